"""Norms: they stop what comes in, and what leaves starts anew with the gain."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from teleport_lite.discovery.constraints import PERM, SCALE, SIGN
from teleport_lite.discovery.labels import Labels, along_channels, along_last, vary_together
from teleport_lite.discovery.operation import Operation
from teleport_lite.discovery.registry import rule_for


def _normalize(
    op: Operation, labels: Labels, gain: Tensor | None, shift: Tensor | None, fit: Callable[[Tensor], Tensor]
) -> Labels:
    """Labels after a norm with a gain and a shift, which `fit` makes broadcast: places pass, multiples do not."""
    starts = op.constraints.sum_labels([fit(a) for a in op.labels(gain)])
    found: Labels = []
    for a in labels:
        op.fix([a], "they are normalised", SCALE | SIGN)
        op.keep_entries_apart([a])
        if starts is not None and vary_together(a, starts):
            op.constraints.equate(a, starts, PERM)
        else:
            found.append(a)
    if starts is not None:
        op.note_gain(gain, starts)
        op.keep_entries_apart([starts])
        if not any(vary_together(a, starts) for a in labels):
            op.fix([starts], "they meet different data", PERM)
        found.append(starts)
    elif gain is not None:
        for a in found:
            op.color_by_values(fit(gain), a)
    return op.add_bias(found, shift, fit)


@rule_for("native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm")
def batch_norm(op: Operation) -> list[Labels]:
    """In evaluation mode the running statistics are constants, which tell channels apart."""
    x, gain, shift, mean, var = op.args[:5]
    training = op.args[5] if isinstance(op.args[5], bool) else False
    fit = along_channels(x)
    labels = _channel_labels(op, x)
    for a in labels if not training else ():
        for constant in (mean, var):
            op.color_by_values(fit(constant), a)
    return [_normalize(op, labels, gain, shift, fit)]


@rule_for("native_layer_norm")
def layer_norm(op: Operation) -> list[Labels]:
    """Over the last dimensions."""
    x = op["input"]
    return [_normalize(op, op.labels(x), op["weight"], op["bias"], along_last(x))]


@rule_for("native_group_norm")
def group_norm(op: Operation) -> list[Labels]:
    """Over groups of channels, which are not exchanged with each other."""
    x, groups = op["input"], op["group"]
    fit = along_channels(x)
    labels = _channel_labels(op, x)
    for a in labels:
        op.constraints.distinguish(a, fit(torch.arange(x.shape[1]) // (x.shape[1] // groups)), PERM)
    return [_normalize(op, labels, op["weight"], op["bias"], fit)]


def _channel_labels(op: Operation, x: Tensor) -> Labels:
    """The labels of an input, the same for all pixels of a channel."""
    return [op.constraints.tie_along(a, range(2, x.ndim)) for a in op.labels(x)]
