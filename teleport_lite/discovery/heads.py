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
from teleport_lite.symmetries.rank import connected_factors

NEARBY = 3  # parameters that are tried as what chooses among the matrices of a stack


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
    """Permutations of whole blocks, attention heads: each moves the queries and keys, and the values, of a layer."""
    families: dict[Any, list[NeuronSymmetry]] = defaultdict(list)
    for s in found:
        if s.dim and all(leg.groups == 1 for leg in s.legs):
            families[tuple(sorted({(leg.name, leg.dim) for leg in s.legs})), type(s.group), s.group.n].append(s)
    sides: list[tuple[int, list[Leg]]] = []
    for members in families.values():
        runs = [_contiguous_runs(s) for s in members]
        behind = all([(n, d, start + size, size) for n, d, start, size in a] == b for a, b in pairwise(runs))
        if len(members) > 1 and behind:
            sides.append((len(members), [Leg(name, dim, dim == 1, start, size) for name, dim, start, size in runs[0]]))

    def pair_sides(holds: Callable[[list[NeuronSymmetry]], bool]) -> list[NeuronSymmetry]:
        """Each side with the one that follows it, where that `holds`."""
        blocks: list[NeuronSymmetry] = []
        used = -1
        for k, ((n, a), (m, b)) in enumerate(pairwise(sides)):
            symmetry = NeuronSymmetry(Permutation(n), a + b)
            if n == m and k != used and not {*a} & {*b} and holds([symmetry]):
                blocks.append(symmetry)
                used = k + 1
        return blocks

    def holds_exactly(symmetries: list[NeuronSymmetry]) -> bool:
        return check.error(symmetries) <= TOLERANCE

    blocks = pair_sides(lambda _: True)
    return blocks if not blocks or holds_exactly(blocks) else pair_sides(holds_exactly)


def permute_stacks(found: list[NeuronSymmetry], check: Verifier) -> list[NeuronSymmetry]:
    """Permutations of the matrices of stacks: experts with the rows of a router, heads with those of another stack."""
    parts = connected_factors(s for s in found if all(leg.groups > 1 for leg in s.legs))
    stacks = [{name for s in part for name in s.names} for part in parts]
    place = {name: i for i, name in enumerate(check.params)}
    rows: dict[tuple[str, int], set[str]] = defaultdict(set)
    for name, p in check.params.items():
        if 0 < p.ndim < 3:
            rows[name.rpartition(".")[0], len(p)].add(name)
    made: list[NeuronSymmetry] = []
    for names in stacks:
        first = min(names, key=place.__getitem__)
        count = len(check.params[first])
        others = [o for o in stacks if o is not names and len(check.params[min(o)]) == count]
        others += [o for (_, n), o in rows.items() if n == count]
        others.sort(key=lambda o: min(abs(place[name] - place[first]) for name in o))
        for other in others[:NEARBY]:
            both = [name for name in place if name in names | other]
            s = NeuronSymmetry(Permutation(count), [Leg(n, 0, buffer=n in check.probe.movable) for n in both])
            if s in made or check.keep([s], lambda *_: None):
                made += [s] if s not in made else []
                break
    return made


def _contiguous_runs(symmetry: NeuronSymmetry) -> list[tuple[str, int, int, int]]:
    """The places that a symmetry moves, side by side: parameter, dimension, first place, how many."""
    runs: list[tuple[str, int, int, int]] = []
    for leg in sorted(symmetry.legs, key=lambda leg: (leg.name, leg.dim, leg.start)):
        size = symmetry.group.n * leg.each
        if runs and runs[-1][:2] == (leg.name, leg.dim) and runs[-1][2] + runs[-1][3] == leg.start:
            runs[-1] = (*runs[-1][:3], runs[-1][3] + size)
        else:
            runs.append((leg.name, leg.dim, leg.start, size))
    return runs
