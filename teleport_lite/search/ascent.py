"""Ascent in the algebra, where there is no closed form."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from teleport_lite.functional import gradients
from teleport_lite.groups import GeneralLinear, Group
from teleport_lite.groups.base import spectral_norm
from teleport_lite.problem import AlongOrbit
from teleport_lite.runtime import unfused_attention
from teleport_lite.symmetries.product import Product

STEPS = 30  # of an ascent


def ascent(
    along: AlongOrbit,
    symmetry: Product,
    starts: list[tuple[Tensor, ...]],
    *,
    maximize: bool,
    radius: float,
) -> tuple[Tensor, ...]:
    """Improve `along` from each of `starts` by clipped gradient steps in the algebra; the best point found.

    A step that improves is kept and the next one is longer; one that does not is undone and the next one is shorter.
    Finite groups stay where they start. A device is waited for once a step for each size of matrices, and else never:
    their singular values are clipped on the CPU, for torch waits for a decomposition anyway.

    Args:
        along: the objective as a function of the coordinates.
        symmetry: gives the norm and the clipping of each factor.
        starts: coordinates to begin at.
        maximize: the direction.
        radius: bound on the operator norm of each factor.
    """
    sign = 1.0 if maximize else -1.0
    groups = [f.group for f in symmetry]

    def value_and_directions(xi: tuple[Tensor, ...]) -> tuple[Tensor, Sequence[Tensor]]:
        points = [x.detach().requires_grad_() if g.dim else x for x, g in zip(xi, groups, strict=True)]
        free = [x for x in points if x.requires_grad]
        with torch.enable_grad(), unfused_attention():
            value = sign * along(tuple(points))
            grads = iter(gradients(value, free) if free and value.requires_grad else free)
        directions = []
        for x in points:
            d = next(grads) if x.requires_grad else None
            directions.append(torch.zeros_like(x) if d is None or not value.requires_grad else d)
        return value.detach(), directions

    best, best_value = starts[0], None
    for xi in starts:
        value, directions = value_and_directions(xi)
        step = torch.full_like(value, radius / 2)
        for _ in range(STEPS):
            trial = _take_steps(groups, xi, directions, step, radius)
            trial_value, trial_directions = value_and_directions(trial)
            better = trial_value > value
            xi = _select_where(better, trial, xi)
            directions = _select_where(better, trial_directions, directions)
            value = torch.where(better, trial_value, value)
            step = torch.where(better, 1.5 * step, step / 3)
        keep = torch.ones_like(value, dtype=torch.bool) if best_value is None else ~(value <= best_value)
        best = _select_where(keep, xi, best)
        best_value = value if best_value is None else torch.where(keep, value, best_value)
    return best


def _select_where(chosen: Tensor, new: Sequence[Tensor], old: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.where(chosen.to(a.device), a, b) for a, b in zip(new, old, strict=True))


def _take_steps(
    groups: list[Group], xi: Sequence[Tensor], directions: Sequence[Tensor], step: Tensor, radius: float
) -> tuple[Tensor, ...]:
    """A step of this length along each direction, within the radius; matrices of one size together, on the CPU."""
    found, sizes = list(xi), defaultdict(list)
    for k, (g, x, d) in enumerate(zip(groups, xi, directions, strict=True)):
        if isinstance(g, GeneralLinear):
            sizes[g, x.dtype, x.device].append(k)
        elif g.dim:
            found[k] = g.clip(x + step.to(x) * (d / g.norm(d).clamp(min=torch.finfo(d.dtype).tiny)), radius)
    for (g, _, device), same in sizes.items():
        xs, ds = (torch.stack([tensors[k] for k in same]) for tensors in (xi, directions))
        x, d, length = torch.stack([xs, ds.to(xs), step.to(xs).expand_as(xs)]).cpu()
        norms = spectral_norm(d).reshape(len(d), -1).amax(1).clamp(min=torch.finfo(d.dtype).tiny)
        moved = g.clip(x + length * (d / norms.view(-1, *[1] * (d.ndim - 1))), radius)
        for k, new in zip(same, moved.to(device, non_blocking=True), strict=True):
            found[k] = new
    return tuple(found)
