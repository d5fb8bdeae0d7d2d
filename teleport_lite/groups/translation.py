"""Translations."""

from __future__ import annotations

import torch

from teleport_lite.groups.base import Group, draw_like, in_ball


class Translation(Group):
    r"""The additive group $\mathbb R^n$: `xi` of shape [n], acting by $x \mapsto x + \xi$; its norm is the length.

    >>> group = Translation(2)
    >>> group.along(group.exp(torch.tensor([1.0, -1.0])), torch.ones(2), 0)
    tensor([2., 0.])
    """

    kind = "translation"

    @property
    def symbol(self) -> str:
        return f"R^{self.n}"

    def compose(self, g, h):
        return g + h

    def along(self, g, tensor, dim):
        return (tensor + g.reshape([-1 if d == dim else 1 for d in range(tensor.ndim)])).to(tensor.dtype)

    def sample(self, like, *, radius=1.0, generator=None):
        drawn = draw_like(torch.randn, self.n, like=like, generator=generator)
        return in_ball(drawn, self.norm(drawn), self.n, radius, generator)

    def norm(self, xi):
        return torch.linalg.vector_norm(xi)
