r"""Rotations of a residual stream, which only norms and linear maps read.

Behind an RMSNorm all rotations R are free, behind a LayerNorm those that keep the vector of ones. What writes to the
stream, rows of matrices, biases and embeddings, moves by $w \\mapsto Rw$; what reads it behind a norm with gain g, with
D = diag(g), by $W \\mapsto W D R^{\\top} D^{-1}$, and the shift of that norm by $\\beta \\mapsto D R D^{-1} \\beta$. The
gains stay. Derived in the chapter *Modern architectures*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from teleport_lite.errors import ShapeError
from teleport_lite.functional import Params
from teleport_lite.groups import Group
from teleport_lite.groups.base import wide
from teleport_lite.symmetries.axes import Leg, NeuronSymmetry
from teleport_lite.symmetries.base import SAVED, Symmetry


@dataclass(frozen=True)
class Gain(Leg):
    """A vector of parameters that multiplies an axis, entry by entry, with `offset` added to it first."""

    offset: float = 0.0


class GainedRotation(NeuronSymmetry):
    r"""A rotation of the axis that the `legs` describe, some of them behind a gain.

    With D = diag(gain + offset) a leg that is dual is multiplied by $D^{-1} R D$ along its axis, and one that is not by
    $D R D^{-1}$. So the action is linear in what it moves and not in the gains, which stay where they are. It is not
    finite where a gain is zero, and a teleport is refused there.

    Args:
        group: the rotations.
        legs: what moves.
        gains: for each leg the gain that it stands behind, or None.
    """

    linear = homogeneous = False

    def __init__(self, group: Group, legs: Iterable[Leg], gains: Iterable[Gain | None]) -> None:
        super().__init__(group, legs)
        self.gains = tuple(gains)
        self.names = tuple(dict.fromkeys([*self.names, *(gain.name for gain in self.gains if gain)]))

    def move(self, params, xi):
        return self._between(params, params, lambda scaled: self._apply(scaled, *self.group.pair(xi)))

    def velocity(self, params, xi):
        return self._between(params, params, lambda scaled: super(GainedRotation, self).velocity(scaled, xi))

    def jet(self, params, xi):
        first = self.velocity(params, xi)
        return first, self.velocity({**first, **{gain.name: params[gain.name] for gain in self.gains if gain}}, xi)

    def transport(self, grads, xi, params=None):
        return Symmetry.transport(self, grads, xi, params)

    def _between(
        self,
        tensors: Params,
        params: Params,
        turn: Callable[[Params], Params],
        entry: Callable[[Tensor], Tensor] = lambda gain: gain,
        dual: bool = False,
    ) -> Params:
        """`tensors`, multiplied by the gains in `params` or divided by them, turned, and divided or multiplied back.

        Args:
            tensors: what moves.
            params: where the gains are.
            turn: a linear map of what moves.
            entry: applied to each gain first.
            dual: for what moves as gradients do.
        """
        moved = {name: tensors[name].to(wide(tensors[name].dtype)) for name in self.names}
        pairs = [(leg, gain) for leg, gain in zip(self.legs, self.gains, strict=True) if gain]

        def scale(up: bool) -> None:
            for leg, gain in pairs:
                part = self.axis(moved[leg.name], leg)
                factor = entry(self.axis(params[gain.name], gain).reshape(-1, *[1] * (part.ndim - 1)) + gain.offset)
                part = part * factor if (leg.dual != dual) == up else part / factor
                moved[leg.name] = self._put(moved[leg.name], part, leg)

        scale(True)
        moved = turn({**tensors, **moved})
        scale(False)
        return {name: moved[name].to(tensors[name].dtype) for name in self.names}

    def check(self, params):
        super().check(params)
        for gain in filter(None, self.gains):
            expected, shape = self.group.n, tuple(params[gain.name].shape)
            if params[gain.name].numel() < gain.start + expected:
                remedy = "pass the parameters that the symmetry was made for"
                raise ShapeError(gain.name, f"at least {gain.start + expected} entries", shape, remedy)

    def to_dict(self):
        gains = [gain and asdict(gain) for gain in self.gains]
        return {**super().to_dict(), "symmetry": "rotation", "gains": gains}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> GainedRotation:
        """What `to_dict` gave."""
        legs = [Leg(**leg) for leg in saved["legs"]]
        return cls(cls._group(**saved["group"]), legs, [gain and Gain(**gain) for gain in saved["gains"]])

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and getattr(other, "gains", None) == self.gains

    __hash__ = NeuronSymmetry.__hash__


SAVED["rotation"] = GainedRotation
