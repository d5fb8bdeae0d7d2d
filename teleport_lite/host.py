"""The private copy of a model: on the CPU, in float64, wherever the model is."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload, OpOverloadPacket
from torch.nn.parameter import UninitializedParameter
from torch.overrides import TorchFunctionMode

from teleport_lite.distributed import Ranks
from teleport_lite.errors import ParameterError, TeleportError


def copy_of(model: nn.Module) -> nn.Module:
    """An independent copy of `model`, not compiled, of one process, in evaluation mode, contiguous, `on_host`.

    On the CPU, wherever the model is: the host looks at each operator that the copy carries out, sums have one order
    there, float64 exists, and a device keeps its memory, of which the copy takes none.

    Raises:
        ParameterError: when the model is sharded over several processes, or has parameters without shape or data.
        TeleportError: when the model cannot be copied.
    """
    inner = unwrap_module(model)
    check_loaded(inner)
    memo: dict[int, Any] = {id(b): on_host(b, copy=True) for b in inner.buffers()}
    memo |= {id(p): nn.Parameter(on_host(p, copy=True), p.requires_grad) for p in inner.parameters()}
    held = [v for m in inner.modules() for v in vars(m).values()]
    memo |= {id(v): on_host(v) for v in held if isinstance(v, torch.Generator)}
    memo |= {id(v): v for v in held if isinstance(v, (CustomOpDef, OpOverload, OpOverloadPacket))}
    try:
        with _Detached():
            copied = copy.deepcopy(inner, memo)
        for p in copied.parameters():  # TorchScript has copied them by an operation
            if not p.is_leaf:
                p.detach_().requires_grad_()
        return copied.eval()._apply(on_host)
    except Exception as error:
        remedy = "keep what cannot be copied out of the model, or pass symmetry=... made by teleport_lite.symmetries"
        got = f"{type(error).__name__}: {error}"
        raise TeleportError("a model that copy.deepcopy can copy", got, remedy) from error


def unwrap_module(model: nn.Module) -> nn.Module:
    """The module that is compiled, or of several processes."""
    inner = Ranks(model).model
    return getattr(inner, "_orig_mod", inner)


def check_loaded(model: nn.Module) -> None:
    """Refuse parameters without shape or data.

    Raises:
        ParameterError: when there is one.
    """
    for name, p in model.named_parameters():
        if isinstance(p, UninitializedParameter):
            raise ParameterError(name, "initialised", "a lazy one", "run the model once on an input")
        if p.is_inference():
            remedy = "load its state_dict into a model that is made outside of it"
            raise ParameterError(name, "a tensor that torch differentiates", "one made under inference_mode", remedy)
        if p.is_meta:
            raise ParameterError(name, "a tensor with data", "one on the meta device", "load its values first")


def on_host(x: Any, copy: bool = False) -> Any:
    """A tensor on the CPU, in float64 or complex128 if real or complex; another generator; anything else as it is.

    >>> on_host(torch.ones(1, dtype=torch.bfloat16)), on_host(torch.ones(1, dtype=torch.int32)), on_host("a")
    (tensor([1.], dtype=torch.float64), tensor([1], dtype=torch.int32), 'a')
    """
    if isinstance(x, torch.Generator):
        new = torch.Generator()
        return new.set_state(x.get_state()) if x.device == new.device else new.manual_seed(x.initial_seed())
    if not isinstance(x, Tensor):
        return x
    wide = torch.complex128 if x.is_complex() else torch.float64 if x.is_floating_point() else x.dtype
    x = x.detach().to("cpu", copy=copy).to(wide)  # not at once: some devices have no float64
    return x.contiguous() if x.layout == torch.strided and not x.is_nested else x


class _Detached(TorchFunctionMode):
    """Lets `deepcopy` copy tensors that were computed: kept activations, pruned or normalised weights."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            memo = args[1]
            memo[id(args[0])] = args[0].detach().clone()
            return memo[id(args[0])]
        return func(*args, **(kwargs or {}))
