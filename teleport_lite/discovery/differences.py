"""What a shift of a parameter adds to the data of a run: numbers, and what they are made of.

The numbers c of a shift are random, so values tell where they come from: a tensor whose entries are among those of c
holds these entries, and one that equals a matrix times them is that product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from teleport_lite.discovery.dispatch import leaves_of, map_tensors
from teleport_lite.symmetries.shifts import Move, Operand, Shift, Step

EXACT = 1e-11  # relative, of differences in float64
Chain = tuple[Step, ...]
Part = tuple[str, tuple[int, ...], Chain]


class _NonlinearError(Exception):
    """What an operator makes of a shift is not linear in it, or cannot be compared."""


@dataclass(eq=False)
class Source:
    """A shift of a parameter by a random c.

    Attributes:
        name, shape: the parameter, and the shape in which what `own` makes of c is added to it.
        c: the random numbers.
        beside: other parameters that move by the same c, each with its shape and what is made of c there.
        read, blocked, settled, absorbed: for each entry whether something computed with it, whether something sees it,
            whether it was seen to end, and whether by being undone.
        born: how many operations had been run when one first computed with it.
        undone: the sources that undo it, what is made of c there, and how many times.
        undoes: whether it is such a source itself.
    """

    name: str
    shape: tuple[int, ...]
    own: Chain
    c: Tensor
    beside: tuple[Part, ...] = ()
    born: int = 0
    read: Tensor = field(init=False)
    blocked: Tensor = field(init=False)
    settled: Tensor = field(init=False)
    absorbed: Tensor = field(init=False)
    undone: dict[tuple[Source, Chain], int] = field(default_factory=dict)
    undoes: bool = False

    def __post_init__(self) -> None:
        self.read, self.blocked, self.settled, self.absorbed = torch.zeros(4, len(self.c), dtype=torch.bool)

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parameters that move, each with its shape and what is made of c."""
        return (self.name, self.shape, self.own), *self.beside

    def ended_shifts(self) -> Iterator[Shift]:
        """The translations by those entries that end everywhere: what nothing sees, and what is undone."""
        free = self.settled & ~self.blocked
        if not all(s.read.all() for s in (self, *(s for s, _ in self.undone))):  # it may be seen elsewhere
            return
        for mine, undone in ((free & ~self.absorbed, ()), (free & self.absorbed, self.undone)):
            if n := int(mine.sum()):
                part = () if n == len(mine) else (Step(tuple(torch.where(mine, mine.cumsum(0) - 1, -1).tolist())),)
                moved = [*self.parts, *((s.name, s.shape, chain) for s, chain in undone)]
                yield Shift(n, [Move(name, shape, 0, n, extend_chain(part, *chain)) for name, shape, chain in moved])


@dataclass(eq=False)
class Difference:
    """What a source, or some of its entries, adds to a tensor.

    Attributes:
        source: that.
        t: the numbers, of length 1 along each dimension on which they do not depend.
        chains: what, added up, makes `t` of c.
        v: what the chains make, where `t` is that times data.
        support: the entries of c on which it depends.
    """

    source: Source
    t: Tensor
    chains: tuple[Chain, ...]
    support: Tensor
    v: Tensor | None = None

    def __post_init__(self) -> None:
        indices = list(range(len(self.support)))  # which entries of c are left, and multiplied entry by entry
        if len(self.chains) > 1 or self.v is not None or len(indices) == 1:
            return
        for step in self.chains[0]:
            if not step.equation:
                indices = [indices[i] if i >= 0 else -1 for i in step.indices]
            elif not step.equation.endswith(",{0}->{0}".format(step.equation[-1])):
                return
        kept = torch.tensor([i for i in indices if i >= 0], dtype=torch.long)
        self.support = torch.zeros_like(self.support).index_fill(0, kept, True)

    @property
    def choice(self) -> Step | None:
        """The choice of entries that it is, where it is that."""
        if self.v is not None or len(self.chains) > 1 or any(step.equation for step in self.chains[0]):
            return None
        return self.chains[0][0] if self.chains[0] else Step(tuple(range(self.t.numel())))


def cluster_by_source(inputs: list[tuple[Tensor, Difference]]) -> list[list[tuple[Tensor, Difference]]]:
    """The arguments that entries of a source shift together."""
    found: list[list[tuple[Tensor, Difference]]] = []
    for x, d in inputs:
        near = [any(e.source is d.source and bool((e.support & d.support).any()) for _, e in c) for c in found]
        together = [i for c, is_near in zip(found, near, strict=True) if is_near for i in c]
        found = [c for c, is_near in zip(found, near, strict=True) if not is_near] + [[*together, (x, d)]]
    return found


def rerun_shifted(
    call: Any, inputs: Sequence[tuple[Tensor, Difference]], moving: bool, written: set[int]
) -> list[list[Tensor]]:
    """What an operator makes of arguments shifted up and down; where it only moves data, of the shifts alone.

    Nothing, where it does not run, as when a shape depends on values.
    """
    (func, args, kwargs), shifts = call, {id(x): d.t for x, d in inputs}

    def shifted_argument(x: Tensor, sign: float) -> Tensor:
        t = shifts.get(id(x))
        if not moving:
            return x + sign * t if t is not None else x.clone() if id(x) in written else x
        if t is None:
            return x.new_zeros(()).expand(x.shape) if x.is_floating_point() else x
        return t.expand(x.shape) if func is torch.ops.aten.embedding.default else torch.empty_like(x).copy_(t)

    try:
        runs = []
        for sign in (1.0,) if moving else (1.0, -1.0):
            new, named = map_tensors(partial(shifted_argument, sign=sign), (args, kwargs))
            runs.append([x for x in leaves_of(func(*new, **named)) if isinstance(x, Tensor)])
        return runs
    except Exception:
        return []


def multiply_shift(call: Any, x: Tensor, t: Tensor) -> list[list[Tensor]]:
    """What a product makes of the shift alone of its first factor, in one row where all rows have the same."""
    func, args, _ = call
    if func is torch.ops.aten.addmm.default:
        func, args = torch.ops.aten.mm.default, args[1:]
    args = (t.expand(len(t), *x.shape[1:]), args[1], *(None for _ in args[2:3]), *args[3:])
    out = func(*args)
    return [[torch.where(out.abs() <= EXACT * t.abs().max() * args[1].abs().max(), 0, out)]]


def output_differences(results: list[Tensor], ends: list[list[Tensor]]) -> list[Tensor | None]:
    """The difference that a shift makes to each result; nothing, where an operator is not linear in it."""
    try:
        return [_output_difference(x, *both) for x, *both in zip(results, *ends, strict=True)]
    except _NonlinearError:
        return []


def _output_difference(x: Tensor, plus: Tensor | None = None, minus: Tensor | None = None) -> Tensor | None:
    """The difference that a shift makes, of length 1 where it can be; None where there is none.

    Raises:
        _NonlinearError: when there is no such.
    """
    if plus is None or x.layout != torch.strided or x.is_nested or x.is_complex():
        raise _NonlinearError
    if not x.is_floating_point() and not (torch.equal(x, plus) and (minus is None or torch.equal(x, minus))):
        raise _NonlinearError
    if not x.is_floating_point() or not x.numel():
        return None
    if bool(x.isnan().any()):
        raise _NonlinearError
    if minus is None:
        return compact_tensor(plus) if bool(plus.any()) else None
    here = torch.where(x.isfinite(), x, 0).abs()
    up, down = (torch.where(x.isfinite(), d, 0) for d in (plus - x, x - minus))
    rounding = EXACT * (here + here.median())
    if not bool(((up - down).abs() <= rounding + EXACT * up.abs().max()).all()):
        raise _NonlinearError
    return compact_tensor(up) if bool((up.abs() > rounding).any()) else None


def compact_tensor(t: Tensor) -> Tensor:
    """`t`, of length 1 along each dimension on which it does not depend."""
    size = EXACT * t.abs().max()
    for dim in range(t.ndim):
        first = t.narrow(dim, 0, 1)
        if bool(((t - first).abs() <= size).all()):
            t = first
    return torch.where(t.abs() <= size, 0, t)


def extend_chain(chain: Chain, *steps: Step) -> Chain:
    """A chain and then more steps, choices of entries drawn together."""
    for step in steps:
        if chain and not chain[-1].equation and not step.equation:
            indices = tuple(chain[-1].indices[i] if i >= 0 else -1 for i in step.indices)
            chain = (*chain[:-1], Step(indices, scale=chain[-1].scale * step.scale))
        else:
            chain = (*chain, step)
    return chain


def undoing_step(d: Difference, e: Difference, choice: Step) -> Step | None:
    """What makes of d the entries of which e is a `choice`, so that e takes d back; nothing where it does not."""
    if any(a not in (1, b) for a, b in zip(d.t.shape, e.t.shape, strict=True)):
        return None
    entries, v = torch.tensor(choice.indices), d.t.reshape(-1)
    places = torch.arange(d.t.numel()).view(d.t.shape).expand(e.t.shape).reshape(-1)
    used = entries >= 0
    back = torch.full((len(e.source.c),), -1)
    back[entries[used]] = places[used]
    undone = torch.cat([v, v.new_zeros(1)])[back][entries] * used.to(v)
    found = bool(((undone - v[places]).abs() <= EXACT * v.abs().max()).all())
    return Step(tuple(back.tolist()), scale=-1.0 / choice.scale) if found else None


def sum_or_mean(t: Tensor, w: Tensor) -> list[Step] | None:
    """The sum or the mean along an axis of `t` that w is."""
    axes = "abcdefgh"[: t.ndim]
    for k in (k for k, n in enumerate(t.shape) if n > 1):
        total = t.sum(k).reshape(-1)
        for scale in (1.0, 1 / t.shape[k]):
            if total.shape == w.shape and bool(((scale * total - w).abs() <= EXACT * t.abs().max()).all()):
                return [Step((), f"{axes}->{axes.replace(axes[k], '')}", tuple(t.shape), (), scale)]
    return None


def product_step(operand: Operand, p: Tensor, v: Tensor, w: Tensor) -> Step | None:
    """The product of rows p of a parameter and v that w is."""
    n, m, rest = len(v), len(w), "jkl"[: max(p.ndim - 2, 0)]
    a, b = (*p.shape, 1)[:2]
    wanted = {f"oi{rest},i->o": (m, n), f"oi{rest},o->i": (n, m), f"oi{rest},o->o": (n, 1) if n == m else None}
    for equation, shape in wanted.items():
        if shape == (a, b):
            equation = equation if p.ndim > 1 else "o,o->o"
            r = torch.einsum(equation, p.to(v), v)
            if r.shape != w.shape:
                continue
            scale = float(w @ r / (r @ r))
            if m == 1 and abs(scale - 1) > EXACT:  # any two numbers are multiples of each other
                continue
            if bool(((w - scale * r).abs() <= EXACT * w.abs().max()).all()):
                return Step((), equation, (n,), (operand,), 1.0 if abs(scale - 1) < EXACT else scale)
    return None


def choice_of(v: Tensor, w: Tensor) -> list[Step] | None:
    """How w is chosen among the entries of v and zero, times a number; the entries are random, so that tells it."""
    if v.shape == w.shape and bool(((v - w).abs() <= EXACT * v.abs().max()).all()):
        return []
    extended = torch.cat([v, v.new_zeros(1)])
    values, order = extended.sort()
    sizes = float(v.abs().max()), float(w.abs().max())
    for scale in dict.fromkeys((1.0, sizes[1] / sizes[0], -sizes[1] / sizes[0])):
        for part in (w[:64] / scale, w / scale):
            at = torch.searchsorted(values, part).clamp(1, len(v))
            near = torch.where((part - values[at - 1]).abs() < (part - values[at]).abs(), at - 1, at)
            found = bool(((values[near] - part).abs() <= EXACT * sizes[0]).all())
            if not found:
                break
        if found:
            indices = order[near]
            return [Step(tuple(torch.where(indices == len(v), -1, indices).tolist()), scale=scale)]
    return None
