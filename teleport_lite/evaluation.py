"""A loss as a function of parameters, evaluated on the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from teleport_lite.errors import LossError, TeleportError
from teleport_lite.outputs import arguments_of, tensors_of, traced
from teleport_lite.runtime import (
    TOLERANCES,
    Call,
    LossFn,
    RandomState,
    Stage,
    check_loss_fn,
    check_model,
    coarsest_dtype,
    eager_mode,
    kept_random_state,
)

Params = dict[str, Tensor]
Loss = Callable[[Params], Tensor]
DIFFERENTIABLE = "a loss that torch differentiates as often as is needed"
BACKWARD = (
    "one that it differentiates by the parameters itself",
    "return the loss and leave backward to the package; derivatives by inputs may stand in loss_fn",
)


class Evaluation:
    """The loss of a model as a function of its parameters: `evaluation(params)` is `loss_fn(model)` at `params`.

    What `loss_fn` receives is the model, with `params` in the places of its parameters and copies of its buffers in
    theirs. It is run as the caller would run it, under the caller's autocast but not compiled, and always from the same
    random state. Inside of `with evaluation:` the parameters of the last call stay in place, since a checkpointed layer
    runs again when it is differentiated; behind it all is as before, whatever happened.

    Args:
        model: the model.
        loss_fn: model -> scalar loss.

    Attributes:
        call: the arguments of the first call of the model.
        dtype: the coarsest type that the parameters, the outputs and the loss had so far, autocast included.
        buffers: what buffers are at the start of an evaluation, by name, where they are not the model's own.

    Raises:
        TeleportError: when the model is none, or a `DistributedDataParallel`, of which one process knows a shard of the
            loss; when loss_fn is no function of the net alone; and under inference_mode.

    >>> model, x = nn.Linear(1, 1, bias=False), torch.ones(1, 1)
    >>> loss = Evaluation(model, lambda net: net(x).sum() + net.weight.square().sum())
    >>> loss({"weight": torch.tensor([[3.0]])}).item()
    12.0
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        if isinstance(model, DistributedDataParallel):
            remedy = "pass model.module for the loss of this process alone; teleport takes the loss of all"
            raise TeleportError("a model of this process", "DistributedDataParallel", remedy)
        check_model(model)
        check_loss_fn(loss_fn)
        if torch.is_inference_mode_enabled():
            remedy = "call it outside of inference_mode; no_grad is fine"
            raise TeleportError("a mode in which torch differentiates", "torch.inference_mode", remedy)
        self.model, self.loss_fn = model, loss_fn
        self.call: Call | None = None
        self.buffers: Params = {}
        first = next((p for p in self.model.parameters() if p.dtype in TOLERANCES), torch.empty(0))
        self.dtype, self.device = first.dtype, first.device.type
        self._arguments = arguments_of(model)
        self._outputs: list[Tensor] | None = None
        self._placed: Params | None = None
        self._depth = 0
        self._stack = ExitStack()

    def __enter__(self) -> Evaluation:
        if not self._depth:
            with ExitStack() as stack:
                self._stage: Stage = Stage(self.model)
                stack.callback(self._stage.put_back)
                self._random: RandomState = stack.enter_context(kept_random_state(self.model))
                on = torch.is_autocast_enabled(self.device)
                self._autocast = torch.get_autocast_dtype(self.device) if on else None
                stack.enter_context(eager_mode(self.device))
                note = lambda *call: self._note_call(*call)  # noqa: E731 - a bound method would be copied along with a model
                stack.enter_context(traced([self.model], note))
                self._stack = stack.pop_all()
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._placed = None
            self._stack.close()

    def __call__(self, params: Params) -> Tensor:
        with self:
            self._stage.put(params, self.buffers)
            self._placed = params
            self._random.restore()
            on = self._autocast is not None
            wanted = torch.is_grad_enabled()
            with torch.autocast(self.device, self._autocast) if on else nullcontext(), torch.enable_grad():
                try:
                    value = self.loss_fn(self.model)  # which may differentiate by its inputs
                except RuntimeError as error:
                    if "does not require grad" not in str(error):
                        raise
                    raise LossError(DIFFERENTIABLE, *BACKWARD) from error
            self._note_dtypes(value)
            value = value if wanted or not isinstance(value, Tensor) else value.detach()
            if isinstance(value, Tensor) and value.requires_grad:
                self.return_before([value], params)
            return value

    def return_before(self, tensors: Iterable[Tensor], params: Params) -> None:
        """Let `params` be in their places again when these `tensors`, computed there, are differentiated.

        Several evaluations may be differentiated together; autograd goes through them from the last to the first.
        """
        buffers = self.buffers

        def place_params(_: Tensor) -> None:
            if self._depth and self._placed is not params:
                self._stage.put(params, buffers)
                self._placed = params

        for t in tensors:
            if t.requires_grad:
                t.register_hook(place_params)

    @contextmanager
    def observed(self) -> Iterator[list[Tensor]]:
        """A context with a list that fills with what the model returns."""
        outputs: list[Tensor] = []
        self._outputs = outputs
        try:
            yield outputs
        finally:
            self._outputs = None

    def rest(self) -> None:
        """Put the model's own parameters and buffers back in their places, until the next call."""
        self._stage.put_back()
        self._placed, self.buffers = None, {}

    def drew(self) -> bool:
        """Whether the last call has drawn random numbers from a global state."""
        return self._random.differs()

    def _note_call(self, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        if self.call is None and not any(map(_is_wrapped, tensors_of((args, kwargs)))):
            self.call = Call(args, kwargs)
        if torch.is_autocast_enabled(self.device):
            self.dtype = coarsest_dtype([self.dtype, torch.get_autocast_dtype(self.device)])
        tensors = self._note_dtypes(output)
        if self._outputs is not None:
            self._outputs += [_unwrapped(t.detach().clone()) for t in tensors]

    def _note_dtypes(self, output: object) -> list[Tensor]:
        tensors = tensors_of(output, self._arguments)
        self.dtype = coarsest_dtype([self.dtype, *(t.dtype for t in tensors if t.dtype in TOLERANCES)])
        return tensors

    def __repr__(self) -> str:
        return f"Evaluation({type(self.model).__name__})"


def _is_wrapped(x: Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def _unwrapped(x: Tensor) -> Tensor:
    """The numbers inside of what `torch.func` differentiates or maps over; they are no more when it has ended."""
    while _is_wrapped(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


loss_of = Evaluation  # the loss as a function: params -> loss_fn(model at params)


def session(loss: Loss) -> AbstractContextManager:
    """A context in which the parameters of the last evaluation stay in place until it is differentiated."""
    return loss if isinstance(loss, Evaluation) else nullcontext()
