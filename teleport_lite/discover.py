"""Find the symmetries of an unmodified model: propose, verify, keep only what holds.

One run of a copy of the model, operation by operation, gives equations between the axes of its parameters
(`teleport_lite.propagate`); their solutions are proposed as groups. Every proposal is then verified on the whole model,
in float64, on fresh inputs, in evaluation and training mode; what fails is dropped, with the reason.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase

from teleport_lite.constraints import MIX, PERM
from teleport_lite.errors import EmptyModelError, TeleportError
from teleport_lite.groups import GeneralLinear, Group, Permutation, PositiveScaling, Signs
from teleport_lite.params import Params
from teleport_lite.propagate import InFloat64, Propagation
from teleport_lite.symmetries.base import Product
from teleport_lite.symmetries.neurons import Leg, NeuronSymmetry
from teleport_lite.trace import copy_of, kept_random_state

TOLERANCE = 1e-10  # relative change in float64 beyond which a proposed symmetry is dropped
ENOUGH = 16  # fresh examples to verify on
SIZES = (30.0, 1 / 30)  # and so many times larger ones, for models that branch on what they read
APART = 8  # finite groups are tried one by one up to so many, else so many random selections of them
PIECES = 64  # an axis in more pieces than that is left out
RETURNED = "the model returns them"


def find_symmetries(model: nn.Module, example_inputs: object) -> Product:
    """The symmetries of `model` that hold on all inputs.

    Works on any model that runs: modules, functions and loops are all followed, operation by operation. What moves
    may be neurons and channels (scalings, signs, permutations, mixings where nothing stands between two linear maps),
    the queries and keys or the values of attention heads, or a residual stream. Mixings of the heads of a layer are one
    factor, GL(d)^heads. Frozen parameters stay. The model is only read, and the global random state is left as it was.

    Each factor is verified on the whole model: in float64, on random inputs of three sizes, in evaluation and training
    mode. That is a test and no proof: a branch that these inputs do not reach is not seen. See the chapter *Modern
    architectures*.

    Args:
        model: the model, on any device, in any mode.
        example_inputs: an input of the right shape, a tuple of positional arguments, or a dictionary of keyword
            arguments.

    Returns:
        A `Product`; empty, with `reasons`, when there is no symmetry. What was left out is listed there too.

    Raises:
        EmptyModelError: when the model has no parameters.
        TeleportError: when the model cannot be copied, or does not run on `example_inputs` in float64.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 1))
    >>> find_symmetries(model, torch.zeros(1, 8))
    Product of 4 symmetries, dim 16
      parameters                      group      dim  holds on
      0.weight, 0.bias -> 2.weight    (R>0)^16   16   all inputs
      0.weight, 0.bias -> 2.weight    S(16)      0    all inputs
      2.weight, 2.bias -> 4.weight    {1,-1}^4   0    all inputs
      2.weight, 2.bias -> 4.weight    S(4)       0    all inputs
    """
    if not any(True for _ in model.parameters()):
        raise EmptyModelError(model)
    probe = copy_of(model)
    args, kwargs = _call(example_inputs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), kept_random_state(probe), _transparent():
        _perturb(probe, generator)
        params: Params = dict(probe.named_parameters())
        check = _Check(probe, args, kwargs, generator)
        args, kwargs = check.inputs[0]
        seen = Propagation(params)
        for name, p in params.items():
            if not p.requires_grad:
                seen.freeze(name, f"{name} is frozen")
        torch.manual_seed(0)
        try:
            with seen:
                outputs = _tensors(probe(*args, **kwargs))
        except Exception as error:
            remedy = "pass an input on which the model runs in float64"
            raise TeleportError(
                "a model that runs on example_inputs", f"{type(error).__name__}: {error}", remedy
            ) from error
        seen.finish(outputs)
        factors, reasons = _solve(seen, check)
    moved = {(leg.name, leg.dim) for f in factors for leg in f.legs}
    still = [s for s in seen.slots if s[1] == 0 and params[s[0]].ndim > 1 and s[0] in seen.used and s[:2] not in moved]
    whys: dict[str, list[str]] = defaultdict(list)
    for (name, _, _), why in zip(still, seen.book.reasons([seen.slots[s] for s in still]), strict=True):
        if why and not (factors and why == RETURNED):
            whys[why].append(name)
    reasons += [f"rows of {', '.join(names)}: {why}" for why, names in whys.items()]
    return Product(factors, reasons)


@dataclass
class _Check:
    """The model, and fresh inputs on which it is asked whether a symmetry holds."""

    probe: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    generator: torch.Generator

    def __post_init__(self) -> None:
        real = [x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
        few = max((len(x) for x in real if x.ndim), default=ENOUGH)
        self.inputs = [self._fresh() for _ in range(-(-ENOUGH // max(few, 1)))]
        self.count = len(self.inputs)
        self.params: Params = dict(self.probe.named_parameters())
        self.widen = True  # until it is known that the model asks for nothing less than float64
        self.inputs += [x for size in SIZES if self._takes(x := self._fresh(size))] if real else []
        self.before: dict[bool, list[list[Tensor]]] = {}
        for training in (False, True):
            try:
                first = self._run(self.params, self.inputs[0], training)
                if not self._repeats(first, training):
                    continue
                if training and False in self.before and _distance(first, self.before[False][0]) == 0:
                    self.before[True] = self.before[False]  # the mode makes no difference
                else:
                    self.before[training] = [first, *(self._run(self.params, x, training) for x in self.inputs[1:])]
            except Exception:
                self.before.pop(training, None)

    def _takes(self, inputs: tuple[tuple, dict[str, Any]]) -> bool:
        """Whether the model runs on these inputs, and its outputs are finite."""
        try:
            return all(bool(y.isfinite().all()) for y in self._run(self.params, inputs, training=False))
        except Exception:
            return False

    def _repeats(self, first: list[Tensor], training: bool) -> bool:
        """Whether the model gives the same again; tried without `InFloat64`, which is left out from then on if so."""
        widen, self.widen = self.widen, False
        try:
            if _distance(self._run(self.params, self.inputs[0], training), first) == 0:
                return True
        except Exception:  # types do not agree
            pass
        self.widen = True
        return widen and _distance(self._run(self.params, self.inputs[0], training), first) == 0

    def _fresh(self, size: float = 1.0) -> tuple[tuple, dict[str, Any]]:
        def new(x: object) -> object:
            return size * _normal(x, self.generator) if isinstance(x, Tensor) and x.is_floating_point() else x

        return tuple(new(x) for x in self.args), {k: new(x) for k, x in self.kwargs.items()}

    def _run(self, params: Params, inputs: tuple[tuple, dict[str, Any]], training: bool) -> list[Tensor]:
        self.probe.train(training)
        buffers = {name: b.clone() for name, b in self.probe.named_buffers()}
        torch.manual_seed(0)
        try:
            with InFloat64() if self.widen else nullcontext():
                return _tensors(functional_call(self.probe, {**params, **buffers}, inputs[0], inputs[1]))
        finally:
            self.probe.eval()

    def error(self, symmetries: list[NeuronSymmetry]) -> float:
        """The largest change of the outputs under elements of radius 1, relative to the largest output."""
        shuffled = any(isinstance(s.group, Permutation) for s in symmetries)  # then masks agree in distribution only
        worst = 0.0 if self.before else float("inf")
        for turn, chosen in enumerate(self._choices(symmetries)):
            moved = self.params
            for symmetry in chosen:
                moved = symmetry.act(moved, self._element(symmetry, turn % 2))
            for k, (training, before) in enumerate(self.before.items()):
                if k and (shuffled or turn):
                    continue
                for x, old in list(zip(self.inputs, before, strict=True))[self._shown(turn)]:
                    gap = _distance(self._run(moved, x, training), old)
                    worst = max(worst, gap) if math.isfinite(gap) else float("inf")
        return worst

    def _shown(self, turn: int) -> slice:
        """The inputs of a turn: of the usual size, of the other sizes, and later the first alone."""
        if turn > 1:
            return slice(1)
        return slice(self.count, None) if turn == 1 and len(self.inputs) > self.count else slice(self.count)

    def _choices(self, symmetries: list[NeuronSymmetry]) -> list[list[NeuronSymmetry]]:
        """What to try together: all, twice; of finite groups, which may undo each other, each or random ones, too."""
        parts = [symmetries, symmetries]
        if len(symmetries) > 1 and all(not s.dim for s in symmetries):
            if len(symmetries) <= APART:
                return parts + [[s] for s in symmetries]
            for _ in range(APART):
                heads = torch.rand(len(symmetries), generator=self.generator) < 0.5
                parts.append([s for s, chosen in zip(symmetries, heads.tolist(), strict=True) if chosen])
        return parts

    def _element(self, symmetry: NeuronSymmetry, turn: int) -> Tensor:
        """A random element of a Lie group; of a finite group, in two turns, elements that generate it or nearly so."""
        n, like = symmetry.group.n, self.params[symmetry.names[0]]
        if isinstance(symmetry.group, Permutation):  # a cycle, then the exchange of two
            order = torch.arange(n, device=like.device)
            return order.roll(1) if turn == 0 else torch.cat([order[:2].flip(0), order[2:]])
        if isinstance(symmetry.group, Signs):  # every second one, then the others
            return 1 - 2 * ((torch.arange(n, device=like.device) + turn + 1) % 2).to(like)
        return symmetry.sample(self.params, generator=self.generator)

    def keep(
        self, symmetries: list[NeuronSymmetry], drop: Callable[[NeuronSymmetry, float], None]
    ) -> list[NeuronSymmetry]:
        """Those that hold."""
        return self._halved([s for s in symmetries if s.dim], drop) + self._halved(
            [s for s in symmetries if not s.dim], drop
        )

    def _halved(
        self, symmetries: list[NeuronSymmetry], drop: Callable[[NeuronSymmetry, float], None]
    ) -> list[NeuronSymmetry]:
        """Those that hold: all at once where they do, else by halves."""
        if not symmetries:
            return []
        error = self.error(symmetries)
        if error <= TOLERANCE:
            return symmetries
        if len(symmetries) == 1:
            drop(symmetries[0], error)
            return []
        half = len(symmetries) // 2
        return self._halved(symmetries[:half], drop) + self._halved(symmetries[half:], drop)


@dataclass(frozen=True)
class _Entry:
    """Where a class shows up: the k-th axis, inversely or not, at these places."""

    axis: int
    dual: bool
    places: tuple[int, ...]


def _solve(seen: Propagation, check: _Check) -> tuple[list[NeuronSymmetry], list[str]]:
    """Propose what solves the constraints, and verify it."""
    axes = [a for a in _axes(seen) if a[0] in seen.used]
    reasons: list[str] = [f"{op} is not understood: what it reads stays as it is" for op in seen.strange]

    def drop(symmetry: NeuronSymmetry, error: float) -> None:
        reasons.append(f"{symmetry}: {symmetry.group} changes the outputs, by {error:.1e} relative")

    found: list[NeuronSymmetry] = []
    covered: set[tuple[int, int]] = set()
    for second in (False, True) if seen.book.totals else (False,):
        classes, inverse = seen.book.scalings(signed=True, second=second)
        entries = _entries(axes, classes, inverse)
        single = _proposals(axes, entries, GeneralLinear, seen.book.kinds(classes, MIX), classes, reasons)
        mixed = [s for s in _side_by_side([s for s in single if s.group.n > 1]) if s not in found]
        kept = check.keep(mixed, lambda *_: None)
        kept += check.keep([part for s in mixed if s not in kept for part in _apart(s)], lambda *_: None)
        covered |= _covered(axes, kept)
        rest = {c: e for c, e in entries.items() if not all((x.axis, p) in covered for x in e for p in x.places)}
        scaled = [s for s in _proposals(axes, rest, PositiveScaling, None, classes, reasons) if s not in found]
        found += kept + check.keep(scaled, drop)
    flips, inverse = seen.book.scalings(signed=False)
    orders = seen.book.permutations()
    for kind, classes, kinds in ((Signs, flips, None), (Permutation, orders, seen.book.kinds(orders, PERM))):
        entries = _entries(axes, classes, torch.zeros_like(inverse))
        rest = {c: e for c, e in entries.items() if not all((x.axis, p) in covered for x in e for p in x.places)}
        proposals = list(_proposals(axes, rest, kind, kinds, classes, reasons))
        found += check.keep([s for s in proposals if kind is Signs or s.group.n > 1], drop)
    found = [s for s in found if not _trivial(s, check)]
    first = {(a[0], a[1]): i for i, a in reversed(list(enumerate(axes)))}
    rank = [GeneralLinear, PositiveScaling, Signs, Permutation]

    def place(s: NeuronSymmetry) -> tuple[int, int]:
        return min(first[leg.name, leg.dim] for leg in s.legs), rank.index(type(s.group))

    found.sort(key=place)
    found += _blocks([part for s in found for part in _apart(s)], check)
    return sorted(found, key=place), reasons


Axis = tuple[str, int, int, Tensor]  # parameter, dimension, groups, labels


def _axes(seen: Propagation) -> list[Axis]:
    """All axes of all parameters, in order; that of a depthwise convolution's inputs lies along dimension 0."""
    axes: list[Axis] = []
    for (name, dim, groups), labels in seen.slots.items():
        if groups > 1 and len(labels) == groups:
            axes.append((name, 0, 1, labels.repeat_interleave(len(seen.slots[name, 0, 1]) // groups)))
        else:
            axes.append((name, dim, groups, labels))
    return axes


def _entries(axes: list[Axis], classes: Tensor, inverse: Tensor) -> dict[int, list[_Entry]]:
    """For each class that moves, where it shows up; it moves the first rows directly."""
    places: dict[int, dict[tuple[int, bool], list[int]]] = defaultdict(lambda: defaultdict(list))
    for k, (_, _, _, labels) in enumerate(axes):
        variables = labels >> 1
        duals = inverse[variables] ^ (labels & 1).bool()
        for i, (c, dual) in enumerate(zip(classes[variables].tolist(), duals.tolist(), strict=True)):
            if c:
                places[c][k, dual].append(i)
    found: dict[int, list[_Entry]] = {}
    for c, there in places.items():
        flip = next((dual for k, dual in there if axes[k][1] == 0), next(iter(there))[1])
        found[c] = [_Entry(k, dual != flip, tuple(where)) for (k, dual), where in there.items()]
    return found


def _covered(axes: list[Axis], symmetries: list[NeuronSymmetry]) -> set[tuple[int, int]]:
    """The places, by axis, that symmetries move."""
    where = {(name, dim): k for k, (name, dim, groups, _) in reversed(list(enumerate(axes)))}
    return {
        (where[leg.name, leg.dim], leg.start + i)
        for s in symmetries
        for leg in s.legs
        for i in range(s.group.n * leg.each)
    }


def _proposals(
    axes: list[Axis],
    entries: dict[int, list[_Entry]],
    kind: type[Group],
    kinds: Tensor | None,
    classes: Tensor,
    reasons: list[str],
) -> Iterator[NeuronSymmetry]:
    """Classes that show up on the same axes and that nothing tells apart, taken together."""
    families: dict[Any, list[list[_Entry]]] = defaultdict(list)
    looks: dict[int, int] = {}
    if kinds is not None:
        looks = dict(zip(classes.tolist(), kinds.tolist(), strict=True))
    for c, there in entries.items():
        shape = tuple(
            (e.axis, e.dual if kind in (PositiveScaling, GeneralLinear) else False, len(e.places)) for e in there
        )
        families[shape, looks.get(c, 0)].append(there)
    for (shape, _), members in families.items():
        plain = all(axes[k][2] == 1 for k, _, _ in shape)
        if not plain and kind in (GeneralLinear, Permutation):
            continue
        pieces = list(_pieces(members))
        if len(pieces) > PIECES:
            names = ", ".join(dict.fromkeys(axes[k][0] for k, _, _ in shape))
            reasons.append(f"{names}: a {kind.__name__} whose places are scattered")
            continue
        for piece in pieces:
            dual_sign = kind in (PositiveScaling, GeneralLinear)
            legs = []
            for entry in piece[0]:
                name, dim, groups, _ = axes[entry.axis]
                each = _block(entry.places)
                starts = [0] if groups > 1 else list(entry.places[::each])
                dual = entry.dual if dual_sign else dim == 1
                legs += [Leg(name, dim, dual, start, each if groups == 1 else 1, groups) for start in starts]
            if kind is Permutation:  # in and out of a depthwise convolution: one place, moved once
                legs = list(dict.fromkeys(legs))
            if plain or len(pieces) == 1:
                yield NeuronSymmetry(kind(len(piece)), legs)


def _side_by_side(mixings: list[NeuronSymmetry]) -> list[NeuronSymmetry]:
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


def _apart(mixing: NeuronSymmetry) -> list[NeuronSymmetry]:
    """The blocks of a mixing, each as a symmetry of its own; any other symmetry as it is."""
    count = mixing.group.blocks if isinstance(mixing.group, GeneralLinear) else 1
    if count == 1:
        return [mixing]
    n = mixing.group.n // count
    legs = ([replace(leg, start=leg.start + k * n * leg.each) for leg in mixing.legs] for k in range(count))
    return [NeuronSymmetry(GeneralLinear(n), part) for part in legs]


def _trivial(symmetry: NeuronSymmetry, check: _Check) -> bool:
    """Whether it moves nothing, because what it multiplies by on one dimension it divides by on another."""
    if len(symmetry.names) > 1:
        return False
    old = check.params
    new = symmetry.act(old, symmetry.sample(old, generator=check.generator))
    return _distance([new[n] for n in symmetry.names], [old[n] for n in symmetry.names]) < TOLERANCE


def _blocks(found: list[NeuronSymmetry], check: _Check) -> list[NeuronSymmetry]:
    """Permutations of whole blocks, attention heads: each moves the queries and keys, and the values, of a layer."""
    families: dict[Any, list[NeuronSymmetry]] = defaultdict(list)
    for s in found:
        if s.dim and all(leg.groups == 1 for leg in s.legs):
            families[tuple(sorted({(leg.name, leg.dim) for leg in s.legs})), type(s.group), s.group.n].append(s)
    sides: list[tuple[int, list[Leg]]] = []
    for members in families.values():
        runs = [_runs(s) for s in members]
        behind = all([(n, d, start + size, size) for n, d, start, size in a] == b for a, b in pairwise(runs))
        if len(members) > 1 and behind:
            sides.append((len(members), [Leg(name, dim, dim == 1, start, size) for name, dim, start, size in runs[0]]))

    def pairs(holds: Callable[[list[NeuronSymmetry]], bool]) -> list[NeuronSymmetry]:
        """Each side with the one that follows it, where that `holds`."""
        blocks: list[NeuronSymmetry] = []
        used = -1
        for k, ((n, a), (m, b)) in enumerate(pairwise(sides)):
            symmetry = NeuronSymmetry(Permutation(n), a + b)
            if n == m and k != used and not {*a} & {*b} and holds([symmetry]):
                blocks.append(symmetry)
                used = k + 1
        return blocks

    def verified(symmetries: list[NeuronSymmetry]) -> bool:
        return check.error(symmetries) <= TOLERANCE

    blocks = pairs(lambda _: True)
    return blocks if not blocks or verified(blocks) else pairs(verified)


def _runs(symmetry: NeuronSymmetry) -> list[tuple[str, int, int, int]]:
    """The places that a symmetry moves, side by side: parameter, dimension, first place, how many."""
    runs: list[tuple[str, int, int, int]] = []
    for leg in sorted(symmetry.legs, key=lambda leg: (leg.name, leg.dim, leg.start)):
        size = symmetry.group.n * leg.each
        if runs and runs[-1][:2] == (leg.name, leg.dim) and runs[-1][2] + runs[-1][3] == leg.start:
            runs[-1] = (*runs[-1][:3], runs[-1][3] + size)
        else:
            runs.append((leg.name, leg.dim, leg.start, size))
    return runs


def _block(places: tuple[int, ...]) -> int:
    """How many places stand side by side, if all such blocks are equally long; else 1."""
    length = next((i for i in range(1, len(places)) if places[i] != places[i - 1] + 1), len(places))
    blocks = [places[i : i + length] for i in range(0, len(places), length)]
    regular = all(b == tuple(range(b[0], b[0] + length)) for b in blocks)
    return length if regular else 1


def _pieces(members: list[list[_Entry]]) -> Iterator[list[list[_Entry]]]:
    """Runs of classes, each of which stands right behind the one before it on every axis."""
    members = sorted(members, key=lambda there: there[0].places)
    piece = [members[0]]
    for there in members[1:]:
        follows = all(
            tuple(p + _block(a.places) for p in a.places) == b.places for a, b in zip(piece[-1], there, strict=True)
        )
        if follows:
            piece.append(there)
        else:
            yield piece
            piece = [there]
    yield piece


@contextmanager
def _transparent() -> Iterator[None]:
    """Fused kernels off, so that each operation can be seen."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _call(example_inputs: object) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments, real tensors in float64."""

    def wide(x: object) -> object:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    if isinstance(example_inputs, dict):
        return (), {name: wide(x) for name, x in example_inputs.items()}
    together = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    return tuple(wide(x) for x in together), {}


def _perturb(probe: nn.Module, generator: torch.Generator) -> None:
    """Move everything off special values: a symmetry must not hold only because a number happens to be 0 or 1."""
    for p in probe.parameters():
        if p.is_floating_point():
            spread = p.square().mean().sqrt().clamp(min=0.1)
            p.add_(spread * _normal(p, generator))
    for module in probe.modules():
        if isinstance(module, _NormBase) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.add_(0.1 * _normal(module.running_mean, generator))
            module.running_var.mul_((0.1 * _normal(module.running_var, generator)).exp())


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def _tensors(output: object) -> list[Tensor]:
    """All tensors in the output of a model."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [t for part in output for t in _tensors(part)] if isinstance(output, (tuple, list)) else []


def _distance(after: list[Tensor], before: list[Tensor]) -> float:
    """The largest difference, relative to the largest entry; 0 when nothing differs."""
    gap = max((float((a - b).abs().max()) for a, b in zip(after, before, strict=True) if a.numel()), default=0.0)
    size = max((float(b.abs().max()) for b in before if b.numel()), default=0.0)
    return gap / size if size else float(gap > 0)
