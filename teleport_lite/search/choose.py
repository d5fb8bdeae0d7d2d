"""How a group element is chosen: in closed form, by ascent in the algebra, or at random."""

from __future__ import annotations

import torch
from torch import Tensor

from teleport_lite.errors import UnknownNameError
from teleport_lite.objectives import Objective
from teleport_lite.problem import Problem
from teleport_lite.search.ascent import ascent
from teleport_lite.search.closed_form import closed_form, has_closed_form
from teleport_lite.symmetries.product import Product


def search(
    problem: Problem,
    symmetry: Product,
    objective: Objective,
    *,
    how: str | None,
    maximize: bool,
    radius: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, ...]:
    """Coordinates that improve `objective` along the orbit, within `radius`.

    Args:
        problem: the loss at a point.
        symmetry: where to move.
        objective: what to improve.
        how: "closed_form", "ascent", "random", or None for the closed form where there is one and ascent elsewhere.
        maximize: the direction.
        radius: bound on the operator norm of the coordinates.
        generator: for "random", and for random starts of an ascent (without one it starts at the identity only).

    Raises:
        UnknownNameError: when there is no such search.
    """
    if how is None:
        how = "closed_form" if has_closed_form(symmetry, objective) else "ascent"
    if how == "random":
        return symmetry.sample(problem.point, radius=radius, generator=generator)
    if how == "closed_form" and has_closed_form(symmetry, objective):
        tensors = problem.gradient if objective.quadratic == "gradient" else problem.params
        return closed_form(symmetry, tensors, objective.quadratic == "gradient", maximize=maximize, radius=radius)
    if how == "ascent":
        starts = [symmetry.zeros(problem.params)]
        if generator is not None:
            starts += [symmetry.sample(problem.params, radius=radius, generator=generator) for _ in range(4)]
        along = problem.along(objective, symmetry)
        return ascent(along, symmetry, starts, maximize=maximize, radius=radius)
    known = ["closed_form", "ascent", "random"] if has_closed_form(symmetry, objective) else ["ascent", "random"]
    raise UnknownNameError(f"search for {objective.name}", how, known)
