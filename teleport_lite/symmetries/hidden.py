"""The hidden layers of a model, read off one run of a copy of it, and whether their weights act through them alone."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from teleport_lite.evaluation import Evaluation
from teleport_lite.functional import Params
from teleport_lite.outputs import distance, tensors_of, traced
from teleport_lite.runtime import Inputs, kept_random_state


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
    between: list[nn.Module]
    sample: Tensor

    @property
    def width(self) -> int:
        """Length of the hidden axis."""
        return self.sample.shape[-1]

    def __str__(self) -> str:
        return f"{self.incoming} -> {self.outgoing}"


def hidden_layers(probe: nn.Module, inputs: Inputs) -> tuple[list[Hidden], list[str]]:
    """Run `probe` (a `copy_of` a model) once and read off its hidden layers, in order, and why others are not known.

    Modules without children are followed by the tensors they hand on: a module belongs to the chain when its input is
    the very tensor that the module before it gave.
    """
    calls: list[tuple[str, nn.Module, Tensor, Tensor, Tensor]] = []

    names = {module: name for name, module in probe.named_modules() if not list(module.children())}

    def note_call(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            calls.append((names[module], module, args[0], output, output.detach().clone()))

    with traced(names, note_call), torch.no_grad(), kept_random_state(probe):
        probe(*inputs)

    hidden: list[Hidden] = []
    reasons: list[str] = []
    linear = [i for i, (_, module, *_) in enumerate(calls) if isinstance(module, nn.Linear)]
    for i, j in pairwise(linear):
        broken = next((calls[k][0] for k in range(i + 1, j + 1) if calls[k][2] is not calls[k - 1][3]), None)
        if broken is None:
            hidden.append(Hidden(calls[i][0], calls[j][0], [module for _, module, *_ in calls[i + 1 : j]], calls[i][4]))
        else:
            reasons.append(
                f"{calls[i][0]} -> {calls[j][0]}: the input of {broken} is not what the module before it gave"
            )
    if len(linear) < 2:
        count = "one nn.Linear only" if linear else "no nn.Linear"
        reasons.append(f"the model calls {count}, hence there is no hidden layer between two of them")
    return hidden, reasons


def other_effect(probe: nn.Module, inputs: Inputs, hidden: Hidden) -> str:
    """What the weights of a hidden layer do besides giving the output of its outgoing map; or nothing.

    With other weights in their places, and that output what it was, all outputs of the model have to be what they were,
    and so has the input of the layer.
    """
    first, second = probe.get_submodule(hidden.incoming), probe.get_submodule(hidden.outgoing)
    moving = {id(p) for p in (first.weight, first.bias, second.weight)}
    weights = {name: p.detach() for name, p in probe.named_parameters() if id(p) in moving}
    draw = torch.Generator().manual_seed(0)
    others = {n: w + torch.randn(w.shape, generator=draw, dtype=w.dtype).to(w) for n, w in weights.items()}

    def observe_layer(params: Params, held: Tensor | None = None) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The inputs of the layer, what its outgoing map gave, of which the first is `held`, and the outputs."""
        inside: list[Tensor] = []
        given: list[Tensor] = []
        outside: list[Tensor] = []

        def note_call(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
            if module is first:
                inside.append(args[0])
            if module is second:
                given.append(output)
            return held if module is second and len(given) == 1 else None

        def run_model(net: nn.Module) -> Tensor:
            outside.extend(tensors_of(net(*inputs)))
            return torch.zeros(())

        with torch.no_grad(), traced({first, second}, note_call):
            Evaluation(probe, run_model)(params)
        return inside, given, outside

    try:
        for mode in ("evaluation", "training"):
            probe.train(mode == "training")
            try:
                inside, given, outside = observe_layer(weights)
                moved, _, after = observe_layer(others, next(iter(given), None))
            except Exception:  # a batch norm in training needs two samples
                if mode == "evaluation":
                    raise
                continue
            if len(inside) != 1:
                return f"{hidden.incoming} is called {len(inside)} times"
            if not outside:
                return "the outputs of the model are no tensors, so that nothing can be verified"
            if distance(moved + after, inside + outside) > 1e-8:
                return f"its weights change the outputs in {mode} mode by another way than through {hidden.outgoing}"
    finally:
        probe.eval()
    return ""
