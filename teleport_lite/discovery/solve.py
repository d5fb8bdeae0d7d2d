r"""Solve the equations between labels: union-find, with sums resolved as they become known, and colour refinement.

A solution is given by classes. For scalings and signs each class is a free number, and a variable is a multiple of it,
or 0; for permutations a class is what is carried along together. Everything is computed on whole tensors of
labels, so that a model with a million of them costs a few passes over them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teleport_lite.discovery.constraints import PERM, SCALE, SIGN, Constraints, nearest_fraction

ROUNDING = 1e-9  # relative, of multiples
FIRST, SECOND, PRODUCT = 0, 1, 2  # the terms of a sum


def solve_scalings(constraints: Constraints, vanishing: int = SECOND) -> tuple[Tensor, Tensor]:
    """Solve for rescalings.

    A sum $s_o = s_a + s_b$ that nothing else decides has several solutions; taken is that in which the
    `vanishing` term is zero.

    Returns:
        For each variable its class, 0 for those that do not move, and which multiple of the class it is.
    """
    classes, factors = _solve_equalities(constraints, SCALE, vanishing)
    values, which = factors.unique(return_inverse=True)
    return classes, values.new_tensor([nearest_fraction(v) for v in values.tolist()])[which]


def solve_signs(constraints: Constraints, vanishing: int = SECOND) -> Tensor:
    """Solve for flips of signs, the same system over the field of two elements, where $-s = s$.

    Returns:
        For each variable its class, 0 for those that do not move.
    """
    return _solve_equalities(constraints, SIGN, vanishing)[0]


def _solve_equalities(constraints: Constraints, system: int, vanishing: int) -> tuple[Tensor, Tensor]:
    """For each variable the least one of which it is a multiple, and which multiple; of signs, modulo 2.

    Invariant: $s_v$ = `factors[v]` $s$ of `classes[v]` solves all equalities read so far; a sum is read once at most
    two of its terms, like ones collected, remain: then it is an equality of two variables. Where none is left, a term
    vanishes in the first sums of each part of the system, those of one operation.
    """

    def split_labels(labels: Tensor) -> tuple[Tensor, Tensor]:
        return labels >> 1, (1 - 2.0 * (labels & 1)).double() if system == SCALE else torch.ones(labels.shape).double()

    def reduce_factors(numbers: Tensor) -> Tensor:
        return numbers % 2 if system == SIGN else torch.where(numbers.abs() < ROUNDING, 0.0, numbers)

    nothing = torch.zeros(0, dtype=torch.int64)
    equal = [(a, b, k) for a, b, s, k in constraints.equalities if s & system]
    equal += [(a, torch.zeros_like(a), 1.0) for a, s, _ in constraints.fixed if s & system]
    ones, others, powers = zip(*equal, (nothing, nothing, 1.0), strict=True)
    (x, p), (y, q) = split_labels(torch.cat(ones)), split_labels(torch.cat(others))
    ratios = p * q * p.new_tensor(powers).repeat_interleave(torch.tensor([len(a) for a in ones]))
    sums = zip(*constraints.sums, (nothing, nothing, nothing), strict=True)
    terms, signs = split_labels(torch.stack([torch.cat(part) for part in sums]))
    signs[2] *= -1
    step = torch.cat([nothing, *(torch.full_like(o, k) for k, (_, _, o) in enumerate(constraints.sums))])
    classes, factors = torch.arange(constraints.count), torch.ones(constraints.count, dtype=torch.float64)
    while True:
        classes, factors = join_powers(classes, factors, x, y, ratios)
        gaps = (factors[x] - ratios * factors[y]).abs() > ROUNDING * factors[x].abs()
        wrong = gaps & (classes[x] != 0)  # two multiples of one number are equal where it is zero
        if bool(wrong.any()):
            x, y, ratios = x[wrong], torch.zeros_like(x[wrong]), torch.ones_like(ratios[wrong])
            continue
        roots = classes[terms]
        numbers = torch.where(roots == 0, 0.0, factors[terms] * signs)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            alike = roots[i] == roots[j]
            numbers[i] += torch.where(alike, numbers[j], 0.0)
            numbers[j] = torch.where(alike, 0.0, numbers[j])
        numbers = reduce_factors(numbers)
        left = (numbers != 0).sum(0)
        if not bool(left.any()):
            return classes, factors
        known = (left > 0) & (left < 3)
        if bool(known.any()):
            order = (numbers[:, known] == 0).byte().argsort(dim=0, stable=True)
            (x, y, _), (p, q, _) = roots[:, known].gather(0, order), numbers[:, known].gather(0, order)
            y, ratios = torch.where(q == 0, 0, y), torch.where(q == 0, 1.0, reduce_factors(-q / p))
        else:
            unknown, at = roots[:, left > 0], step[left > 0]
            part = connected_components(torch.arange(constraints.count), unknown[:2].flatten(), unknown[1:].flatten())
            first = torch.full_like(part, len(constraints.sums)).scatter_reduce(0, part[unknown[0]], at, "amin")
            x = unknown[vanishing][at == first[part[unknown[0]]]]
            y, ratios = torch.zeros_like(x), torch.ones(x.shape, dtype=torch.float64)


def solve_permutations(constraints: Constraints) -> Tensor:
    """For each variable the class with which it is permuted, 0 for those that keep their places.

    The entries of a tensor on which two axes cross are permuted along one of them, and the other keeps its places:
    taken is, one crossing after another, what leaves more classes.
    """
    stays = [(a, torch.zeros_like(a)) for a, s, _ in constraints.fixed if s & PERM]
    classes = _variable_classes(constraints, PERM, stays)
    if constraints.blocks:
        b, out = (torch.cat(part) >> 1 for part in zip(*constraints.blocks, strict=True))
        classes = connected_components(classes, out, torch.where(classes[b] == 0, out, b))
    for a, b, out in constraints.crossings:
        options = []
        for moves, rests in ((b, a), (a, b)):
            x, y = torch.cat([out, rests]) >> 1, torch.cat([moves, torch.zeros_like(rests)]) >> 1
            options.append(connected_components(classes, x, y))
        classes = max(options, key=lambda option: len(option.unique()))
    return classes


def color_signatures(constraints: Constraints, classes: Tensor, system: int) -> Tensor:
    """Colour refinement: for each variable a number that two classes share when nothing tells them apart.

    The number is a sum of hashes, one for each colour that an entry of the class was given, so it does not depend on
    the order of the entries; different multisets of colours share one with probability $2^{-64}$.
    """
    found = torch.zeros(2 * constraints.count, dtype=torch.int64)
    for step, (labels, colors, systems) in enumerate(constraints.colors):
        if systems & system:
            found.index_add_(0, classes[labels >> 1], scatter_bits(scatter_bits(colors) + step))
    return found[classes]


def connected_axes(constraints: Constraints, axes: dict[tuple[str, int, int], Tensor]) -> dict[tuple[str, int], Tensor]:
    """For each dimension of a parameter numbers [groups, entries]: entries with one in common meet in some operator."""
    classes = _variable_classes(constraints, SCALE, [])
    return {(name, dim): classes[labels >> 1].view(groups, -1) for (name, dim, groups), labels in axes.items()}


def fixing_reasons(constraints: Constraints, axes: list[Tensor]) -> list[str]:
    """For each of some axes the first reason why its first entry is not multiplied by anything, or ''."""
    classes = _variable_classes(constraints, SCALE, [])
    found: dict[int, str] = {}
    for labels, systems, why in constraints.fixed:
        for c in classes[labels >> 1].unique().tolist() if systems & SCALE else ():
            found.setdefault(c, why)
    return [found.get(int(classes[labels.reshape(-1)[0] >> 1]), "") for labels in axes]


def _variable_classes(constraints: Constraints, system: int, also: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The classes of variables, signs aside, under the equalities of one system."""
    pairs = [(a, b) for a, b, s, _ in constraints.equalities if s & system] + also
    x, y = (torch.cat([torch.zeros(0, dtype=torch.int64), *(p[i] for p in pairs)]) >> 1 for i in (0, 1))
    return connected_components(torch.arange(constraints.count), x, y)


def connected_components(classes: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Join the nodes x and y, pair by pair: the least node of each component.

    Args:
        classes: the components so far, each named by its least node.
        x: nodes.
        y: as many nodes.

    >>> connected_components(torch.tensor([0, 1, 2, 3, 4, 4, 6]), torch.tensor([1, 2]), torch.tensor([4, 5])).tolist()
    [0, 1, 1, 3, 1, 1, 6]
    """
    return join_powers(classes, torch.ones(len(classes)), x, y, torch.ones(len(x)))[0]


def join_powers(classes: Tensor, factors: Tensor, x: Tensor, y: Tensor, ratios: Tensor) -> tuple[Tensor, Tensor]:
    """As `connected_components`, where each node is a multiple of its class, and x `ratios` times y.

    What contradicts that, around a circle of pairs, is left for the caller to see.

    Invariant: `parent` points from the least node of a class to a node that is smaller or itself, in the same
    component, and is its own square; the node is `weights` times that one. It is constant on every pair when nothing
    changes any more.

    >>> join_powers(torch.arange(3), torch.ones(3), *map(torch.tensor, ([2, 1], [1, 0], [2.0, -1.0])))
    (tensor([0, 0, 0]), tensor([ 1., -1., -2.]))
    """
    ratios = ratios * factors[y] / factors[x]
    x, y = classes[x], classes[y]
    parent, weights = torch.arange(len(classes)), torch.ones_like(factors)
    while True:
        px, py = parent[x], parent[y]
        if torch.equal(px, py):
            return parent[classes], factors * weights[classes]
        high, low, between = torch.maximum(px, py), torch.minimum(px, py), ratios * weights[y] / weights[x]
        parent = parent.scatter_reduce(0, high, low, "amin")
        taken = (parent[high] == low) & (high != low)
        between = torch.where(px > py, between, 1 / between)[taken]
        weights = weights.scatter_reduce(0, high[taken], between, "amax", include_self=False)
        while not torch.equal(square := parent[parent], parent):
            parent, weights = square, weights * weights[parent]


def scatter_bits(numbers: Tensor) -> Tensor:
    """Scattered over all 64-bit integers, by steps of SplitMix64."""
    numbers = (numbers + 1) * -7046029254386353131
    numbers = (numbers ^ (numbers >> 30)) * -4658895280553007687
    numbers = (numbers ^ (numbers >> 27)) * -7723592293110705685
    return numbers ^ (numbers >> 31)
