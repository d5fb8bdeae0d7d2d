r"""Rotations and shears of a residual stream, which stand behind the gains of norms.

Behind an RMSNorm all rotations A of a stream are free, behind a LayerNorm those that keep the vector of ones. What
writes to the stream, rows of matrices, biases and embeddings, moves by $w \mapsto Aw$. What reads it behind a norm
with gain g moves by $W \mapsto W D A^{-1} D^{-1}$ with D = diag(g), the shift of that norm by
$\beta \mapsto D A D^{-1} \beta$; g stays. The latter two alone move by shears $A = I + s 1^\top$ behind a LayerNorm,
whose output has no mean before the gain. Without gains this is a `NeuronSymmetry`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from teleport_lite.functional import Params
from teleport_lite.groups import Group
from teleport_lite.groups.base import element_dtype
from teleport_lite.symmetries.axes import Leg, NeuronSymmetry
from teleport_lite.symmetries.base import SAVED, Symmetry


class GainedSymmetry(NeuronSymmetry):
    r"""A group acting on the axis that the `legs` describe, some of them behind a gain.

    With D = diag(gain + offset) a leg that is dual is multiplied by $D^{-1} A^{-\top} D$ along its axis, and one that
    is not by $D A D^{-1}$. So the action is linear in what it moves and not in the gains, which stay where they are.
    It is not finite where a gain is zero, and a teleport is refused there.

    Args:
        group: that of the matrices A.
        legs: what moves.
        gains: for each leg the vector that it stands behind, with its `offset` added, or None.
    """

    linear = homogeneous = False

    def __init__(self, group: Group, legs: Iterable[Leg], gains: Iterable[Leg | None]) -> None:
        super().__init__(group, legs)
        self.gains: tuple[Leg | None, ...] = tuple(gains)
        self.names = tuple(dict.fromkeys([*self.names, *(gain.name for gain in self.gains if gain)]))

    def move(self, params, xi):
        pair, moved = self.group.pair(xi), {name: params[name] for name in self.names}
        for leg, gain in self._leg_pairs:
            moved[leg.name] = self._turn_leg(moved[leg.name], pair[leg.dual], leg, self._gain_of(params, leg, gain))
        return moved

    def velocity(self, params, xi):
        pair = self.group.algebra(xi), self.group.algebra(self.group.dual(xi))
        found = {name: torch.zeros_like(params[name]) for name in self.names}
        for leg, gain in self._leg_pairs:
            stretch = self._gain_of(params, leg, gain)
            part = self.group.along(pair[leg.dual], self.axis(params[leg.name], leg) * stretch, 0) / stretch
            part = self.axis(found[leg.name], leg) + part.to(found[leg.name].dtype)
            found[leg.name] = self.put(found[leg.name], part, leg)
        return found

    transport = Symmetry.transport

    def jet(self, params, xi):
        first = self.velocity(params, xi)
        return first, self.velocity(
            {**first, **{gain.name: params[gain.name] for _, gain in self._leg_pairs if gain}}, xi
        )

    def spread(self, tensors, xi, entry, *, dual=True, params=None):
        if params is None:
            return Symmetry.spread(self, tensors, xi, entry, dual=dual)  # which says so
        self.check(tensors)
        self._check_coordinates(tensors, xi)
        pair = self.group.pair(xi)
        point, moved = dict(params), dict(tensors)
        for leg, gain in self._leg_pairs:
            matrix, carried = pair[leg.dual], pair[leg.dual != dual]
            g, diagonal = entry(carried), carried.diagonal()
            stretch, x, old = self._gain_of(params, leg, gain), *(self.axis(p[leg.name], leg) for p in (point, moved))
            point[leg.name] = self._turn_leg(point[leg.name], matrix, leg, stretch)
            moved[leg.name] = self._turn_leg(moved[leg.name], g, leg, entry(1 / stretch if dual else stretch))
            if gain is None:
                continue
            # y_k = A_kj e_j x_j / e_k has the derivative (A_kj x_j - [k = j] y_k) / e_k by e_j, which is slope * gain_j
            y, kept = self.axis(point[leg.name], leg), diagonal.view_as(stretch)
            slope, moves = entry(stretch.new_ones(()) if leg.dual else -(stretch**2)), self.axis(moved[gain.name], gain)
            if dual:
                old = old / entry(stretch)
                row = entry(y) * (self.group.along(g, old, 0) - entry(kept) * old) + entry(kept * y - x) * old
                moves = moves + (slope * row).reshape(self.group.n, -1).sum(1).view_as(moves)
                moved[gain.name] = self.put(moved[gain.name], moves.to(moved[gain.name].dtype), gain)
            else:
                old = slope * moves.view_as(stretch)
                row = self.group.along(g, entry(x) * old, 0) - entry(kept * x) * old + entry(kept * x - y) * old
                new = self.axis(moved[leg.name], leg) + row / entry(stretch)
                moved[leg.name] = self.put(moved[leg.name], new.to(moved[leg.name].dtype), leg)
        return moved

    @property
    def _leg_pairs(self) -> Iterator[tuple[Leg, Leg | None]]:
        return zip(self.legs, self.gains, strict=True)

    def _gain_of(self, params: Params, leg: Leg, gain: Leg | None) -> Tensor:
        """What a leg is multiplied by, along its axis, before it is turned, and divided by after that: [n, 1, ...]."""
        if gain is None:
            return params[leg.name].new_ones(())
        vector = self.axis(params[gain.name], gain).flatten()
        vector = vector.to(element_dtype(vector.dtype)) + self.offset_of(params[gain.name], gain)
        return (vector if leg.dual else 1 / vector).reshape(-1, *[1] * (self.axis(params[leg.name], leg).ndim - 1))

    def _turn_leg(self, tensor: Tensor, g: Tensor, leg: Leg, stretch: Tensor) -> Tensor:
        part = self.group.along(g, self.axis(tensor, leg) * stretch, 0) / stretch
        return self.put(tensor, part.to(tensor.dtype), leg)

    def to_dict(self):
        gains = [gain and asdict(gain) for gain in self.gains]
        return {**super().to_dict(), "symmetry": "gained", "gains": gains}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> GainedSymmetry:
        """What `to_dict` gave."""
        legs = [Leg(**leg) for leg in saved["legs"]]
        return cls(cls._group_of_kind(**saved["group"]), legs, [gain and Leg(**gain) for gain in saved["gains"]])


SAVED["gained"] = GainedSymmetry
