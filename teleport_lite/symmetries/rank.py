"""How many directions there are, where the tangents of several symmetries may depend on each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from teleport_lite.functional import Params

if TYPE_CHECKING:
    from teleport_lite.symmetries.base import Symmetry

S = TypeVar("S", bound="Symmetry")
DEPENDENT = 1e-8  # relative, of singular values


def connected_factors(factors: Iterable[S], meet: Callable[[S, S], bool] | None = None) -> list[list[S]]:
    """Those that `meet`, by default in a parameter that both move, directly or through others, taken together."""
    meet = meet or (lambda a, b: bool({*a.moved} & {*b.moved}))
    parts: list[list[S]] = []
    for factor in factors:
        near = [part for part in parts if any(meet(factor, f) for f in part)]
        parts = [part for part in parts if part not in near]
        parts.append([*(f for part in near for f in part), factor])
    return parts


def tangent_rows(factors: Sequence[Symmetry], params: Params) -> Tensor:
    """The directions in which the coordinates move the parameters: unit rows [dim, entries], in float64, on the CPU."""
    wide = {name: params[name].detach().cpu().double() for f in factors for name in f.names}
    moved = list(dict.fromkeys(name for f in factors for name in f.moved))
    rows = []
    for f in factors:
        zero = f.zeros(wide)
        basis = torch.eye(zero.numel(), dtype=zero.dtype, device=zero.device).view(-1, *zero.shape)
        found = torch.func.vmap(lambda e, f=f: f.velocity(wide, e))(basis)
        parts = (found[n] if n in f.moved else zero.new_zeros(len(basis), wide[n].numel()) for n in moved)
        rows.append(torch.cat([part.reshape(len(basis), -1) for part in parts], 1))
    found = torch.cat(rows)
    return found / torch.linalg.vector_norm(found, dim=1, keepdim=True).clamp(min=torch.finfo(found.dtype).tiny)


def tangent_rank(factors: Sequence[Symmetry], params: Params) -> int:
    """The rank of the tangents of continuous factors, component by component."""
    matrices = (tangent_rows(part, params) for part in connected_factors([f for f in factors if f.dim]))
    sizes = [torch.linalg.svdvals(m) for m in matrices]
    return sum(int((s > DEPENDENT * s.max()).sum()) for s in sizes)


def rank_cost(factors: Sequence[Symmetry], params: Params) -> int:
    """About how many operations `tangent_rank` takes."""
    parts = connected_factors([f for f in factors if f.dim])
    entries = [sum(params[n].numel() for n in {n for f in part for n in f.moved}) for part in parts]
    return sum(n * sum(f.dim for f in part) ** 2 for part, n in zip(parts, entries, strict=True))
