"""Tensors of labels: each broadcasts to the shape of the tensor that it belongs to, and those of one tensor add up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

Labels = list[Tensor]  # of one tensor


def varying_dims(labels: Tensor) -> list[int]:
    """The dimensions along which labels vary, counted from the last one, -1."""
    return [d - labels.ndim for d in range(labels.ndim) if labels.shape[d] > 1]


def lift_labels(labels: Tensor, ndim: int) -> Tensor:
    """`labels` with dimensions of length 1 in front, `ndim` in all."""
    return labels.reshape((1,) * (ndim - labels.ndim) + labels.shape)


def cluster_by_dims(sides: list[Labels]) -> list[list[Labels]]:
    """Labels of several tensors, sorted into those that vary along common dimensions: [cluster][tensor].

    Invariant: no two clusters vary along a common dimension; labels that do not vary at all are one cluster.
    """
    clusters: list[tuple[set[int], list[Labels]]] = []
    for i, labels in enumerate(sides):
        for a in labels:
            dims = set(varying_dims(a))
            touching = [c for c in clusters if c[0] & dims or not (c[0] or dims)]
            joined: list[Labels] = [[] for _ in sides]
            for c in touching:
                dims = dims | c[0]
                joined = [x + y for x, y in zip(joined, c[1], strict=True)]
                clusters.remove(c)
            joined[i].append(a)
            clusters.append((dims, joined))
    return [c[1] for c in clusters]


def common_shape(shapes: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """The shape to which all broadcast; `torch.broadcast_shapes` imports a computer algebra system for that.

    >>> common_shape([(3, 1), (4,)])
    (3, 4)
    """
    lengths = zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1)
    return tuple(max(n) for n in lengths)[::-1]


def vary_together(a: Tensor, b: Tensor) -> bool:
    """Whether labels vary along a common dimension, or neither varies at all."""
    one, other = set(varying_dims(a)), set(varying_dims(b))
    return bool(one & other) or not (one or other)


def are_stacked(labels: Tensor, dims: Iterable[int], others: Iterable[int]) -> bool:
    """Whether several axes, along `others`, are stacked along `dims`: the labels of one axis are near each other."""

    def smallest_step(along: Iterable[int]) -> int:
        steps = [s for d in along if labels.shape[d] > 1 for s in labels.diff(dim=d).abs().unique()[:2].tolist()]
        return min(filter(None, steps), default=0)

    return smallest_step(dims) > smallest_step(others) > 0


def order_along(labels: Tensor, dims: Iterable[int]) -> Tensor:
    """A number for each place along some dimensions, which broadcasts to `labels`."""
    shape = [n if d in {*dims} else 1 for d, n in enumerate(labels.shape)]
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


def along_last(out: Tensor) -> Callable[[Tensor], Tensor]:
    """Stand along the last dimensions of `out`."""
    return lambda t: lift_labels(t, out.ndim)


def along_channels(out: Tensor) -> Callable[[Tensor], Tensor]:
    """Stand along dimension 1 of `out`."""
    return lambda t: t.reshape([-1 if d == 1 else 1 for d in range(out.ndim)])


def compact_labels(labels: Tensor) -> Tensor:
    """`labels` with length 1 along each dimension on which they do not depend."""
    for d in range(labels.ndim):
        if labels.shape[d] > 1:
            first = labels.narrow(d, 0, 1)
            if labels.stride(d) == 0 or bool((labels == first).all()):
                labels = first
    return labels


def laid_out_as(values: Tensor, tensor: Tensor) -> Tensor:
    """`values`, expanded to the shape of `tensor`, in memory as `tensor` is, from position 0 of a storage on."""
    out = torch.empty_strided(tensor.size(), tensor.stride(), dtype=values.dtype)
    return out.copy_(values.expand(tensor.shape)) if all(tensor.stride()) else values.expand(tensor.shape).contiguous()
