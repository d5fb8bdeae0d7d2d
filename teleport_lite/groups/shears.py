"""Shears along the vector of ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from teleport_lite.groups.base import Group, draw_like, in_ball, matmul_along, multiply_along, same_dtype

NEAR = 0.1  # where ten terms of a series are exact in float64


class Shears(Group):
    r"""The matrices $I + s 1^\top$ with $1 + 1^\top s > 0$: `xi` of shape [n], acting by $e^{\xi 1^\top}$.

    They keep each vector whose entries have the sum zero, as what a LayerNorm gives. As a group they are the maps
    $x \mapsto e^t x + c$ of $\mathbb R^{n-1}$. With $M = \xi 1^\top$, of rank one and trace t, $M^2 = t M$, and so
    $e^M = I + \varphi(t) M$ with $\varphi(t) = (e^t - 1) / t$.

    Args:
        n: length of the vectors.
        transposed: the matrices $I + 1 s^\top$ in their place, which change a vector by a multiple of that of ones.

    >>> group = Shears(2)
    >>> group.along(group.exp(torch.tensor([1.0, -1.0])), torch.tensor([[1.0, -1.0], [1.0, 0.0]]), 1)
    tensor([[ 1., -1.],
            [ 2., -1.]])
    """

    kind = "shear"

    def __init__(self, n: int, transposed: bool = False) -> None:
        super().__init__(n)
        self.transposed = transposed

    @property
    def symbol(self) -> str:
        return f"Sh({self.n})"

    def algebra(self, xi):
        """The matrix M; a matrix, which `dual` gives, stands for itself."""
        if xi.ndim > 1:
            return xi
        m = xi[:, None].expand(self.n, self.n)
        return m.mT if self.transposed else m

    def exp(self, xi):
        m = self.algebra(xi)
        return torch.eye(self.n, dtype=m.dtype, device=m.device) + _exponential_quotient(m.diagonal().sum()) * m

    def compose(self, g, h):
        return g @ h

    def along(self, g, tensor, dim):
        if 0 not in g.stride():
            return matmul_along(g, tensor, dim)
        g, x = same_dtype(g, tensor)  # of rank one, s 1^T or 1 s^T
        if g.stride(1) == 0:
            x = multiply_along(g[:, 0], x.sum(dim, keepdim=True).expand_as(x), dim)
        else:
            x = multiply_along(g[0], x, dim).sum(dim, keepdim=True).expand_as(x)
        return x.to(tensor.dtype)

    def sample(self, like, *, radius=1.0, generator=None):
        drawn = draw_like(torch.randn, self.n, like=like, generator=generator)
        return in_ball(drawn, self.norm(drawn), self.n, radius, generator)

    def dual(self, xi):
        return self.algebra(-xi).mT

    def norm(self, xi):
        return self.n**0.5 * torch.linalg.vector_norm(xi)


def _exponential_quotient(t: Tensor) -> Tensor:
    r"""$(e^t - 1) / t = \sum_k t^k / (k + 1)!$, by ten terms near zero, where it is to be smooth."""
    near = t.abs() < NEAR
    away = torch.where(near, 1.0, t)
    series = torch.full_like(t, 1 / math.factorial(10))
    for k in range(9, 0, -1):
        series = series * t + 1 / math.factorial(k)
    return torch.where(near, series, away.expm1() / away)
