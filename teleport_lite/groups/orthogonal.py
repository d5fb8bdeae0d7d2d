"""Rotations."""

from __future__ import annotations

import math

import torch

from teleport_lite.errors import TeleportError
from teleport_lite.groups.base import Group, draw_like, in_ball, matmul_along, matrix_exp, same_dtype, spectral_norm


class SpecialOrthogonal(Group):
    r"""$SO(n)$: `xi` of shape [n(n-1)/2], the lower triangle of a skew matrix; for n = 2 the angle.

    Args:
        n: length of the vectors.
        centered: only the rotations that keep the vector of ones, the group $SO(n-1)$ of its complement, which also
            keep the mean of a vector. The reflection $H$ that exchanges the last basis vector with that of ones carries
            the complement to the first n - 1 coordinates, and `xi` is that of $H A H$.

    >>> group = SpecialOrthogonal(2)
    >>> group.exp(torch.tensor([torch.pi / 2])).round().abs()
    tensor([[0., 1.],
            [1., 0.]])
    """

    kind = "rotation"
    isometry = matrices = True

    def __init__(self, n: int, centered: bool = False) -> None:
        super().__init__(n)
        self.centered, self.m = centered, n - centered

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.m * (self.m - 1) // 2,)

    @property
    def symbol(self) -> str:
        return f"SO({self.m})"

    def algebra(self, xi):
        i, j = torch.tril_indices(self.m, self.m, -1, device=xi.device)
        lower = xi.new_zeros(self.n, self.n).index_put((i, j), xi)
        skew = lower - lower.mT
        if not self.centered:
            return skew
        v = xi.new_ones(self.n)
        v[-1] -= math.sqrt(self.n)
        half = torch.outer(skew @ v, v / (self.n - math.sqrt(self.n)))  # H A H, with H = 1 - 2 v v^T / |v|^2
        return skew - half + half.mT

    def exp(self, xi):
        return matrix_exp(self.algebra(xi))

    def compose(self, g, h):
        return g @ h

    def along(self, g, tensor, dim):
        return matmul_along(g, tensor, dim)

    def sample(self, like, *, radius=1.0, generator=None):
        drawn = draw_like(torch.randn, self.dim, like=like, generator=generator)
        return in_ball(drawn, self.norm(drawn), self.dim, radius, generator)

    def norm(self, xi):
        return spectral_norm(self.algebra(xi))


class PairRotations(Group):
    r"""$SO(2)^{n/2}$: `xi` of shape [n/2], the angles by which pairs of entries turn.

    Args:
        n: length of the vectors.
        halves: whether entry i is paired with entry i + n/2, or 2i with 2i + 1; both are layouts of rotary positions.

    >>> group = PairRotations(4, halves=True)
    >>> group.along(group.exp(torch.tensor([torch.pi / 2, 0.0])), torch.tensor([1.0, 2.0, 3.0, 4.0]), 0).round()
    tensor([-3.,  2.,  1.,  4.])
    """

    kind = "rotation"
    isometry = True

    def __init__(self, n: int, halves: bool = False) -> None:
        super().__init__(n)
        if n % 2:
            raise TeleportError("vectors of even length", n, "pass the number of entries, two for each angle")
        self.halves = halves

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n // 2,)

    @property
    def symbol(self) -> str:
        return f"SO(2)^{self.dim}"

    def algebra(self, xi):
        return torch.stack([0 * xi, -xi, xi, 0 * xi]).view(2, 2, -1)

    def exp(self, xi):
        return torch.stack([xi.cos(), -xi.sin(), xi.sin(), xi.cos()]).view(2, 2, -1)

    def compose(self, g, h):
        return torch.einsum("abm,bcm->acm", g, h)

    def along(self, g, tensor, dim):
        shape = (2, self.dim) if self.halves else (self.dim, 2)
        g, pairs = same_dtype(g, tensor.movedim(dim, -1).unflatten(-1, shape))
        turned = torch.einsum("abm,...bm->...am" if self.halves else "abm,...mb->...ma", g, pairs)
        return turned.flatten(-2).movedim(-1, dim).to(tensor.dtype)

    def sample(self, like, *, radius=1.0, generator=None):
        return radius * (2 * draw_like(torch.rand, self.dim, like=like, generator=generator) - 1)

    def norm(self, xi):
        return xi.abs().amax()

    def clip(self, xi, radius):
        return xi.clamp(-radius, radius)
