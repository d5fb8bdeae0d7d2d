"""Verify proposed symmetries on the whole model, in float64, on all trials at once; look closer only on failure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from teleport_lite.discovery.elements import DRAWN, random_element
from teleport_lite.discovery.exercised import exercised_entries, without_effect
from teleport_lite.discovery.inputs import Arguments
from teleport_lite.discovery.probe import Probe, randn_like, scattered
from teleport_lite.discovery.trial import CHAOS, SLACK, Trial
from teleport_lite.discovery.trials import Trials
from teleport_lite.functional import Params
from teleport_lite.groups import Permutation
from teleport_lite.outputs import distance
from teleport_lite.symmetries.axes import Leg, NeuronSymmetry
from teleport_lite.symmetries.base import Symmetry

TOLERANCE = 1e-10  # relative change in float64 beyond which a proposed symmetry is dropped
SEEN = 1e-6  # what another change of the same parameters has to make of the outputs at least, relative
SMALL = 8  # a finite group on fewer axes has few elements
WIDER = 3  # times that more inputs are tried where some, as experts that tokens pick, were not used

Drop = Callable[[Any, float], None]
S = TypeVar("S", bound=Symmetry)
Turn = tuple[int, list[Trial]]  # its number, and what is run
Failure = tuple[float, Trial, int]  # by how much, where, in which turn


class Verifier:
    """Asks the copy of a model whether symmetries hold.

    Attributes:
        params: where they are tried, and buffers that may move along.
        untouched: parameters that matter in no trial; they stay.
        gradients: of random sums of the outputs, in some of the trials.
        unread: those of them that no operator reads, or that reach the outputs times zero alone, so that nobody knows
            where they belong; what may share an axis with them stays as well.
        partly: lengths of axes of which they read a part.
        withheld: the symmetries that were not tried for that reason, in words.
        thorough: whether each is tried on whole trials, too, and not only all together at the end.
    """

    def __init__(self, probe: Probe, example: Arguments, generator: torch.Generator) -> None:
        self.probe, self.generator = probe, generator
        self.planned = Trials(probe, example, generator)
        self.params: Params = probe.home
        self.untouched = self._unexercised_names()
        for _ in range(WIDER):
            idle = sum(self._idle_parts().values())
            if not idle or not self.planned.add_wide_trial():
                break
            self.untouched = self._unexercised_names()
            if sum(self._idle_parts().values()) == idle:
                self.planned.take_back()
                self.untouched = self._unexercised_names()
                break
        read = {name for trial in self.trials for _, *names, _ in trial.reads for name in names}
        self.unread = [name for name in self.untouched if name not in read or name in self.connected]
        self.partly: set[int] = set()
        self.withheld: dict[str, None] = {}
        self.thorough = False
        self.numbers: dict[Symmetry, int] = {}  # of finite symmetries

    def _unexercised_names(self) -> list[str]:
        """The parameters of which no entry matters in any trial."""
        trials = dict.fromkeys([*self.planned.trials, *self.planned.even])
        telling = self.planned.informative_trials()
        self.trials = [*telling, *(s for s in trials if s not in telling)]
        self.matters, self.connected, self.gradients = exercised_entries(self.probe.params, [s.run for s in telling])
        for trial in self.trials[len(telling) :]:
            idle = {n: self.probe.params[n] for n in self._idle_parts()}
            if not idle:
                return []
            matters, connected, _ = exercised_entries(idle, [trial.run])
            self.matters |= {n: m | self.matters[n] for n, m in matters.items()}
            self.connected = self.connected | connected
        rest = [n for n, m in self.matters.items() if not m.any()]
        return without_effect(rest, lambda names: self._outputs_stay({n: ~self.matters[n] for n in names}))

    def _idle_parts(self) -> dict[str, int]:
        """For each parameter how many of its matrices, several for a stack, have no effect, where any has none."""
        parts = {n: m.flatten(1) if m.ndim == 3 else m.reshape(1, -1) for n, m in self.matters.items()}
        return {n: idle for n, m in parts.items() if (idle := int((~m.any(1)).sum()))}

    def _outputs_stay(self, entries: Params) -> bool:
        """Whether all outputs stay, bit for bit, when these entries are changed."""
        moved = {n: self.params[n] + randn_like(self.params[n], self.generator) * where for n, where in entries.items()}
        with self.probe.at(moved):
            return all(trial.repeats_exactly() for trial in self.trials)

    def is_exercised(self, symmetry: Symmetry) -> bool:
        """Whether all that it moves, and all that may have the same axis, was exercised."""
        legs = symmetry.legs if isinstance(symmetry, NeuronSymmetry) else ()
        lengths = {n for name in self.unread for n in self.params[name].shape} - {1} | (self.partly if legs else set())
        own = {self.params[leg.name].shape[leg.dim] for leg in legs} | {symmetry.group.n}
        own |= set() if legs else {n for name in symmetry.moved for n in self.params[name].shape}
        shared = lengths & own or {*symmetry.names} & {*self.untouched}
        if not shared and not any(self._leg_is_idle(symmetry, leg) for leg in legs if not leg.buffer):
            return True
        self.withheld[str(symmetry)] = None
        return False

    def _leg_is_idle(self, symmetry: Any, leg: Leg) -> bool:
        """Whether no entry that a leg moves matters, as in rows of a table that nothing reads."""
        if symmetry.axis(self.matters[leg.name], leg).any():
            return False
        nowhere = torch.zeros_like(self.matters[leg.name])
        return self._outputs_stay({leg.name: symmetry.put(nowhere, ~symmetry.axis(nowhere, leg), leg)})

    def notices_change(self, symmetry: Symmetry) -> bool:
        """Whether another change of all that it moves shows in the outputs: where none does, nothing can be verified.

        As in deep networks whose signal has died, or where outputs are not numbers.
        """
        draw = torch.Generator().manual_seed(0)
        with self.probe.at(scattered({n: self.params[n] for n in symmetry.moved}, 0.5, draw)):
            return any(SEEN < trial.output_gap(TOLERANCE) < float("inf") for trial in self.trials)

    def at_given(self, symmetries: list[S]) -> list[S]:
        """Those that hold at the parameters as given, too, where a neuron on for all inputs seems linear."""
        trial, given = self.planned.calm[min(1, len(self.planned.calm) - 1)], {**self.params, **self.probe.given}

        def gap_at(moved: Params) -> float:
            if not all(bool(p.isfinite().all()) for n, p in moved.items() if p is not given[n]):
                return 0.0
            return distance(self._outputs_at(trial, moved), before)

        def gap_alone(part: Sequence[S]) -> float:
            moved = given
            for s in part:
                moved = s.act(moved, random_element(s, 0, self.params))
            return gap_at(moved)

        before = self._outputs_at(trial, given) if symmetries else []
        if not before or gap_alone(symmetries) <= SEEN:
            return symmetries
        if gap_at(scattered(given, 1e-15, torch.Generator().manual_seed(0))) > SEEN:  # nothing can be compared here
            return symmetries
        return [s for s in symmetries if gap_alone([s]) <= SEEN]

    def _outputs_at(self, trial: Trial, params: Params) -> list[Tensor]:
        with self.probe.at(params):
            try:
                return trial.run()
            except Exception:  # as when a shape depends on values
                return []

    def notes(self) -> list[str]:
        """What was left out, and why."""
        names = ", ".join(self.untouched)
        notes = [*self.planned.notes, *([f"not exercised by these inputs: {names}"] if names else [])]
        if self.withheld:
            notes.append(f"not exercised by these inputs, as they may share an axis: {'; '.join(self.withheld)}")
        return notes

    def error(self, symmetries: Sequence[Symmetry]) -> float:
        """By how much they change the outputs, relative; 0 when they hold, infinite when outputs are not finite."""
        return (self._first_failure(symmetries) or (0.0,))[0]

    def keep(self, symmetries: list[S], drop: Drop) -> list[S]:
        """Those that hold."""
        kinds = self._with_trials([s for s in symmetries if self.is_exercised(s)])
        return [s for kind, _ in kinds for s in self.bisect_holding(kind, drop)]

    def confirm_together(self, *parts: Sequence[Symmetry]) -> bool:
        """Whether all that was found, part by part, holds on whole trials; if not, each is tried on them afterwards."""
        self.thorough = True
        kinds = (pair for part in parts for pair in self._with_trials(part))
        trials = ((kind, [t for t in self.planned.whole if t in plan]) for kind, plan in kinds)
        return all(self._hold_in_parts(kind, whole) for kind, whole in trials if kind and whole)

    def _with_trials(self, symmetries: Sequence[S]) -> list[tuple[list[S], list[Trial]]]:
        """What is tried together, and where: permutations apart, if they would have to move what is drawn."""
        plain, even = self.planned.trials, self.planned.even
        apart = [s for s in symmetries if isinstance(s.group, Permutation) and plain != even]
        return [([s for s in symmetries if s not in apart], plain), (apart, even)]

    def _hold_in_parts(self, symmetries: Sequence[Symmetry], trials: list[Trial]) -> bool:
        """Whether they hold on these trials: all together or, where rounding adds up, by halves."""
        failure, half = self._first_failure(symmetries, [(0, trials)]), len(symmetries) // 2
        if failure and half and failure[0] < SLACK * CHAOS:
            return all(self._hold_in_parts(part, trials) for part in (symmetries[:half], symmetries[half:]))
        return not failure

    def bisect_holding(self, symmetries: list[S], drop: Drop, turns: Sequence[Turn] = ()) -> list[S]:
        """All at once; where that fails, by halves on the trial that shows it; in these `turns`, or in all."""
        while symmetries and (failure := self._first_failure(symmetries, turns)):
            if len(symmetries) > 1 and failure[0] < SLACK * CHAOS:  # rounding may add up
                parts = symmetries[: len(symmetries) // 2], symmetries[len(symmetries) // 2 :]
                return [s for part in parts for s in self.bisect_holding(part, drop, turns)]
            found = self._culprits(symmetries, *failure)
            for symmetry, error in found.items():
                drop(symmetry, error)
            symmetries = [s for s in symmetries if s not in found]
        return symmetries

    def hold_on_many(self, symmetries: list[S]) -> list[S]:
        """Those that hold on many examples as well, and at the parameters of the model as it was given."""
        trials = self.planned.with_many_examples()
        if trials and not self._hold_in_parts(symmetries, trials):
            symmetries = self.bisect_holding(symmetries, lambda *_: None, [(0, trials)])
        return self.at_given(symmetries)

    def _culprits(self, symmetries: Sequence[Symmetry], error: float, trial: Trial, turn: int) -> dict[Symmetry, float]:
        """Those that change one trial by themselves; where none does, the first that does so beside those before it."""
        if len(symmetries) == 1:
            return {symmetries[0]: error}
        found: dict[Symmetry, float] = {}
        half = len(symmetries) // 2
        for part in (symmetries[:half], symmetries[half:]):
            gap = self._trial_gap(part, trial, turn)
            found |= self._culprits(part, gap, trial, turn) if gap else {}
        if found:
            return found
        if alone := {s: e for s in symmetries if (e := self.error([s]))}:
            return alone
        held, failing = 1, len(symmetries)  # how many of the first ones hold together, as where rounding adds up
        while failing - held > 1:
            middle = (held + failing) // 2
            held, failing = (held, middle) if self._trial_gap(symmetries[:middle], trial, turn) else (middle, failing)
        return {symmetries[held]: error}

    def _first_failure(self, symmetries: Sequence[Symmetry], turns: Iterable[Turn] = ()) -> Failure | None:
        """The first trial whose outputs change, of these `turns`, or of all."""
        if not self.planned.trials:
            return float("inf"), self.planned.calm[0], 0
        for turn, trials in turns or self._element_turns(symmetries):
            moved = self._moved_parameters(symmetries, turn)
            with self.probe.at(moved):
                for trial in trials:
                    gap = trial.output_gap(TOLERANCE, self._written_buffers(symmetries, turn, trial))
                    if gap and not (trial.is_chaotic and self._spare_trial(trial)):
                        self._look_here_first(trial)
                        return gap, trial, turn
        return None

    def _spare_trial(self, trial: Trial) -> bool:
        """Leave out a trial whose outputs rounding decides, where others of its mode remain; whether they do."""
        plans = [plan for plan in (self.planned.trials, self.planned.even) if trial in plan]
        if not all(any(t is not trial and t.training == trial.training for t in plan) for plan in plans):
            return False
        for plan in plans:
            plan.remove(trial)
        return True

    def _look_here_first(self, trial: Trial) -> None:
        for trials in (self.planned.trials, self.planned.even):
            trials.sort(key=lambda t: t is not trial)

    def _trial_gap(self, symmetries: Sequence[Symmetry], trial: Trial, turn: int) -> float:
        with self.probe.at(self._moved_parameters(symmetries, turn)):
            return trial.output_gap(TOLERANCE, self._written_buffers(symmetries, turn, trial))

    def _written_buffers(self, symmetries: Sequence[Symmetry], turn: int, trial: Trial) -> Params:
        """The buffers that a trial changes and that these symmetries move, as the moved model has to leave them."""
        moving = [s for s in symmetries if any(n in trial.written for n in s.buffers)]
        own = {n: trial.written.get(n, self.params[n]) for s in moving for n in s.buffers}
        return {n: b for n, b in self._moved_parameters(moving, turn, own).items() if n in trial.written}

    def _element_turns(self, symmetries: Sequence[Symmetry]) -> Iterator[Turn]:
        """Which elements to try, by number, on which trials.

        Random elements of several symmetries undo each other with probability zero, but those of small finite groups
        may. So `DRAWN` more follow, and then some of these symmetries without the others: any two, whose numbers differ
        in a bit, stand apart once. One trial is enough for that.
        """
        shuffled = any(isinstance(s.group, Permutation) for s in symmetries)
        later = [] if self.thorough else self.planned.whole
        trials = [t for t in (self.planned.even if shuffled else self.planned.trials) if t not in later]
        yield 0, trials
        if finite := [s for s in symmetries if not s.dim]:
            yield 1, trials[::2]
            small = [s for s in finite if s.group.n < SMALL]
            for s in small:
                self.numbers.setdefault(s, len(self.numbers) + 1)
            bits = max((self.numbers[s] for s in small), default=0).bit_length()
            smallest = min(trials, key=lambda t: sum(x.numel() for x in t.call.tensors()))
            for k in range(DRAWN + bits if len(small) > 1 else 0):
                yield 2 + k, [smallest]

    def _moved_parameters(self, symmetries: Sequence[Symmetry], turn: int, buffers: Params | None = None) -> Params:
        """What the elements of this turn make of the parameters, or of the `buffers` alone."""
        moved = self.params if buffers is None else buffers
        for s in symmetries:
            if turn == 0 or (not s.dim and (turn < 2 + DRAWN or self.numbers.get(s, 0) >> (turn - 2 - DRAWN) & 1)):
                moved = {**moved, **s.move(moved, random_element(s, turn, self.params))}
        return moved


def describe_error(error: float) -> str:
    """What is wrong with a symmetry."""
    if error == float("inf"):
        return "makes outputs not finite, or of another shape"
    return f"changes the outputs, by {error:.1e} relative"
