"""Permutations of whole modules in a list, as the experts of a mixture with the rows of what chooses among them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from teleport_lite.errors import ShapeError, TeleportError
from teleport_lite.functional import Params
from teleport_lite.groups import Permutation
from teleport_lite.symmetries.axes import Leg, NeuronSymmetry
from teleport_lite.symmetries.base import SAVED


class ModulePermutation(NeuronSymmetry):
    r"""The permutations of n modules: $w_k \mapsto w_{\pi(k)}$ for each of their parameters, and the `legs` alike.

    Args:
        legs: axes of length n that are permuted along, such as the rows of a router.
        rows: for each parameter of the modules its n names, one a module; the tensors have equal shapes.

    Raises:
        TeleportError: when there are no rows, or none of equal length.

    >>> swap = ModulePermutation([Leg("router", 0)], [("experts.0.weight", "experts.1.weight")])
    >>> params = {"router": torch.ones(2), "experts.0.weight": torch.zeros(1), "experts.1.weight": torch.ones(1)}
    >>> swap.act(params, torch.tensor([1, 0]))["experts.0.weight"]
    tensor([1.])
    >>> swap
    ModulePermutation(experts.*.weight, router; S(2), dim 0, all inputs)
    """

    def __init__(self, legs: Iterable[Leg], rows: Iterable[Sequence[str]]) -> None:
        self.rows = tuple(tuple(row) for row in rows)
        if len({len(row) for row in self.rows}) != 1:
            remedy = "name each parameter of the modules once for each of them"
            raise TeleportError("rows of equally many names", [len(row) for row in self.rows], remedy)
        super().__init__(Permutation(len(self.rows[0])), legs)
        self.names = tuple(dict.fromkeys([*self.names, *(name for row in self.rows for name in row)]))

    def _apply_to_legs(self, params: Params, g: Tensor, dual: Tensor) -> Params:
        moved = super()._apply_to_legs(params, g, dual)
        for row in self.rows:
            whole = torch.stack([params[name].to(params[row[0]].device) for name in row])
            parts = self.group.along(g.to(whole.device), whole, 0).unbind()
            moved |= {name: part.to(params[name].device) for name, part in zip(row, parts, strict=True)}
        return moved

    def check(self, params: Params) -> None:
        super().check(params)
        for first, *others in self.rows:
            for name in others:
                if params[name].shape != params[first].shape:
                    expected, got = tuple(params[first].shape), tuple(params[name].shape)
                    raise ShapeError(name, expected, got, "permute modules of one kind")

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "symmetry": "modules", "rows": [list(row) for row in self.rows]}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> ModulePermutation:
        """What `to_dict` gave."""
        return cls([Leg(**leg) for leg in saved["legs"]], saved["rows"])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModulePermutation) and self.rows == other.rows and super().__eq__(other)

    def __hash__(self) -> int:
        return hash(self.rows)

    def __str__(self) -> str:
        parts = (zip(*(name.split(".") for name in row), strict=True) for row in self.rows)
        patterns = [".".join(same[0] if len({*same}) == 1 else "*" for same in row) for row in parts]
        return ", ".join([*patterns, super().__str__()])


SAVED["modules"] = ModulePermutation
