"""Norms: they stop what comes in, and what leaves starts anew with the gain."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from teleport_lite.discovery.constraints import PERM, SCALE, SIGN
from teleport_lite.discovery.labels import Labels, along_channels, along_last, vary_together, varying_dims
from teleport_lite.discovery.operation import Operation
from teleport_lite.discovery.registry import rule_for


def _normalized_labels(
    op: Operation,
    labels: Labels,
    gain: Tensor | None,
    shift: Tensor | None,
    fit: Callable[[Tensor], Tensor],
    signed: Tensor | None = None,
) -> Labels:
    """Labels after a norm with a gain and a shift, which `fit` makes broadcast: places pass, multiples do not.

    Signs pass along the one axis that is `signed`.
    """
    starts = op.constraints.sum_labels([fit(a) for a in op.labels(gain)])
    found: Labels = []
    for a in labels:
        op.fix([a], "they are normalised", SCALE if a is signed else SCALE | SIGN)
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
        found.append(starts if signed is None else op.constraints.sum_of(signed, starts))
    elif gain is not None:
        for a in found:
            op.color_by_values(fit(gain), a)
    return op.add_bias(found, shift, fit)


@rule_for("native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm")
def batch_norm(op: Operation) -> list[Labels]:
    """A mean has the sign of its channel, a variance has none; statistics that stay tell channels apart when read."""
    x, gain, shift, mean, var = op.args[:5]
    training = op.args[5] if isinstance(op.args[5], bool) else False
    fit = along_channels(x)
    labels = _channel_labels(op, x)
    channels = [a for a in labels if 1 - x.ndim in varying_dims(a)]
    signed = channels[0] if [varying_dims(a) for a in channels] == [[1 - x.ndim]] else None
    for statistic, systems in ((mean, SIGN | PERM), (var, PERM)):
        own = [fit(b) for b in op.labels(statistic)]
        for b in own:
            op.fix([b], "", SCALE if signed is not None and statistic is mean else SCALE | SIGN)
            for a in channels:
                op.constraints.equate(a, b, systems if a is signed else PERM)
            if not channels:
                op.fix([b], "they meet different data", PERM)
        if statistic is not None and not own:
            signed = None if statistic is mean else signed
            for a in labels if not training else ():
                op.color_by_values(fit(statistic), a)
    return [_normalized_labels(op, labels, gain, shift, fit, signed)]


@rule_for("native_layer_norm")
def layer_norm(op: Operation) -> list[Labels]:
    """Over the last dimensions."""
    x = op["input"]
    return [_normalized_labels(op, op.labels(x), op["weight"], op["bias"], along_last(x))]


@rule_for("native_group_norm")
def group_norm(op: Operation) -> list[Labels]:
    """Over groups of channels, which are not exchanged with each other."""
    x, groups = op["input"], op["group"]
    fit = along_channels(x)
    labels = _channel_labels(op, x)
    for a in labels:
        op.constraints.distinguish(a, fit(torch.arange(x.shape[1]) // (x.shape[1] // groups)), PERM)
    return [_normalized_labels(op, labels, op["weight"], op["bias"], fit)]


def _channel_labels(op: Operation, x: Tensor) -> Labels:
    """The labels of an input, the same for all pixels of a channel."""
    return [op.constraints.tie_along(a, range(2, x.ndim)) for a in op.labels(x)]
