"""Positive scalings of the entries of a vector."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from teleport_lite.groups.base import Group, draw_like, multiply_along

NEWTON = 20  # steps, each of which doubles the digits in the end


class PositiveScaling(Group):
    r"""$(\mathbb R_{>0})^n$: `xi` of shape [n], acting by $x_i \mapsto e^{\xi_i} x_i$.

    >>> group, one = PositiveScaling(2), torch.ones(2)
    >>> group.along(group.exp(torch.tensor([0.0, 2.0]).log1p()), one, 0)
    tensor([1., 3.])
    """

    kind = "scaling"

    @property
    def symbol(self) -> str:
        return f"(R>0)^{self.n}"

    def exp(self, xi):
        return xi.exp()

    def compose(self, g, h):
        return g * h

    def along(self, g, tensor, dim):
        return multiply_along(g, tensor, dim)

    def sample(self, like, *, radius=1.0, generator=None):
        return radius * (2 * draw_like(torch.rand, self.n, like=like, generator=generator) - 1)

    def dual(self, xi):
        return -xi

    def norm(self, xi):
        return xi.abs().amax()

    def clip(self, xi, radius):
        return xi.clamp(-radius, radius)

    def gram(self, tensor: Tensor, dim: int) -> Tensor:
        """Squared length of each slice of `tensor` along `dim`: shape [n]."""
        return tensor.movedim(dim, 0).reshape(self.n, -1).square().sum(1)

    def extremum(
        self, *coefficients: Tensor, powers: Sequence[float] = (1.0, -1.0), maximize: bool, radius: float
    ) -> Tensor:
        r"""Extremise $\sum_p u_p e^{2p\xi}$ over $|\xi| \le r$, entry by entry.

        Convex: the maximum is at $\pm r$, the minimum where $\log \sum_{p>0} p u_p e^{2p\xi}$ equals the same for
        the negative powers, clipped. Both are linear in $\xi$ with one power each, which gives
        $\tfrac14 \log(d / u)$ for $u e^{2\xi} + d e^{-2\xi}$. With more powers Newton's method converges from
        anywhere: the slope is the sum of a rising and a falling term, so no step leaves the bracket of those before.
        Where all coefficients are zero the coordinate stays at zero, and so it does where there is no minimum.

        >>> PositiveScaling(1).extremum(torch.tensor([1.0]), torch.tensor([16.0]), maximize=False, radius=1.0)
        tensor([0.6931])
        """
        order = sorted(range(len(powers)), key=lambda k: -powers[k])
        us, ps = [coefficients[k] for k in order], [powers[k] for k in order]
        if maximize:  # u_p sinh(2 p r), divided by what the largest power may overflow
            top = max(abs(p) for p in ps)
            sizes = [math.exp(2 * radius * (abs(p) - top)) * -math.expm1(-4 * radius * abs(p)) for p in ps]
            ends = [math.copysign(size, p) * u for size, p, u in zip(sizes, ps, us, strict=True)]
            up = (functools.reduce(torch.add, ends) >= 0).to(us[0])
            return (2 * radius * up - radius).masked_fill(functools.reduce(torch.add, us) == 0, 0.0)
        if len(powers) == 2:
            down, up = ((u if abs(p) == 1 else u * abs(p)).log() for u, p in zip(us[::-1], ps[::-1], strict=True))
            return ((down - up) / (2 * (ps[0] - ps[1]))).nan_to_num(0.0, 0.0, 0.0).clamp(-radius, radius)
        u = torch.stack(us)
        p = torch.stack([torch.full_like(u[0], power) for power in ps])
        size = p.abs()
        positive = sum(power > 0 for power in powers)
        above, below = slice(positive), slice(positive, None)
        xi = torch.zeros_like(u[0])
        start = (u * size).log()
        for _ in range(NEWTON):
            logs = start + 2 * p * xi
            gap = logs[above].logsumexp(0) - logs[below].logsumexp(0)
            xi = xi - gap / (2 * sum((logs[s].softmax(0) * size[s]).sum(0) for s in (above, below)))
        there = (u[above] > 0).any(0) & (u[below] > 0).any(0)
        return torch.where(there, xi.clamp(-radius, radius), 0.0)
