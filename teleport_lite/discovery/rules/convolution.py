"""Convolutions: a product over channels, with places that move along; and groups of channels."""

from __future__ import annotations

import torch
from torch import Tensor

from teleport_lite.discovery.call import Call
from teleport_lite.discovery.constraints import MIX, PERM, SCALE, SIGN
from teleport_lite.discovery.labels import Labels, along_channels
from teleport_lite.discovery.registry import rule_for
from teleport_lite.discovery.rules.contraction import cancel


@rule_for("convolution convolution_overrideable _convolution")
def convolve(call: Call) -> list[Labels]:
    """Channels that come in meet those of the weight; the weight's rows leave. All pixels of a channel move alike."""
    bias, transposed, groups = call["bias"], call["transposed"], call["groups"]
    arriving = _channels_of_input(call, call["input"])
    within, leaving = _sides_of_weight(call, call["weight"], transposed)
    if groups > 1:
        within, leaving = _split_in_groups(call, arriving, within, leaving)
    cancel(call, arriving, within)
    fit = along_channels(call.out)
    return [call.add_bias([] if leaving is None else [fit(leaving)], bias, fit)]


def _channels_of_input(call: Call, x: Tensor) -> Tensor | None:
    """One label for each channel: pixels and examples move as one; what does not go along with channels stays."""
    coming: Labels = []
    for a in call.labels(x):
        tied = call.constraints.tie_along(a, range(2, x.ndim))
        if tied.shape[1] > 1 or (x.shape[1] == 1 and a.numel() == 1):
            coming.append(call.constraints.tie_along(tied, [0]).reshape(-1))
        elif a.numel() > 1:
            call.fix([tied], "convolution")
    return call.constraints.sum_labels(coming)


def _sides_of_weight(call: Call, weight: Tensor, transposed: bool) -> tuple[Tensor | None, Tensor | None]:
    """The labels of the weight that are summed over, and those that leave: [channels] each."""
    inner, outer = (0, 1) if transposed else (1, 0)
    sides: dict[int, Labels] = {0: [], 1: []}
    for a in call.labels(weight):
        vary = [d for d in range(a.ndim) if a.shape[d] > 1]
        if len(vary) > 1 or vary > [1]:
            call.fix([a], "a convolution sums over them")
        else:
            side = vary[0] if vary else inner if weight.shape[inner] == 1 and not sides[inner] else outer
            sides[side].append(a.reshape(-1))
    return call.constraints.sum_labels(sides[inner]), call.constraints.sum_labels(sides[outer])


def _split_in_groups(
    call: Call, arriving: Tensor | None, within: Tensor | None, leaving: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Dimension 1 of the weight has a label for each group of rows: it takes the place of what all groups share."""
    weight, transposed, groups = call["weight"], call["transposed"], call["groups"]
    axis = call.grouped_axis(weight, groups)
    shared = leaving if transposed else within
    if shared is not None:
        call.fix([shared], "groups share them", SCALE | SIGN | PERM)
    within, leaving = (within, axis) if transposed else (axis, leaving)
    depthwise = call["input"].shape[1] == groups == call.out.shape[1]
    for labels in (arriving, within, leaving):
        if labels is not None and not depthwise:
            call.constraints.distinguish(labels, torch.arange(labels.numel()) // (labels.numel() // groups))
        elif labels is not None:
            call.constraints.distinguish(labels, systems=MIX)
    if depthwise and arriving is not None and leaving is not None:
        call.constraints.equate(arriving, leaving, PERM)
    elif not depthwise and axis is not None:
        call.fix([axis], "groups", PERM)
    return within, leaving
