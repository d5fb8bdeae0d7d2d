r"""What may move, as equations between the entries of axes.

Every entry of every axis has a *label*, an integer: label $2v$ stands for the variable $s_v$, label $2v+1$ for $-s_v$,
and 0 for "does not move". A rescaling multiplies the tensor entry with labels a, b, ... by $e^{s_a + s_b + \dots}$, a
flip of signs by $(-1)^{s_a + s_b + \dots}$, and a permutation moves an entry to the place of another one.
What a model does to its tensors gives equations between the labels, one system for each kind of group; their solutions
(`teleport_lite.discovery.solve`) are the symmetries that can be proposed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

SCALE, SIGN, PERM, MIX = 1, 2, 4, 8  # the systems, as bits
TURN = 16  # that of rotations, which is MIX but for norms and their gains
ALL = SCALE | SIGN | PERM


def negate_labels(labels: Tensor) -> Tensor:
    """The labels of $-s$."""
    return torch.where(labels < 2, labels, labels ^ 1)


@lru_cache(4096)
def nearest_fraction(number: float) -> float:
    """The fraction with a small denominator that a computed number is, or else the number without its last digits.

    >>> nearest_fraction(0.33333333333), nearest_fraction(0.7071067811865476)
    (0.3333333333333333, 0.7071067811865)
    """
    near = float(Fraction(number).limit_denominator(64)) if math.isfinite(number) else number
    return near if abs(near - number) < 1e-9 else float(f"{number:.13g}")


@dataclass
class Constraints:
    """A growing list of equations between labels.

    Attributes:
        count: number of variables; the first one is zero.
        equalities: labels a, b with $s_a = k s_b$, pair by pair, in which systems, and k, which is 1 but for scalings.
        sums: labels a, b, o with $s_o = s_a + s_b$.
        crossings: labels a, b, o of the entries of one tensor, which are permuted as those of a, or as those of b.
        blocks: labels b of a factor that is the same for blocks of entries, and o of the product: a block is permuted
            with b where b moves, and its entries among themselves where b stays.
        fixed: labels that do not move, in which systems, and why.
        colors: labels, a colour for each, and in which systems different colours are told apart.
        gains: labels of what multiplies an axis and consists of parameters.
        lengths: the first labels of norms, of which a bound lets everything pass that guards a division by zero.
        offsets: labels of parameters to which a number was added, those of the parameters themselves, and the number.
        biases: labels of sums with a bias, and those of that bias.
        absorbed: labels of biases, and a constant, as numbers for each entry, that was added to such a sum.
    """

    count: int = 1
    equalities: list[tuple[Tensor, Tensor, int, float]] = field(default_factory=list)
    sums: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    crossings: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    blocks: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    fixed: list[tuple[Tensor, int, str]] = field(default_factory=list)
    colors: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)
    gains: list[Tensor] = field(default_factory=list)
    lengths: set[int] = field(default_factory=set)
    offsets: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)
    biases: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    absorbed: list[tuple[Tensor, tuple[float, ...]]] = field(default_factory=list)

    def fresh(self, *shape: int) -> Tensor:
        """Labels of new variables."""
        size = torch.Size(shape).numel()
        self.count += size
        return 2 * torch.arange(self.count - size, self.count).reshape(shape)

    def fresh_axes(self, shape: Sequence[int]) -> list[Tensor]:
        """New labels for each axis of a tensor of that shape."""
        return [self.fresh(*(n if d == i else 1 for i, n in enumerate(shape))) for d in range(len(shape))]

    def equate(self, a: Tensor, b: Tensor, systems: int = ALL, power: float = 1.0) -> None:
        """Entries with these labels move in the same way, or, where multiplied, those of a by a power of that of b."""
        if a is not b:
            a, b = torch.broadcast_tensors(a, b)
            self.equalities.append((a.reshape(-1), b.reshape(-1), systems, power))

    def fix(self, labels: Tensor, why: str, systems: int = SCALE | SIGN) -> None:
        """Entries with these labels are not multiplied by anything; with PERM, they also keep their places."""
        self.fixed.append((labels.reshape(-1), systems, why))

    def sum_of(self, a: Tensor, b: Tensor, crossing: bool = False) -> Tensor:
        """New labels, $s_a + s_b$.

        Args:
            a: labels.
            b: labels.
            crossing: whether both are of one tensor, whose entries are permuted along one of two axes; by default they
                are of the factors of a product, and all three are permuted together.
        """
        sizes = a.numel(), b.numel()
        a, b = torch.broadcast_tensors(a, b)
        out = self.fresh(*a.shape)
        self.sums.append((a.reshape(-1), b.reshape(-1), out.reshape(-1)))
        if crossing:
            self.crossings.append(self.sums[-1])
            return out
        for factor, size in zip((a, b), sizes, strict=True):
            if size < out.numel():
                self.blocks.append((factor.reshape(-1), out.reshape(-1)))
            else:
                self.equate(factor, out, PERM)
        return out

    def distinguish(self, labels: Tensor, colors: Tensor | None = None, systems: int = PERM | MIX) -> None:
        """Entries of different `colors` (by default, any two) are not exchanged (PERM) or not mixed (MIX)."""
        if colors is None:
            colors = torch.arange(labels.numel())
        else:
            labels, colors = torch.broadcast_tensors(labels, colors)
        self.colors.append((labels.reshape(-1), colors.reshape(-1), systems))

    def sum_labels(self, labels: Sequence[Tensor]) -> Tensor | None:
        """The labels of one tensor as one, their sum; None when there is none."""
        if not labels:
            return None
        first, *rest = labels
        for a in rest:
            first = self.sum_of(first, a, crossing=True)
        return first

    def tie_along(self, labels: Tensor, dims: Sequence[int], systems: int = ALL) -> Tensor:
        """Entries that differ only along `dims` made to move in the same way; length 1 along them remains."""
        for d in dims:
            if labels.shape[d] > 1:
                first = labels.narrow(d, 0, 1)
                self.equate(first, labels.narrow(d, 1, labels.shape[d] - 1), systems)
                labels = first
        return labels
