"""Permutations of whole matrices and modules, as the experts of a mixture, with the rows of what chooses among them."""

from __future__ import annotations

from collections import defaultdict

from teleport_lite.discovery.verify import Verifier
from teleport_lite.groups import Permutation
from teleport_lite.symmetries.axes import Leg, NeuronSymmetry
from teleport_lite.symmetries.modules import ModulePermutation
from teleport_lite.symmetries.rank import connected_factors

NEARBY = 3  # parameters that are tried as what chooses among the matrices of a stack, or among modules


def permute_experts(found: list[NeuronSymmetry], check: Verifier) -> list[NeuronSymmetry]:
    """Permutations of the matrices of stacks, and of modules in lists, with the rows of a router or with other stacks.

    No label passes from one module of a list to another: that they may be exchanged is tried on the whole model.
    """
    parts = connected_factors(s for s in found if all(leg.groups > 1 for leg in s.legs))
    stacks = [[Leg(name, 0) for name in dict.fromkeys(name for s in part for name in s.names)] for part in parts]
    families: list[tuple[list[Leg], list[list[str]]]] = [(legs, []) for legs in stacks]
    families += [([], rows) for rows in _modules_of_one_kind(check)]
    place = {name: i for i, name in enumerate(check.params)}
    proposals: list[list[NeuronSymmetry]] = []  # for each family what is tried, one after another
    for own, rows in families:
        names = [leg.name for leg in own] or [name for row in rows for name in row]
        count = len(rows[0]) if rows else len(check.params[names[0]])
        others = [legs for legs in stacks if len(check.params[legs[0].name]) == count] + _axes_by_module(count, check)
        others = [[leg for leg in o if leg.name not in names] for o in others]
        others = [o for o in others if any(own or not leg.buffer for leg in o)]
        others.sort(key=lambda o: min(abs(place[leg.name] - place[name]) for leg in o for name in names))
        chosen = [sorted(own + other, key=lambda leg: place[leg.name]) for other in others[:NEARBY]]
        proposals.append(
            [ModulePermutation(c, rows) if rows else NeuronSymmetry(Permutation(count), c) for c in chosen]
        )
    made: list[NeuronSymmetry] = []
    while any(proposals):
        held = check.keep(list(dict.fromkeys(first for first, *_ in filter(None, proposals))), lambda *_: None)
        made += [s for s in held if s not in made]
        proposals = [rest for first, *rest in filter(None, proposals) if first not in held]
    return made


def _modules_of_one_kind(check: Verifier) -> list[list[list[str]]]:
    """For lists of modules, or parameters, of one kind: of each parameter its names; lists side by side are one."""
    lists: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for name in check.probe.params:
        parts = name.split(".")
        for i in (i for i, part in enumerate(parts) if part.isdigit()):
            lists[".".join(parts[:i])][parts[i]][".".join(parts[i + 1 :])] = name
    found: dict[tuple[str, int], list[list[str]]] = defaultdict(list)
    for prefix, modules in lists.items():
        first, *others = ({part: check.params[name].shape for part, name in m.items()} for m in modules.values())
        rows = [[m[part] for m in modules.values() if part in m] for part in first]
        alike = all(shapes == first for shapes in others)
        if others and alike and all(_may_move(name, check) for row in rows for name in row):
            found[prefix.rpartition(".")[0], len(modules)] += rows
    return [*found.values()]


def _may_move(name: str, check: Verifier) -> bool:
    """Whether it is a parameter of real numbers that is trained, or a buffer that moves along."""
    return check.params[name].is_floating_point() and (
        name in check.probe.movable or check.probe.params[name].requires_grad
    )


def _axes_by_module(count: int, check: Verifier) -> list[list[Leg]]:
    """Axes with that many entries, of vectors and matrices that may move: those of each module together."""
    found: dict[str, list[Leg]] = defaultdict(list)
    for name, p in check.params.items():
        if 0 < p.ndim < 3 and count in p.shape and _may_move(name, check):
            leg = Leg(name, [*p.shape].index(count), buffer=name in check.probe.movable)
            found[name.rpartition(".")[0]].append(leg)
    return [*found.values()]
