"""One run of the copy of a model, and how far its outputs are from those before anything was moved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from teleport_lite.discovery.draws import Draws
from teleport_lite.discovery.inputs import Arguments
from teleport_lite.discovery.probe import Probe, scattered
from teleport_lite.functional import Params
from teleport_lite.outputs import distance, real_numbers, relative_gaps

SLACK = 1e2  # times that rounding explains
ROUNDING = 1e-15  # of parameters, relative
CHAOS = 1e-9  # outputs that rounding changes by more cannot be compared
NOTHING = 1e-12  # outputs that are zero but for rounding, as a difference of equal terms
WILD = 1e8  # ratio of entries beyond which those that no parameter changes are looked for


@dataclass(eq=False)
class Trial:
    """One run of the copy, and what it returned before anything was moved.

    Attributes:
        call, training, seed: what is run.
        draws: arguments of `Draws`; None for the generators as they are.
        before: the outputs.
        written: the buffers that the run changes, of those that may move along.
        reads: what the run read, as `Watch` says.
    """

    probe: Probe
    call: Arguments
    training: bool = False
    seed: int = 0
    draws: dict[str, Any] | None = None
    before: list[Tensor] = field(default_factory=list)
    written: Params = field(default_factory=dict)
    reads: set[tuple] = field(default_factory=set)
    _constant: list[Tensor] | None = None
    _noise: list[float] | None = None

    @property
    def operators(self) -> set[tuple]:
        """Which operators read which parameters: `reads` but for the integers beside them, as the ends of a slice."""
        return {read[:-1] for read in self.reads}

    def run(self) -> list[Tensor]:
        """What the copy returns now."""
        return self.probe.outputs(self.call, self.training, self.seed, self.modes())

    def repeats_exactly(self, rounding: float = 0.0) -> bool:
        """Whether outputs are those before, bit for bit or up to that much."""
        try:
            return distance(self.run(), self.before) <= rounding
        except Exception:
            return False

    def modes(self) -> tuple[Draws, ...]:
        """The dispatch modes that decide what is drawn."""
        return () if self.draws is None else (Draws(**self.draws),)

    def output_gap(self, floor: float, written: Params | None = None) -> float:
        """How far the outputs are now from those before, beyond what rounding explains; 0 when below `floor`.

        The run has to leave the buffers `written` as they are here, too.
        """
        try:
            after = self.run()
        except Exception:  # as when a shape depends on values
            return float("inf")
        if len(after) != len(self.before):
            return float("inf")
        left = self.probe.buffers_left() if written else {}
        wrong = max((distance([left[n]] if n in left else [], [b]) for n, b in (written or {}).items()), default=0.0)
        if wrong > floor:
            return wrong
        found = relative_gaps(after, self.before, self.constant)
        if max(found, default=0.0) <= floor:
            return 0.0
        nothing = [_is_nothing(a) and _is_nothing(b) for a, b in zip(after, self.before, strict=True)]

        def largest_beyond(noise: list[float]) -> float:
            allowed = [max(floor, SLACK * n) if n < CHAOS else floor for n in noise]
            return max(
                (g for g, most, no in zip(found, allowed, nothing, strict=True) if g > most and not no), default=0.0
            )

        gap = largest_beyond(self.noise)
        if 0 < gap < SLACK * CHAOS:  # parameters that were moved far are rounded more
            gap = largest_beyond(
                relative_gaps(self._outputs_near(ROUNDING, after, self.probe.here), after, self.constant)
            )
        return gap

    @property
    def is_chaotic(self) -> bool:
        """Whether rounding decides an output."""
        return any(n >= CHAOS and not _is_nothing(b) for n, b in zip(self.noise, self.before, strict=True))

    @property
    def constant(self) -> list[Tensor] | None:
        """For each output the entries that stay when all parameters are changed; None where none stands out."""
        if self._constant is None:
            sizes = [s[s.isfinite() & (s > 0)] for s in (real_numbers(t).abs() for t in self.before)]
            if any(s.numel() and float(s.max()) > WILD * float(s.min()) for s in sizes):
                found = self._outputs_near(0.5, self.before, self.probe.home)
                self._constant = [real_numbers(a) == real_numbers(b) for a, b in zip(found, self.before, strict=True)]
            else:
                self._constant = []
        return self._constant or None

    @property
    def noise(self) -> list[float]:
        """For each output how far rounding, of the parameters in their last digits, changes it."""
        if self._noise is None:
            moved = self._outputs_near(ROUNDING, self.before, self.probe.home)
            self._noise = relative_gaps(moved, self.before, self.constant)
        return self._noise

    def _outputs_near(self, spread: float, default: list[Tensor], point: Params) -> list[Tensor]:
        """The outputs at other parameters, near `point`, or `default` where they do not come out alike."""
        at = {n: point[n] for n in self.probe.values}
        moved = scattered(at, spread, torch.Generator().manual_seed(0))
        try:
            with self.probe.at({**point, **moved}):
                found = self.run()
        except Exception:
            return default
        alike = [a.shape for a in found] == [b.shape for b in default]
        return found if alike else default


def _is_nothing(tensor: Tensor) -> bool:
    return not tensor.numel() or bool((real_numbers(tensor).abs() < NOTHING).all())
