"""Attention heads: mixings that stand side by side, as one symmetry, and permutations of whole heads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

from teleport_lite.discovery.verify import TOLERANCE, Verifier
from teleport_lite.groups import GeneralLinear, Permutation
from teleport_lite.symmetries.axes import Leg, NeuronSymmetry

Run = tuple[str, int, bool, int, int]  # parameter, dimension, whether by the inverse, first place, how many


def join_side_by_side(mixings: list[NeuronSymmetry]) -> list[NeuronSymmetry]:
    """Mixings of equal size that stand right behind one another on every axis, the heads of a layer, as one."""
    runs: list[list[NeuronSymmetry]] = []
    for s in mixings:
        last = runs[-1][-1] if runs else None
        behind = last and tuple(replace(leg, start=leg.start + leg.each * last.group.n) for leg in last.legs)
        if last and last.group == s.group and behind == s.legs:
            runs[-1].append(s)
        else:
            runs.append([s])
    return [NeuronSymmetry(GeneralLinear(run[0].group.n, len(run)), run[0].legs) for run in runs]


def split_blocks(mixing: NeuronSymmetry) -> list[NeuronSymmetry]:
    """The blocks of a mixing, each as a symmetry of its own; any other symmetry as it is."""
    count = mixing.group.blocks if isinstance(mixing.group, GeneralLinear) else 1
    if count == 1:
        return [mixing]
    n = mixing.group.n // count
    legs = ([replace(leg, start=leg.start + k * n * leg.each) for leg in mixing.legs] for k in range(count))
    return [NeuronSymmetry(GeneralLinear(n), part) for part in legs]


def permute_blocks(found: list[NeuronSymmetry], check: Verifier) -> list[NeuronSymmetry]:
    """Permutations of whole blocks, attention heads: each moves the queries and keys, and the values, of a layer.

    Where several heads of queries share keys and values, these groups of heads are blocks, and the heads of each are
    exchanged as well.
    """
    families: dict[Any, list[NeuronSymmetry]] = defaultdict(list)
    for s in found:
        if s.dim and all(leg.groups == 1 for leg in s.legs):
            families[tuple(sorted({(leg.name, leg.dim) for leg in s.legs})), type(s.group), s.group.n].append(s)
    beside: dict[Any, list[list[Run]]] = {}
    in_pairs: set[Any] = set()  # scalings of rotary pairs, which stand in one run for all heads
    for (axes, *_), members in families.items():  # of a head, what rotary positions turn and what they do not
        side = beside.setdefault(key := (axes, len(members)), [[] for _ in members])
        in_pairs |= {key} if all(leg.each == 2 for leg in members[0].legs) else set()
        for places, s in zip(side, members, strict=True):
            places += [(leg.name, leg.dim, leg.dual, leg.start, s.group.n * leg.each) for leg in s.legs]
    sides = [
        (len(members), legs)
        for key, members in beside.items()
        if (legs := _legs_of_blocks(members))
        and (len(members) > 1 or key in in_pairs or len({leg.each for leg in legs}) > 1)
    ]

    def pair_sides(holds: Callable[[NeuronSymmetry], bool]) -> list[NeuronSymmetry]:
        """Exchanges of the blocks of each side and the one that follows it, where that `holds`, and inside of them."""
        exchanges: list[NeuronSymmetry] = []
        used = -1
        for k, pair in enumerate(pairwise(sides)):
            count = max(n for n, _ in pair)
            fits = all(n in (1, count) and not any(leg.each * n % count for leg in legs) for n, legs in pair)
            if k == used or not fits:
                continue
            a, b = ([replace(leg, each=leg.each * n // count) for leg in legs] for n, legs in pair)
            whole = NeuronSymmetry(Permutation(count), dict.fromkeys(a + b))
            if count == 1 or holds(whole):
                exchanges += ([whole] if count > 1 else []) + _exchanges_inside(count, a, b)
                used = k + 1
        return exchanges

    exchanges = pair_sides(lambda _: True)
    if exchanges and check.error(exchanges) > TOLERANCE:
        exchanges = check.keep(pair_sides(lambda s: check.error([s]) <= TOLERANCE), lambda *_: None)
    return exchanges


def _legs_of_blocks(members: list[list[Run]]) -> list[Leg]:
    """Where blocks stand that have these places each, `each` block as long as it is from one to the next; or none.

    A block with gaps is taken to begin at a multiple of its length, as where a head has queries, keys and values.
    """
    first, *others = (_contiguous_runs(places) for places in members)
    if any(len(runs) != len(first) for runs in others):
        return []
    steps = [b[3] - a[3] for a, b in zip(first, others[0], strict=True)] if others else [run[4] for run in first]
    for k, runs in enumerate(others, 1):
        if runs != [(*r[:3], r[3] + k * step, r[4]) for r, step in zip(first, steps, strict=True)] or min(steps) < 1:
            return []
    return [
        Leg(name, dim, dim == 1, start if size == step else start - start % step, step)
        for (name, dim, _, start, size), step in zip(first, steps, strict=True)
    ]


def _exchanges_inside(count: int, a: list[Leg], b: list[Leg]) -> list[NeuronSymmetry]:
    """Exchanges of the parts of each block, where both sides are longer on one axis than on another, as often."""
    ratios = [max(leg.each for leg in side) / min(leg.each for leg in side) for side in (a, b)]
    n = int(ratios[0])
    if n == 1 or ratios != [n, n]:
        return []
    long = [leg for side in (a, b) for leg in side if leg.each == max(x.each for x in side)]
    return [
        NeuronSymmetry(
            Permutation(n), [replace(leg, start=leg.start + k * leg.each, each=leg.each // n) for leg in long]
        )
        for k in range(count)
    ]


def _contiguous_runs(places: list[Run]) -> list[Run]:
    """Places side by side as one, and none twice."""
    runs: list[Run] = []
    for name, dim, dual, start, size in sorted({*places}):
        if runs and runs[-1][:3] == (name, dim, dual) and sum(runs[-1][3:]) == start:
            runs[-1] = (name, dim, dual, runs[-1][3], runs[-1][4] + size)
        else:
            runs.append((name, dim, dual, start, size))
    return runs
