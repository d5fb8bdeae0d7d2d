"""Modes that see each operator which PyTorch carries out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READ_WHOLE = (Tensor.tolist, Tensor.numpy, Tensor.__array__)


class DispatchMode(TorchDispatchMode):
    """A mode that runs in eager mode only, so that it does not make torch import its compiler, which takes seconds."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class ReadingsSeen(TorchFunctionMode):
    """Lets dispatch modes see that Python reads a whole tensor, which is no operator, as that it is compared."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READ_WHOLE:
            torch.equal(args[0], args[0])
        return func(*args, **(kwargs or {}))


def leaves_of(*values: Any) -> list[Any]:
    """All that stands in the lists, tuples and dictionaries that an operator takes or gives, in order.

    >>> leaves_of([1, (2, None)], {"a": 3})
    [1, 2, None, 3]
    """
    found: list[Any] = []
    for x in values:
        if isinstance(x, (tuple, list)):
            found += leaves_of(*x)
        elif isinstance(x, dict):
            found += leaves_of(*x.values())
        else:
            found.append(x)
    return found


def map_tensors(change: Callable[[Tensor], Tensor], x: Any) -> Any:
    """What an operator takes, with each tensor in it changed."""
    if isinstance(x, (tuple, list)):
        return type(x)([map_tensors(change, part) for part in x])
    if isinstance(x, dict):
        return {key: map_tensors(change, part) for key, part in x.items()}
    return change(x) if isinstance(x, Tensor) else x


def written_tensors(func: Any, args: tuple, kwargs: dict) -> Iterator[Tensor]:
    """The tensors among its arguments that an operator writes to."""
    for i, spec in enumerate(func._schema.arguments):
        if spec.alias_info is not None and spec.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(spec.name)
            yield from (x for x in leaves_of(value) if isinstance(x, Tensor))
