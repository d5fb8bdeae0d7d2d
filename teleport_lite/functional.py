"""Parameters as a plain dictionary, and losses as functions of it.

Everything in the package is a function of `Params`, the dictionary that `dict(model.named_parameters())`
gives. The model itself is only read: a loss is evaluated at other parameters through
`torch.func.functional_call`, on copies of the buffers, so nothing of the model changes until a teleport
is committed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from teleport_lite.distributed import check_whole
from teleport_lite.errors import EmptyModelError, LossError, ShapeError, TeleportError

Params = dict[str, Tensor]
Loss = Callable[[Params], Tensor]


def trainable(model: nn.Module) -> Params:
    """The parameters of `model` that require a gradient, by name; a shared parameter stands once, under its first name.

    Raises:
        EmptyModelError: when there is none.
        ParameterError: when one is sharded over several processes.

    >>> sorted(trainable(nn.Linear(2, 3)))
    ['bias', 'weight']
    """
    check_whole(model)
    params: Params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise EmptyModelError(model)
    return params


class Net:
    """`model` at the given parameters, as a callable with the model's signature: what a `loss_fn` receives.

    Buffers are copied first, so that a batch norm in training mode updates the copies. `inputs` keeps the
    arguments of the first call.
    """

    def __init__(self, model: nn.Module, params: Params) -> None:
        self.model, self.params = model, params
        self.buffers = {name: b.clone() for name, b in model.named_buffers()}
        self.inputs: tuple | None = None

    def __call__(self, *args, **kwargs):
        if self.inputs is None:
            self.inputs = args
        return functional_call(self.model, {**self.buffers, **self.params}, args, kwargs)

    def __repr__(self) -> str:
        return f"Net({type(self.model).__name__} at {len(self.params)} given parameters)"


def loss_of(model: nn.Module, loss_fn: Callable[[Callable], Tensor]) -> Loss:
    """The loss as a function of parameters: params -> loss_fn(net), where net is the model at params.

    Raises:
        TeleportError: when the model is a `DistributedDataParallel`, of which one process knows a shard of the loss.

    >>> model, x = nn.Linear(1, 1, bias=False), torch.ones(1, 1)
    >>> loss = loss_of(model, lambda net: net(x).sum())
    >>> loss({"weight": torch.tensor([[3.0]])}).item()
    3.0
    """
    if isinstance(model, DistributedDataParallel):
        remedy = "pass model.module for the loss of this process alone; teleport takes the loss of all"
        raise TeleportError("a model of this process", "DistributedDataParallel", remedy)
    return lambda params: loss_fn(Net(model, params))


def value_and_grad(loss: Loss, params: Params, *, create_graph: bool = False) -> tuple[Tensor, Params]:
    """The loss at `params` and its gradient, one reverse pass.

    With `create_graph` both can be differentiated again, with respect to whatever `params` were computed from.

    Raises:
        LossError: when the loss is no scalar, or does not depend on the parameters.

    >>> value_and_grad(lambda p: (p["w"] ** 2).sum(), {"w": torch.tensor([1.0, 2.0])})
    (tensor(5.), {'w': tensor([2., 4.])})
    """
    with torch.enable_grad():
        points = {  # views, because one parameter may have been computed from another
            name: p.view_as(p) if create_graph and p.requires_grad else p.detach().requires_grad_()
            for name, p in params.items()
        }
        value = check_scalar(loss(points))
        if not value.requires_grad:
            raise LossError(
                "a loss that depends on the parameters",
                "one without a gradient",
                "call the given net inside loss_fn, and do not detach its output",
            )
        grads = torch.autograd.grad(value, list(points.values()), create_graph=create_graph, allow_unused=True)
    if all(g is None for g in grads):
        raise LossError(
            "a loss that depends on the parameters",
            "one that uses none of them",
            "call the given net inside loss_fn, not the model itself",
        )
    filled = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(points.items(), grads, strict=True)}
    return (value if create_graph else value.detach()), filled


def check_scalar(value: object) -> Tensor:
    """`value` when it is a scalar tensor.

    Raises:
        LossError: otherwise.
    """
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise LossError("a real scalar tensor as the loss", got, "reduce it, for example with .mean()")
    return value.reshape(())


def hvp(loss: Loss, params: Params, vector: Params) -> Params:
    """The Hessian of the loss at `params` times `vector`, by differentiating the gradient along `vector`.

    Raises:
        ShapeError: when `vector` does not have the names and shapes of `params`.

    >>> hvp(lambda p: (p["w"] ** 3).sum(), {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 0.0])})
    {'w': tensor([6., 0.])}
    """
    for name, p in params.items():
        if name not in vector or vector[name].shape != p.shape:
            got = tuple(vector[name].shape) if name in vector else None
            raise ShapeError(f"vector[{name!r}]", tuple(p.shape), got, "pass a vector that is shaped like params")
    points = {name: p.detach().requires_grad_() for name, p in params.items()}
    _, grads = value_and_grad(loss, points, create_graph=True)
    with torch.enable_grad():
        slope = dot(grads, vector)
        if not slope.requires_grad:  # a linear loss
            return {name: torch.zeros_like(p) for name, p in params.items()}
        rows = torch.autograd.grad(slope, list(points.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if row is None else row for (n, p), row in zip(points.items(), rows, strict=True)}


def dot(a: Params, b: Params) -> Tensor:
    """The inner product of all entries together.

    >>> dot({"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 4.0])})
    tensor(11.)
    """
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()


def norm(params: Params) -> Tensor:
    """The Euclidean norm of all entries together.

    >>> norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])})
    tensor(5.)
    """
    return torch.stack([torch.linalg.vector_norm(p) for p in params.values()]).norm()


def normal_like(params: Params, count: int, generator: torch.Generator | None) -> Params:
    """Normal random numbers [count, ...] for each parameter, drawn where the generator lives."""
    drawn = {}
    for name, p in params.items():
        device = p.device if generator is None else generator.device
        drawn[name] = torch.randn(count, *p.shape, generator=generator, dtype=p.dtype, device=device).to(p.device)
    return drawn
