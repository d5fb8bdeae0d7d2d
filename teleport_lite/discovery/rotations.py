"""Rotations, proposed from what was found: of a residual stream from its permutation, of rotary pairs from scalings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from teleport_lite.discovery.constraints import TURN, Constraints
from teleport_lite.discovery.solve import color_signatures, solve_permutations, solve_scalings
from teleport_lite.discovery.verify import Verifier
from teleport_lite.functional import Params
from teleport_lite.groups import GeneralLinear, PairRotations, Permutation, PositiveScaling, SpecialOrthogonal
from teleport_lite.symmetries.axes import Leg, NeuronSymmetry
from teleport_lite.symmetries.gained import GainedSymmetry

TRIED = 8  # entries of a stream that are rotated to verify it: with its permutations they generate all rotations
Rotate = Callable[[int, bool], NeuronSymmetry]  # so many entries of a stream, all rotations or those that are centered


def verified_rotations(
    found: list[NeuronSymmetry],
    constraints: Constraints,
    axes: dict[tuple[str, int], Tensor],
    check: Verifier,
) -> list[NeuronSymmetry]:
    """The rotations that hold.

    Args:
        found: what was verified, permutations and scalings among it.
        constraints: the equations between labels.
        axes: the labels of each parameter and dimension.
        check: the verifier.
    """
    turning = check.keep([turned for s in found if (turned := _of_pairs(s))], lambda *_: None)
    streams = list(_residual_streams(found, constraints, axes, check.params))
    for centered in (False, True):  # behind an RMSNorm, and behind a LayerNorm
        tried = {rotate(min(n, TRIED), centered): (n, rotate) for n, rotate in streams if n > 1 + centered}
        held = check.bisect_holding(list(tried), lambda *_: None)
        turning += [rotate(n, centered) for n, rotate in map(tried.__getitem__, held)]
        streams = [pair for s, pair in tried.items() if s not in held]
    return turning


def join_into_mixings(found: list[NeuronSymmetry], check: Verifier) -> list[NeuronSymmetry]:
    """Mixings in place of a scaling and a rotation of the same places, which generate them, where they hold."""
    parts: dict[NeuronSymmetry, tuple[NeuronSymmetry, ...]] = {}
    turning = {
        frozenset(_places(s)): s
        for s in found
        if isinstance(s.group, SpecialOrthogonal) and not (s.group.centered or s.gains)
    }
    for s in (s for s in found if isinstance(s.group, PositiveScaling)):
        rotation = turning.get(frozenset(_places(s)))
        if rotation and all(leg.power == 1 and not leg.offset for leg in s.legs):
            parts[NeuronSymmetry(GeneralLinear(s.group.n), s.legs)] = s, rotation
    joined = check.keep(list(parts), lambda *_: None)
    return [s for s in found if all(s not in parts[m] for m in joined)] + joined


def _places(symmetry: NeuronSymmetry) -> list[Leg]:
    return [replace(leg, dual=False, power=1.0) for leg in symmetry.legs]


def _of_pairs(scaling: NeuronSymmetry) -> NeuronSymmetry | None:
    """The rotations of the pairs of entries that a scaling of queries and keys multiplies alike."""
    n = scaling.group.n
    if not isinstance(scaling.group, PositiveScaling) or len({leg.dual for leg in scaling.legs}) == 1:
        return None
    if all(leg.each == 2 for leg in scaling.legs):
        return NeuronSymmetry(PairRotations(2 * n), [replace(leg, each=1) for leg in scaling.legs])
    rest, legs = sorted(scaling.legs, key=lambda leg: leg.start), []
    while rest:
        legs.append(rest.pop(0))
        other = replace(legs[-1], start=legs[-1].start + n)
        if other not in rest or other.each > 1:
            return None
        rest.remove(other)
    return NeuronSymmetry(PairRotations(2 * n, halves=True), legs)


def _residual_streams(
    found: list[NeuronSymmetry],
    constraints: Constraints,
    axes: dict[tuple[str, int], Tensor],
    params: Params,
) -> Iterator[tuple[int, Rotate]]:
    """The axes that are permuted and that nothing but norms and linear maps reads, with their rotations.

    A leg stands behind a gain when both would be rescaled together.
    """

    def first_label(leg: Leg) -> int:
        return int(axes[leg.name, leg.dim][leg.start])

    permuted = [s for s in found if isinstance(s.group, Permutation) and not s.buffers]
    if permuted:
        marks = color_signatures(constraints, solve_permutations(constraints), TURN)
        permuted = [s for s in permuted if not marks[first_label(s.legs[0]) >> 1]]
    if not permuted:
        return
    classes, factors = solve_scalings(constraints)
    gain_of, number, multiplies = axis_multipliers(constraints)

    def class_and_sign(k: int) -> tuple[int, bool]:
        return int(classes[k >> 1]), bool(factors[k >> 1] < 0) != bool(k & 1)

    for s in permuted:
        gains: dict[int, tuple[Leg, bool]] = {}
        legs: list[tuple[Leg, Leg | None]] = []
        for leg in s.legs:
            vector = params[leg.name].numel() == params[leg.name].shape[leg.dim]
            if vector and multiplies[k := int(gain_of[first_label(leg)])] and class_and_sign(k)[0]:
                gains[class_and_sign(k)[0]] = replace(leg, offset=float(number[first_label(leg)])), class_and_sign(k)[1]
            else:
                legs.append((leg, None))
        for i, (leg, _) in enumerate(legs):
            c, dual = class_and_sign(first_label(leg))
            if c in gains:
                legs[i] = replace(leg, dual=dual != gains[c][1]), gains[c][0]
        if legs:
            yield s.group.n, partial(_rotation_of_legs, legs)


def axis_multipliers(constraints: Constraints) -> tuple[Tensor, Tensor, Tensor]:
    """For each label that of the parameter with its offset, the offset, and whether what has it multiplies an axis."""
    gain_of, number = torch.arange(2 * constraints.count), torch.zeros(2 * constraints.count, dtype=torch.float64)
    for shifted, parameter, offset in constraints.offsets:
        gain_of[parameter], number[parameter] = shifted, offset
    multiplies = torch.zeros_like(gain_of, dtype=torch.bool)
    for labels in constraints.gains:
        multiplies[labels] = True
    return gain_of, number, multiplies


def _rotation_of_legs(legs: list[tuple[Leg, Leg | None]], n: int, centered: bool) -> NeuronSymmetry:
    group = SpecialOrthogonal(n, centered)
    if any(gain for _, gain in legs):
        return GainedSymmetry(group, *zip(*legs, strict=True))
    return NeuronSymmetry(group, [leg for leg, _ in legs])
