"""What one run of a model reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teleport_lite.discovery.dispatch import DispatchMode, leaves_of

INDEXED = {  # by operator, at which place its indices stand, and that of the dimension, or the dimension
    **dict.fromkeys(("embedding", "embedding_bag", "_embedding_bag"), (1, None, 0)),
    **dict.fromkeys(("index_select", "gather", "scatter", "scatter_add", "scatter_reduce", "index_add"), (2, 1, 0)),
    "nll_loss_forward": (1, None, -1),
}


class Watch(DispatchMode):
    """Notes which operators read which parameters, and which inputs are indices.

    Args:
        params: the parameters.

    Attributes:
        reads: operator, parameter and the integers beside it, for each reading: two runs with the same reads go
            through the same parts of the model. What is read beside an empty tensor is not read.
        tables: for the k-th tensor among the inputs, of integers, the length of the shortest table that it indexes.
    """

    def __init__(self, params: dict[str, Tensor]) -> None:
        super().__init__()
        self.reads: set[tuple] = set()
        self.tables: dict[int, int] = {}
        self._names = {id(p): name for name, p in params.items()}
        self._inputs: list[Tensor] = []

    def look_at(self, inputs: list[Tensor]) -> None:
        """The tensors among the inputs."""
        self._inputs = inputs

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = leaves_of(args, kwargs)
        names = [self._names[id(x)] for x in leaves if id(x) in self._names]
        if names and all(x.numel() for x in leaves if isinstance(x, Tensor)):
            beside = tuple(x for x in leaves if isinstance(x, int) and not isinstance(x, bool))
            self.reads.add((func, *names, beside))
        name = func._schema.name.split("::")[1].rstrip("_")
        if name in INDEXED:
            at, place, dim = INDEXED[name]
            self._note_index(args[at], args[0].shape[dim if place is None else args[place]] if args[0].ndim else 1)
        elif name in ("index", "index_put"):
            for d, index in enumerate(args[1]):
                if isinstance(index, Tensor) and index.dtype not in (torch.bool, torch.uint8):
                    self._note_index(index, args[0].shape[d])
        return func(*args, **kwargs)

    def _note_index(self, at: Any, length: int) -> None:
        for k, x in enumerate(self._inputs):
            if not x.is_floating_point() and not x.is_complex() and _derives_from(at, x):
                self.tables[k] = min(length, self.tables.get(k, length))


def _derives_from(at: Tensor, x: Tensor) -> bool:
    """Whether indices are an input, a view of it, or a copy in another type."""
    if at.layout != torch.strided or x.layout != torch.strided:
        return False
    if at.untyped_storage()._cdata == x.untyped_storage()._cdata:
        return True
    telling = at.numel() == x.numel() > 1 and bool(x.reshape(-1).min() < x.reshape(-1).max())
    return telling and bool((at.reshape(-1) == x.reshape(-1)).all())
