"""Where classes of labels stand on the axes of parameters: those that stand alike, and runs of them side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from teleport_lite.discovery.constraints import nearest_fraction
from teleport_lite.discovery.solve import scatter_bits
from teleport_lite.symmetries.axes import NeuronSymmetry


class Axis(NamedTuple):
    """An axis of a parameter; scalings act on it with `offset` added, as on the gain 1 + w of a norm."""

    name: str
    dim: int
    groups: int
    labels: Tensor
    offset: float | tuple[float, ...] = 0.0
    buffer: bool = False


class Entry(NamedTuple):
    """Where a class shows up: the k-th axis, by a power, at these indices, of which so many stand side by side."""

    axis: int
    power: float
    indices: tuple[int, ...]
    each: int


class Places(NamedTuple):
    """The places of classes that move, one an element: class by class, and in each the k-th axes in order.

    Invariant: the places of a class on one axis with one power, an *entry*, stand together, with rising indices.
    `flat` counts the places of all axes, one axis after another; powers are relative to that of the first rows.
    """

    owners: Tensor
    axes: Tensor
    powers: Tensor
    indices: Tensor
    flat: Tensor

    def outside(self, covered: Tensor) -> Places:
        """Those of classes with a place that is not `covered`, which says so for all places of all axes."""
        wanted = torch.zeros(int(self.owners.max()) + 1 if len(self.owners) else 1, dtype=torch.bool)
        wanted[self.owners[~covered[self.flat]]] = True
        return Places(*(part[wanted[self.owners]] for part in self))


def places_of(axes: list[Axis], classes: Tensor, factors: Tensor) -> Places:
    """The places where classes show up that move, and by which multiples."""
    labels = torch.cat([torch.zeros(0, dtype=torch.int64), *(a.labels for a in axes)])
    axis = torch.arange(len(axes)).repeat_interleave(torch.tensor([len(a.labels) for a in axes], dtype=torch.int64))
    index = torch.cat([axis[:0], *(torch.arange(len(a.labels)) for a in axes)])
    owner, power = classes[labels >> 1], factors[labels >> 1].double() * (1 - 2 * (labels & 1))
    flat = owner.nonzero()[:, 0]
    axis, index, owner, power = axis[flat], index[flat], owner[flat], power[flat]
    values, which = power.unique(return_inverse=True)
    entry = ((owner * max(len(axes), 1) + axis) * max(len(values), 1) + which).unique(return_inverse=True)[1]
    begin = _least(entry, flat)[entry]
    order = (owner * max(len(labels), 1) + begin).argsort(stable=True)
    owner, axis, power = owner[order], axis[order], power[order]
    column = torch.tensor([a.dim != 0 for a in axes], dtype=torch.int64)[axis]
    number = owner.unique(return_inverse=True)[1]
    position = torch.arange(len(owner))
    unit = power[_least(number, position + len(owner) * column) % max(len(owner), 1)][number]
    ratios, which = (power / unit).unique(return_inverse=True)
    ratios = ratios.new_tensor([nearest_fraction(r) for r in ratios.tolist()])
    return Places(owner, axis, ratios[which], index[order], flat[order])


def covered_places(axes: list[Axis], symmetries: Iterable[NeuronSymmetry]) -> Tensor:
    """For each place of all axes whether one of these symmetries moves it."""
    sizes = [len(a.labels) for a in axes]
    found = torch.zeros(sum(sizes), dtype=torch.bool)
    parts = {a[:3]: part for a, part in reversed(list(zip(axes, found.split(sizes), strict=True)))} if sizes else {}
    for s in symmetries:
        for leg in s.legs:
            parts[leg.name, leg.dim, leg.groups][leg.start : leg.start + s.group.n * leg.each] = True
    return found


def families(
    places: Places, signature: Tensor | None, with_powers: bool, fewest: int
) -> Iterator[list[tuple[int, list[Entry]]]]:
    """Classes, at least the `fewest`, that show up on the same axes and that no signature tells apart, as runs.

    In a run each class stands right behind the one before it on every axis; given are their number, and the first.
    """
    owners, axes, powers, indices, flat = places
    if not len(owners):
        return
    starts = torch.ones(len(owners), dtype=torch.bool)
    starts[1:] = (owners.diff() != 0) | (axes.diff() != 0) | (powers.diff() != 0)
    begins = starts.nonzero()[:, 0]
    counts = torch.cat([begins, begins.new_tensor([len(owners)])]).diff()
    classes, number = owners[begins].unique_consecutive(return_inverse=True)
    first = _least(number, torch.arange(len(begins)))
    ranks = powers[begins].unique(return_inverse=True)[1] if with_powers else torch.zeros_like(begins)
    looks = torch.zeros_like(axes[begins])
    for part in (axes[begins], ranks, counts, torch.arange(len(begins)) - first[number]):
        looks = scatter_bits(looks + scatter_bits(part))
    alike = torch.zeros_like(classes).index_add_(0, number, looks)
    alike += 0 if signature is None else scatter_bits(signature[classes])
    family = alike.unique(return_inverse=True)[1]
    earliest = flat[begins[first]]
    order = (_least(family, earliest)[family] * (int(flat.max()) + 1) + earliest).argsort()
    entries = torch.bincount(number)
    order = order[torch.bincount(family)[family[order]] >= fewest]
    for members in order.split(torch.unique_consecutive(family[order], return_counts=True)[1].tolist()):
        heads = int(first[members[0]]) + torch.arange(int(entries[members[0]]))
        sizes = counts[heads]
        rows = indices[begins[first[members]][:, None] + torch.arange(int(sizes.sum()))]
        blocks = torch.stack([_side_by_side(part) for part in rows.split(sizes.tolist(), 1)], 1)
        ends = (rows[1:] != rows[:-1] + blocks[:-1].repeat_interleave(sizes, 1)).any(1).nonzero()[:, 0] + 1
        edges = [0, *ends.tolist(), len(members)]
        shape = list(zip(axes[begins[heads]].tolist(), powers[begins[heads]].tolist(), strict=True))
        runs: list[tuple[int, list[Entry]]] = []
        for begin, end in pairwise(edges):
            split = [tuple(part.tolist()) for part in rows[begin].split(sizes.tolist())]
            each = blocks[begin].tolist()
            runs.append((end - begin, [Entry(*s, i, e) for s, i, e in zip(shape, split, each, strict=True)]))
        yield runs


def _side_by_side(indices: Tensor) -> Tensor:
    """For rows of rising indices how many stand side by side, if all such blocks are equally long; else 1.

    >>> _side_by_side(torch.tensor([[0, 1, 4, 5], [0, 1, 2, 5]])).tolist()
    [2, 1]
    """
    n, near = indices.shape[1], indices.diff(dim=1) == 1
    length = near.long().cumprod(1).sum(1) + 1
    inner = torch.arange(1, n) % length[:, None] != 0
    return torch.where((near | ~inner).all(1) & (n % length == 0), length, 1)


def _least(groups: Tensor, numbers: Tensor) -> Tensor:
    """The least of the numbers of each group."""
    count = int(groups.max()) + 1 if len(groups) else 0
    return numbers.new_zeros(count).scatter_reduce(0, groups, numbers, "amin", include_self=False)
