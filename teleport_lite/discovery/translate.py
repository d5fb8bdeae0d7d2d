"""Propose translations, verify them, and take together what belongs together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from teleport_lite.discovery.differences import EXACT
from teleport_lite.discovery.elements import random_element
from teleport_lite.discovery.exercised import exercised_entries
from teleport_lite.discovery.kernels import kernel_shifts
from teleport_lite.discovery.probe import Probe, randn_like, scattered
from teleport_lite.discovery.shifts import Shifts
from teleport_lite.discovery.ties import Tie
from teleport_lite.discovery.verify import S, Verifier
from teleport_lite.functional import Params, norm
from teleport_lite.symmetries.base import Symmetry
from teleport_lite.symmetries.shifts import Move, Shift, Step, join_shifts

BLOCKS, TERMS = 8, 64  # of columns of a matrix, and of what may undo the shift of a table, at most
SUMS = 4  # of the outputs of a trial, at random
FAR_OUT, COARSELY = 300.0, 1e-3  # coordinates of translations, and relative changes of outputs that are none there
ROUNDS = 8  # of runs, in which a maximum of maxima ties more and more
FINELY = 1e-8  # the same where inputs are large
ROUNDING = 1e-8  # the cosine of what is orthogonal


def verified_translations(
    probe: Probe, check: Verifier, connected: dict[tuple[str, int], Tensor], generator: torch.Generator
) -> dict[Shift, int]:
    """The translations that hold, each with the number of its family, for `combine_translations`.

    In `connected` are, for each dimension of a parameter, numbers [groups, entries] as `connected_axes` gives them.
    """
    calm, params = check.planned.calm, probe.params
    looped: frozenset[str] = frozenset()
    ties: tuple[Tie, ...] = ()
    trials = [calm[min(1, len(calm) - 1)], *check.planned.whole[:1]]
    for left, trial in zip(range(2 * len(trials) - 1, -ROUNDS, -1), trials * ROUNDS, strict=False):
        mode = Shifts(params, generator, looped, ties)
        outputs = probe.outputs(trial.call, trial.training, trial.seed, (*trial.modes(), mode))
        live = (s for s in mode.sources if not s.blocked.all())
        again = {o.name for s in live for (o, _), n in s.undone.items() if mode.uses[o.name] > n} - looped
        if ties == (*mode.ties,) and (left <= 0 or (not again and all(bool(s.read.all()) for s in mode.sources))):
            break
        looped, ties = looped | again, (*mode.ties,)
    readers = {  # behind a norm with that gain
        (s.name, o[0]) for s in mode.sources if s.own for o in s.own[0].operands[:1] if isinstance(o, tuple)
    }
    unseen = dict(constant_shifts(params, check.gradients, generator))
    unseen = {s: k for s, k in unseen.items() if s.monomial or (s.moves[0].name, s.names[-1]) not in readers}
    low_rank = list(absorbed_shifts(params, check.gradients, mode.products))
    in_kernels = dict(kernel_shifts(params, check.gradients, mode.products, connected, ties, generator))
    alike = {s.moves[0].name: Move(s.moves[0].name, (1,) * len(s.moves[0].shape), 0, 1) for s in unseen if s.monomial}
    followed = [s for s in mode.finish(outputs) if alike.get(s.moves[0].name) != s.moves[0]]
    known = {s.moves[0].name for s in (*followed, *unseen) if s.monomial or not s.moves[0].steps}
    of_tables = table_shifts(params, check, mode.tables - known)
    proposed = [*followed, *low_rank, *unseen, *of_tables, *in_kernels]
    proposed = [s for s in proposed if all(params[n].requires_grad for n in s.names)]
    if proposed:
        elsewhere = scattered(probe.values, 0.5, generator)
        trial = next((t for t in check.planned.trials if t.training), trial)
        with probe.at(elsewhere):
            gradients = exercised_entries(params, [trial.run])[2]
        lengths = [float(norm(g)) for g in gradients]
        proposed = [s for s in proposed if to_first_order(s, elsewhere, gradients, lengths)]
    family = {**unseen, **{s: -k for k, s in enumerate(low_rank, 1)}}
    kinds = list(dict.fromkeys(in_kernels.values()))
    family |= {s: -len(low_rank) - 1 - kinds.index(k) for s, k in in_kernels.items()}
    kept = hold_far_out(check.at_given(check.keep(proposed, lambda *_: None)), check)
    return {s: family.get(s, 0) for s in kept}


def hold_far_out(symmetries: list[S], check: Verifier) -> list[S]:
    """Those that hold far from here: bounds such as a clamp's, which no usual run meets, stop what is false.

    So translations go `FAR_OUT`, where rounding is large and outputs are compared coarsely; and inputs are large.
    """
    near = check.planned.calm[0]

    def gap(tried: list[S]) -> float:
        moved = check.params
        for s in tried:
            c = randn_like(check.params[s.names[0]].new_empty(s.group.n), check.generator) * FAR_OUT
            moved = s.act(moved, c if isinstance(s, Shift) else random_element(s, 0, check.params))
        with check.probe.at(moved):
            return max(
                [near.output_gap(COARSELY), *(t.output_gap(FINELY) for t in check.planned.far if not t.is_chaotic)]
            )

    return [s for s in symmetries if not gap([s])] if symmetries and gap(symmetries) else symmetries


def combine_translations(found: dict[Shift, int]) -> list[Shift]:
    """Translations of one family that move a parameter in common, or are constant along the same axis, as one."""
    parts: list[tuple[int, list[Shift], set[str], set[str]]] = []
    for shift, family in found.items():
        own, own_reads = {*shift.moved}, {*shift.names} - {*shift.moved}
        for number, part, moved, reads in parts:
            near = number == family and (family or own & moved)
            if near and not own & reads and not own_reads & moved:
                part.append(shift)
                moved |= own
                reads |= own_reads
                break
        else:
            parts.append((family, [shift], own, own_reads))
    return [join_shifts(part) for _, part, _, _ in parts]


def to_first_order(symmetry: Symmetry, params: Params, gradients: list[Params], lengths: list[float]) -> bool:
    """Whether gradients, finite ones of these lengths, have no part along a symmetry: then it holds to first order."""
    velocity = symmetry.velocity(params, symmetry.sample(params, generator=torch.Generator().manual_seed(0)))
    inner = [sum(float((g[n] * v).sum()) for n, v in velocity.items() if n in g) for g in gradients]
    most = [length * float(norm(velocity)) for length in lengths]
    return any(most) and all(abs(a) <= ROUNDING * b for a, b in zip(inner, most, strict=True))


def constant_shifts(params: Params, gradients: list[Params], generator: torch.Generator) -> Iterator[tuple[Shift, int]]:
    """Shifts that are constant along an axis which a softmax or a norm reads, and the length of that axis.

    There the sum of the gradient along the axis is zero, or along each of several runs of its entries, as the groups of
    a GroupNorm: where partial sums of a gradient come back to a value, such a run begins and ends. Where a gain stands
    between, it is the sum of the gradient divided by that gain.
    """
    vectors: dict[int, list[str]] = defaultdict(list)
    for name, p in params.items():
        if p.ndim and p.numel() == max(p.shape):
            vectors[p.numel()].append(name)
    stacks = {n: torch.stack([params[name].flatten() for name in names]) for n, names in vectors.items()}
    largest = max((float(g.abs().max()) for found in gradients for g in found.values() if g.numel()), default=0.0)
    for name, p in params.items():
        grads = [g[name] for g in gradients if name in g]
        within = False
        for dim in range(p.ndim) if grads and p.requires_grad and p.is_floating_point() else ():
            rest = [d for d in range(p.ndim) if d != dim]
            weights = randn_like(p.select(dim, 0), generator)
            entries = torch.stack([torch.tensordot(g, weights, (rest, list(range(p.ndim - 1)))) for g in grads]).sum(0)
            runs = _zero_sum_runs(entries, EXACT * (largest + 10 * float(entries.abs().sum())))
            if runs:
                yield _constant_along(name, p.shape, dim, runs), p.shape[dim]
                within |= dim > 0
                continue
            if p.shape[dim] == 1 or not (gains := vectors[p.shape[dim]]):
                continue
            parts = entries / stacks[p.shape[dim]].to(entries)
            for k in (parts.sum(1).abs() <= EXACT * parts.abs().sum(1)).nonzero()[:, 0].tolist():
                if (gain := gains[k]) != name:
                    yield _shift_behind_gain(gain, params[gain].shape, name, p.shape, dim), p.shape[dim]
        some = [g.flatten(1) for g in grads if p.ndim > 2 and g.any()]
        if some and not within and all(bool((g.sum(1).abs() <= EXACT * g.abs().sum()).all()) for g in some):
            yield Shift(len(p), [Move(name, (len(p), *[1] * (p.ndim - 1)), 0, len(p))]), p[0].numel()  # a whole filter


def _zero_sum_runs(entries: torch.Tensor, rounding: float) -> list[tuple[int, int]]:
    """The shortest runs, of two entries or more, whose sums are zero."""
    some = (entries.abs() > rounding).nonzero()[:, 0]
    sums = torch.cat([entries.new_zeros(1), entries[some].cumsum(0)])
    values, order = sums.sort()
    value = torch.empty_like(order)
    value[order] = torch.cat([order.new_zeros(1), (values.diff() > rounding).cumsum(0)])  # equal ones have one number
    order = value.sort(stable=True).indices
    ends = torch.stack([order[:-1], order[1:]], 1)[value[order].diff() == 0].sort(0).values.tolist()
    if ends == [[0, len(some)]]:
        return [(0, len(entries))]
    return [(int(some[a]), int(some[b - 1]) + 1) for a, b in ends]


def _shift_behind_gain(gain: str, gains: torch.Size, name: str, shape: torch.Size, dim: int) -> Shift:
    """The shift that is constant along an axis behind a gain, a vector in the shape `gains`."""
    axes = "ijklm"[: len(shape)]
    flat = tuple(1 if d == dim else n for d, n in enumerate(shape))
    n = torch.Size(flat).numel()
    own = "".join(axes[dim] if length > 1 else "xyz"[d] for d, length in enumerate(gains))
    step = Step((), f"{own},{axes}->{axes}", flat, ((gain, 0, gains[0], -1),))
    return Shift(n, [Move(name, tuple(shape), 0, n, (step,))])


def _constant_along(name: str, shape: torch.Size, dim: int, runs: list[tuple[int, int]]) -> Shift:
    flat = tuple(1 if d == dim else n for d, n in enumerate(shape))
    n = torch.Size(flat).numel()
    if runs == [(0, shape[dim])]:
        return Shift(n, [Move(name, flat, 0, n)])
    which = torch.full((shape[dim],), -1)
    for k, (first, end) in enumerate(runs):
        which[first:end] = k
    places = torch.arange(len(runs) * n).view(*flat[:dim], len(runs), *flat[dim + 1 :])
    padded = torch.cat([places, torch.full(flat, -1)], dim).index_select(dim, which % (len(runs) + 1))
    return Shift(len(runs) * n, [Move(name, tuple(shape), 0, len(runs) * n, (Step(tuple(padded.flatten().tolist())),))])


def absorbed_shifts(
    params: Params, gradients: list[Params], products: dict[str, tuple[tuple[int, ...], int, str]]
) -> Iterator[Shift]:
    r"""Translations of A and B in $Wx + s\,BAx$, which W undoes: $B + \Delta$ with $W - s \Delta A$, and likewise.

    There the gradients are $G_B = s\,G_W A^\top$, which gives s.
    """
    for gradient in gradients[:1]:
        readers: dict[Any, list[str]] = defaultdict(list)
        for name, (x, _, _) in products.items():
            for key in (x, x[0]) if name in gradient else ():  # of this tensor, of this memory
                readers[key].append(name)
        beside = [pair for key, r in readers.items() if isinstance(key, tuple) for pair in permutations(r, 2)]
        for w, a, b in [(*pair, b) for pair in beside for b in readers.get(products[pair[1]][1], ())]:
            full, inner, last = (products[name][2] for name in (w, a, b))
            left, right = "or" if last == "oi" else "ro", "ri" if inner == "oi" else "ir"
            expected = torch.einsum(f"{full},{right}->{left}", gradient[w], params[a].to(gradient[w]))
            if expected.shape != gradient[b].shape:
                continue
            expected = expected.to(gradient[b])
            s = float((gradient[b] * expected).sum() / expected.square().sum())
            if (gradient[b] - s * expected).norm() <= ROUNDING * gradient[b].norm():
                s = round(s, 6) if abs(s - round(s, 6)) < ROUNDING * abs(s) else s
                for free, own, kept, other in ((b, left, a, right), (a, right, b, left)):
                    p, n = params[free], params[free].numel()
                    operand = (kept, 0, len(params[kept]), 1)
                    step = Step((), f"{other},{own}->{full}", tuple(p.shape), (operand,), -s)
                    yield Shift(n, [Move(free, tuple(p.shape), 0, n), Move(w, tuple(params[w].shape), 0, n, (step,))])


def table_shifts(params: Params, check: Verifier, tables: set[str]) -> Iterator[Shift]:
    r"""Translations of all rows of a table Q by c, which biases $b - s\,Mc$ undo, as in $p_u \cdot q_i + b_u$.

    There the gradients are $\sum_i G_{Q,i} = \sum_b s\,M^\top G_b$, which gives each s, for columns M of a matrix.
    """
    params = {name: p for name, p in params.items() if p.is_floating_point()}
    vectors: dict[int, list[str]] = defaultdict(list)
    for name, p in params.items():
        if p.ndim and p.numel() == len(p):
            vectors[len(p)].append(name)
    gradients: list[Params] = []
    for name in (n for n in params if n in tables and params[n].ndim == 2 and params[n].requires_grad):
        k = params[name].shape[1]
        terms = [
            (m, first, b)
            for m, p in params.items()
            if p.ndim == 2 and m != name and p.shape[1] % k == 0 and p.shape[1] <= BLOCKS * k
            for b in vectors[len(p)]
            for first in range(0, p.shape[1], k)
            if b not in (m, name)
        ]
        if not 0 < len(terms) <= TERMS:
            continue
        gradients = gradients or exercised_entries(params, [t.run for t in check.planned.trials] * SUMS)[2]
        found = [{n: g[n] if n in g else 0 * params[n] for n in params} for g in gradients if name in g]
        sums = torch.cat([g[name].sum(0) for g in found]) if found else torch.zeros(0)
        if len(sums) <= len(terms) or not sums.any():
            continue
        sides = [
            torch.cat([g[b].flatten() @ params[m].narrow(1, first, k).to(g[b]) for g in found]) for m, first, b in terms
        ]
        factors = torch.linalg.lstsq(torch.stack(sides, 1), sums, driver="gelsd").solution
        if (torch.stack(sides, 1) @ factors - sums).norm() > ROUNDING * sums.norm():
            continue
        moves = [Move(name, (1, k), 0, k)]
        for (m, first, b), s in zip(terms, factors.tolist(), strict=True):
            if abs(s) > ROUNDING:
                n, wide = params[m].shape
                s = round(s, 6) if abs(s - round(s, 6)) < ROUNDING * abs(s) else s
                places = tuple(i - first if first <= i < first + k else -1 for i in range(wide))
                product = Step((), "oi,i->o", (wide,), ((m, 0, n, 1),), -s)
                steps = (product,) if wide == k else (Step(places), product)
                moves.append(Move(b, tuple(params[b].shape), 0, k, steps))
        yield Shift(k, moves)
