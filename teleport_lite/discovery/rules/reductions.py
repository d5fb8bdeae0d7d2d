"""Sums, norms, maxima and the like over some dimensions; running sums; sorting; softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from teleport_lite.discovery.call import Call, RuleMisfit
from teleport_lite.discovery.constraints import PERM, SCALE, SIGN
from teleport_lite.discovery.labels import Labels
from teleport_lite.discovery.registry import rule_for, words_for
from teleport_lite.discovery.rules.pointwise import NEITHER, Equivariance

LINEAR = Equivariance("equivariant", "equivariant", linear=True)
EXTREME = Equivariance("equivariant", "neither")
ABSOLUTE = Equivariance("equivariant", "invariant")
COUNTED = Equivariance("invariant", "invariant")
RANKED = Equivariance("invariant", "neither")
REDUCTIONS = {  # what a reduction commutes with, entry by entry of what is left
    "sum": LINEAR,
    "mean": LINEAR,
    "nansum": LINEAR,
    "amax": EXTREME,
    "amin": EXTREME,
    "max": EXTREME,
    "min": EXTREME,
    "median": EXTREME,
    "kthvalue": EXTREME,
    "std": ABSOLUTE,
    "linalg_vector_norm": ABSOLUTE,
    "norm": ABSOLUTE,
    "any": COUNTED,
    "all": COUNTED,
    "count_nonzero": COUNTED,
    "argmax": RANKED,
    "argmin": RANKED,
    "var": NEITHER,
    "var_mean": NEITHER,
    "prod": NEITHER,
    "logsumexp": NEITHER,
}
SCANS = {  # the same length comes out
    "cumsum": LINEAR,
    "cummax": EXTREME,
    "cummin": EXTREME,
    "sort": EXTREME,
    "topk": EXTREME,
    "argsort": RANKED,
    "cumprod": NEITHER,
    "logcumsumexp": NEITHER,
}
ENTRYWISE = ("linalg_vector_norm", "norm", "any", "all", "count_nonzero")  # each sign that goes in may flip alone
SYMMETRIC = ("sort", "topk", "argsort")  # the order of what goes in is of no importance


def _dims_of(call: Call, x: Tensor) -> list[int]:
    """The dimensions that a reduction goes over.

    Raises:
        RuleMisfit: when they are given by name.
    """
    given = call["dim"] if call.has("dim") else None
    dims = list(range(x.ndim)) if given is None or given == [] else [given] if isinstance(given, int) else list(given)
    if not all(isinstance(d, int) for d in dims):
        raise RuleMisfit("dimensions by name")
    return [d % x.ndim for d in dims] if x.ndim else []


@rule_for(REDUCTIONS)
def reduce_labels(call: Call) -> list[Labels]:
    """What does not vary along the reduced dimensions passes as far as the function commutes with it."""
    x, kind = call.args[0], call.short_name
    dims = _dims_of(call, x)
    found: list[Labels] = [[] for _ in call.results()]
    for a in call.labels(x):
        passing = gather_over(call, a, dims, REDUCTIONS[kind], kind in ENTRYWISE, symmetric=True)
        for labels, result in zip(found, call.results(), strict=True):
            moved = passing if result.is_floating_point() else _places_only(call, passing)
            labels.append(moved if result.ndim == x.ndim else moved.squeeze(dims))
    return found


@rule_for(SCANS)
def scan_labels(call: Call) -> list[Labels]:
    """As a reduction, with the same entry all along the dimension."""
    x, kind = call.args[0], call.short_name
    dim = (call["dim"] if call.has("dim") else -1) % max(x.ndim, 1)
    found: list[Labels] = [[] for _ in call.results()]
    for a in call.labels(x):
        passing = gather_over(call, a, [dim], SCANS[kind], False, symmetric=kind in SYMMETRIC)
        for labels, result in zip(found, call.results(), strict=True):
            labels.append(passing if result.is_floating_point() else _places_only(call, passing))
    return found


def _places_only(call: Call, labels: Tensor) -> Tensor:
    """Labels of indices, which are permuted along and not multiplied."""
    out = call.constraints.fresh(*labels.shape)
    call.constraints.equate(out, labels, PERM)
    call.fix([out], "", SCALE | SIGN)
    return out


def gather_over(call: Call, a: Tensor, dims: list[int], how: Equivariance, entrywise: bool, symmetric: bool) -> Tensor:
    """Labels of what a function of all entries along `dims` gives, of length 1 there.

    Args:
        call: the call.
        a: labels of what goes in.
        dims: the dimensions.
        how: what the function commutes with when all entries along `dims` are multiplied alike.
        entrywise: whether the sign of each entry may change alone.
        symmetric: whether the order of the entries along `dims` is of no importance.
    """
    inside = [d for d in dims if a.shape[d] > 1]
    word = f"{call.short_name} does not commute with"
    first = a
    for d in inside:
        first = first.narrow(d, 0, 1)
    if not inside and how.linear:
        return a
    if not how.linear or inside:
        call.keep_entries_apart([a])
    out = call.constraints.fresh(*first.shape)
    for system, answer, verb in ((SCALE, how.scale, "rescaling"), (SIGN, how.sign, "flipping")):
        if answer == "neither":
            call.fix([a, out], f"{word} {verb} them", system)
            continue
        if inside and not (entrywise and (system == SIGN or how.scale == "invariant")):
            call.constraints.tie_along(a, inside, system)
        if answer == "equivariant":
            call.constraints.equate(out, first, system)
        else:
            call.fix([out], f"{call.short_name} does not change with them", system)
    if not inside:
        call.constraints.equate(out, first, PERM)
        return out
    call.fix([out], "", PERM)
    kept = [d for d in range(a.ndim) if d not in dims]
    if not symmetric:
        call.fix([a], f"{call.short_name} goes over them", PERM)
    elif any(a.shape[d] > 1 for d in kept):
        order = torch.arange(torch.Size([a.shape[d] for d in kept]).numel())
        call.constraints.distinguish(a, order.reshape([a.shape[d] if d in kept else 1 for d in range(a.ndim)]), PERM)
    return out


@rule_for("_softmax _log_softmax _safe_softmax")
def softmax_labels(call: Call) -> list[Labels]:
    """Only the places of the entries move along."""
    labels = call.labels(call.args[0])
    call.fix(labels, "softmax does not commute with rescaling them", SCALE | SIGN)
    call.keep_entries_apart(labels)
    return [labels]


words_for(softmax=softmax_labels)
