"""The closed forms of norms along an orbit.

Norms of transported gradients and of moved weights are sums of exponentials of `xi`, convex along the orbit: their
maximum over a ball is at its boundary, their minimum is the balanced point. Both are found factor by factor, each
factor exactly given the others. Derived in the chapter *Teleporting*.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from teleport_lite.functional import Params
from teleport_lite.groups import GeneralLinear, PositiveScaling
from teleport_lite.groups.base import element_dtype
from teleport_lite.objectives import Objective
from teleport_lite.runtime import home_of_float64
from teleport_lite.symmetries.axes import NeuronSymmetry
from teleport_lite.symmetries.base import Symmetry
from teleport_lite.symmetries.product import Product
from teleport_lite.symmetries.rank import connected_factors

SWEEPS_UP = 4  # a corner maximum has been stable after 1 to 4 sweeps wherever it was measured
SWEEPS_DOWN = 100  # at most


def has_closed_form(symmetry: Product, objective: Objective) -> bool:
    """Whether `searched_factors` leaves alone what can be optimised exactly given the others, or need not be."""
    return objective.quadratic is not None and (
        any(_is_solvable(f, objective.quadratic == "gradient") for f in symmetry)
        or all(_is_neutral(f) for f in symmetry)
    )


def searched_factors(symmetry: Product, objective: Objective) -> Product:
    """The factors that a search moves by default.

    Those without a closed form stay at the identity as long as others have one; ascent moves them when there is nothing
    else, or when it is asked for.
    """
    solvable = [f for f in symmetry if objective.quadratic and _is_solvable(f, objective.quadratic == "gradient")]
    return Product(solvable, symmetry.reasons) if solvable else symmetry


def _is_neutral(factor: Symmetry) -> bool:
    """A factor that preserves all norms: nothing to choose."""
    return isinstance(factor, NeuronSymmetry) and factor.group.isometry and factor.linear


def _is_solvable(factor: Symmetry, gradients: bool) -> bool:
    """A scaling or mixing that multiplies no entry of a tensor twice, and no weight with an offset."""
    if not isinstance(factor, NeuronSymmetry) or not isinstance(factor.group, (PositiveScaling, GeneralLinear)):
        return False
    legs = sorted(factor.legs, key=lambda leg: (leg.name, leg.start))
    return (gradients or factor.homogeneous) and all(
        a.name != b.name or (a.dim == b.dim and a.start + a.each * factor.group.n <= b.start and a.groups == 1)
        for a, b in pairwise(legs)
    )


@torch.no_grad()
def closed_form(
    symmetry: Product, tensors: Params, gradients: bool, *, maximize: bool = True, radius: float = 1.0
) -> tuple[Tensor, ...]:
    r"""Extremise the norm of `tensors` along the orbit, by sweeps of exact updates of one factor at a time.

    A scaling sees only squares, and a tensor only the sums of its squares over the dimensions on which nothing acts, so
    a sweep costs less than one pass over the parameters.

    Args:
        symmetry: scalings and mixings; other factors stay at the identity, as `searched_factors` says.
        tensors: parameters, or gradients with respect to them.
        gradients: whether `tensors` transform like gradients.
        maximize: to a corner of the box, or down to the balanced point.
        radius: bound on the operator norm of each factor.
    """
    moving = [f for f in symmetry if isinstance(f, NeuronSymmetry) and _is_solvable(f, gradients)]
    found: dict[int, Tensor] = {}
    for parts in _equal_components(connected_factors(moving, _share_entries), tensors):
        first = parts[0]
        plain = all(isinstance(f.group, PositiveScaling) and all(leg.groups == 1 for leg in f.legs) for f in first)
        sweep = partial(
            _sweep_squares if plain else _sweep_tensors,
            first,
            gradients=gradients,
            maximize=maximize,
            radius=radius,
            sweeps=SWEEPS_UP if maximize and len(first) > 1 else _sweeps_down(first, relax=plain),
        )
        # a parameter of the first, with its counterparts
        rows = zip(*(_moved_names(part) for part in parts), strict=True)
        if len(parts) > 1:
            xis: Any = torch.func.vmap(sweep)({row[0]: torch.stack([tensors[n] for n in row]) for row in rows})
        else:
            still = plain or len(first) == 1
            alone = {name: tensors[name] if still else tensors[name].clone() for (name,) in rows}
            xis = [[xi] for xi in sweep(alone)]
        for factors, elements in zip(zip(*parts, strict=True), xis, strict=True):
            found |= {id(f): xi.to(f.zeros(tensors)) for f, xi in zip(factors, elements, strict=True)}
    return tuple(found[id(f)] if id(f) in found else f.zeros(tensors) for f in symmetry)


def _sweeps_down(factors: list[NeuronSymmetry], *, relax: bool) -> int:
    r"""How many sweeps balance these factors to the last digits, as far as the way in which they meet tells.

    In a chain of $K$ factors what is missing shrinks by $\cos^2(\pi / (K + 1))$ a sweep, and by the
    `_relaxation_excess` of a relaxed step over 1 where steps are relaxed.
    """
    count = len(factors)
    meetings = [sum(_share_entries(f, g) for g in factors if g is not f) for f in factors]
    if sum(meetings) != 2 * (count - 1) or max(meetings) > 2:  # no chain
        return SWEEPS_DOWN
    rate = _relaxation_excess(count) if relax else math.cos(math.pi / (count + 1)) ** 2
    return min(SWEEPS_DOWN, math.ceil(-36 / math.log(rate))) if rate > 1e-16 else 1


def _relaxation_excess(count: int) -> float:
    r"""By how much a step of successive over-relaxation is longer than one to the extremum: $\omega - 1$.

    $\omega = 2 / (1 + \sin(\pi / (K + 1)))$ is best for a chain of K factors (Young, 1954). Any $\omega < 2$ goes down,
    for $u e^{2\xi} + d e^{-2\xi}$ is symmetric about its minimum.

    >>> round(_relaxation_excess(2), 3), _relaxation_excess(1)
    (0.072, 0.0)
    """
    sine = math.sin(math.pi / (count + 1))
    return (1 - sine) / (1 + sine)


def _share_entries(a: NeuronSymmetry, b: NeuronSymmetry) -> bool:
    """Whether two factors share entries; those of the queries' and the values' rows of one tensor do not."""
    for x, y in ((x, y) for x in a.legs for y in b.legs if x.name == y.name):
        ends = [leg.start + f.group.n * leg.each for f, leg in ((a, x), (b, y))]
        if x.dim != y.dim or x.groups > 1 or y.groups > 1 or (x.start < ends[1] and y.start < ends[0]):
            return True
    return False


def _equal_components(parts: list[list[NeuronSymmetry]], tensors: Params) -> Iterable[list[list[NeuronSymmetry]]]:
    """Components that are the same but for the names of their parameters, as the layers of a transformer, together."""
    families: dict[object, list[list[NeuronSymmetry]]] = defaultdict(list)
    for part in parts:
        names = _moved_names(part)
        places = [(f.group, [replace(leg, name=str(names.index(leg.name))) for leg in f.legs]) for f in part]
        looks = tuple((tensors[n].shape, tensors[n].dtype, tensors[n].device) for n in names)
        families[str(places), looks].append(part)
    return families.values()


def _moved_names(part: list[NeuronSymmetry]) -> list[str]:
    return list(dict.fromkeys(name for f in part for name in f.names))


def _sweep_squares(
    factors: list[NeuronSymmetry], tensors: Params, *, gradients: bool, maximize: bool, radius: float, sweeps: int
) -> list[Tensor]:
    r"""Scalings only: a squared norm is the contraction of the squared entries with vectors $e^{2p\xi}$.

    A maximum is looked for from three starts at once, the identity and the two corners whose signs alternate from
    factor to factor: in a chain of layers no best corner lies outside of the last two (Proposition 4.4).
    """
    dims = {(leg.name, leg.dim) for f in factors for leg in f.legs}
    home, dtype = _sweep_device_dtype(tensors, maximize)
    squares = {n: _summed_squares(tensors[n], {d for m, d in dims if m == n}).to(home).to(dtype) for n, _ in dims}
    first = next(iter(squares.values()))
    signs = torch.arange(3 if maximize and len(factors) > 1 else 1, device=first.device)
    starts = radius * ((signs + 1) % 3 - 1).to(first)  # 0, 1, -1
    vectors = {(name, dim): first.new_ones(len(starts), squares[name].shape[dim]) for name, dim in dims}
    xis = [starts[:, None] * (-1) ** k * first.new_ones(f.group.n) for k, f in enumerate(factors)]

    side = -1 if gradients else 1
    powers = [{1.0, -1.0} | {side * leg.exponent for leg in f.legs} for f in factors]
    stretches: list[dict[float, Tensor]] = [
        dict.fromkeys(ps, torch.ones_like(xi)) for ps, xi in zip(powers, xis, strict=True)
    ]

    def set_coordinates(k: int, xi: Tensor) -> None:
        """Let factor k have coordinates `xi`; two factors may act along one dimension."""
        old, stretches[k] = stretches[k], {p: (2 * p * xi).exp() for p in powers[k]}
        steps = {p: new / old[p] for p, new in stretches[k].items()}
        for leg in factors[k].legs:
            step = steps[side * leg.exponent]
            step = step if leg.each == 1 else step.repeat_interleave(leg.each, 1)
            vectors[leg.name, leg.dim].narrow(1, leg.start, step.shape[1]).mul_(step)

    def contract_squares(name: str, keep: int | None) -> Tensor:
        """The squares of a tensor, contracted with all vectors but that of dimension `keep`: [starts, entries]."""
        inner = sorted((d for n, d in dims if n == name and d != keep), reverse=True)
        if not inner:
            return squares[name].flatten().expand(len(starts), -1)
        rest = torch.tensordot(vectors[name, inner[0]], squares[name], ([1], [inner[0]]))[:, None]
        for dim in inner[1:]:
            vector = vectors[name, dim].view(len(starts), *[1] * (rest.ndim - 3), -1, 1)
            rest = (rest.movedim(dim + 2, -1) @ vector)[..., 0]
        return rest.reshape(len(starts), -1)

    for k, xi in enumerate(xis):
        set_coordinates(k, xi)
    for _ in range(sweeps):
        for k, factor in enumerate(factors):
            totals: dict[float, Any] = dict.fromkeys((1.0, -1.0), 0)  # coefficients of e^{2 p xi} by p
            for leg in factor.legs:
                p = side * leg.exponent
                rest = contract_squares(leg.name, leg.dim) * vectors[leg.name, leg.dim]
                rest = rest.narrow(1, leg.start, factor.group.n * leg.each)
                rest = rest if leg.each == 1 else rest.unflatten(1, (-1, leg.each)).sum(2)
                totals[p] = rest + totals.get(p, 0)
            totals = {p: total / stretches[k][p] for p, total in totals.items()}
            found = _group_extremum(factor.group, totals, maximize, radius).expand(len(starts), -1)
            if not maximize and len(factors) > 1 and len(totals) == 2:
                found = torch.lerp(xis[k], found, 1 + _relaxation_excess(len(factors))).clamp(-radius, radius)
            set_coordinates(k, found)
            xis[k] = found
    values = torch.stack([contract_squares(name, None).sum(1) for name in squares]).sum(0)
    best = values.argmax().view(1)
    return [xi.index_select(0, best)[0] for xi in xis]


def _sweep_tensors(
    factors: list[NeuronSymmetry], tensors: Params, *, gradients: bool, maximize: bool, radius: float, sweeps: int
) -> list[Tensor]:
    """Mixings among them: the tensors move along, in place, and a factor sees the Gram matrices of what it acts on.

    Its own element g, a symmetric matrix, is undone on these small matrices A alone, which become A' with gA'g = A.
    """
    home, dtype = _sweep_device_dtype(tensors, maximize)
    state = {n: t.to(home).to(dtype) for n, t in tensors.items()}
    xis = [f.zeros(state) for f in factors]
    side = -1 if gradients else 1
    elements = [(one, one) for one in (f.group.exp(xi) for f, xi in zip(factors, xis, strict=True))]  # and inverses
    for _ in range(sweeps):
        for k, factor in enumerate(factors):
            group: Any = factor.group
            g, inverse = elements[k]
            totals = dict.fromkeys((1.0, -1.0), torch.zeros_like(xis[k]))
            for leg in factor.legs:
                p = side * leg.exponent
                totals[p] = totals.get(p, 0) + group.gram(factor.axis(state[leg.name], leg), 0)
            for p, t in totals.items():
                h = inverse if p > 0 else g
                totals[p] = h @ t @ h if isinstance(group, GeneralLinear) else h ** (2 * abs(p)) * t
            xis[k] = _group_extremum(group, totals, maximize, radius)
            if len(factors) == 1:
                return xis
            elements[k] = new, new_inverse = group.exp(torch.stack([xis[k], -xis[k]])).unbind()
            steps = group.compose(new, inverse), group.compose(new_inverse, g)
            for leg in factor.legs:
                factor.multiply_(steps[leg.dual != gradients], state[leg.name], leg)
    return xis


def _group_extremum(group: Any, totals: dict[float, Tensor], maximize: bool, radius: float) -> Tensor:
    """The extremum of a group, which has to know the powers when there are others than 1 and -1."""
    powers = {} if len(totals) == 2 else {"powers": tuple(totals)}
    return group.extremum(*totals.values(), **powers, maximize=maximize, radius=radius)


def _sweep_device_dtype(tensors: Params, maximize: bool) -> tuple[torch.device, torch.dtype]:
    """Where to sweep, and in which type: a corner is a choice of signs, a minimum wants float64."""
    home = next(iter(tensors.values())).device
    return (
        (home, element_dtype(*(t.dtype for t in tensors.values())))
        if maximize
        else (home_of_float64(home), torch.float64)
    )


def _summed_squares(tensor: Tensor, dims: set[int]) -> Tensor:
    """Squares of `tensor`, summed over all dimensions but `dims` (which stay in place), in float32 at least."""
    rest = [d for d in range(tensor.ndim) if d not in dims]
    wide = tensor if tensor.dtype.itemsize >= 4 else tensor.float()
    return (torch.linalg.vector_norm(wide, dim=rest, keepdim=True) if rest else wide).square()
