"""Convolutions: a product over channels, with places that move along; and groups of channels."""

from __future__ import annotations

import torch
from torch import Tensor

from teleport_lite.discovery.constraints import MIX, PERM, SCALE, SIGN, negate_labels
from teleport_lite.discovery.labels import Labels, along_channels
from teleport_lite.discovery.operation import Operation
from teleport_lite.discovery.registry import rule_for
from teleport_lite.discovery.rules.contraction import cancel_axes


@rule_for("convolution convolution_overrideable _convolution")
def convolution_rule(op: Operation) -> list[Labels]:
    """Channels that come in meet those of the weight; the weight's rows leave. All pixels of a channel move alike."""
    bias, transposed, groups = op["bias"], op["transposed"], op["groups"]
    arriving = _channels_of_input(op, op["input"])
    within, leaving = _sides_of_weight(op, op["weight"], transposed)
    if groups > 1:
        within, leaving = _split_in_groups(op, arriving, within, leaving)
    cancel_axes(op, arriving, within)
    fit = along_channels(op.out)
    return [op.add_bias([] if leaving is None else [fit(leaving)], bias, fit)]


def _channels_of_input(op: Operation, x: Tensor) -> Tensor | None:
    """One label for each channel: pixels and examples move as one; what does not go along with channels stays."""
    coming: Labels = []
    for a in op.labels(x):
        tied = op.constraints.tie_along(a, range(2, x.ndim))
        if tied.shape[1] > 1 or (x.shape[1] == 1 and a.numel() == 1):
            coming.append(op.constraints.tie_along(tied, [0]).reshape(-1))
        else:
            op.fix([tied], "convolution")
    return op.constraints.sum_labels(coming)


def _sides_of_weight(op: Operation, weight: Tensor, transposed: bool) -> tuple[Tensor | None, Tensor | None]:
    """The labels of the weight that are summed over, and those that leave: [channels] each."""
    inner, outer = (0, 1) if transposed else (1, 0)
    sides: dict[int, Labels] = {0: [], 1: []}
    for a in op.labels(weight):
        a = op.constraints.tie_along(a, [0]) if any(n > 1 for n in a.shape[1:]) else a
        vary = [d for d in range(a.ndim) if a.shape[d] > 1]
        if len(vary) > 1 or vary > [1]:
            op.fix([a], "a convolution sums over them")
        else:
            side = vary[0] if vary else inner if weight.shape[inner] == 1 and not sides[inner] else outer
            sides[side].append(a.reshape(-1))
    return op.constraints.sum_labels(sides[inner]), op.constraints.sum_labels(sides[outer])


def _split_in_groups(
    op: Operation, arriving: Tensor | None, within: Tensor | None, leaving: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Dimension 1 of the weight has a label for each group of rows: it takes the place of what all groups share."""
    weight, transposed, groups = op["weight"], op["transposed"], op["groups"]
    axis = op.grouped_axis(weight, groups)
    shared = leaving if transposed else within
    if shared is not None:
        op.fix([shared], "groups share them", SCALE | SIGN | PERM)
    within, leaving = (within, axis) if transposed else (axis, leaving)
    depthwise = op["input"].shape[1] == groups == op.out.shape[1]
    for labels in (arriving, within, leaving):
        if labels is not None and not depthwise:
            op.constraints.distinguish(labels, torch.arange(labels.numel()) // (labels.numel() // groups))
        elif labels is not None:
            op.constraints.distinguish(labels, systems=MIX)
    if depthwise and axis is None:  # the weight is no parameter itself: a product, channel by channel
        return _depthwise_sides(op, arriving, leaving)
    if depthwise and arriving is not None and leaving is not None:
        op.constraints.equate(arriving, leaving, PERM)
    return within, leaving


def _depthwise_sides(
    op: Operation, arriving: Tensor | None, leaving: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The two sides of a weight that multiplies each channel by one row: nothing is summed over."""
    x, weight = op["input"], op["weight"]
    if arriving is not None and leaving is not None:
        return negate_labels(arriving), op.constraints.sum_of(arriving, leaving)
    if arriving is not None:
        op.color_by_values(weight, arriving.view(-1, *[1] * (weight.ndim - 1)))
        return negate_labels(arriving), arriving
    if leaving is not None:
        op.color_by_values(x, along_channels(x)(leaving))
    return None, leaving
