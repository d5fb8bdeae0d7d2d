"""Permutations of the entries of a vector."""

from __future__ import annotations

import torch

from teleport_lite.groups.base import Group, draw_like


class Permutation(Group):
    """The permutations of n things: `xi` is the index tensor [n] itself, acting by x -> x[xi].

    >>> group = Permutation(3)
    >>> cycle = torch.tensor([1, 2, 0])
    >>> group.along(cycle, torch.tensor([10, 20, 30]), 0), group.inverse(cycle)
    (tensor([20, 30, 10]), tensor([2, 0, 1]))
    """

    kind = "permutation"
    isometry = True
    dim = 0

    @property
    def symbol(self) -> str:
        return f"S({self.n})"

    def zeros(self, like):
        return torch.arange(self.n, device=like.device)

    def compose(self, g, h):
        return h[g]

    def along(self, g, tensor, dim):
        return tensor.index_select(dim, g)

    def sample(self, like, *, radius=1.0, generator=None):
        return draw_like(torch.rand, self.n, like=like, generator=generator).argsort()

    def inverse(self, xi):
        return xi.argsort()
