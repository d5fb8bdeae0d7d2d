"""Whether rounding alone moved a loss, or a gradient: asked where they did not stay within the tolerance."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from teleport_lite.discovery.float64 import Float64
from teleport_lite.functional import Evaluation, Params, entry_norms, value_and_grad
from teleport_lite.host import on_host
from teleport_lite.problem import Problem
from teleport_lite.runtime import home_of_float64
from teleport_lite.symmetries.product import Product

ULPS = 4  # units in the last place by which weights are moved to see what rounding does
TIMES = 4  # of what that does: rounding may have done so much
ALIKE = 1e-5  # two losses in float64, relative: there rounding is no excuse


def relative_gap(found: Tensor, expected: Tensor) -> Tensor:
    """The distance of two vectors, relative to the longer one."""
    size = torch.maximum(found.norm(), expected.norm())
    return torch.where(size > 0, (found - expected).norm() / size, 0.0)


def jitter_ulps(params: Params, sign: int, seed: int = 0, share: float | None = None) -> Params:
    """`params` with each entry moved by `ULPS` units in its last place, up or down at random, or the other way.

    Or by a `share` of itself, where that is given.

    >>> w = {"w": torch.ones(100)}
    >>> float((jitter_ulps(w, 1)["w"] - 1).abs().max()) < 1e-6
    True
    """
    draw = torch.Generator().manual_seed(seed)

    def move_entries(p: Tensor) -> Tensor:
        signs = torch.randint(0, 2, p.shape, generator=draw).to(p.device) * 2 - 1
        return p * (1 + sign * (share or ULPS * torch.finfo(p.dtype).eps) * signs.to(p.dtype))

    return {name: move_entries(p) if p.is_floating_point() else p for name, p in params.items()}


def moves_the_loss(before: float, after: float, problem: Problem, product: Product, xi: Any) -> bool:
    """Whether it is rounding alone that moved the loss, as it does where that is small beside its terms.

    Rounding the weights moves it as far. Where there is something finer, float64 decides: the loss does not move there,
    from what the inverse element makes of the new point, and no further here than a few times what rounding does, to
    the weights or to what is computed with them. A loss that changes by itself does so in float64 too.
    """
    near = [after, *(float(problem.at(jitter_ulps(problem.params, sign, seed))) for seed in (0, 1) for sign in (1, -1))]
    size, gap = max(near) - min(near), abs(after - before)
    finest = all(p.dtype == torch.float64 for p in problem.params.values())
    wide = replace(problem, params=tree_map(on_host, problem.params), buffers=tree_map(on_host, problem.buffers))
    here = math.nan if finest or not product.exact else _in_float64(wide)
    if math.isnan(here):
        return gap <= size
    back = wide.moved(product, product.inverse(tree_map(on_host, xi)))
    there = _in_float64(replace(wide, params=back))
    cast(Evaluation, problem.local).rest()
    same = here == _in_float64(wide) and abs(here - there) <= ALIKE * abs(here)
    return same and gap <= TIMES * max(size, abs(after - here))


def _in_float64(problem: Problem) -> float:
    """The loss on the CPU, in float64 whatever it asks for; no number where it cannot be computed so."""
    loss = cast(Evaluation, problem.local)
    home = home_of_float64(torch.device(loss.device))

    def widen_arguments(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return tree_map(on_host, (args, kwargs))

    def wide_loss(params: Params) -> Tensor:
        try:
            with loss.model.register_forward_pre_hook(widen_arguments, with_kwargs=True), Float64():
                value = on_host(loss(params))
        except Exception:  # of a kernel, or of a check of types
            value = torch.tensor(torch.nan, dtype=torch.float64)
        return value.to(home)

    with torch.no_grad():
        return float(problem.mean(wide_loss)(problem.params))


def moves_the_gradient(gap: float, problem: Problem) -> bool:
    """Whether rounding the weights changes the lengths of the gradients as much: it does near a minimum."""
    here, near = (
        entry_norms(value_and_grad(problem.loss, p)[1]) for p in (problem.params, jitter_ulps(problem.params, 1))
    )
    return gap <= 4 * float(relative_gap(near, here))
