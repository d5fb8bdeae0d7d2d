"""Modes that see each operator which PyTorch carries out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class DispatchMode(TorchDispatchMode):
    """A mode that runs in eager mode only, so that it does not make torch import its compiler, which takes seconds."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def written(func: Any, args: tuple, kwargs: dict) -> Iterator[Tensor]:
    """The tensors among its arguments that an operator writes to."""
    for i, spec in enumerate(func._schema.arguments):
        if spec.alias_info is not None and spec.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(spec.name)
            yield from (x for x in tree_leaves(value) if isinstance(x, Tensor))
