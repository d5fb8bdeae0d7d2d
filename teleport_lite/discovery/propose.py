"""From classes of labels to symmetries."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teleport_lite.discovery.constraints import MIX, PERM, Constraints, rational
from teleport_lite.discovery.heads import join_side_by_side, permute_blocks, permute_stacks, split_blocks
from teleport_lite.discovery.operation import Operation
from teleport_lite.discovery.propagate import Propagation
from teleport_lite.discovery.rotations import rotations
from teleport_lite.discovery.solve import (
    FIRST,
    PRODUCT,
    SECOND,
    signatures,
    solve_permutations,
    solve_scalings,
    solve_signs,
)
from teleport_lite.discovery.verify import TOLERANCE, Verifier, distance, told
from teleport_lite.groups import (
    GeneralLinear,
    Group,
    PairRotations,
    Permutation,
    PositiveScaling,
    Signs,
    SpecialOrthogonal,
)
from teleport_lite.symmetries.axes import Leg, NeuronSymmetry

PIECES = 64  # an axis in more pieces than that is left out


class _Entry(NamedTuple):
    """Where a class shows up: the k-th axis, by a power, at these indices."""

    axis: int
    power: float
    indices: tuple[int, ...]


def solve_and_verify(
    propagation: Propagation, moving: Propagation, check: Verifier
) -> tuple[list[NeuronSymmetry], list[str]]:
    """Propose what solves the constraints, and verify it: for finite groups those where buffers are `moving` along."""
    axes = still = [a for a in _axes(propagation) if a[0] in propagation.used]
    reasons: list[str] = [
        f"{op} is not understood{f' ({why})' if why else ''}: what it reads stays as it is"
        for op, why in propagation.unsupported_ops.items()
    ]
    if unread := [name for name in propagation.unexercised if name not in check.untouched]:
        reasons.append(f"{', '.join(unread)}: {Operation.NOT_EXERCISED}, in part")

    def drop(symmetry: NeuronSymmetry, error: float) -> None:
        reasons.append(f"{symmetry}: {symmetry.group} {told(error)}")

    found: list[NeuronSymmetry] = []
    mixings: list[NeuronSymmetry] = []
    sums, scaled = bool(propagation.constraints.sums), _with_offsets(axes, propagation.constraints)
    terms: tuple[int, ...] = (SECOND, PRODUCT) if sums else (SECOND,)
    for classes, factors in _distinct(solve_scalings(propagation.constraints, term) for term in terms):
        entries = _entries(scaled, classes, factors)
        single = _proposals(
            scaled, entries, GeneralLinear, signatures(propagation.constraints, classes, MIX), classes, reasons
        )
        mixed = [s for s in join_side_by_side(list(single)) if s not in found]
        kept = check.keep(mixed, lambda *_: None)
        kept += check.keep([part for s in mixed if s not in kept for part in split_blocks(s)], lambda *_: None)
        mixings += kept
        covered = _covered(axes, mixings)
        rest = {c: e for c, e in entries.items() if not all((x.axis, p) in covered for x in e for p in x.indices)}
        made = [s for s in _proposals(scaled, rest, PositiveScaling, None, classes, reasons) if s not in found]
        found += kept + check.keep(made, drop)
    constraints, axes = moving.constraints, [a for a in _axes(moving) if a[0] in moving.used]
    covered, orders = _covered(axes, mixings), solve_permutations(constraints)
    terms = (SECOND, FIRST, PRODUCT) if constraints.sums else (SECOND,)
    kinds: list[tuple[type[Group], Tensor, Tensor | None]] = [
        *((Signs, classes, None) for (classes,) in _distinct((solve_signs(constraints, term),) for term in terms)),
        (Permutation, orders, signatures(constraints, orders, PERM)),
    ]
    proposals: list[NeuronSymmetry] = []
    for kind, classes, signature in kinds:
        entries = _entries(axes, classes, torch.ones(len(classes)))
        rest = {c: e for c, e in entries.items() if not all((x.axis, p) in covered for x in e for p in x.indices)}
        made = [s for s in _proposals(axes, rest, kind, signature, classes, reasons) if s not in found + proposals]
        proposals += made
        if check.planned.trials != check.planned.even or kind is Permutation:  # else all in one go
            found, proposals = found + check.keep(proposals, drop), []
    found = [s for s in found if not _trivial(s, check)]
    first = {(a[0], a[1]): i for i, a in reversed(list(enumerate(axes)))}
    rank = [GeneralLinear, PositiveScaling, SpecialOrthogonal, PairRotations, Signs, Permutation]

    def sort_key(s: NeuronSymmetry) -> tuple[int, int]:
        return min(first[leg.name, leg.dim] for leg in s.legs), rank.index(type(s.group))

    found.sort(key=sort_key)
    turning = rotations(found, propagation.constraints, {a[:2]: a[3] for a in still}, check)
    found += permute_blocks([part for s in found for part in split_blocks(s)], check)
    found += permute_stacks(found, check) + turning
    return sorted(found, key=sort_key), reasons


def _distinct(solutions: Iterable[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Those that are not equal to one before."""
    found: list[tuple[Tensor, ...]] = []
    for s in solutions:
        if not any(all(map(torch.equal, s, t)) for t in found):
            found.append(s)
    return found


class Axis(NamedTuple):
    """An axis of a parameter; scalings act on it with `offset` added, as on the gain 1 + w of a norm."""

    name: str
    dim: int
    groups: int
    labels: Tensor
    offset: float = 0.0
    buffer: bool = False


def _axes(propagation: Propagation) -> list[Axis]:
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
    """The axes with the labels that parameters have once a number was added to them."""
    found = {int(parameter.reshape(-1)[0]): (s.reshape(-1), number) for s, parameter, number in constraints.offsets}
    return [
        axis._replace(labels=shifted, offset=number) if len(shifted) == len(axis.labels) else axis
        for axis in axes
        for shifted, number in [
            found.get(int(axis.labels[0]), (axis.labels, 0.0)) if len(axis.labels) else (axis.labels, 0.0)
        ]
    ]


def _entries(axes: list[Axis], classes: Tensor, factors: Tensor) -> dict[int, list[_Entry]]:
    """For each class that moves, where it shows up; it moves the first rows directly."""
    places: dict[int, dict[tuple[int, float], list[int]]] = {}
    for k, axis in enumerate(axes):
        variables = axis.labels >> 1
        powers = factors[variables] * (1 - 2 * (axis.labels & 1))
        for i, (c, power) in enumerate(zip(classes[variables].tolist(), powers.tolist(), strict=True)):
            if c:
                places.setdefault(c, {}).setdefault((k, power), []).append(i)
    found: dict[int, list[_Entry]] = {}
    for c, there in places.items():
        unit = next((power for k, power in there if axes[k].dim == 0), next(iter(there))[1])
        found[c] = [_Entry(k, rational(power / unit), tuple(where)) for (k, power), where in there.items()]
    return found


def _covered(axes: list[Axis], symmetries: list[NeuronSymmetry]) -> set[tuple[int, int]]:
    """The places, by axis, that symmetries move."""
    where = {axis[:3]: k for k, axis in reversed(list(enumerate(axes)))}
    return {
        (where[leg.name, leg.dim, leg.groups], leg.start + i)
        for s in symmetries
        for leg in s.legs
        for i in range(s.group.n * leg.each)
    }


def _proposals(
    axes: list[Axis],
    entries: dict[int, list[_Entry]],
    kind: type[Group],
    signature: Tensor | None,
    classes: Tensor,
    reasons: list[str],
) -> Iterator[NeuronSymmetry]:
    """Classes that show up on the same axes and that nothing tells apart, taken together."""
    families: dict[Any, list[list[_Entry]]] = defaultdict(list)
    of_class: dict[int, int] = {}
    if signature is not None:
        of_class = dict(zip(classes.tolist(), signature.tolist(), strict=True))
    for c, there in entries.items():
        shape = tuple(
            (e.axis, e.power if kind in (PositiveScaling, GeneralLinear) else 1.0, len(e.indices)) for e in there
        )
        families[shape, of_class.get(c, 0)].append(there)
    for (shape, _), members in families.items():
        if kind is GeneralLinear and any(abs(power) != 1 for _, power, _ in shape):
            continue
        made: list[NeuronSymmetry] = []
        pieces = list(_pieces(members))
        for piece in pieces:
            if len(piece) == 1 and kind in (GeneralLinear, Permutation) and len(pieces) <= PIECES:
                continue  # a scaling, or nothing
            dual_sign = kind in (PositiveScaling, GeneralLinear)
            legs = []
            for entry in piece[0]:
                name, dim, groups, _, offset, buffer = axes[entry.axis]
                each = _block(entry.indices)
                dual, power = (entry.power < 0, abs(entry.power)) if dual_sign else (dim == 1, 1.0)
                own = Leg(name, dim, dual, 0, each, groups, 0, power, offset, buffer)
                legs += [replace(own, start=start) for start in entry.indices[::each]]
            if kind is Permutation:  # in and out of a depthwise convolution: one place, moved once
                legs = list(dict.fromkeys(legs))
            if not all(leg.buffer for leg in legs):
                made.append(NeuronSymmetry(kind(len(piece)), legs))
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


def _trivial(symmetry: NeuronSymmetry, check: Verifier) -> bool:
    """Whether it moves nothing, because what it multiplies by on one dimension it divides by on another."""
    if len(symmetry.names) > 1:
        return False
    old = check.params
    new = symmetry.act(old, symmetry.sample(old, generator=check.generator))
    names = (*symmetry.names, *symmetry.buffers)
    return distance([new[n] for n in names], [old[n] for n in names]) < TOLERANCE


def _block(indices: tuple[int, ...]) -> int:
    """How many indices stand side by side, if all such blocks are equally long; else 1."""
    if len(indices) == 1:
        return 1
    length = next((i for i in range(1, len(indices)) if indices[i] != indices[i - 1] + 1), len(indices))
    blocks = [indices[i : i + length] for i in range(0, len(indices), length)]
    regular = all(b == tuple(range(b[0], b[0] + length)) for b in blocks)
    return length if regular else 1


def _pieces(members: list[list[_Entry]]) -> Iterator[list[list[_Entry]]]:
    """Runs of classes, each of which stands right behind the one before it on every axis."""
    members = sorted(members, key=lambda there: there[0].indices)
    piece = [members[0]]
    for there in members[1:]:
        follows = all(
            tuple(p + _block(a.indices) for p in a.indices) == b.indices for a, b in zip(piece[-1], there, strict=True)
        )
        if follows:
            piece.append(there)
        else:
            yield piece
            piece = [there]
    yield piece
