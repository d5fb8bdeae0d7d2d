r"""Solve the equations between labels: union-find, with sums resolved as they become known, and colour refinement.

A solution is given by classes. For scalings and signs each class is a free number, and a variable is that number, its
negative or 0; for permutations a class is what is carried along together. Everything is computed on whole tensors of
labels, so that a model with a million of them costs a few passes over them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from teleport_lite.discovery.constraints import PERM, SCALE, SHIFTED, SIGN, Constraints, negative

FIRST, SECOND, PRODUCT = 0, 1, 2  # the terms of a sum


def solve_scalings(constraints: Constraints, vanishing: int = SECOND, offsets: bool = False) -> tuple[Tensor, Tensor]:
    """Solve for rescalings.

    A sum $s_o = s_a + s_b$ that nothing else decides has several solutions; taken is that in which the
    `vanishing` term is zero. With `offsets` gains of the form 1 + w are rescaled too, which no change of w does.

    Returns:
        For each variable its class, 0 for those that do not move, and whether it moves inversely to the class.
    """
    labels = _solve(constraints, SCALE if offsets else SCALE | SHIFTED, lambda a: a, negative, vanishing)
    plus, minus = labels[0::2], labels[1::2]
    return torch.minimum(plus, minus), minus < plus


def solve_signs(constraints: Constraints, vanishing: int = SECOND) -> Tensor:
    """Solve for flips of signs, the same system over the field of two elements, where $-s = s$.

    Returns:
        For each variable its class, 0 for those that do not move.
    """
    return _solve(constraints, SIGN, lambda a: a & ~1, lambda a: a, vanishing)[0::2]


def _solve(
    constraints: Constraints,
    system: int,
    node: Callable[[Tensor], Tensor],
    opposite: Callable[[Tensor], Tensor],
    vanishing: int,
) -> Tensor:
    """For each label the least one that is equal to it; `node` names what stands for a label, `opposite` its negative.

    Invariant: `classes` is a solution of all equalities read so far, closed under `opposite`, and a sum is `done` once
    its equation is equivalent to equalities that were read.
    """
    nothing = torch.zeros(0, dtype=torch.int64)
    pairs = [(node(a), node(b)) for a, b, s in constraints.equalities if s & system]
    pairs += [(node(a), torch.zeros_like(a)) for a, s, _ in constraints.fixed if s & system]
    x, y = (torch.cat([torch.tensor([zero]), *(p[i] for p in pairs)]) for i, zero in enumerate((0, 1)))
    a, b, o = (node(torch.cat(part)) for part in zip(*constraints.sums, (nothing,) * 3, strict=True))
    done = torch.zeros_like(a, dtype=torch.bool)
    everything = torch.arange(2 * constraints.count)
    classes, decided = everything, False
    while True:
        classes = components(classes, torch.cat([x, opposite(x)]), torch.cat([y, opposite(y)]))
        mirror = classes[negative(everything)]
        if opposite is negative:  # what equals its own negative is zero
            own = ((classes == mirror) & (classes != 0)).nonzero()[:, 0]
            if len(own):
                x, y = own, torch.zeros_like(own)
                continue
        la, lb, lo = classes[a], classes[b], classes[o]
        zero_a = (la == 0) | (lb == lo)  # each case says which two labels are zero or equal from then on
        zero_b = (lb == 0) | (la == lo)
        zero_o = (lo == 0) | (la == classes[opposite(b)])
        x, y, before = nothing, nothing, int(done.sum())
        for holds, zero, one, other in ((zero_a, a, b, o), (zero_b, b, a, o), (zero_o, o, a, opposite(b))):
            new = holds & ~done
            done = done | new
            x = torch.cat([x, zero[new], one[new]])
            y = torch.cat([y, torch.zeros_like(zero[new]), other[new]])
        if int(done.sum()) > before:
            continue
        if decided or bool(done.all()):
            return classes
        decided = True
        x = (a, b, o)[vanishing][~done]
        y = torch.zeros_like(x)


def solve_permutations(constraints: Constraints) -> Tensor:
    """For each variable the class with which it is permuted, 0 for those that keep their places.

    The entries of a tensor on which two axes cross are permuted along one of them, and the other keeps its places:
    taken is, one crossing after another, what leaves more classes.
    """
    stays = [(a, torch.zeros_like(a)) for a, s, _ in constraints.fixed if s & PERM]
    classes = _variables(constraints, PERM, stays)
    if constraints.blocks:
        b, out = (torch.cat(part) >> 1 for part in zip(*constraints.blocks, strict=True))
        classes = components(classes, out, torch.where(classes[b] == 0, out, b))
    for a, b, out in constraints.crossings:
        options = []
        for moves, rests in ((b, a), (a, b)):
            x, y = torch.cat([out, rests]) >> 1, torch.cat([moves, torch.zeros_like(rests)]) >> 1
            options.append(components(classes, x, y))
        classes = max(options, key=lambda option: len(option.unique()))
    return classes


def signatures(constraints: Constraints, classes: Tensor, system: int) -> Tensor:
    """Colour refinement: for each variable a number that two classes share when nothing tells them apart.

    The number is a sum of hashes, one for each colour that an entry of the class was given, so it does not depend on
    the order of the entries; different multisets of colours share one with probability $2^{-64}$.
    """
    found = torch.zeros(2 * constraints.count, dtype=torch.int64)
    for step, (labels, colors, systems) in enumerate(constraints.colors):
        if systems & system:
            found.index_add_(0, classes[labels >> 1], _hash(_hash(colors) + step))
    return found[classes]


def reasons(constraints: Constraints, axes: list[Tensor]) -> list[str]:
    """For each of some axes the first reason why its first entry is not multiplied by anything, or ''."""
    classes = _variables(constraints, SCALE, [])
    found: dict[int, str] = {}
    for labels, systems, why in constraints.fixed:
        for c in classes[labels >> 1].unique().tolist() if systems & SCALE else ():
            found.setdefault(c, why)
    return [found.get(int(classes[labels.reshape(-1)[0] >> 1]), "") for labels in axes]


def _variables(constraints: Constraints, system: int, also: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The classes of variables, signs aside, under the equalities of one system."""
    pairs = [(a, b) for a, b, s in constraints.equalities if s & system] + also
    x, y = (torch.cat([torch.zeros(0, dtype=torch.int64), *(p[i] for p in pairs)]) >> 1 for i in (0, 1))
    return components(torch.arange(constraints.count), x, y)


def components(classes: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Join the nodes x and y, pair by pair: the least node of each component.

    Invariant: `parent` points from the least node of a class to a node that is smaller or itself, in the same
    component, and is its own square. It is constant on every pair when nothing changes any more.

    Args:
        classes: the components so far, each named by its least node.
        x: nodes.
        y: as many nodes.

    >>> components(torch.tensor([0, 1, 2, 3, 4, 4, 6, 7]), torch.tensor([1, 2]), torch.tensor([4, 5])).tolist()
    [0, 1, 1, 3, 1, 1, 6, 7]
    """
    x, y = classes[x], classes[y]
    parent = torch.arange(len(classes))
    while True:
        px, py = parent[x], parent[y]
        low = torch.minimum(px, py)
        if torch.equal(px, py):
            return parent[classes]
        parent = parent.scatter_reduce(0, torch.cat([px, py, x, y]), low.repeat(4), "amin")
        while not torch.equal(square := parent[parent], parent):
            parent = square


def _hash(numbers: Tensor) -> Tensor:
    """Scattered over all 64-bit integers, by steps of SplitMix64."""
    numbers = (numbers + 1) * -7046029254386353131
    numbers = (numbers ^ (numbers >> 30)) * -4658895280553007687
    numbers = (numbers ^ (numbers >> 27)) * -7723592293110705685
    return numbers ^ (numbers >> 31)
