r"""Translations of parameters: shifts that other parameters undo, or that nothing sees.

A bias may move by c where the next bias moves by $-Wc$, with W the weights between the two; a key bias under a softmax
may move alone. So each moved parameter gets something linear in c, made of other parameters that stay:
$p \mapsto p + \sum_k A_k(w)\,c$. What a `Move` adds is data, a short chain of `Step`s, each an einsum or a choice of
entries.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from teleport_lite.errors import ShapeError, TeleportError
from teleport_lite.functional import Params
from teleport_lite.groups import Translation
from teleport_lite.symmetries.base import SAVED, Symmetry
from teleport_lite.symmetries.kernels import Kernel

Rows = tuple[str, int, int, int]  # of a parameter: its name, the first row, the number of rows, and the power, 1 or -1
Operand = Rows | Kernel


@dataclass(frozen=True)
class Step:
    r"""A linear map of a vector v: $s \cdot$ einsum(equation, operands, v), or $s \cdot (v, 0)_{indices}$.

    Args:
        indices: without an `equation`, which entries to take; -1 is zero.
        equation: of einsum; its last operand is v in this `shape`.
        shape: the shape in which the equation takes v.
        operands: rows of parameters, or what they send to zero.
        scale: the number s.
    """

    indices: tuple[int, ...] = ()
    equation: str = ""
    shape: tuple[int, ...] = ()
    operands: tuple[Operand, ...] = ()
    scale: float = 1.0


@dataclass(frozen=True)
class Move:
    """What is added to parameter `name`: the `steps` on some of the coordinates, in this `shape`, then broadcast.

    Args:
        name: the parameter.
        shape: broadcasts to its shape.
        start: the first coordinate that matters.
        count: how many do.
        steps: what is made of them.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    steps: tuple[Step, ...] = ()


class Shift(Symmetry):
    r"""A translation $p \mapsto p + A(w)\,c$ of parameters, with $\xi = c$.

    What is read by some move is moved by none, so that translations add up. Gradients move too where weights are read:
    after $b_1 \mapsto b_1 + c,\ b_2 \mapsto b_2 - Wc$ that of W is $G_W + G_{b_2} c^\top$.

    Args:
        n: the number of coordinates.
        moves: what they move.
        of: what it keeps.

    Attributes:
        in_kernel: whether some move is by what other parameters send to zero.

    Raises:
        TeleportError: when a move reads what another one moves.

    >>> shift = Shift(1, [Move("a", (1,), 0, 1), Move("b", (1,), 0, 1, (Step((0,), scale=-1.0),))])
    >>> shift, shift.act({"a": torch.zeros(1), "b": torch.zeros(1)}, torch.ones(1))
    (Shift(a -> b; R^1, dim 1, all inputs), {'a': tensor([1.]), 'b': tensor([-1.])})
    """

    def __init__(self, n: int, moves: Iterable[Move], of: str = "outputs") -> None:
        self.group, self.moves, self.of = Translation(n), tuple(moves), of
        self._operands = dict.fromkeys(o for m in self.moves for step in m.steps for o in step.operands)
        read = [name for o in self._operands for name, *_ in (o.parts if isinstance(o, Kernel) else (o,))]
        self.names = tuple(dict.fromkeys((*self.moved, *read)))
        if both := {*self.moved} & {*read}:
            raise TeleportError(
                "moves that read what stays", f"{', '.join(sorted(both))} read and moved", "make them two"
            )
        self.monomial, self.in_kernel = not self._operands, any(isinstance(o, Kernel) for o in self._operands)
        factors = [[o for step in m.steps for o in step.operands] for m in self.moves]
        self.linear = all(len(f) < 2 and all(not isinstance(o, Kernel) and o[3] == 1 for o in f) for f in factors)

    @property
    def moved(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(m.name for m in self.moves))

    def move(self, params, xi):
        return self._add_values(params, self._shift_values(self._operand_rows(params, xi), xi, params))

    def velocity(self, params, xi):
        found = {name: torch.zeros_like(params[name]) for name in self.names}
        return self._add_values(found, self._shift_values(self._operand_rows(params, xi), xi, params))

    def jet(self, params, xi):
        first = self.velocity(params, xi)
        return first, {name: torch.zeros_like(v) for name, v in first.items()}

    def bend(self, params: Params, xi: Tensor, direction: Params) -> Params:
        """The derivative of the velocity along a direction of the parameters."""
        if not self.linear:
            names = [{n: p[n] for n in self.names} for p in (params, direction)]
            return torch.func.jvp(lambda w: self.velocity(w, xi), (names[0],), (names[1],))[1]
        here, there = self.velocity(direction, xi), self.velocity({n: 0 * direction[n] for n in self.names}, xi)
        return {name: here[name] - there[name] for name in here}

    def _add_values(self, params: Params, values: Params) -> Params:
        added = {name: (params[name] + v.to(params[name].device)).to(params[name].dtype) for name, v in values.items()}
        return {name: added.get(name, params[name]) for name in self.names}

    def _operand_rows(self, params: Params, xi: Tensor) -> dict[Operand, Tensor]:
        """What the einsums take."""
        return {
            o: o.basis(params, xi) if isinstance(o, Kernel) else params[o[0]].narrow(0, o[1], o[2]).to(xi) ** o[3]
            for o in self._operands
        }

    def _shift_values(self, rows: dict[Operand, Tensor], xi: Tensor, like: Params, entry: Any = None) -> Params:
        """What is added to each parameter that moves; with the `entry` of each scale in its place."""
        found: Params = {}
        for m in self.moves:
            v = xi.narrow(0, m.start, m.count)
            for step in m.steps:
                if step.equation:
                    operands = [rows[o] for o in step.operands]
                    v = torch.einsum(step.equation, *operands, v.view(step.shape)).reshape(-1)
                else:
                    v = torch.cat([v, v.new_zeros(1)])[torch.tensor(step.indices).to(v.device, non_blocking=True)]
                if step.scale != 1:
                    scale = v.new_full((), step.scale)  # a number would be copied from the host
                    v = (scale if entry is None else entry(scale)) * v
            value = v.view(m.shape).expand(like[m.name].shape)
            found[m.name] = found[m.name] + value if m.name in found else value
        return found

    def spread(self, tensors, xi, entry, *, dual=True, params=None):
        r"""As `Symmetry.spread`, with entries that are sums of products taken as if their terms were uncorrelated.

        Raises:
            TeleportError: when the action is nonlinear and `params`, where its Jacobian is taken, is missing.
        """
        if params is None and not self.linear:
            raise TeleportError("params, because the action is nonlinear", None, "pass the params to be moved")
        self.check(tensors)
        if self.monomial:
            return {**tensors}
        point, like = tensors if params is None else params, xi
        rows = self._operand_rows(point, xi)
        slopes = {
            o: entry(torch.ones_like(r) if o[3] == 1 else -r.square())
            for o, r in rows.items()
            if not isinstance(o, Kernel)
        }
        rows, xi = {o: entry(r) for o, r in rows.items()}, entry(xi)
        values = partial(self._shift_values, xi=xi, like=tensors, entry=entry)
        if not dual:
            tangents = {
                o: o.tangent(point, tensors, entry, like)
                if isinstance(o, Kernel)
                else slopes[o] * tensors[o[0]].narrow(0, o[1], o[2]).to(rows[o])
                for o in rows
            }
            return {**tensors, **self._add_values(tensors, torch.func.jvp(values, (rows,), (tangents,))[1])}
        like, pull = torch.func.vjp(values, rows)[:2]
        found = {name: tensors[name].clone() for name in self.names}
        for o, part in pull({name: tensors[name].to(v) for name, v in like.items()})[0].items():
            if isinstance(o, Kernel):
                for name, moved in o.cotangent(point, part, entry).items():
                    found[name] += moved
            else:
                sign = entry(part.new_full((), -1.0))
                found[o[0]].narrow(0, o[1], o[2]).add_((sign * slopes[o] * part).to(tensors[o[0]]))
        return {**tensors, **found}

    def check(self, params: Params) -> None:
        super().check(params)
        shapes = {m.name: m.shape for m in self.moves}
        for name in self.names:
            shape, remedy = tuple(params[name].shape), "pass the parameters that the symmetry was made for"
            wanted = shapes.get(name, shape)
            if len(wanted) != len(shape) or any(a not in (1, b) for a, b in zip(wanted, shape, strict=True)):
                raise ShapeError(name, f"what {wanted} broadcasts to", shape, remedy)
            for dim, stop in [
                (dim, first + length)
                for o in self._operands
                for n, dim, first, length in (
                    [(*part, o.length) for part in o.parts] if isinstance(o, Kernel) else [(o[0], 0, *o[1:3])]
                )
                if n == name
            ]:
                if len(shape) <= dim or shape[dim] < stop:
                    raise ShapeError(name, f"at least {stop} along dimension {dim}", shape, remedy)

    def to_dict(self) -> dict[str, Any]:
        return {"symmetry": "shift", "n": self.group.n, "of": self.of, "moves": [asdict(m) for m in self.moves]}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Shift:
        """What `to_dict` gave."""
        moves = [Move(**{**m, "steps": tuple(map(_step, m["steps"]))}) for m in _as_tuples(saved["moves"])]
        return cls(saved["n"], moves, saved["of"])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shift) and (self.group, self.moves, self.of) == (other.group, other.moves, other.of)

    def __hash__(self) -> int:
        return hash((self.group, self.moved))

    def __str__(self) -> str:
        free = dict.fromkeys(m.name for m in self.moves if all(s.scale > 0 for s in m.steps))
        sides = free, [name for name in self.moved if name not in free]
        return " -> ".join(", ".join(side) for side in sides if side)


SAVED["shift"] = Shift


def _step(saved: dict[str, Any]) -> Step:
    """What `asdict` gave."""
    operands = tuple(Kernel(**o) if isinstance(o, dict) else o for o in saved["operands"])
    return Step(**{**saved, "operands": operands})


def _as_tuples(saved: Any) -> Any:
    """Tuples in place of lists, in what JSON gave."""
    if isinstance(saved, dict):
        return {key: _as_tuples(value) for key, value in saved.items()}
    return tuple(map(_as_tuples, saved)) if isinstance(saved, (list, tuple)) else saved


def join_shifts(shifts: list[Shift]) -> Shift:
    """Several translations that do not read what others move, as one."""
    starts = accumulate((s.group.n for s in shifts), initial=0)
    moves = [replace(m, start=m.start + first) for s, first in zip(shifts, starts, strict=False) for m in s.moves]
    return Shift(sum(s.group.n for s in shifts), moves, shifts[0].of)
