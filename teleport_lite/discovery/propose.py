"""From classes of labels to symmetries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from teleport_lite.discovery.constraints import MIX, PERM, Constraints
from teleport_lite.discovery.experts import permute_experts
from teleport_lite.discovery.heads import join_side_by_side, permute_blocks, split_blocks
from teleport_lite.discovery.operation import Operation
from teleport_lite.discovery.places import Axis, Places, covered_places, families, places_of
from teleport_lite.discovery.propagate import Propagation
from teleport_lite.discovery.rotations import join_into_mixings, verified_rotations
from teleport_lite.discovery.solve import (
    FIRST,
    PRODUCT,
    SECOND,
    color_signatures,
    solve_permutations,
    solve_scalings,
    solve_signs,
)
from teleport_lite.discovery.verify import TOLERANCE, Verifier, describe_error
from teleport_lite.groups import (
    GeneralLinear,
    Group,
    PairRotations,
    Permutation,
    PositiveScaling,
    Signs,
    SpecialOrthogonal,
)
from teleport_lite.outputs import distance
from teleport_lite.symmetries.axes import Leg, NeuronSymmetry

PIECES = 64  # an axis in more pieces than that is left out


def solve_and_verify(
    propagation: Propagation, moving: Propagation, check: Verifier
) -> tuple[list[NeuronSymmetry], list[str]]:
    """Propose what solves the constraints, and verify it: for finite groups those where buffers are `moving` along."""
    axes = still = [a for a in _all_axes(propagation) if a[0] in propagation.used]
    reasons: list[str] = [
        f"{op} is not understood{f' ({why})' if why else ''}: what it reads stays as it is"
        for op, why in propagation.unsupported_ops.items()
    ]
    if unread := [name for name in propagation.unexercised if name not in check.untouched]:
        reasons.append(f"{', '.join(unread)}: {Operation.NOT_EXERCISED}, in part")

    def note_rejected(symmetry: NeuronSymmetry, error: float) -> None:
        reasons.append(f"{symmetry}: {symmetry.group} {describe_error(error)}")

    mixings: list[NeuronSymmetry] = []
    proposals: list[NeuronSymmetry] = []
    sums, scaled = bool(propagation.constraints.sums), _with_offsets(axes, propagation.constraints)
    terms: tuple[int, ...] = (SECOND, PRODUCT, FIRST) if sums else (SECOND,)
    for classes, factors in _distinct_solutions(solve_scalings(propagation.constraints, term) for term in terms):
        places = places_of(scaled, classes, factors)
        single = _group_classes(
            scaled, places, GeneralLinear, color_signatures(propagation.constraints, classes, MIX), reasons
        )
        mixed = [s for s in join_side_by_side(list(single)) if s not in mixings]
        kept = check.keep(mixed, lambda *_: None)
        kept += check.keep([part for s in mixed if s not in kept for part in split_blocks(s)], lambda *_: None)
        mixings += kept
        rest = places.outside(covered_places(axes, mixings))
        made = _group_classes(scaled, rest, PositiveScaling, None, reasons)
        proposals += [s for s in made if s not in proposals]
    constraints, axes = moving.constraints, [a for a in _all_axes(moving) if a[0] in moving.used]
    covered, orders = covered_places(axes, mixings), solve_permutations(constraints)
    terms = (SECOND, FIRST, PRODUCT) if constraints.sums else (SECOND,)
    kinds: list[tuple[type[Group], Tensor, Tensor | None]] = [
        *(
            (Signs, classes, None)
            for (classes,) in _distinct_solutions((solve_signs(constraints, term),) for term in terms)
        ),
        (Permutation, orders, color_signatures(constraints, orders, PERM)),
    ]
    for kind, classes, signature in kinds:
        rest = places_of(axes, classes, torch.ones(len(classes))).outside(covered)
        proposals += [s for s in _group_classes(axes, rest, kind, signature, reasons) if s not in proposals]
    found = [s for s in mixings + check.keep(proposals, note_rejected) if not _is_trivial(s, check)]
    found = _without_dependent_scalings(found)
    first = {(a[0], a[1]): i for i, a in reversed(list(enumerate(axes)))}
    rank = [GeneralLinear, PositiveScaling, SpecialOrthogonal, PairRotations, Signs, Permutation]

    def sort_key(s: NeuronSymmetry) -> tuple[int, int]:
        places = (first.get((leg.name, leg.dim), len(axes)) for leg in s.legs)  # a mask has no labels
        return min(places), rank.index(type(s.group))

    found.sort(key=sort_key)
    turning = verified_rotations(found, propagation.constraints, {a[:2]: a[3] for a in still}, check)
    found += permute_blocks([part for s in found for part in split_blocks(s)], check)
    found = join_into_mixings(found + permute_experts(found, check) + turning, check)
    return sorted(found, key=sort_key), reasons


def _distinct_solutions(solutions: Iterable[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Those that are not equal to one before."""
    found: list[tuple[Tensor, ...]] = []
    for s in solutions:
        if not any(all(map(torch.equal, s, t)) for t in found):
            found.append(s)
    return found


def _without_dependent_scalings(found: list[NeuronSymmetry]) -> list[NeuronSymmetry]:
    """All but scalings that those before them make together, as of two of the three terms of a product."""
    kept: list[NeuronSymmetry] = []
    powers: list[dict[tuple[Leg, int], float]] = []
    for s in found:
        if isinstance(s.group, PositiveScaling):
            own = {(replace(leg, dual=False, power=1.0), s.group.n): leg.exponent for leg in s.legs}
            near = [*(p for p in powers if p.keys() & own.keys()), own]
            places = list({leg: None for p in near for leg in p})
            if int(torch.linalg.matrix_rank(torch.tensor([[p.get(k, 0.0) for k in places] for p in near]))) < len(near):
                continue
            powers.append(own)
        kept.append(s)
    return kept


def _all_axes(propagation: Propagation) -> list[Axis]:
    """All axes of all parameters, in order; that of a depthwise convolution's inputs lies along dimension 0."""
    axes: list[Axis] = []
    for (name, dim, groups), labels in propagation.parameter_axes.items():
        if groups > 1 and len(labels) == groups:
            each = len(propagation.parameter_axes[name, 0, 1]) // groups
            axes.append(Axis(name, 0, 1, labels.repeat_interleave(each)))
        else:
            axes.append(Axis(name, dim, groups, labels, buffer=name in propagation.buffers))
    return axes


def _with_offsets(axes: list[Axis], constraints: Constraints) -> list[Axis]:
    """The axes with the labels that parameters have once a number was added to them, or to what they are added to."""
    found: dict[int, tuple[Tensor, Any]] = {int(bias[0]): (bias, numbers) for bias, numbers in constraints.absorbed}
    found |= {int(parameter.reshape(-1)[0]): (s.reshape(-1), number) for s, parameter, number in constraints.offsets}
    return [
        axis._replace(labels=shifted, offset=number) if len(shifted) == len(axis.labels) else axis
        for axis in axes
        for shifted, number in [
            found.get(int(axis.labels[0]), (axis.labels, 0.0)) if len(axis.labels) else (axis.labels, 0.0)
        ]
    ]


def _group_classes(
    axes: list[Axis], places: Places, kind: type[Group], signature: Tensor | None, reasons: list[str]
) -> Iterator[NeuronSymmetry]:
    """Classes that show up on the same axes and that nothing tells apart, taken together."""
    by_powers, fewest = kind in (PositiveScaling, GeneralLinear), 1 + (kind in (GeneralLinear, Permutation))
    for runs in families(places, signature, by_powers, fewest):
        if kind is GeneralLinear and any(abs(entry.power) != 1 for entry in runs[0][1]):
            continue
        made: list[NeuronSymmetry] = []
        for count, entries in runs:
            if count < fewest and len(runs) <= PIECES:
                continue  # a scaling, or nothing
            legs = []
            for entry in entries:
                name, dim, groups, _, offset, buffer = axes[entry.axis]
                dual, power = (entry.power < 0, abs(entry.power)) if by_powers else (dim == 1, 1.0)
                own = Leg(name, dim, dual, 0, entry.each, groups, 0, power, offset, buffer)
                legs += [replace(own, start=start) for start in entry.indices[:: entry.each]]
            if kind is Permutation:  # in and out of a depthwise convolution: one place, moved once
                legs = list(dict.fromkeys(legs))
            if not all(leg.buffer for leg in legs):
                made.append(NeuronSymmetry(kind(count), legs))
        if made and kind in (PositiveScaling, Signs):
            made = _whole_stack(made, {a[:3]: len(a[3]) // a[2] for a in axes})
        if len(made) > PIECES:
            reasons.append(f"{', '.join(made[0].names)}: a {kind.__name__} whose places are scattered")
            continue
        yield from made


def _whole_stack(parts: list[NeuronSymmetry], sizes: dict[tuple[str, int, int], int]) -> list[NeuronSymmetry]:
    """One symmetry of a stack in place of the same one for each of its matrices; `sizes` are those of their axes."""
    first, count = parts[0], len(parts)
    shifts = {leg: sizes[leg.name, leg.dim, leg.groups] for leg in first.legs}
    if (
        count == 1
        or any(leg.groups != count or leg.each > 1 for leg in first.legs)
        or any(
            part.legs != tuple(replace(leg, start=leg.start + k * shifts[leg]) for leg in first.legs)
            for k, part in enumerate(parts)
        )
    ):
        return parts
    group: Any = type(first.group)
    return [NeuronSymmetry(group(count * first.group.n), [replace(leg, run=first.group.n) for leg in first.legs])]


def _is_trivial(symmetry: NeuronSymmetry, check: Verifier) -> bool:
    """Whether it moves nothing, because what it multiplies by on one dimension it divides by on another."""
    if len(symmetry.names) > 1:
        return False
    old = check.params
    new = symmetry.act(old, symmetry.sample(old, generator=check.generator))
    names = (*symmetry.names, *symmetry.buffers)
    return distance([new[n] for n in names], [old[n] for n in names]) < TOLERANCE
