"""What an elementwise function commutes with, found by trying it on random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from teleport_lite.discovery.constraints import SCALE, SIGN, nearest_fraction
from teleport_lite.discovery.labels import Labels, lift_labels
from teleport_lite.discovery.operation import Operation, RuleMisfit, is_inexact

SCALES = (1e-12, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e12)  # magnitudes at which a function is tried


@dataclass(frozen=True)
class Equivariance:
    """How a function answers when some of its arguments are multiplied by c.

    Args:
        scale: its degree k, where c > 0 multiplies it by $c^k$: 1 for ReLU, 0 for a comparison with zero; or None.
        sign: 1 where c = -1 multiplies it likewise, 0 where it stays, else None.
        linear: whether it is linear in them.
    """

    scale: float | None
    sign: int | None
    linear: bool = False

    @property
    def systems(self) -> tuple[tuple[int, float | None, str], ...]:
        """The answer for each system of equations, and what it is an answer to."""
        return (SCALE, self.scale, "rescaling"), (SIGN, self.sign, "flipping")


NEITHER = Equivariance(None, None)
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
    def floating_bearers(self) -> list[int]:
        """The bearers that can be multiplied: all but masks."""
        return [i for i in self.bearers if is_inexact(self.leaves[i])] or self.bearers


def operands_of(op: Operation) -> Operands:
    """The arguments of an operation.

    Raises:
        RuleMisfit: when it is no elementwise function of one result.
    """
    leaves, spec = tree_flatten((op.args, op.kwargs))
    at = [i for i, t in enumerate(leaves) if isinstance(t, Tensor)]
    if len(op.results()) != 1:
        raise RuleMisfit("an elementwise function with several results")
    labels = {i: [lift_labels(a, op.out.ndim) for a in op.labels(leaves[i])] for i in at}
    bearers = [i for i in at if labels[i]]
    return Operands(leaves, spec, bearers, [leaves[i] for i in at if not labels[i]], labels)


def ask_once(op: Operation, found: Operands, which: list[int]) -> Equivariance:
    """The answer of `_try_multiples`, kept for the next call of the same function with the same kinds of arguments."""
    kinds = tuple(
        f"{x.dtype}{_named_number(op, found, i)}" if isinstance(x, Tensor) else repr(x)
        for i, x in enumerate(found.leaves)
    )
    key = (op.func, kinds, tuple(which))
    if key not in op.answers:
        op.answers[key] = _try_multiples(op, found, which)
    return op.answers[key]


def _named_number(op: Operation, found: Operands, i: int) -> complex | None:
    """The value of a number that the model's code names; None for all that depends on inputs or may be trained."""
    x = found.leaves[i]
    named = i not in found.bearers and x.numel() == 1 and op.memory.origin(x) == "uniform"
    return x.item() if named else None


def _try_multiples(op: Operation, found: Operands, which: list[int]) -> Equivariance:
    """Try an elementwise function, at all `SCALES`, on multiples and on sums of the arguments `which`."""
    draw = torch.Generator().manual_seed(0)
    moving = [i for i in which if is_inexact(found.leaves[i])]

    def draw_normal(like: Tensor) -> Tensor:
        dtype = torch.complex128 if like.is_complex() else torch.float64
        return torch.randn(64, generator=draw, dtype=dtype)

    def draw_argument(i: int, x: Any, scale: float) -> Any:
        if not isinstance(x, Tensor):
            return x
        if not is_inexact(x):
            low = int(x.dtype != torch.bool)  # a number may divide
            return torch.randint(low, low + 2, (64,), generator=draw).to(x.dtype)
        if (number := _named_number(op, found, i)) is not None:
            return torch.full((64,), number, dtype=torch.result_type(x, 1.0))
        return (scale if i in which else 1.0) * draw_normal(x)

    def function_value(arguments: list) -> Tensor:
        args, kwargs = tree_unflatten([x.clone() if isinstance(x, Tensor) else x for x in arguments], found.spec)
        value = op.func(*args, **kwargs)
        return value if value.is_complex() else value.double()

    holds, degree = dict.fromkeys(("degree", "odd", "even", "linear"), True), 1.0
    for scale in SCALES:
        trial = [draw_argument(i, x, scale) for i, x in enumerate(found.leaves)]
        other = [scale * draw_normal(x) if i in moving else x for i, x in enumerate(trial)]
        one, big, small, flipped, none = (
            function_value([c * x if i in moving else x for i, x in enumerate(trial)])
            for c in (1.0, 3.7, 0.3, -1.0, 0.0)
        )
        size = one.abs().nan_to_num(0, torch.inf).max()
        if scale == SCALES[0] and 0 < size < torch.inf:
            degree = nearest_fraction(float((big.abs().nan_to_num(0).max() / size).log()) / math.log(3.7))
        total = function_value([x + y if i in moving else x for i, (x, y) in enumerate(zip(trial, other, strict=True))])
        for claim, got, expected in (
            ("degree", big / 3.7**degree, one),
            ("degree", small / 0.3**degree, one),
            ("odd", flipped, -one),
            ("even", flipped, one),
            ("linear", total, one + function_value(other)),
            ("linear", none, 0 * none),
        ):
            holds[claim] &= _is_close(got, expected, size)
    return Equivariance(
        degree if holds["degree"] else None,
        1 if holds["odd"] else 0 if holds["even"] else None,
        bool(moving) and holds["linear"] and degree == 1,
    )


def _is_close(a: Tensor, b: Tensor, size: Tensor) -> bool:
    """Whether tensors agree, also in where they are not a number, which must not be everywhere."""
    alike = ((a - b).abs() <= 1e-9 * size) | (a.isnan() & b.isnan())
    return bool(size.isfinite()) and not bool(b.isnan().all()) and bool(alike.all())
