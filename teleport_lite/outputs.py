"""What a model and its layers return, as tensors, and how far two returns are apart."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def traced(modules: Iterable[nn.Module], note: Callable[[Any, tuple, dict, Any], Any]) -> Iterator[None]:
    """Inside: `note(module, args, kwargs, output)` after each call of these modules; its answer replaces the output."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(module.register_forward_hook(note, with_kwargs=True))
        yield


def tensors_of(output: object, arguments: Collection[str] = ()) -> list[Tensor]:
    """All tensors in the output of a model: in containers, and in the attributes of objects.

    An object that is returned under the name of one of the model's own `arguments`, such as the cache of keys and
    values of a language model, is a state that the model hands on to itself, and no output.

    >>> tensors_of({"loss": torch.tensor(1.0), "rest": [torch.tensor(2), None]})
    [tensor(1.), tensor(2)]
    """
    if arguments and isinstance(output, Mapping):
        output = [x for name, x in output.items() if not (name in arguments and _is_object(x))]
    return list(_walk_tensors(output, set()))


def arguments_of(model: nn.Module) -> frozenset[str]:
    """The names of the arguments of a model, where Python knows them.

    >>> sorted(arguments_of(nn.Linear(1, 1)))
    ['input']
    """
    try:
        return frozenset(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return frozenset()


def _is_object(x: object) -> bool:
    """Whether it is neither data nor a container of data."""
    return hasattr(x, "__dict__") and not isinstance(x, (Tensor, Mapping, tuple, list)) and not is_dataclass(x)


def _walk_tensors(x: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (float, complex)):
        yield torch.tensor(x, dtype=torch.complex128 if isinstance(x, complex) else torch.float64)
    elif not isinstance(x, (str, bytes, int, type, nn.Module, torch.dtype, torch.device)) and id(x) not in seen:
        seen.add(id(x))
        for part in _child_values(x):
            yield from _walk_tensors(part, seen)


def _child_values(x: Any) -> list[Any]:
    if isinstance(x, Mapping):
        return list(x.values())
    if isinstance(x, (tuple, list)):
        return list(x)
    if hasattr(x, "__array__"):
        return [torch.as_tensor(x)]
    if is_dataclass(x):
        return [getattr(x, f.name) for f in fields(x)]
    slots = [getattr(x, name, None) for kind in type(x).__mro__ for name in getattr(kind, "__slots__", ())]
    return [*slots, *vars(x).values()] if hasattr(x, "__dict__") and not callable(x) else slots


def real_numbers(tensor: Tensor) -> Tensor:
    """A tensor of any kind as a dense one of real numbers."""
    tensor = tensor.detach()
    if tensor.is_nested:
        tensor = torch.cat([t.reshape(-1) for t in tensor.unbind()])
    tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor
    tensor = tensor.dequantize() if tensor.is_quantized else tensor
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor.double()


def distance(after: list[Tensor], before: list[Tensor]) -> float:
    """The largest of the `relative_gaps`, over all tensors; infinite when their number differs."""
    if len(after) != len(before):
        return float("inf")
    return max(relative_gaps(after, before), default=0.0)


def relative_gaps(after: list[Tensor], before: list[Tensor], constant: list[Tensor] | None = None) -> list[float]:
    """For each tensor the largest difference of two entries, relative to the larger of this entry and the typical one.

    So one huge entry hides no other. Typical is the median of what is finite, not zero, and not `constant`, which says
    for each tensor where no parameter matters. Entries that are not finite have to stay the same.
    """
    constant = constant or [torch.zeros((), dtype=torch.bool)] * len(before)
    return [_relative_gap(a, b, fixed) for a, b, fixed in zip(after, before, constant, strict=True)]


def _relative_gap(a: Tensor, b: Tensor, fixed: Tensor) -> float:
    a, b = real_numbers(a), real_numbers(b)
    if a.shape != b.shape:
        return float("inf")
    finite = b.isfinite()
    if not bool(((a == b) | (finite & a.isfinite()) | (a.isnan() & b.isnan())).all()):
        return float("inf")
    difference = torch.where(finite, (a - b).abs(), 0)
    if not bool(difference.any()):
        return 0.0
    size = b.abs()
    typical = size.masked_fill(~finite | (size == 0) | fixed, torch.nan).nanmedian().nan_to_num(1.0)
    return float((difference / size.nan_to_num().clamp(min=float(typical))).max())
