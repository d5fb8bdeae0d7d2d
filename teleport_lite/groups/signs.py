"""Flips of the signs of the entries of a vector."""

from __future__ import annotations

import torch

from teleport_lite.groups.base import Group, draw_like, multiply_along


class Signs(Group):
    r"""$\{+1, -1\}^n$: `xi` is the tensor [n] of signs itself, acting by $x_i \mapsto \xi_i x_i$.

    >>> group = Signs(2)
    >>> group.along(torch.tensor([1.0, -1.0]), torch.ones(2), 0)
    tensor([ 1., -1.])
    """

    kind = "sign"
    isometry = True
    dim = 0

    @property
    def symbol(self) -> str:
        return f"{{1,-1}}^{self.n}"

    def zeros(self, like):
        return like.new_ones(self.n)

    def compose(self, g, h):
        return g * h

    def along(self, g, tensor, dim):
        return multiply_along(g, tensor, dim)

    def sample(self, like, *, radius=1.0, generator=None):
        return torch.where(draw_like(torch.rand, self.n, like=like, generator=generator) < 0.5, -1.0, 1.0).to(like)

    def inverse(self, xi):
        return xi
