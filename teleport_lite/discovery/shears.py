r"""Shears, proposed from what was found: behind LayerNorms from scalings of their gains, of streams from permutations.

What a LayerNorm gives has the sum zero before the gain g. So its shift $\beta$ and all that reads it may move by
$A = D (I + s 1^\top) D^{-1}$ with D = diag(g). Where each reader has a bias, translations do that. And it forgets a
change of the mean of what comes in: then all that writes to a stream moves by $I + 1 s^\top$, and what reads it beside
the norms undoes that. Where nothing else reads it, translations do that, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace

from teleport_lite.discovery.constraints import SCALE
from teleport_lite.discovery.propagate import Propagation
from teleport_lite.discovery.rotations import axis_multipliers
from teleport_lite.discovery.solve import solve_scalings
from teleport_lite.discovery.translate import hold_far_out, to_first_order
from teleport_lite.discovery.verify import Verifier
from teleport_lite.functional import Params, norm
from teleport_lite.groups import GeneralLinear, Permutation, PositiveScaling, Shears
from teleport_lite.symmetries.axes import Leg, NeuronSymmetry
from teleport_lite.symmetries.gained import GainedSymmetry
from teleport_lite.symmetries.shifts import Shift


def verified_shears(
    found: list[NeuronSymmetry], shifts: Iterable[Shift], propagation: Propagation, check: Verifier
) -> list[NeuronSymmetry]:
    """The shears that hold, but for those that translations make, beside scalings and permutations that were found."""
    free = {m.name for s in shifts for m in s.moves if not m.steps and m.count == check.params[m.name].numel()}
    params = check.params
    proposed = [s for s in _behind_norms(found, propagation, params) if not free & {*s.moved}]
    mixed = [{(leg.name, leg.dim) for leg in s.legs} for s in found if isinstance(s.group, GeneralLinear)]
    proposed += [s for s in _of_means(found, propagation) if {(leg.name, leg.dim) for leg in s.legs} not in mixed]
    lengths = [float(norm(g)) for g in check.gradients]
    proposed = [s for s in proposed if to_first_order(s, params, check.gradients, lengths) and check.notices_change(s)]
    return hold_far_out(check.at_given(check.keep(proposed, lambda *_: None)), check)


def _behind_norms(found: list[NeuronSymmetry], propagation: Propagation, params: Params) -> Iterator[NeuronSymmetry]:
    """All that a gain is scaled with, but for that gain, where the shift of the norm is among it."""
    gain_of, _, multiplies = axis_multipliers(propagation.constraints)
    for s in (s for s in found if isinstance(s.group, PositiveScaling)):
        vectors = [leg for leg in s.legs if params[leg.name].numel() == s.group.n]
        gains = [leg for leg in vectors if multiplies[gain_of[_first_label(leg, propagation)]]]
        if len(gains) != 1 or any(leg.power != 1 for leg in s.legs):
            continue
        legs = [replace(leg, dual=leg.dual != gains[0].dual) for leg in s.legs if leg not in gains]
        if any(leg in vectors and not leg.dual for leg in legs):
            yield GainedSymmetry(Shears(s.group.n), legs, gains * len(legs))


def _of_means(found: list[NeuronSymmetry], propagation: Propagation) -> Iterator[NeuronSymmetry]:
    """What is permuted together, divided where norms stand; what a matrix writes is told from what reads it by a sign.

    Which of both is which is tried out.
    """
    permuted = [s for s in found if isinstance(s.group, Permutation) and s.group.n > 1 and not s.buffers]
    equations = propagation.constraints
    last = [(b, out, SCALE, 1.0) for _, b, out in equations.crossings]  # as in a table of positions
    classes, factors = solve_scalings(replace(equations, equalities=equations.equalities + last, fixed=[], sums=[]))
    for s in permuted:
        parts: dict[int, list[tuple[Leg, bool]]] = defaultdict(list)
        for leg in s.legs:
            k = _first_label(leg, propagation)
            parts[int(classes[k >> 1])].append((leg, bool(factors[k >> 1] < 0) != bool(k & 1)))
        for c, part in parts.items():
            if c and {dual for _, dual in part} == {False, True}:
                for flip in (False, True):
                    legs = [replace(leg, dual=dual != flip) for leg, dual in part]
                    yield NeuronSymmetry(Shears(s.group.n, transposed=True), legs)


def _first_label(leg: Leg, propagation: Propagation) -> int:
    """That of the first entry."""
    return int(propagation.parameter_axes[leg.name, leg.dim, leg.groups][leg.start])
