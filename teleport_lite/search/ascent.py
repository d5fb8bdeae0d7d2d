"""Ascent in the algebra, where there is no closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from teleport_lite.functional import gradients
from teleport_lite.objectives import AlongOrbit
from teleport_lite.runtime import unfused_attention
from teleport_lite.symmetries.product import Product

STEPS = 30  # of an ascent


def ascent(
    along: AlongOrbit,
    symmetry: Product,
    starts: list[tuple[Tensor, ...]],
    *,
    maximize: bool = True,
    radius: float = 1.0,
) -> tuple[Tensor, ...]:
    """Improve `along` from each of `starts` by clipped gradient steps in the algebra; the best point found.

    A step that improves is kept and the next one is longer; one that does not is undone and the next one is shorter.
    Finite groups stay where they start.

    Args:
        along: the objective as a function of the coordinates.
        symmetry: gives the norm and the clipping of each factor.
        starts: coordinates to begin at.
        maximize: the direction.
        radius: bound on the operator norm of each factor.
    """
    sign = 1.0 if maximize else -1.0
    groups = [f.group for f in symmetry]

    def slope(xi: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        points = [x.detach().requires_grad_() if g.dim else x for x, g in zip(xi, groups, strict=True)]
        free = [x for x in points if x.requires_grad]
        with torch.enable_grad(), unfused_attention():
            value = sign * along(tuple(points))
            grads = iter(gradients(value, free) if free and value.requires_grad else free)
        directions = []
        for x, g in zip(points, groups, strict=True):
            d = next(grads) if x.requires_grad else None
            d = torch.zeros_like(x, dtype=value.dtype) if d is None or not value.requires_grad else d
            directions.append(d / g.norm(d).clamp(min=torch.finfo(d.dtype).tiny) if g.dim else d)
        return value.detach(), directions

    best, best_value = starts[0], None
    for xi in starts:
        value, directions = slope(xi)
        step = torch.full_like(value, radius / 2)
        for _ in range(STEPS):
            trial = tuple(
                g.clip(x + step.to(x) * d, radius) if g.dim else x
                for x, d, g in zip(xi, directions, groups, strict=True)
            )
            trial_value, trial_directions = slope(trial)
            better = trial_value > value
            xi = tuple(torch.where(better, t, x) for t, x in zip(trial, xi, strict=True))
            directions = [torch.where(better, t, d) for t, d in zip(trial_directions, directions, strict=True)]
            value = torch.where(better, trial_value, value)
            step = torch.where(better, 1.5 * step, step / 3)
        keep = torch.ones_like(value, dtype=torch.bool) if best_value is None else ~(value <= best_value)
        best = tuple(torch.where(keep, x, b) for x, b in zip(xi, best, strict=True))
        best_value = value if best_value is None else torch.where(keep, value, best_value)
    return best
