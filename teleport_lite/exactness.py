"""Whether a model computes after a move what it computed before.

A loss is a mean, so it is compared within the tolerance; outputs are compared entry by entry, and their largest change
may be `LARGEST` times that. Where a loss is so small that rounding alone moves it further, float64 decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from teleport_lite import rounding
from teleport_lite.discovery.dispatch import DispatchMode, leaves_of
from teleport_lite.distributed import BITS
from teleport_lite.errors import BatchError, LossError
from teleport_lite.functional import Evaluation, check_finite
from teleport_lite.problem import Problem
from teleport_lite.symmetries.axes import NeuronSymmetry
from teleport_lite.symmetries.minibatch import MiniBatchMixing
from teleport_lite.symmetries.product import Product

LARGEST = 10  # times the tolerance
TWICE = 2  # what rounding does to outputs in 16 bits: true moves do at most half of that
HIDDEN = 1e6  # an entry that did not change is no measure for those that did when it is so many times larger
FINE, HALF_PRECISION = 1e-5, 0.1  # the tolerance of float32, and what 16 bits inside of a model may make of outputs
MOVED = "the loss moved"


class RefusedError(Exception):
    """Ends a transaction whose result must not stay."""

    def __init__(self, reason: str, moved: bool = False) -> None:
        self.reason, self.moved = reason, moved
        super().__init__(reason)


def largest_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """The largest change of an entry, relative to the largest entry of its tensor; infinite where shapes differ.

    Entries that are equal, not finite ones too, count as unchanged. One that stands out by `HIDDEN`, as the constant of
    a mask does, and did not change is left out of the size.

    >>> mask = torch.tensor([1.0, 2.0, -3e38])
    >>> largest_change([mask], [mask + torch.tensor([0.5, 0.0, 0.0])])
    tensor(0.2500)
    """
    worst = torch.zeros((), device=before[0].device if before else None)
    if len(before) != len(after):
        return worst + torch.inf
    for old, new in zip(before, after, strict=True):
        if old.shape != new.shape:
            return worst + torch.inf
        if not (old.is_floating_point() or old.is_complex()) or not old.numel():
            continue
        if old.is_complex():
            old, new = torch.view_as_real(old), torch.view_as_real(new)
        same = old.view(BITS[old.dtype.itemsize]) == new.view(BITS[new.dtype.itemsize])  # infinities and NaN too
        gap = (new - old).abs_().masked_fill_(same, 0).amax().nan_to_num(torch.inf, torch.inf)
        sizes = old.abs().nan_to_num_(0, 0)
        moved = sizes.masked_fill(same, 0).amax()
        size = torch.where(sizes <= HIDDEN * moved, sizes, 0).amax()
        worst = torch.maximum(worst, torch.where(gap > 0, gap / size, 0.0).to(worst))
    return worst


def change_by_rounding(problem: Problem, loss: Evaluation, outputs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The largest change of the outputs, in 16 bits, that rounding explains.

    That is twice a unit of `dtype`, or twice what it makes of them to move each weight by one, up or down at random.
    """
    unit = torch.finfo(dtype).eps
    worst = problem.value.new_tensor(unit, dtype=torch.float32)
    for seed in (0, 1):
        with loss.observed() as near:
            problem.at(rounding.jitter_ulps(problem.params, 1, seed, unit))
        worst = torch.maximum(worst, largest_change(outputs, near).to(worst))
    return TWICE * worst


def check_deterministic(problem: Problem, value: float, tol: float) -> None:
    """Evaluate the loss again at the same parameters, to tell a broken symmetry from a loss that changes by itself.

    With a gradient too, if need be: fused kernels, which round otherwise, run without one.

    Raises:
        LossError: when it does.
    """
    again = float(problem.at(problem.params))
    if not _losses_agree(again, value, tol) and not _losses_agree(float(problem.differentiate()[0]), value, tol):
        raise LossError(
            "a deterministic loss",
            f"{value:.6g} and {again:.6g} at the same parameters",
            "fix the batch, and seed what draws from a generator of its own at each call",
        )


def _losses_agree(a: float, b: float, tol: float) -> bool:
    """Whether two losses agree; two that are not finite count as agreeing here, and are refused elsewhere."""
    return a == b or abs(a - b) <= tol * abs(b) or a - b != a - b


def why_refused(
    numbers: list[float],
    problem: Problem,
    product: Product,
    xi: Any,
    tol: float,
    seen: bool,
    maximize: bool,
    search: str | None,
) -> str:
    """Why the move must not stay, or nothing.

    What all ranks know alike comes first, so that all take part in what is evaluated again.

    Raises:
        LossError: when the loss changes by itself.
        ParameterError: when a parameter is not finite.
    """
    before, after, old, new, gap, explained, false = numbers  # explained is 0 where rounding was not measured
    most = min(LARGEST * tol, explained or LARGEST * tol)
    finite = torch.tensor([before, after, old, new]).isfinite().tolist()
    if not finite[0] or not finite[2]:
        check_finite(problem.params)
    if not all(finite):
        names = ("loss", "loss after the move", "objective", "objective after the move")
        return f"the {names[finite.index(False)]} is not finite"
    if not _losses_agree(after, before, tol):
        check_deterministic(problem, after, tol)
        if not (rounding.moves_the_loss(before, after, problem, product, xi) and seen):
            same = seen and product.exact and product.of == "outputs" and gap <= most
            hint = _hint(problem, product, same) or _hint_at_autocast(gap, tol, problem)
            return f"{MOVED} from {before:.6g} to {after:.6g}, beyond the relative tolerance {tol:g}{hint}"
    wrong = false > math.sqrt(tol) and not rounding.moves_the_gradient(false, problem)
    if gap > most:
        beyond = f"{LARGEST} times the relative tolerance {tol:g}"
        beyond = beyond if most >= LARGEST * tol else f"the {most:.1e} that rounding explains"
        return f"the outputs moved by {gap:.1e} of the largest, beyond {beyond}{_hint_at_autocast(gap, tol, problem)}"
    if wrong:
        return (
            f"the gradient after the move is not the one that was carried along (off by {false:.1e}, relative): the "
            "backward pass is not the derivative of the forward pass, as with straight-through estimators"
        )
    if search != "random" and not (new > old if maximize else new < old):
        hint = "" if maximize or search == "ascent" else _hint_at_one_side(product)
        return f"nothing {'larger' if maximize else 'smaller'} was found within the radius{hint}"
    return ""


def _hint_at_autocast(gap: float, tol: float, problem: Problem) -> str:
    if tol != FINE or gap >= HALF_PRECISION or not isinstance(problem.local, Evaluation):
        return ""
    with _Halves() as mode:
        problem.local(problem.params)
    return "; if the model opens autocast itself, pass tol=5e-2" if mode.seen else ""


class _Halves(DispatchMode):
    """Whether anything is computed in 16 bits."""

    seen = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= any(isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) for x in leaves_of(out))
        return out


def _hint_at_one_side(product: Product) -> str:
    """The closed form balances growing against shrinking weights, and leaves a scale where it is without a partner."""
    alone = (f for f in product if isinstance(f, NeuronSymmetry) and len({leg.exponent > 0 for leg in f.legs}) == 1)
    factor = next(alone, None)
    return f"; nothing takes back a scale of {factor.legs[0].name}: search='ascent' goes on" if factor else ""


def _hint(problem: Problem, product: Product, same: bool) -> str:
    """What may have moved the loss, though not the outputs if these are the `same`."""
    for factor in product:
        if isinstance(factor, MiniBatchMixing):
            try:
                factor.require_exact(problem.params)
            except BatchError as error:
                return f" ({error})"
    if same:
        return "; the outputs did not: leave out of loss_fn what else depends on the weights, such as their length"
    if isinstance(problem.local, Evaluation) and problem.local.drew():
        return "; random numbers, as of dropout, do not move along: call model.eval() for the teleport"
    return ""
