"""Positive scalings of the entries of a vector."""

from __future__ import annotations

import torch
from torch import Tensor

from teleport_lite.groups.base import Group, draw, multiply_along, wide


class PositiveScaling(Group):
    r"""$(\mathbb R_{>0})^n$: `xi` of shape [n], acting by $x_i \mapsto e^{\xi_i} x_i$.

    >>> group, one = PositiveScaling(2), torch.ones(2)
    >>> group.along(group.exp(torch.tensor([0.0, 2.0]).log1p()), one, 0)
    tensor([1., 3.])
    """

    kind = "scaling"

    @property
    def dim(self) -> int:
        return self.n

    @property
    def symbol(self) -> str:
        return f"(R>0)^{self.n}"

    def zeros(self, like):
        return like.new_zeros(self.n, dtype=wide(like.dtype))

    def exp(self, xi):
        return xi.exp()

    def compose(self, g, h):
        return g * h

    def along(self, g, tensor, dim):
        return multiply_along(g, tensor, dim)

    def sample(self, like, *, radius=1.0, generator=None):
        return radius * (2 * draw(torch.rand, self.n, like=like, generator=generator) - 1)

    def dual(self, xi):
        return -xi

    def norm(self, xi):
        return xi.abs().amax()

    def clip(self, xi, radius):
        return xi.clamp(-radius, radius)

    def gram(self, tensor: Tensor, dim: int) -> Tensor:
        """Squared length of each slice of `tensor` along `dim`: shape [n]."""
        return tensor.movedim(dim, 0).reshape(self.n, -1).square().sum(1)

    def extremum(self, up: Tensor, down: Tensor, *, maximize: bool, radius: float) -> Tensor:
        r"""Extremise $\sum_i u_i e^{2\xi_i} + d_i e^{-2\xi_i}$ over $|\xi_i| \le r$, in closed form.

        Convex in each coordinate: the maximum is at the corner $\pm r$ on the side of the larger coefficient, the
        minimum at $\tfrac14 \log(d_i / u_i)$, clipped. Where both coefficients are zero the coordinate stays at zero,
        and so it does where one is and there is no minimum.

        >>> PositiveScaling(1).extremum(torch.tensor([1.0]), torch.tensor([16.0]), maximize=False, radius=1.0)
        tensor([0.6931])
        """
        if maximize:
            return radius * torch.where((up == 0) & (down == 0), 0.0, torch.where(up >= down, 1.0, -1.0)).to(up)
        balanced = ((down.log() - up.log()) / 4).clamp(-radius, radius)
        return torch.where((up == 0) | (down == 0), 0.0, balanced)
