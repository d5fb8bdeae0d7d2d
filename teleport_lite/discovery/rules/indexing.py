"""Rows that are looked up in a table, and values that are written or added where an index says."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from teleport_lite.discovery.constraints import MIX, PERM
from teleport_lite.discovery.labels import Labels, cluster_by_dims, lift_labels
from teleport_lite.discovery.operation import Operation, RuleMisfit
from teleport_lite.discovery.registry import rule_for
from teleport_lite.discovery.rules.reductions import REDUCTIONS

KINDS = {"add": "sum", "multiply": "prod", "sum": "sum", "mean": "mean", "amax": "amax", "amin": "amin", "prod": "prod"}


@rule_for("embedding")
def look_up_rows(op: Operation) -> list[Labels]:
    """The rows of a table are picked by the inputs; its columns pass."""
    found: Labels = []
    for a in op.labels(op["weight"]):
        if a.shape[0] > 1:
            op.fix([a], "inputs pick them")
        else:
            found.append(a.reshape((1,) * (op.out.ndim - 1) + a.shape[1:]))
    return [found]


@rule_for("_embedding_bag _embedding_bag_forward_only")
def reduce_rows(op: Operation) -> list[Labels]:
    """Sums, means or maxima of the rows that the inputs pick."""
    columns = [a for a in op.labels(op["weight"]) if a.shape[0] == 1]
    op.fix([a for a in op.labels(op["weight"]) if a.shape[0] > 1], "inputs pick them")
    op.fix(op.labels(op["per_sample_weights"]), "they weigh rows")
    _restrict_to(op, columns, ("sum", "mean", "amax")[op["mode"]])
    return [columns]


def _restrict_to(op: Operation, labels: Labels, kind: str) -> None:
    """What a reduction of several entries with these labels asks of them."""
    how = REDUCTIONS[kind]
    for system, answer, word in how.systems:
        if answer != 1:
            op.fix(labels, f"{kind} does not commute with {word} them", system)
    if not how.linear:
        op.keep_entries_apart(labels)


@rule_for("segment_reduce")
def reduce_segments(op: Operation) -> list[Labels]:
    """A reduction of neighbouring rows."""
    axis = op["axis"] % op["data"].ndim
    labels = op.labels(op["data"])
    rows = [a for a in labels if a.shape[axis] > 1]
    op.fix(rows, "segments of them are reduced")
    passing = [a for a in labels if a.shape[axis] == 1]
    kind = op["reduce"]
    _restrict_to(op, passing, {"max": "amax", "min": "amin"}.get(kind, kind))
    return [passing]


@rule_for("scatter_add scatter scatter_reduce scatter_reduce.two index_add index_copy index_reduce")
def write_along(op: Operation) -> list[Labels]:
    """Values go where an index along one dimension says.

    Raises:
        RuleMisfit: for a tensor without dimensions, or a factor of zero.
    """
    base, dim, kind = op["self"], op["dim"], op.short_name
    source: Any = op["source"] if op.has("source") else op["src"] if op.has("src") else op["value"]
    op.fix(op.labels(op["index"]), "they choose where to write")
    kind = KINDS[op["reduce"]] if op.has("reduce") else "sum" if kind.endswith("add") else "copy"
    if base.ndim == 0 or (op.has("alpha") and op["alpha"] == 0):
        raise RuleMisfit("nothing to write along")
    return [_write_labels(op, base, source, {dim % base.ndim - base.ndim}, kind)]


@rule_for("index_put _index_put_impl _unsafe_index_put")
def write_at(op: Operation) -> list[Labels]:
    """Values go where indices, or masks, of the leading dimensions say.

    Raises:
        RuleMisfit: when a dimension in front of an index is written as a whole.
    """
    base, indices, values = op["self"], op["indices"], op["values"]
    given = [i for i in indices if i is not None]
    if any(i is None for i in indices[: len(given)]):
        raise RuleMisfit("an index behind a dimension that is written as a whole")
    for index in given:
        op.fix(op.labels(index), "they choose where to write")
    covered = sum(i.ndim if i.dtype.is_floating_point or str(i.dtype) == "torch.bool" else 1 for i in given)
    rest = base.ndim - covered
    return [
        _write_labels(
            op, base, values, set(range(-max(base.ndim, values.ndim), -rest)), "sum" if op["accumulate"] else "copy"
        )
    ]


def _write_labels(op: Operation, base: Tensor, source: Any, dims: set[int], kind: str) -> Labels:
    """The labels of `base` after `source` is written, added, ... to entries chosen by an index along `dims`.

    What is written has to move as what stands beside it. Labels that vary along `dims` stay, since the index is free.
    """
    ndim = max([base.ndim, *([source.ndim] if isinstance(source, Tensor) else [])])
    new = op.labels(source)
    old = op.constraints.fresh_axes(base.shape) if op.is_zero(base) and new else op.labels(base)
    nothing = op.is_zero(source) or (not isinstance(source, Tensor) and source == 0)
    found: Labels = []
    for cluster in cluster_by_dims([[lift_labels(a, ndim) for a in old], [lift_labels(a, ndim) for a in new]]):
        a, b = (op.constraints.sum_labels(part) for part in cluster)
        there = [x for x in (a, b) if x is not None]
        chosen = any(x.shape[d] > 1 for x in there for d in dims if -d <= x.ndim)
        if chosen and nothing and b is None:
            op.keep_entries_apart(there, PERM | MIX)  # multiples of what an index erases are erased, too
        elif chosen:
            op.fix(there, "an index chooses among them")
        elif a is not None and b is not None:
            n = [slice(0, min(p, q)) if p > 1 and q > 1 else slice(None) for p, q in zip(a.shape, b.shape, strict=True)]
            op.constraints.equate(a[tuple(n)], b[tuple(n)])
        elif b is not None or not nothing:
            op.fix(there, "they are written beside a constant")
        if kind != "copy":
            _restrict_to(op, there, kind)
        if a is not None:
            found.append(a.reshape(a.shape[ndim - base.ndim :]))
    return found
