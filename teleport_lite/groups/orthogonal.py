"""Rotations."""

from __future__ import annotations

import torch

from teleport_lite.groups.base import Group, draw, in_ball, matmul_along, matrix_exp, spectral_norm, wide


class SpecialOrthogonal(Group):
    r"""$SO(n)$: `xi` of shape [n(n-1)/2], the lower triangle of a skew matrix; for n = 2 the angle.

    >>> group = SpecialOrthogonal(2)
    >>> group.exp(torch.tensor([torch.pi / 2])).round().abs()
    tensor([[0., 1.],
            [1., 0.]])
    """

    kind = "rotation"
    isometry = True

    @property
    def dim(self) -> int:
        return self.n * (self.n - 1) // 2

    @property
    def symbol(self) -> str:
        return f"SO({self.n})"

    def zeros(self, like):
        return like.new_zeros(self.dim, dtype=wide(like.dtype))

    def algebra(self, xi):
        i, j = torch.tril_indices(self.n, self.n, -1, device=xi.device)
        lower = xi.new_zeros(self.n, self.n).index_put((i, j), xi)
        return lower - lower.mT

    def exp(self, xi):
        return matrix_exp(self.algebra(xi))

    def compose(self, g, h):
        return g @ h

    def along(self, g, tensor, dim):
        return matmul_along(g, tensor, dim)

    def sample(self, like, *, radius=1.0, generator=None):
        drawn = draw(torch.randn, self.dim, like=like, generator=generator)
        return in_ball(drawn, self.norm(drawn), self.dim, radius, generator)

    def norm(self, xi):
        return spectral_norm(self.algebra(xi))

    def clip(self, xi, radius):
        return xi * (radius / self.norm(xi).clamp(min=radius))
