"""The hidden layers of a model, read off one run of it.

A hidden layer is two linear maps with modules between them that pass one hidden axis on. The run is made on a copy of
the model, so the model is never touched.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from teleport_lite.runtime import (
    Inputs,
    kept_random_state,
)


@dataclass(frozen=True)
class Hidden:
    """Two linear maps and what stands between them.

    Attributes:
        incoming: module name of the first map, `V` [width, in_features].
        outgoing: module name of the second map, `U` [out_features, features].
        between: the modules between the two, on the copy of the model.
        sample: what the first map gave on the traced inputs, [..., width].
    """

    incoming: str
    outgoing: str
    between: nn.Sequential
    sample: Tensor

    @property
    def width(self) -> int:
        """Length of the hidden axis."""
        return self.sample.shape[-1]

    def __str__(self) -> str:
        return f"{self.incoming} -> {self.outgoing}"


@dataclass(frozen=True)
class Trace:
    """What one run of a model showed.

    Attributes:
        hidden: its hidden layers, in order.
        reasons: why others were not understood.
        uses: how often each parameter was used, by `id`.
    """

    hidden: list[Hidden]
    reasons: list[str]
    uses: Counter[int]


def trace(probe: nn.Module, inputs: Inputs) -> Trace:
    """Run `probe` (a `copy_of` a model) once and read off its hidden layers.

    Modules without children are followed by the tensors they hand on: a module belongs to the chain when its input is
    the very tensor that the module before it gave.
    """
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    samples: list[Tensor] = []
    uses: Counter[int] = Counter()

    def record(name: str):
        def hook(module, args, output):
            uses.update(id(p) for p in module.parameters())
            if len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                calls.append((name, module, args[0], output))
                samples.append(output.detach().clone())

        return hook

    leaves = {name: module for name, module in probe.named_modules() if not list(module.children())}
    handles = [module.register_forward_hook(record(name)) for name, module in leaves.items()]
    try:
        with torch.no_grad(), kept_random_state(probe):
            probe(*inputs)
    finally:
        for handle in handles:
            handle.remove()

    hidden: list[Hidden] = []
    reasons: list[str] = []
    linear = [i for i, (_, module, _, _) in enumerate(calls) if isinstance(module, nn.Linear)]
    for i, j in pairwise(linear):
        broken = next((calls[k][0] for k in range(i + 1, j + 1) if calls[k][2] is not calls[k - 1][3]), None)
        if broken is None:
            between = nn.Sequential(*(module for _, module, _, _ in calls[i + 1 : j]))
            hidden.append(Hidden(calls[i][0], calls[j][0], between, samples[i]))
        else:
            pair = f"{calls[i][0]} -> {calls[j][0]}"
            reasons.append(f"{pair}: the input of {broken} is not what the module before it gave")
    if len(linear) < 2:
        count = "no nn.Linear" if not linear else "one nn.Linear only"
        reasons.append(f"the model calls {count}, hence there is no hidden layer between two of them")
    return Trace(hidden, reasons, uses)
