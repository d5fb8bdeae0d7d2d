"""Compare the arms of an experiment by one rule: paired by seed, with intervals, at the best rate and over all rates.

Every table of [seeds, rates] holds one number for each training, infinite where it failed (needs the extra
`teleport-lite[book]`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from teleport_lite.errors import ShapeError, TeleportError

try:
    from scipy import optimize, stats
except ImportError as error:
    raise TeleportError("scipy", "none", "pip install teleport-lite[book]") from error


class Effect(NamedTuple):
    """A mean difference and what is known of it.

    Attributes:
        mean: the mean of n paired differences.
        half: half the width of its 95% interval, from Student's t with n - 1 degrees of freedom.
        p: two-sided p-value of the paired t test.
        limit: the smallest true difference that n pairs with this spread would show in four of five repetitions.
    """

    mean: float
    half: float
    p: float
    limit: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.half:.3f}".replace("-", "−")

    @property
    def clear(self) -> int:
        """The sign of the difference where the interval excludes zero, else 0."""
        return int(np.sign(self.mean)) if abs(self.mean) > self.half else 0


def paired(arm: ArrayLike, base: ArrayLike = 0.0) -> Effect:
    """The mean of arm - base, paired entry by entry.

    Args:
        arm: [n], one number a seed.
        base: [n] of the same seeds, or one number.

    Returns:
        An `Effect`; an infinite difference gives no interval: half and limit infinite, p = 1.

    Raises:
        ShapeError: when arm is not [n] with n > 1, or base of another length.

    >>> print(paired([1.0, 2.0, 4.0], [0.0, 2.0, 2.0]))
    +1.000 ± 2.484
    """
    a, b = np.asarray(arm, float), np.asarray(base, float)
    if a.ndim != 1 or len(a) < 2 or b.shape not in ((), a.shape):
        raise ShapeError("arm and base", "[n], n > 1, twice", (a.shape, b.shape), "give one number for each seed")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Effect(float("nan"), math.inf, 1.0, math.inf)
    change, n = a - b, len(a)
    mean, error = float(change.mean()), float(change.std(ddof=1)) / math.sqrt(n)
    if error == 0:
        return Effect(mean, 0.0, float(mean == 0), 0.0)
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
    return Effect(mean, float(stats.t.ppf(0.975, n - 1)) * error, p, error * noncentrality(n))


def noncentrality(n: int, level: float = 0.05, power: float = 0.8) -> float:
    """How many standard errors a true mean must lie from zero for n differences to show it with this power.

    >>> round(noncentrality(5), 2), round(noncentrality(1000), 2)
    (3.76, 2.8)
    """
    edge = float(stats.t.ppf(1 - level / 2, n - 1))
    return float(optimize.brentq(lambda c: float(stats.nct.sf(edge, n - 1, c)) - power, 1e-3, 60.0))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's correction of the p-values of one table.

    The smallest of n is multiplied by n, the next by n - 1, and so on; none is let below one that was smaller.

    >>> [round(x, 3) for x in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p, kind="stable")
    raised = np.minimum(1.0, np.asarray(p, float)[order] * np.arange(len(p), 0, -1))
    corrected = np.empty(len(p))
    corrected[order] = np.maximum.accumulate(raised)
    return corrected.tolist()


class Best(NamedTuple):
    """Position of the best rate, and whether a better one may exist: it is at an edge of the grid, or alone trains."""

    rate: int
    at_edge: bool


def best_rate(validation: ArrayLike, ceiling: float = math.inf) -> Best:
    """The rate [of seeds, rates] with the smallest mean validation loss; rates must be sorted.

    Of rates that agree to twelve digits the first. A loss that is not below `ceiling` counts as failed; the only rate
    without a failed seed counts as an edge.

    >>> best_rate([[0.3, 0.1, 0.2], [0.3, 0.2, 0.2]])
    Best(rate=1, at_edge=False)
    """
    table = np.asarray(validation, float)
    rate, trained = int(table.mean(0).round(12).argmin()), np.all(table < ceiling, axis=0)
    return Best(rate, rate in (0, len(trained) - 1) or int(trained.sum()) == 1)


@dataclass(frozen=True)
class Comparison:
    """An arm against a base, by both rules.

    Attributes:
        at_best: each at its own best rate.
        over_rates: the mean over the rates at which every training of both arms is below the ceiling.
        rates: how many rates that mean takes.
        arm: the arm's best rate.
        base: the base's best rate.
    """

    at_best: Effect
    over_rates: Effect
    rates: int
    arm: Best
    base: Best


def compare(
    arm: ArrayLike, base: ArrayLike, *, arm_validation: ArrayLike, base_validation: ArrayLike, ceiling: float = math.inf
) -> Comparison:
    """Losses of an arm against those of a base, tables [seeds, rates] of the same seeds and rates.

    Each arm has its rate chosen by its own validation loss, paired by seed with the base at the base's best rate. The
    mean over rates pairs at the same rate; a loss that is not below `ceiling` (of a guess, say) counts as failed.

    Raises:
        ShapeError: when the four tables differ in shape.

    >>> base = [[0.5, 0.4, 0.6], [0.7, 0.5, 0.8]]
    >>> arm = [[0.4, 0.3, 9.0], [0.5, 0.5, 0.9]]
    >>> found = compare(arm, base, arm_validation=arm, base_validation=base, ceiling=2.3)
    >>> round(found.at_best.mean, 3), round(found.over_rates.mean, 3), found.rates, found.arm.rate
    (-0.05, -0.1, 2, 1)
    """
    a, b = np.asarray(arm, float), np.asarray(base, float)
    shapes = {np.shape(table) for table in (a, b, arm_validation, base_validation)}
    if len(shapes) > 1 or a.ndim != 2:
        raise ShapeError(
            "tables", "[seeds, rates], all the same", sorted(shapes), "take the same seeds and rates for both"
        )
    mine, other = best_rate(arm_validation, ceiling), best_rate(base_validation, ceiling)
    trained = ((a < ceiling) & (b < ceiling) & np.isfinite(a) & np.isfinite(b)).all(0)
    over = paired((a[:, trained] - b[:, trained]).mean(1)) if trained.any() else paired([math.inf] * len(a))
    return Comparison(paired(a[:, mine.rate], b[:, other.rate]), over, int(trained.sum()), mine, other)


def fieller(top: ArrayLike, bottom: ArrayLike) -> tuple[float, float, float]:
    r"""A ratio of two means of paired numbers, and its 95% interval by Fieller's theorem.

    The interval holds the ratios r at which the mean of top - r bottom is not clearly different from zero. Where the
    mean of `bottom` itself is not, no bounded interval exists, and it is (-inf, inf).

    >>> ratio, low, high = fieller([2.0, 2.2, 1.9], [1.0, 1.1, 1.05])
    >>> print(f"{ratio:.2f} [{low:.2f}, {high:.2f}]")
    1.94 [1.66, 2.21]
    """
    x, y = np.asarray(top, float), np.asarray(bottom, float)
    n, t = len(x), float(stats.t.ppf(0.975, len(x) - 1))
    (xx, xy), (_, yy) = np.cov(x, y) * t**2 / n
    # |mean(x) - r mean(y)| <= t * its standard error, a quadratic inequality in r
    a, b, c = y.mean() ** 2 - yy, x.mean() * y.mean() - xy, x.mean() ** 2 - xx
    ratio = float(x.mean() / y.mean())
    if a <= 0:
        return ratio, -math.inf, math.inf
    root = math.sqrt(max(b**2 - a * c, 0.0))
    return ratio, float((b - root) / a), float((b + root) / a)
