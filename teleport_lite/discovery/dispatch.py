"""Modes that see each operator which PyTorch carries out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class DispatchMode(TorchDispatchMode):
    """A mode that runs in eager mode only, so that it does not make torch import its compiler, which takes seconds."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


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
