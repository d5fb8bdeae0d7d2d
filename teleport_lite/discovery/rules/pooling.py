"""Pooling, resizing and padding: the same for all channels, so that only places are reduced."""

from __future__ import annotations

import torch

from teleport_lite.discovery.constraints import SIGN
from teleport_lite.discovery.labels import Labels, compact_labels
from teleport_lite.discovery.operation import Operation
from teleport_lite.discovery.registry import rule_for

KINDS = """avg_pool adaptive_avg_pool _adaptive_avg_pool mkldnn_adaptive_avg_pool adaptive_max_pool max_pool
    max_pool_with_indices fractional_max_pool upsample_nearest _upsample_nearest_exact upsample_linear upsample_bilinear
    upsample_trilinear upsample_bicubic _upsample_bilinear_aa _upsample_bicubic_aa reflection_pad replication_pad"""


def _with_dims(kind: str, n: int) -> str:
    """The name for `n` dimensions of space: "max_pool2d_with_indices", "upsample_nearest2d"."""
    head, suffix = (kind[: -len(end)], end) if kind.endswith(end := "_with_indices") else (kind, "")
    for tail in ("_exact", "_aa"):
        if head.endswith(tail):
            return f"{head}{n}d" if tail == "_exact" else f"{head[: -len(tail)]}{n}d{tail}"
    return f"{head}{n}d{suffix}"


POOLING_OPS = {_with_dims(kind, n): n for kind in KINDS.split() for n in (1, 2, 3)}


@rule_for(POOLING_OPS)
def pool_labels(op: Operation) -> list[Labels]:
    """All places of a channel move alike; a maximum commutes with positive multiples only."""
    x = op.args[0]
    space = range(x.ndim - POOLING_OPS[op.short_name], x.ndim)
    found = [op.constraints.tie_along(a, space) for a in op.labels(x)]
    if "max" in op.short_name:
        op.fix(found, "the maximum does not commute with flipping them", SIGN)
        op.keep_entries_apart(found)
    return [found]


@rule_for("constant_pad_nd")
def pad_labels(op: Operation) -> list[Labels]:
    """Zeros may stand beside anything and move with it; another constant stays."""
    x, pad = op.args[0], op["pad"]
    if op["value"]:
        return [[compact_labels(torch.nn.functional.pad(a.expand(x.shape), pad)) for a in op.labels(x)]]
    found: Labels = []
    for a in op.labels(x):
        sizes = [p if a.shape[a.ndim - 1 - i // 2] > 1 else 0 for i, p in enumerate(pad)]
        found.append(torch.nn.functional.pad(a, sizes))
    return [found]
