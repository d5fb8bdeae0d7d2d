"""What a model is run as: unwrapped, eager, with its random state kept and its precision noted."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from teleport_lite.distributed import Ranks
from teleport_lite.errors import ParameterError, TeleportError

LossFn = Callable[[Callable], Tensor]
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
Inputs = tuple  # the positional arguments of one call of the model


class PrecisionProbe:
    """`loss_fn` as the caller would run it, under the caller's autocast; it notes the coarsest `dtype` it computes in.

    Args:
        loss_fn: net -> scalar loss.
        like: a parameter of the model.
    """

    def __init__(self, loss_fn: LossFn, like: Tensor) -> None:
        self.loss_fn, self.dtype, self.device = loss_fn, like.dtype, like.device.type
        self.autocast = torch.get_autocast_dtype(self.device) if torch.is_autocast_enabled(self.device) else None

    def __call__(self, net: Callable) -> Tensor:
        context = nullcontext() if self.autocast is None else torch.autocast(self.device, self.autocast)
        with context:
            value = self.loss_fn(lambda *args, **kwargs: self._call(net, *args, **kwargs))
        self._note(value)
        return value

    def _call(self, net, *args, **kwargs):
        if torch.is_autocast_enabled(self.device):
            self.dtype = coarsest([self.dtype, torch.get_autocast_dtype(self.device)])
        output = net(*args, **kwargs)
        self._note(output)
        return output

    def _note(self, output: object) -> None:
        found = [t.dtype for t in tree_leaves(output) if isinstance(t, Tensor) and t.dtype in TOLERANCES]
        self.dtype = coarsest([self.dtype, *found])


def coarsest(dtypes: list[torch.dtype]) -> torch.dtype:
    """The floating-point type with the largest machine epsilon.

    >>> coarsest([torch.float32, torch.bfloat16, torch.float64])
    torch.bfloat16
    """
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def unwrap_compiled(model: nn.Module, names: Iterable[str] = ()) -> nn.Module:
    """The module in which `names` are those of parameters: inside of `torch.compile`, or as it is."""
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, nn.Module) and set(names) <= dict(inner.named_parameters()).keys():
        return inner
    return model


@contextmanager
def eager_mode(device: str) -> Iterator[None]:
    """A context without compilation and without autocast."""
    compiled = "torch._dynamo" in sys.modules  # importing it takes seconds, so not before something is compiled
    stance = getattr(torch.compiler, "set_stance", None) if compiled else None  # torch >= 2.6
    autocast = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
    with stance("force_eager") if stance else nullcontext(), autocast:
        yield


def kept_random_state(module: nn.Module) -> AbstractContextManager:
    """A context that leaves the global random state, of the devices that `module` lives on, as it was."""
    devices = sorted({p.device for p in module.parameters() if p.device.type == "cuda"}, key=str)
    return torch.random.fork_rng(devices=devices)


class _Detached(TorchFunctionMode):
    """Lets `deepcopy` copy tensors that were computed: kept activations, pruned or normalised weights."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            memo = args[1]
            memo[id(args[0])] = args[0].detach().clone()
            return memo[id(args[0])]
        return func(*args, **(kwargs or {}))


def copy_of(model: nn.Module) -> nn.Module:
    """An independent copy of `model`, not compiled, of one process, in evaluation mode, contiguous and in float64.

    Raises:
        ParameterError: when the model is sharded over several processes, or has parameters without a shape.
        TeleportError: when the model cannot be copied.
    """
    inner = Ranks(model).model
    inner = getattr(inner, "_orig_mod", inner)
    for name, p in inner.named_parameters():
        if isinstance(p, UninitializedParameter):
            remedy = "run the model once on an input, which gives lazy layers their shapes"
            raise ParameterError(name, "initialised", "a lazy parameter without a shape", remedy)
    try:
        with _Detached():
            return copy.deepcopy(inner).eval()._apply(_plain_float64)
    except Exception as error:
        remedy = "pass symmetry=... built by hand from teleport_lite.symmetries"
        got = f"{type(error).__name__}: {error}"
        raise TeleportError("a model that copy.deepcopy can copy", got, remedy) from error


def _plain_float64(tensor: Tensor) -> Tensor:
    tensor = tensor.to(torch.complex128) if tensor.is_complex() else tensor
    tensor = tensor.double() if tensor.is_floating_point() else tensor
    return tensor.contiguous() if tensor.layout == torch.strided else tensor


def as_inputs(example_inputs: object) -> Inputs:
    """The positional arguments that `example_inputs` stands for: a tuple or list as it is, anything else alone."""
    return tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)


def double(inputs: Inputs) -> Inputs:
    """`inputs` with floating-point tensors as float64."""
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
