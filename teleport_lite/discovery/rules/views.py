"""Data that changes place or stays what it is, and new constants."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from teleport_lite.discovery.constraints import PERM
from teleport_lite.discovery.labels import (
    Labels,
    cluster_by_dims,
    common_shape,
    compact_labels,
    laid_out_as,
    lift_labels,
    vary_together,
    varying_dims,
)
from teleport_lite.discovery.operation import Operation, RuleMisfit, is_inexact
from teleport_lite.discovery.registry import POINTWISE, WORDS, rule_for

VIEW_OPS = """view _unsafe_view _reshape_alias reshape permute transpose t expand slice select unsqueeze squeeze cat
    stack split split_with_sizes unsafe_split unsafe_split_with_sizes unsafe_chunk unbind flip roll rot90 repeat index
    index_select gather unfold diagonal as_strided pixel_shuffle pixel_unshuffle channel_shuffle repeat_interleave
    narrow movedim masked_select slice_scatter"""
CHOOSING_OPS = """slice narrow select split split_with_sizes unsafe_split unsafe_split_with_sizes unsafe_chunk unbind
    index index_select gather unfold diagonal as_strided masked_select slice_scatter"""
CUTTING_OPS = "slice narrow split split_with_sizes unsafe_split unsafe_split_with_sizes index index_select expand cat"
IDENTITY_OPS = """clone _to_copy contiguous detach alias lift_fresh lift_fresh_copy lift native_dropout positive
    _conj _neg_view resolve_conj resolve_neg"""
FACTORY_OPS = """zeros ones empty full zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full
    empty_strided new_empty_strided scalar_tensor"""
RANDOM_OPS = "rand_like randn_like randint_like bernoulli"


@rule_for(f"{FACTORY_OPS} {RANDOM_OPS}")
def make_constant(op: Operation) -> list[Labels]:
    """What comes out depends on no values of the arguments."""
    return [[] for _ in op.results()]


@rule_for(IDENTITY_OPS)
def keep_labels(op: Operation) -> list[Labels]:
    """The same values; a change to integers or truth values is a function like any other."""
    if is_inexact(op.args[0]) and not is_inexact(op.results()[0]):
        return WORDS[POINTWISE](op)
    return [op.labels(op.args[0])]


@rule_for("copy")
def copy_labels(op: Operation) -> list[Labels]:
    """What is copied into a tensor, broadcast to its shape."""
    return [[lift_labels(a, op.out.ndim) for a in op.labels(op.args[1])]]


@rule_for(VIEW_OPS)
def move_labels(op: Operation) -> list[Labels]:
    """The data only changes place: let the labels do the same, those that vary along the same dimensions as one.

    Raises:
        RuleMisfit: for a view of the same memory as another type.
    """
    inputs = op.moved_tensors()
    if any(t.dtype != inputs[0].dtype for t in op.results()):
        raise RuleMisfit("a view with another type")
    for t in op.tensors:
        if all(t is not x for x in inputs):
            op.fix(op.labels(t), "they choose what is read")
    found: list[Labels] = [[] for _ in op.results()]
    sides = [op.labels(t) for t in inputs]
    for cluster in [[[a]] for a in sides[0]] if len(inputs) == 1 else cluster_by_dims(sides):
        parts = [op.constraints.sum_labels(part) for part in cluster]
        spread = common_shape(_varying_lengths(a) for a in parts if a is not None)
        stand_ins = [_stand_in(op, a, t, spread) for a, t in zip(parts, inputs, strict=True)]
        for labels, moved, result in zip(found, op.replay(stand_ins), op.results(), strict=True):
            if result.numel():
                labels.append(compact_labels(moved))
                if op.short_name in CHOOSING_OPS.split():
                    _tell_chosen_apart(op, [a for a in parts if a is not None], labels[-1])
            else:
                labels += _of_nothing(op, [a for a in parts if a is not None], inputs[0], result)
    if op.short_name in ("diagonal", "masked_select", "index"):  # axes that are read side by side
        for labels in found:
            for (x, a), (y, b) in combinations(zip(sides[0], labels, strict=False), 2):
                if vary_together(a, b) and not vary_together(x, y):
                    op.fix([a, b], "they are read along with another axis", PERM)
                    op.keep_entries_apart([a, b])
    return found


def _varying_lengths(labels: Tensor) -> tuple[int, ...]:
    """2 along each dimension on which labels vary, 1 along the others."""
    return tuple(min(n, 2) for n in labels.shape)


def _stand_in(op: Operation, labels: Tensor | None, tensor: Tensor, spread: tuple[int, ...]) -> Tensor:
    """Labels in the shape of a tensor; new ones for zeros, which may move in any way, 0 for all other constants."""
    if labels is None and op.is_zero(tensor) and len(spread) == tensor.ndim:
        labels = op.constraints.fresh(*(n if k > 1 else 1 for n, k in zip(tensor.shape, spread, strict=True)))
    elif labels is None:
        labels = torch.zeros(1, dtype=torch.int64)
    if op.short_name == "as_strided":  # which reads memory, not a shape
        return laid_out_as(labels, tensor)
    return labels.expand(op.shapes[id(tensor)])


def _tell_chosen_apart(op: Operation, sources: Labels, chosen: Tensor) -> None:
    """Entries that are taken, and those that are not, or more often, are not exchanged; none where they scatter."""
    scattered = any(len(varying_dims(chosen)) > len(varying_dims(a)) for a in sources)
    chosen = chosen.reshape(-1).contiguous()
    for a in sources:
        if scattered:
            op.constraints.distinguish(a)
            continue
        entries, place = a.reshape(-1).unique(return_inverse=True)
        spots = torch.searchsorted(entries, chosen).clamp(max=len(entries) - 1)
        times = torch.zeros(len(entries), dtype=torch.int64).index_add_(0, spots, (entries[spots] == chosen).long())
        if bool((times != times[0]).any()):
            op.constraints.distinguish(a, times[place].reshape(a.shape))


def _of_nothing(op: Operation, labels: Labels, source: Tensor, result: Tensor) -> Labels:
    """Labels of an empty result, as they would be were it longer; where that is not known, what was read stays.

    A cut along the dimension of the labels themselves takes none of them, on other inputs either.
    """
    if op.short_name not in CUTTING_OPS.split() or result.ndim != source.ndim:
        op.fix(labels, op.NOT_EXERCISED)
        return []
    emptied = [d for d in range(result.ndim) if not result.shape[d]]
    labels = [a for a in labels if all(a.shape[d] == 1 for d in emptied)]
    whole = [a for a in labels if all(a.shape[d] in (1, result.shape[d]) for d in range(a.ndim))]
    op.fix([a for a in labels if all(a is not b for b in whole)], op.NOT_EXERCISED)
    return whole


WORDS.update(identity=keep_labels, constant=make_constant, views=move_labels)
