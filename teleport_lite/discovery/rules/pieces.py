"""Operators that are followed piece by piece, and those that are left out, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from teleport_lite.discovery.labels import Labels
from teleport_lite.discovery.operation import Operation, RuleMisfit
from teleport_lite.discovery.registry import decomposition_of, rule_for


def _add_scaled(combine: Callable, x: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Tensor:
    return x + (combine(a, b) if value == 1 else value * combine(a, b))


decomposition_of("addcmul")(partial(_add_scaled, torch.mul))
decomposition_of("addcdiv")(partial(_add_scaled, torch.div))


@decomposition_of("lerp")
def _decompose_lerp(x: Tensor, end: Tensor, weight: Tensor | float) -> Tensor:
    return x + weight * (end - x)


@decomposition_of("_weight_norm_interface")
def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    norm = v.norm(2, [d for d in range(v.ndim) if d != dim % v.ndim], keepdim=True)
    return g * (v / norm), norm


@decomposition_of("_trilinear")
def _decompose_trilinear(
    a: Tensor, b: Tensor, c: Tensor, expand1: list, expand2: list, expand3: list, sumdim: list, unroll_dim: int = 1
) -> Tensor:
    for dims, k in ((expand1, 0), (expand2, 1), (expand3, 2)):
        for d in dims:
            a, b, c = (t.unsqueeze(d) if i == k else t for i, t in enumerate((a, b, c)))
    # [n, out, in1, in2] as two sums of products, so that only two factors meet at a time
    if c.ndim == 4 and a.shape[-2] == c.shape[-2] and b.shape[-1] == c.shape[-1] and list(sumdim) == [2, 3]:
        rows = torch.einsum("ni,oij->noj", a[:, 0, :, 0], c[0])
        return torch.einsum("noj,nj->no", rows, b[:, 0, 0, :])
    return (a * b * c).sum(sumdim)


@rule_for("equal _local_scalar_dense")
def stay_where_read(op: Operation) -> list[Labels]:
    """What Python reads may be used in any way.

    Raises:
        RuleMisfit: always.
    """
    raise RuleMisfit("Python reads the values")
