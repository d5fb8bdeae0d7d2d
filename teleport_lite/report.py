"""What a teleport did."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from teleport_lite.symmetries.base import Symmetry


@dataclass(frozen=True)
class Report:
    """What a teleport did; prints as a short table.

    Attributes:
        objective: name of the objective.
        loss_before: the loss at the old parameters.
        loss_after: the loss at the proposed parameters, which are the new ones when `accepted`.
        objective_before: the objective at the old parameters.
        objective_after: the objective at the proposed parameters.
        invariance_error: |loss_after - loss_before| / |loss_before|.
        seconds: wall time of the whole teleport.
        accepted: whether the model was moved; otherwise it is bit for bit as before.
        reason: why it was not moved; empty when it was.
        symmetry: along which it moved, or would have.
        xi: by which element: `symmetry.act(params, xi)` moves a copy of the old parameters along.
        output_change: the largest change of an output that the loss saw, relative to the largest output; NaN where
            outputs were not compared, since the symmetry keeps no more than the loss.
    """

    objective: str
    loss_before: float
    loss_after: float
    objective_before: float
    objective_after: float
    invariance_error: float
    seconds: float
    accepted: bool
    reason: str = ""
    symmetry: Symmetry | None = field(default=None, repr=False)
    xi: Any = field(default=None, repr=False)
    output_change: float = math.nan

    def __str__(self) -> str:
        head = "Teleported" if self.accepted else f"Not teleported: {self.reason}"
        width = max(len(self.objective), len("invariance error"))
        ratio = self.objective_after / self.objective_before if self.objective_before else float("nan")
        return "\n".join(
            [
                head,
                f"  {'':<{width}}  {'before':>10}  {'after':>10}",
                f"  {'loss':<{width}}  {self.loss_before:>10.5g}  {self.loss_after:>10.5g}",
                f"  {self.objective:<{width}}  {self.objective_before:>10.5g}  {self.objective_after:>10.5g}"
                f"  x{ratio:.4g}",
                f"  {'invariance error':<{width}}  {'':>10}  {self.invariance_error:>10.1e}",
                f"  {'output change':<{width}}  {'':>10}  {self.output_change:>10.1e}",
                f"  {'seconds':<{width}}  {'':>10}  {self.seconds:>10.2g}",
            ]
        )
