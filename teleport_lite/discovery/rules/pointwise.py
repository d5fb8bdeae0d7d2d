"""Elementwise functions: what they commute with is tried out with random numbers, except for products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from teleport_lite.discovery.constraints import PERM, SCALE, SIGN, negative
from teleport_lite.discovery.labels import Labels, cluster_by_dims, compact, lift, varying_dims
from teleport_lite.discovery.operation import Operation, RuleMisfit
from teleport_lite.discovery.registry import rule_for, words_for

SCALES = (1e-12, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e12)  # magnitudes at which a function is tried


@dataclass(frozen=True)
class Equivariance:
    """How a function answers when some of its arguments are multiplied.

    Args:
        scale: "equivariant" when it is multiplied likewise, "invariant" when it stays, else "neither".
        sign: the same for -1.
        linear: whether it is linear in them.
    """

    scale: str
    sign: str
    linear: bool = False


NEITHER = Equivariance("neither", "neither")
Ask = Callable[[list[int]], Equivariance]


@dataclass
class Operands:
    """The arguments of an elementwise function: those with labels (`bearers`), and the constants beside them."""

    leaves: list[Any]
    spec: Any
    bearers: list[int]
    constants: list[Tensor]
    labels: dict[int, Labels]

    @property
    def floating(self) -> list[int]:
        """The bearers that can be multiplied: all but masks."""
        return [i for i in self.bearers if self.leaves[i].is_floating_point()] or self.bearers


def _operands(op: Operation) -> Operands:
    leaves, spec = tree_flatten((op.args, op.kwargs))
    at = [i for i, t in enumerate(leaves) if isinstance(t, Tensor)]
    if len(op.results()) != 1:
        raise RuleMisfit("an elementwise function with several results")
    labels = {i: [lift(a, op.out.ndim) for a in op.labels(leaves[i])] for i in at}
    bearers = [i for i in at if labels[i]]
    return Operands(leaves, spec, bearers, [leaves[i] for i in at if not labels[i]], labels)


def pointwise(op: Operation) -> list[Labels]:
    """An elementwise function: what it commutes with is tried out."""
    found = _operands(op)
    return [_commute(op, found, partial(_asked_once, op, found))]


def _asked_once(op: Operation, found: Operands, which: list[int]) -> Equivariance:
    """The answer of `probe`, kept for the next call of the same function with the same kinds of arguments."""
    kinds = tuple(
        f"{x.dtype}{_value(op, found, i)}" if isinstance(x, Tensor) else repr(x) for i, x in enumerate(found.leaves)
    )
    key = (op.func, kinds, tuple(which))
    if key not in op.answers:
        op.answers[key] = probe(op, found, which)
    return op.answers[key]


def _value(op: Operation, found: Operands, i: int) -> float | None:
    """The value of a number that the model's code names; None for all that depends on inputs or may be trained."""
    x = found.leaves[i]
    named = i not in found.bearers and x.numel() == 1 and op.memory.origin(x) == "uniform"
    return float(x) if named else None


def declared(equivariance: Equivariance, op: Operation) -> list[Labels]:
    """An elementwise function whose equivariance is known."""
    return [_commute(op, _operands(op), lambda which: equivariance)]


words_for(
    pointwise=pointwise,
    homogeneous=partial(declared, Equivariance("equivariant", "neither")),
    odd=partial(declared, Equivariance("neither", "equivariant")),
    linear=partial(declared, Equivariance("equivariant", "equivariant", linear=True)),
)
rule_for("max.other min.other")(pointwise)


@rule_for("rrelu_with_noise")
def leaky_relu_in_evaluation(op: Operation) -> list[Labels]:
    """The noise is read in training only."""
    found = _operands(op)
    found.constants = []
    return [_commute(op, found, partial(_asked_once, op, found))]


@rule_for("add.Tensor sub.Tensor rsub.Tensor")
def add_labels(op: Operation) -> list[Labels]:
    """Sums: a term that the model made zero says nothing."""
    found = _operands(op)
    if len(found.bearers) == 1 and found.constants and all(map(op.is_zero, found.constants)):
        return [found.labels[found.bearers[0]]]
    return pointwise(op)


@rule_for("mul.Tensor div.Tensor")
def multiply_labels(op: Operation) -> list[Labels]:
    """Products: exponents add. A factor that the model made zero may move in any way, and so may the product."""
    found = _operands(op)
    if len(found.bearers) == 1 and any(map(op.is_zero, found.constants)):
        op.unexercised.update(id(found.leaves[i]) for i in found.bearers)
        return [[_free_product(op, a) for a in found.labels[found.bearers[0]]]]
    if len(found.bearers) < 2 or op.kwargs:
        return pointwise(op)
    out: Labels = []
    for cluster in cluster_by_dims([found.labels[i] for i in found.bearers]):
        a, b = parts = [op.constraints.sum_labels(part) for part in cluster]
        _tell_apart(op, found, parts)
        inverse = "div" in op.name
        if a is not None and b is not None:
            product = op.constraints.sum_of(a, negative(b) if inverse else b)
            op.keep_entries_apart([product, a, b])
            out.append(product)
        elif a is not None:
            out.append(a)
        elif b is not None:
            out.append(negative(b) if inverse else b)
    return [out]


def _free_product(op: Operation, labels: Tensor) -> Tensor:
    """Labels of a product with zeros: only the places are kept."""
    free = op.constraints.fresh(*labels.shape)
    op.constraints.equate(free, labels, PERM)
    op.keep_entries_apart([free, labels])
    return free


def _tell_apart(op: Operation, found: Operands, parts: list[Tensor | None]) -> None:
    """Constants, and bearers that vary along the axis without a label there, tell the entries of an axis apart."""
    for a in (p for p in parts if p is not None):
        for constant in found.constants:
            op.color_by_values(constant, a)
        for i, part in zip(found.bearers, parts, strict=True):
            t = found.leaves[i]
            if part is None and any(-d <= t.ndim and t.shape[d] > 1 for d in varying_dims(a)):
                op.constraints.distinguish(a)


def _commute(op: Operation, found: Operands, ask: Ask) -> Labels:
    """The labels of an elementwise function, cluster by cluster of dimensions along which its arguments vary.

    A label passes where the function commutes with multiplying all floating arguments that have labels. Where it does
    not, it may still commute with one of them alone, and the others stay.
    """
    joint = ask(found.bearers)
    out: Labels = []
    for cluster in cluster_by_dims([found.labels[i] for i in found.bearers]):
        parts = [op.constraints.sum_labels(part) for part in cluster]
        there = {i: a for i, a in zip(found.bearers, parts, strict=True) if a is not None}
        _tell_apart(op, found, parts)
        first, *others = there.values()
        for a in others:
            op.constraints.equate(first, a, PERM)
        if not joint.linear:
            op.keep_entries_apart(there.values())
        shape = torch.broadcast_shapes(*(a.shape for a in there.values()))
        moving = {i: a for i, a in there.items() if i in found.floating} or there
        answer, passing = _answer(op, found, ask, moving)
        result = next(iter(moving.values())) if passing is None else passing
        if "invariant" in (answer.scale, answer.sign):
            result = op.constraints.fresh(*shape)
            op.constraints.equate(result, first, PERM)
        _restrict(op, result.expand(shape), moving if passing is None else {0: passing}, answer)
        out.append(compact(result.expand(shape)))
    return out


def _answer(op: Operation, found: Operands, ask: Ask, moving: dict[int, Tensor]) -> tuple[Equivariance, Tensor | None]:
    """How the function answers, and the labels of the one argument that may move where not all may."""
    floating = found.floating
    joint = ask(found.bearers)
    refused = replace(NEITHER, linear=joint.linear)
    joint = joint if len(moving) == len(floating) else refused
    if len(floating) > 1 and joint.scale != "equivariant":
        for i, a in moving.items():
            alone = ask([i])
            if alone.scale == "equivariant":
                others = [x for k, x in moving.items() if k != i]
                op.fix(others, f"{op.short_name} does not commute with rescaling them", SCALE | SIGN)
                return alone, a
    if len(floating) > 1 and joint.scale == "invariant":  # all by the same factor, which nothing makes sure of
        return refused, None
    return joint, None


def _restrict(op: Operation, result: Tensor, moving: dict[int, Tensor], answer: Equivariance) -> None:
    """Write down what an answer asks of the labels that go in and of the result's."""
    for system, how, word in ((SCALE, answer.scale, "rescaling"), (SIGN, answer.sign, "flipping")):
        if how == "equivariant":
            for a in moving.values():
                op.constraints.equate(result, a, system)
        else:
            stays = [result] + (list(moving.values()) if how == "neither" else [])
            op.fix(stays, f"{op.short_name} does not commute with {word} them", system)


def probe(op: Operation, found: Operands, which: list[int]) -> Equivariance:
    """Try an elementwise function, at all `SCALES`, on multiples and on sums of the arguments `which`."""
    draw = torch.Generator().manual_seed(0)
    moving = [i for i in which if found.leaves[i].is_floating_point()]

    def normal() -> Tensor:
        return torch.randn(64, generator=draw, dtype=torch.float64)

    def sample(i: int, x: Any, scale: float) -> Any:
        if not isinstance(x, Tensor):
            return x
        if not x.is_floating_point():
            return torch.randint(0, 2, (64,), generator=draw).to(x.dtype)
        if (number := _value(op, found, i)) is not None:
            return torch.full((64,), number, dtype=torch.float64)
        return (scale if i in which else 1.0) * normal()

    def value(arguments: list) -> Tensor:
        args, kwargs = tree_unflatten([x.clone() if isinstance(x, Tensor) else x for x in arguments], found.spec)
        return op.func(*args, **kwargs).double()

    holds = dict.fromkeys(("same", "free", "odd", "even", "linear"), True)
    for scale in SCALES:
        trial = [sample(i, x, scale) for i, x in enumerate(found.leaves)]
        other = [scale * normal() if i in moving else x for i, x in enumerate(trial)]
        one, big, flipped, none = (
            value([c * x if i in moving else x for i, x in enumerate(trial)]) for c in (1.0, 3.7, -1.0, 0.0)
        )
        total = value([x + y if i in moving else x for i, (x, y) in enumerate(zip(trial, other, strict=True))])
        for claim, got, expected in (
            ("same", big, 3.7 * one),
            ("free", big, one),
            ("odd", flipped, -one),
            ("even", flipped, one),
            ("linear", total, one + value(other)),
            ("linear", none, 0 * none),
        ):
            holds[claim] &= _is_close(got, expected, one.abs().max())
    return Equivariance(
        "equivariant" if holds["same"] else "invariant" if holds["free"] else "neither",
        "equivariant" if holds["odd"] else "invariant" if holds["even"] else "neither",
        bool(moving) and holds["linear"] and holds["same"],
    )


def _is_close(a: Tensor, b: Tensor, size: Tensor) -> bool:
    return bool(size.isfinite()) and bool(((a - b).abs() <= 1e-9 * size).all())
