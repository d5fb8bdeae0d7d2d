"""Find the symmetries of an unmodified model: propose, verify, keep only what holds.

For each hidden layer the groups that could act on its neurons are proposed from what stands between the two linear
maps, by asking those modules themselves whether they commute with the group. Every proposal is then verified on the
whole model, in float64, on fresh inputs; what fails is dropped, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

from teleport_lite.errors import EmptyModelError
from teleport_lite.groups import GeneralLinear, Group, Permutation, PositiveScaling, Signs
from teleport_lite.params import Params
from teleport_lite.symmetries.base import Product
from teleport_lite.symmetries.neurons import Leg, NeuronSymmetry
from teleport_lite.trace import Hidden, Inputs, Trace, as_inputs, copy_of, double, kept_random_state, trace

TOLERANCE = 1e-10  # relative change in float64 beyond which a proposed symmetry is dropped
SCALES = (1e-12, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e12)  # magnitudes at which an activation is asked what it commutes with


def find_symmetries(model: nn.Module, example_inputs: object) -> Product:
    """The symmetries of `model` that hold on all inputs, hidden layer by hidden layer.

    Understands networks whose modules hand one tensor on to the next (nn.Sequential, nested or not, and models that
    call their modules in that way), with nn.Linear layers and any activation, Flatten, Dropout or Identity between
    them. Parameters that are frozen, or used more than once, are left out. The model is only read, and the global
    random state is left as it was.

    Args:
        model: the model, on any device, in any mode.
        example_inputs: an input of the right shape, or a tuple of positional arguments.

    Returns:
        A `Product`; empty, with `reasons`, when there is no symmetry. What was left out is listed there too.

    Raises:
        EmptyModelError: when the model has no parameters.

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
    probe, inputs = copy_of(model), double(as_inputs(example_inputs))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), kept_random_state(probe):
        _perturb(probe, generator)
        traced = trace(probe, inputs)
        draws = 1 + 16 // len(inputs[0]) if isinstance(inputs[0], Tensor) and inputs[0].ndim else 1
        fresh = [tuple(_fresh(x, generator) for x in inputs) for _ in range(draws)]
        reasons = list(traced.reasons)
        factors: list[NeuronSymmetry] = []
        for hidden in traced.hidden:
            reason = _not_understood(probe, hidden, traced)
            if reason:
                reasons.append(f"{hidden}: {reason}")
                continue
            for symmetry in _propose(probe, hidden, generator):
                error = max(_invariance_error(probe, x, symmetry, generator) for x in fresh)
                if error <= TOLERANCE:
                    factors.append(symmetry)
                else:
                    reasons.append(f"{hidden}: {symmetry.group} changes the outputs, by {error:.1e} relative")
    return Product(factors, reasons)


def _invariance_error(model: nn.Module, inputs: Inputs, symmetry: NeuronSymmetry, generator: torch.Generator) -> float:
    """The largest change of the outputs under a random element of radius 1, relative to the largest output."""
    params: Params = dict(model.named_parameters())
    moved = symmetry.act(params, symmetry.sample(params, generator=generator))
    return _distance(_outputs(functional_call(model, moved, inputs)), _outputs(model(*inputs)))


def _not_understood(probe: nn.Module, hidden: Hidden, traced: Trace) -> str | None:
    """Why no group is proposed for a hidden layer, or None."""
    names = {id(p): name for name, p in probe.named_parameters()}
    first, second = probe.get_submodule(hidden.incoming), probe.get_submodule(hidden.outgoing)
    for module in (first, *hidden.between, second):
        for p in module.parameters(recurse=False):
            if id(p) not in names:
                return f"{type(module).__name__} computes its weight from other parameters"
            if not p.requires_grad:
                return f"{names[id(p)]} is frozen"
            if traced.uses[id(p)] > 1:
                return f"{names[id(p)]} is used {traced.uses[id(p)]} times"
    for module in hidden.between:
        if list(module.buffers()) or (list(module.parameters()) and not isinstance(module, nn.PReLU)):
            return f"{type(module).__name__} between them has a state of its own"
    out = hidden.between(hidden.sample.clone())
    if out.ndim != hidden.sample.ndim or out.shape[-1] not in (hidden.width, hidden.width / 2):
        return f"the shape changes between them from {tuple(hidden.sample.shape)} to {tuple(out.shape)}"
    return None


def _propose(probe: nn.Module, hidden: Hidden, generator: torch.Generator) -> Iterator[NeuronSymmetry]:
    """The groups that commute with what stands between the maps; GL alone where there is GL, as it holds the others."""
    n = hidden.between(hidden.sample.clone()).shape[-1]
    value = (0,)
    both = (0, n) if n != hidden.width else value  # of a GLU, which has values in the first half and their gates after
    small: list[tuple[Group, tuple[int, ...]]]
    small = [(PositiveScaling(n), value), (Signs(n), value), (Permutation(n), both)]
    found = [(group, starts) for group, starts in small if _commutes(hidden, group, starts, generator)]
    if len(found) == len(small) and _commutes(hidden, GeneralLinear(n), value, generator):
        found = [(GeneralLinear(n), value)]
    for group, starts in found:
        yield NeuronSymmetry(group, _legs(probe, hidden, group, starts))


def _commutes(hidden: Hidden, group: Group, starts: tuple[int, ...], generator: torch.Generator) -> bool:
    """Whether the modules between the maps commute with random elements of `group`, at all `SCALES`.

    In evaluation mode, and in training mode too with the same random numbers; for permutations dropout masks agree in
    distribution only, so there evaluation mode decides.
    """
    modes = (False,) if isinstance(group, Permutation) else (False, True)
    between = {name: p for name, p in hidden.between.named_parameters() if p.numel() == group.n > 1}
    rows = 1 + 256 // hidden.sample.numel()  # few numbers would miss a kink
    like = hidden.sample.repeat(rows, *[1] * (hidden.sample.ndim - 1)) if hidden.sample.ndim > 1 else hidden.sample
    for scale in SCALES:
        z = scale * _normal(like, generator)
        g = group.exp(group.sample(z, generator=generator))
        permuted = {k: group.along(g, p, 0) for k, p in between.items()} if isinstance(group, Permutation) else {}
        moved = z
        for start in starts:
            part = group.along(g, moved.narrow(-1, start, group.n), z.ndim - 1)
            moved = moved.slice_scatter(part, -1, start, start + group.n)
        for mode in modes:
            hidden.between.train(mode)
            torch.manual_seed(0)
            straight = functional_call(hidden.between, permuted, moved.clone())
            torch.manual_seed(0)
            turned = group.along(g, hidden.between(z.clone()), z.ndim - 1)
            hidden.between.eval()
            if not _distance([straight], [turned]) <= TOLERANCE:
                return False
    return True


def _legs(probe: nn.Module, hidden: Hidden, group: Group, starts: tuple[int, ...]) -> Iterator[Leg]:
    """Where the hidden axis shows up in the parameters."""
    names = {id(p): name for name, p in probe.named_parameters()}
    for p in probe.get_submodule(hidden.incoming).parameters():
        yield from (Leg(names[id(p)], 0, start=start) for start in starts)
    if isinstance(group, Permutation):
        yield from (Leg(names[id(p)], 0) for p in hidden.between.parameters() if p.numel() == group.n > 1)
    yield Leg(names[id(probe.get_submodule(hidden.outgoing).weight)], 1, dual=True)


def _perturb(probe: nn.Module, generator: torch.Generator) -> None:
    """Move all parameters off special values: a symmetry must not hold only because a weight happens to be zero."""
    for p in probe.parameters():
        if p.is_floating_point():
            spread = p.square().mean().sqrt().clamp(min=0.1)
            p.add_(spread * _normal(p, generator))


def _fresh(x: object, generator: torch.Generator) -> object:
    """A fresh input in place of `x`: normal random numbers when it holds real ones, else `x` itself."""
    return _normal(x, generator) if isinstance(x, Tensor) and x.is_floating_point() else x


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def _outputs(output: object) -> list[Tensor]:
    """All tensors in the output of a model."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [t for part in output for t in _outputs(part)] if isinstance(output, (tuple, list)) else []


def _distance(after: list[Tensor], before: list[Tensor]) -> float:
    """The largest difference, relative to the largest entry; 0 when nothing differs."""
    gap = max((float((a - b).abs().max()) for a, b in zip(after, before, strict=True) if a.numel()), default=0.0)
    size = max((float(b.abs().max()) for b in before if b.numel()), default=0.0)
    return gap / size if size else float(gap > 0)
