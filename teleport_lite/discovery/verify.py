"""Verify a proposed symmetry on the whole model, in float64, on fresh inputs, in evaluation and training mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase

from teleport_lite.discovery.propagate import InFloat64
from teleport_lite.functional import Params
from teleport_lite.groups import Permutation, Signs
from teleport_lite.runtime import Call
from teleport_lite.symmetries.axes import NeuronSymmetry

TOLERANCE = 1e-10  # relative change in float64 beyond which a proposed symmetry is dropped
ENOUGH = 16  # fresh examples to verify on
SIZES = (30.0, 1 / 30)  # and so many times larger ones, for models that branch on what they read
APART = 8  # finite groups are tried one by one up to so many, else so many random selections of them


@dataclass
class Verifier:
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
                if training and False in self.before and distance(first, self.before[False][0]) == 0:
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
            if distance(self._run(self.params, self.inputs[0], training), first) == 0:
                return True
        except Exception:  # types do not agree
            pass
        self.widen = True
        return widen and distance(self._run(self.params, self.inputs[0], training), first) == 0

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
                return tensors_of(functional_call(self.probe, {**params, **buffers}, inputs[0], inputs[1]))
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
                    gap = distance(self._run(moved, x, training), old)
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
        return self._bisect([s for s in symmetries if s.dim], drop) + self._bisect(
            [s for s in symmetries if not s.dim], drop
        )

    def _bisect(
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
        return self._bisect(symmetries[:half], drop) + self._bisect(symmetries[half:], drop)


@contextmanager
def unfused() -> Iterator[None]:
    """Fused kernels off, so that each operation can be seen."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def as_call(example_inputs: object) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments, real tensors in float64."""

    def wide(x: object) -> object:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    if isinstance(example_inputs, Call):
        return tuple(map(wide, example_inputs.args)), {name: wide(x) for name, x in example_inputs.kwargs.items()}
    if isinstance(example_inputs, dict):
        return (), {name: wide(x) for name, x in example_inputs.items()}
    together = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    return tuple(wide(x) for x in together), {}


def perturb(probe: nn.Module, generator: torch.Generator) -> None:
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


def tensors_of(output: object) -> list[Tensor]:
    """All tensors in the output of a model."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [t for part in output for t in tensors_of(part)] if isinstance(output, (tuple, list)) else []


def distance(after: list[Tensor], before: list[Tensor]) -> float:
    """The largest difference, relative to the largest entry; 0 when nothing differs."""
    gap = max((float((a - b).abs().max()) for a, b in zip(after, before, strict=True) if a.numel()), default=0.0)
    size = max((float(b.abs().max()) for b in before if b.numel()), default=0.0)
    return gap / size if size else float(gap > 0)
