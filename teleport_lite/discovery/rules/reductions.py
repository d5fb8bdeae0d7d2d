"""Sums, norms, maxima and the like over some dimensions; running sums; sorting; softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from teleport_lite.discovery.constraints import PERM, SCALE, SIGN
from teleport_lite.discovery.labels import Labels, are_stacked, order_along
from teleport_lite.discovery.operation import Operation, RuleMisfit, is_inexact
from teleport_lite.discovery.registry import WORDS, rule_for
from teleport_lite.discovery.rules.equivariance import NEITHER, Equivariance

COMMUTES = {  # what they commute with, entry by entry of what is left
    Equivariance(1, 1, linear=True): "sum mean nansum cumsum",
    Equivariance(1, None): "amax amin max min median kthvalue cummax cummin sort topk",
    Equivariance(1, 0): "std linalg_vector_norm norm",
    Equivariance(2, 0): "var",
    Equivariance(0, 0): "any all count_nonzero",
    Equivariance(0, None): "argmax argmin argsort",
    NEITHER: "var_mean prod logsumexp cumprod logcumsumexp",
}
REDUCTIONS = {name: how for how, names in COMMUTES.items() for name in names.split()}
SCANS = (
    "cumsum",
    "cummax",
    "cummin",
    "sort",
    "topk",
    "argsort",
    "cumprod",
    "logcumsumexp",
)  # the same length comes out
ORDERED = (*SCANS, "argmax", "argmin")  # which entry it is depends on their order
ENTRYWISE = ("linalg_vector_norm", "norm", "any", "all", "count_nonzero")  # each sign that goes in may flip alone


def _dims_of(op: Operation, x: Tensor) -> list[int]:
    """The dimensions that a reduction goes over."""
    given = op["dim"] if op.has("dim") else -1 if op.short_name in SCANS else None
    dims = list(range(x.ndim)) if given is None or given == [] else [given] if isinstance(given, int) else list(given)
    if not all(isinstance(d, int) for d in dims):
        raise RuleMisfit("dimensions by name")
    return [d % x.ndim for d in dims] if x.ndim else []


@rule_for(REDUCTIONS)
def reduce_labels(op: Operation) -> list[Labels]:
    """What does not vary along the reduced dimensions passes as far as the function commutes with it.

    Running sums, sorting and the like are reductions to an entry that stands all along the dimension.
    """
    x, kind = op.args[0], op.short_name
    dims = _dims_of(op, x)
    found: list[Labels] = [[] for _ in op.results()]
    for a in op.labels(x):
        passing = gather_over(op, a, dims, REDUCTIONS[kind], kind in ENTRYWISE, symmetric=kind not in ORDERED)
        if kind in ("linalg_vector_norm", "norm"):
            op.constraints.lengths.add(int(passing.reshape(-1)[0]))
        for labels, result in zip(found, op.results(), strict=True):
            moved = passing if is_inexact(result) else _places_only(op, passing)
            labels.append(moved if result.ndim == x.ndim else moved.squeeze(dims))
    return found


def _places_only(op: Operation, labels: Tensor) -> Tensor:
    """Labels of indices, which are permuted along and not multiplied."""
    if labels.numel() == 1:
        return torch.zeros_like(labels)
    out = op.constraints.fresh(*labels.shape)
    op.constraints.equate(out, labels, PERM)
    op.fix([out], "", SCALE | SIGN)
    return out


def gather_over(
    op: Operation, a: Tensor, dims: list[int], how: Equivariance, entrywise: bool, symmetric: bool
) -> Tensor:
    """Labels of what a function of all entries along `dims` gives, of length 1 there.

    Args:
        op: the operation.
        a: labels of what goes in.
        dims: the dimensions.
        how: what the function commutes with when all entries along `dims` are multiplied alike.
        entrywise: whether the sign of each entry may change alone.
        symmetric: whether the order of the entries along `dims` is of no importance.
    """
    inside = [d for d in dims if a.shape[d] > 1]
    word = f"{op.short_name} does not commute with"
    first = a
    for d in inside:
        first = first.narrow(d, 0, 1)
    if not inside and how.linear:
        return a
    kept = [d for d in range(a.ndim) if d not in dims]
    stacked = are_stacked(a, inside, kept)  # axes that are reduced entry by entry
    if not how.linear or (inside and not stacked):
        op.keep_entries_apart([a])
    out = op.constraints.fresh(*first.shape)
    for system, answer, verb in how.systems:
        if answer is None:
            op.fix([a, out], f"{word} {verb} them", system)
            continue
        if inside and not (entrywise and (system == SIGN or how.scale == 0)):
            op.constraints.tie_along(a, inside, system)
        if answer:
            op.constraints.equate(out, first, system, answer)
        else:
            op.fix([out], f"{op.short_name} does not change with them", system)
    if not inside or stacked:
        op.constraints.tie_along(a, inside, PERM)
        op.constraints.equate(out, first, PERM)
        return out
    op.fix([out], "", PERM)
    if not symmetric:
        op.fix([a], f"{op.short_name} goes over them", PERM)
    elif any(a.shape[d] > 1 for d in kept):
        op.constraints.distinguish(a, order_along(a, kept), PERM)
    return out


@rule_for("_softmax _log_softmax _safe_softmax")
def softmax_labels(op: Operation) -> list[Labels]:
    """Only the places of the entries move along."""
    labels = op.labels(op.args[0])
    op.fix(labels, "softmax does not commute with rescaling them", SCALE | SIGN)
    op.keep_entries_apart(labels)
    return [labels]


WORDS.update(softmax=softmax_labels)
