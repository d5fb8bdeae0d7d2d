"""The runs on which symmetries are verified: inputs of other values, sizes and lengths, modes and random draws."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from teleport_lite.discovery import inputs
from teleport_lite.discovery.draws import PATTERNS, Draws, drawn_outside
from teleport_lite.discovery.inputs import Arguments
from teleport_lite.discovery.probe import Probe
from teleport_lite.discovery.trial import Trial
from teleport_lite.discovery.watch import Watch
from teleport_lite.errors import TeleportError
from teleport_lite.host import on_host
from teleport_lite.outputs import distance, real_numbers

SIZES = (30.0, 1 / 30, -1.0)  # times the inputs, for models that branch on what they read
FAR = (1e2, -1e3, 1e4, -1e6, 1e8)  # times the inputs, for bounds, as of a clamp, that usual ones do not meet
MANY = 16  # examples in a batch that is not run as a whole
SEEDS, OUTSIDE = 3, 16  # for models that draw random numbers, in torch or outside
PARTS = 8  # runs that leave something out
SHORT = 8  # longer axes are cut, to at least that
REPEATED = 1e-12  # two runs of the same agree up to that


class Trials:
    """All trials of a model: its example varied, in evaluation and training mode.

    Attributes:
        trials: in evaluation mode, and in training mode with draws as they are.
        even: the same in training mode with draws that no permutation moves.
        whole: of both, those with axes as long as given, where they are cut elsewhere.
        notes: what could not be done, in words.
    """

    def __init__(self, probe: Probe, example: Arguments, generator: torch.Generator) -> None:
        self.probe, self.generator = probe, generator
        self.notes: list[str] = []
        self.whole: list[Trial] = []
        self.far: list[Trial] = []
        self.limit = 1.0
        self.example = example.map(on_host)
        self.calm = self._vary_calls(self.example)
        self.trials = list(self.calm) if self.calm[0].repeats_exactly(REPEATED) else []
        self.even = list(self.trials)
        if not self.trials:
            self.notes.append("evaluation mode: two runs on the same input differ")
        self._add_training()
        if probe.mode and not probe.mode.needed:
            probe.mode = None  # nothing is coarser than float64

    # -- evaluation

    def _vary_calls(self, example: Arguments) -> list[Trial]:
        """Trials in evaluation mode, the first one of usual size and the last one longest."""
        try:
            given = self._given_example(example)
        except Exception as error:
            raise TeleportError(
                "a model that runs on example_inputs", _error_text(error), _input_remedy(error, example)
            ) from error
        if not given.before:
            got = "no tensor in what it returns"
            raise TeleportError("a model that returns tensors", got, "return them, or wrap the model in one that does")
        self.limit = _nonfinite_share(given.before)
        whole, given = given, self._cut_axes(given)
        found = self._varied_values(given)
        noisy = found[0] if found else None
        if noisy and self._has_real(noisy.call):
            one = self._accept_trial(inputs.resize_axes(noisy.call, inputs.batch_length(noisy.call), 1, 0)) or noisy
            found += self._all_accepted(inputs.scale_inputs(one.call, size) for size in SIZES)
            self.far = [*self._all_accepted(inputs.scale_inputs(noisy.call, size) for size in FAR)]
        base = noisy or given
        found += self._all_accepted(inputs.drop_optional(base.call))
        longest = self._grow_axes(base, {size for size, _ in inputs.axis_lengths(whole.call)})
        found += islice(self._all_accepted(inputs.other_numbers(base.call)), 8)
        if not found and not longest and self._has_real(example):
            self.notes.append("other inputs than those given: the model does not take them")
        if given is not whole:
            self.whole = self._varied_values(whole) or [whole]
        return [given, *found, *([longest] if longest else []), *self.whole]

    def _cut_axes(self, trial: Trial) -> Trial:
        """The trial with long axes cut, as far as it reads the same then: short ones tell as much, and cost less."""
        for size, dim in list(inputs.axis_lengths(trial.call)):
            news = [size // k for k in (8, 4, 2) if size // k >= SHORT and dim != 0]
            tried = (n for n in news if inputs.has_length(trial.call, size, dim))
            shorter = self._all_accepted(inputs.resize_axes(trial.call, size, new, dim) for new in tried)
            trial = next((s for s in shorter if s.operators == trial.operators), trial)
        return trial

    def _given_example(self, example: Arguments) -> Trial:
        """The example, cut to few rows or with its rows repeated where the model takes that."""
        self.tables: dict[int, int] = {}
        small = inputs.few_rows(example)
        given = None if small is None else self._accept_trial(small)
        if given is None or (
            inputs.batch_length(example) <= MANY and not self._watch_trial(example).reads <= given.reads
        ):
            given = self._watch_trial(example)
        unsettled = self.probe.perturb_buffers(self.generator)
        return self._watch_trial(given.call) if self.probe.settle_buffers(given.call) or unsettled else given

    def _varied_values(self, base: Trial) -> list[Trial]:
        """Other values, of the first kind that the model takes."""
        tables = {id(x): self.tables[k] for k, x in enumerate(base.call.tensors()) if k in self.tables}
        for kind in inputs.variations(base.call, tables, self.generator):
            if found := [*islice(self._all_accepted(kind), 1)]:
                return found
        return []

    def _grow_axes(self, base: Trial, lengths: set[int]) -> Trial | None:
        """All axes of these lengths longer that may be; None when none may."""
        call, grown = base.call, False
        for size, dim in list(inputs.axis_lengths(call)):
            if size in lengths and inputs.has_length(call, size, dim):
                tried = (inputs.resize_axes(call, size, new, dim) for new in inputs.longer_lengths(size, dim))
                for longer in islice(self._all_accepted(tried), 1):
                    call, grown = longer.call, True
        if not grown:
            return None
        varied = self._varied_values(Trial(self.probe, call))
        return varied[0] if varied else self._accept_trial(call)

    def _has_real(self, call: Arguments) -> bool:
        return any(x.is_floating_point() or x.is_complex() for x in call.tensors())

    def _all_accepted(self, calls: Iterable[Arguments]) -> Iterator[Trial]:
        return (s for s in map(self._accept_trial, calls) if s)

    def _accept_trial(self, call: Arguments) -> Trial | None:
        """The trial, where the model runs and no more of its outputs is infinite than of those of the example."""
        try:
            trial = self._watch_trial(call)
        except Exception:
            return None
        return trial if _nonfinite_share(trial.before) <= self.limit else None

    def _watch_trial(self, call: Arguments, **how: Any) -> Trial:
        """The trial, with what it returned and read; the tables that inputs index are noted, and the draws."""
        trial, watch = Trial(self.probe, call, **how), Watch(self.probe.params)
        self.drawn = Draws(**trial.draws or {})
        found = self.probe.outputs(call, trial.training, trial.seed, (self.drawn, watch))
        self.drawn.outside = drawn_outside(trial.seed)
        trial.before, trial.reads = [t.detach().clone() for t in found], watch.reads
        home = self.probe.home
        trial.written = {n: b.clone() for n, b in self.probe.buffers_left().items() if not torch.equal(b, home[n])}
        for k, length in watch.tables.items():
            self.tables[k] = min(length, self.tables.get(k, length))
        return trial

    def add_wide_trial(self) -> bool:
        """Add a trial with many more rows, which are drawn anew, where the model takes them."""
        call = self.calm[-1].call
        count = next((len(x) for x in call.tensors() if x.ndim), 0)
        found = (
            self._varied_values(Trial(self.probe, inputs.resize_axes(call, count, 8 * count, 0)))[:1] if count else []
        )
        for trials in (self.calm, self.trials, self.even) if found else ():
            trials.append(found[0])
        return bool(found)

    def with_many_examples(self) -> list[Trial]:
        """Trials with many examples: those given, as far as there are, and others in their place."""
        count, given = inputs.many_rows(self.example), inputs.batch_length(self.example)
        found: list[Trial] = []
        if given > inputs.ROWS:
            call = inputs.resize_axes(self.example, given, min(given, count), 0)
            found += self._all_accepted([call])
        base = self.calm[min(1, len(self.calm) - 1)].call
        more = self._all_accepted([inputs.resize_axes(base, inputs.batch_length(base), count, 0)])
        found += [varied for trial in more for varied in self._varied_values(trial)]
        return [*found, *self._all_accepted(inputs.thinned(self.calm[0].call, self.generator))]

    def take_back(self) -> None:
        """Undo `add_wide_trial`."""
        for trials in (self.calm, self.trials, self.even):
            trials.pop()

    def informative_trials(self) -> list[Trial]:
        """The longest of those that were cut, those that read something new, and parts that training leaves out."""
        longest = next(t for t in reversed(self.calm) if t not in self.whole)
        calm = [t for t in reversed(self.calm) if t is not longest]
        found, seen = [longest], {*longest.reads}
        for trial in dict.fromkeys([*calm, *self.even, *self.trials]):
            partial = trial.training and all(trial.reads != t.reads for t in found) and len(found) < PARTS
            found += [trial] if partial or not trial.reads <= seen else []
            seen |= trial.reads
        return found

    # -- training

    def _add_training(self) -> None:
        """Training mode, where it makes a difference."""
        first = self.calm[min(1, len(self.calm) - 1)]
        try:
            plain = self._watch_trial(first.call, training=True)
        except Exception as error:
            self.notes.append(f"training mode: the model does not run, {_error_text(error)}")
            return
        draws = self.drawn
        random = draws.single or draws.many or draws.outside
        alike = plain.reads == first.reads and not plain.written and distance(plain.before, first.before) == 0
        if not random and alike:
            return
        if not plain.repeats_exactly(REPEATED):
            self.notes.append("training mode: two runs on the same input differ")
            return
        last = self.calm[-1].call
        same = [plain, *(self._try_training(last) if last is not first.call else [])]
        self.whole += same[1:] if self.whole else []
        if not random:
            self.trials, self.even = [*self.trials, *same], [*self.even, *same]
            return
        seeds = OUTSIDE if draws.outside else SEEDS
        for k in range(seeds):
            self.trials += self._try_training(first.call, seed=k) if k else same
            self.even += self._try_training(first.call, seed=k, draws={"even": True, "keep": not k})
        for pattern in PATTERNS if draws.single else ():
            self.trials += self._try_training(first.call, draws={"pattern": pattern})
            self.even += self._try_training(first.call, draws={"even": True, "pattern": pattern})

    def _try_training(self, call: Arguments, **how: Any) -> list[Trial]:
        """A trial in training mode, where the model runs."""
        try:
            return [self._watch_trial(call, training=True, **how)]
        except Exception:
            return []


def _nonfinite_share(outputs: list[Tensor]) -> float:
    """The share of entries that are not finite."""
    count = sum(t.numel() for t in outputs)
    return sum(int((~real_numbers(t).isfinite()).sum()) for t in outputs) / max(count, 1)


def _error_text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _input_remedy(error: Exception, example: Arguments) -> str:
    others = [x for x in example.leaves() if not isinstance(x, Tensor)]
    if any(isinstance(x, DataLoader) for x in others):
        return "pass the inputs of one batch, such as next(iter(loader))[0]"
    if any(hasattr(x, "__array__") for x in others):
        return "pass tensors: torch.from_numpy(x) for an array x"
    if isinstance(error, (TypeError, KeyError, AttributeError)):
        return "pass a tuple of positional arguments, or a dictionary of keyword arguments, without targets"
    if any(word in str(error) for word in ("dtype", "Double", "Float", "float", "Half")):
        return "the model is run in float64: let it take the type of what it reads from its input or its parameters"
    return "pass inputs as the model is called with"
