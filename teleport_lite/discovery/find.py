"""Find the symmetries of an unmodified model: propose, verify, keep only what holds.

Runs of a copy of the model, operation by operation, give equations between the axes of its parameters
(`teleport_lite.discovery.propagate`); their solutions are proposed as groups. Every proposal is then verified on the
whole model, in float64, on trials of many kinds (`teleport_lite.discovery.trials`); what fails is dropped, with the
reason.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from teleport_lite.discovery.decisions import keep_decisions
from teleport_lite.discovery.draws import WithoutDropout
from teleport_lite.discovery.inputs import Arguments
from teleport_lite.discovery.probe import Probe, run_settings
from teleport_lite.discovery.propagate import Propagation
from teleport_lite.discovery.propose import solve_and_verify
from teleport_lite.discovery.shears import verified_shears
from teleport_lite.discovery.solve import connected_axes
from teleport_lite.discovery.solve import fixing_reasons as reasons_of
from teleport_lite.discovery.translate import combine_translations, verified_translations
from teleport_lite.discovery.trial import Trial
from teleport_lite.discovery.verify import Verifier
from teleport_lite.errors import EmptyModelError, UnknownNameError
from teleport_lite.functional import Params, check_apart
from teleport_lite.symmetries.axes import NeuronSymmetry
from teleport_lite.symmetries.base import Symmetry
from teleport_lite.symmetries.product import Product
from teleport_lite.symmetries.rank import connected_factors, rank_cost, tangent_rank
from teleport_lite.symmetries.shifts import Shift

PATIENCE = 3.0  # seconds after which steps are logged
CHEAP = 1e8  # operations that the rank of the tangents may take

RETURNED = "the model returns them"


def find_symmetries(model: nn.Module, example_inputs: object, of: str = "outputs") -> Product:
    """The symmetries of `model` that hold on all inputs.

    Works on any model that runs: modules, functions and loops are all followed, operation by operation. What moves may
    be neurons and channels (scalings, signs, permutations, mixings where nothing stands between two linear maps), the
    queries and keys or the values of attention heads, which rotate with rotary positions, or a residual stream, which
    is rotated where nothing but norms and linear maps reads it. Shears move what reads a LayerNorm with its shift, and
    the mean of a stream. Mixings of the heads of a layer are one factor, GL(d)^heads. Whole heads are exchanged, and
    whole experts with the rows of their router. Translations shift biases, tables and weights where others undo that,
    as b + c is undone by b' - Wc in the next layer, or where nothing sees it, as under a softmax or a LayerNorm; a row
    at `padding_idx` moves with its table. Frozen parameters stay. The model is only read, and the global random state
    is left as it was.

    Each factor is verified on a copy of the whole model, in float64: on the example and on values near it, on larger
    and smaller ones, other integers, batches and lengths, as far as the model takes them, in evaluation and training
    mode. What these runs do not exercise stays, and so does what may share an axis with a parameter that they did not
    read. All that the model returns stays, but for an object that it returns under the name of one of its own
    arguments: the cache of a language model is a state that it hands on to itself. That is a test and no proof: a
    branch that no run takes is not seen. See the chapter *Modern architectures*. A search that takes more than a few
    seconds logs its steps, as INFO of `logging.getLogger("teleport_lite")`.

    Args:
        model: the model, on any device, in any mode.
        example_inputs: an input of the right shape, a tuple of positional arguments, or a mapping of keyword arguments;
            tensors may stand in containers and dataclasses.
        of: "outputs", or "loss" to have what shifts all logits of an example alike as well, which a cross-entropy does
            not see. Classes are the last dimension of the outputs, and the second one of those with more than three.

    Returns:
        A `Product`; empty, with `reasons`, when there is no symmetry. What was left out is listed there too.

    Raises:
        EmptyModelError: when the model has no parameters.
        ParameterError: when a parameter has no shape yet, is sharded, or shares memory with another one.
        UnknownNameError: when `of` is neither.
        TeleportError: when the model is none, cannot be copied, or does not run on `example_inputs` in float64.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 1))
    >>> find_symmetries(model, torch.zeros(1, 8))
    Product of 4 symmetries, dim 16
      parameters                      group      dim  holds on
      0.weight, 0.bias -> 2.weight    (R>0)^16   16   all inputs
      0.weight, 0.bias -> 2.weight    S(16)      0    all inputs
      2.weight, 2.bias -> 4.weight    {1,-1}^4   0    all inputs
      2.weight, 2.bias -> 4.weight    S(4)       0    all inputs
    """
    if of not in ("outputs", "loss"):
        raise UnknownNameError("of", of, ("outputs", "loss"))
    step = _step_logger()
    probe = Probe(model)
    if not probe.params:
        raise EmptyModelError(model)
    check_apart(dict(model.named_parameters()))
    generator = torch.Generator().manual_seed(0)
    with run_settings(probe.module):
        probe.perturb_parameters(generator)
        check = Verifier(probe, Arguments.of(example_inputs), generator)
        trials = check.planned.informative_trials()
        propagation = moving = propagate_trials(probe, trials)
        propagation.fix_idle_matrices(check.matters)
        if probe.movable:
            training = [t for t in check.planned.even if t.training][:1]
            masks = {n for n in probe.movable if bool(((probe.home[n] == 0) | (probe.home[n] == 1)).all())}
            moving = propagate_trials(
                probe, dict.fromkeys([*trials, *training]), [n for n in probe.movable if n not in masks]
            )
            moving.fix_idle_matrices(check.matters)
        check.partly = propagation.partly | moving.partly
        connected = connected_axes(propagation.constraints, propagation.parameter_axes)
        step("inputs are varied")
        while True:
            factors, reasons = solve_and_verify(propagation, moving, check)
            step(f"{len(factors)} factors hold")
            shifts = verified_translations(probe, check, connected, generator)
            sheared = verified_shears(factors, shifts, propagation, check)
            step(f"{len(shifts) + len(sheared)} translations and shears hold")
            if check.thorough or check.confirm_together(factors, sheared, [*shifts]):
                break
        held = check.hold_on_many([*factors, *sheared, *shifts])
        kept = keep_decisions(held, check)
        for gone, why in (
            ({*factors, *sheared} - {*held}, "fails on more examples, or at the weights as given"),
            ({*held} - {*kept}, "moves what the model decides by"),
        ):
            reasons += [f"{s}: {s.group} {why}" for s in (*factors, *sheared) if s in gone]
        found: list[Symmetry] = [s for s in (*factors, *sheared) if s in kept]
        shifts = {s: k for s, k in shifts.items() if s in kept}
        for shift in combine_translations(shifts):
            found += [shift] if _adds(shift, found, check.params) else []
        if of == "loss":
            probe.of = of
            check_loss = Verifier(probe, Arguments.of(example_inputs), generator)
            check_loss.thorough = True
            seen = verified_translations(probe, check_loss, connected, generator)
            found += [
                Shift(s.dim, s.moves, of)
                for s in combine_translations({s: k for s, k in seen.items() if s not in shifts})
            ]
        mixed = [f for part in connected_factors(found) if any(isinstance(f, Shift) for f in part) for f in part]
        overlap = (
            sum(f.dim for f in mixed) - tangent_rank(mixed, check.params)
            if rank_cost(mixed, check.params) < CHEAP
            else 0
        )
        reasons = [*reasons, *check.notes(), *_reasons_unmoved(propagation, probe.params, factors)]
    return Product(found, reasons, overlap)


def _adds(shift: Shift, found: list[Symmetry], params: Params) -> bool:
    """Whether a translation in a kernel has more directions than what was found: mixings of narrow layers make them."""
    near = [f for f in found if f.dim and {*f.moved} & {*shift.names}]
    if not near or not shift.in_kernel or rank_cost([*near, shift], params) >= CHEAP:
        return True
    return tangent_rank([*near, shift], params) > tangent_rank(near, params)


def _step_logger() -> Callable[[str], None]:
    """What logs a step, with the time, of a search that takes long."""
    begun, log = time.monotonic(), logging.getLogger("teleport_lite")

    def log_step(what: str) -> None:
        if (seconds := time.monotonic() - begun) > PATIENCE:
            log.info("find_symmetries: %s after %.0f s", what, seconds)

    return log_step


def propagate_trials(probe: Probe, trials: Iterable[Trial], buffers: Collection[str] = ()) -> Propagation:
    """The constraints that all these runs put on the parameters together, and on these buffers."""
    kernels = {id(p) for m in probe.module.modules() if isinstance(m, (_ConvNd, nn.Bilinear)) for p in m.parameters()}
    stacks = {n: len(p) for n, p in probe.params.items() if p.ndim == 3 and len(p) > 1 and id(p) not in kernels}
    trials, moving = list(trials), {n: probe.movable[n] for n in buffers}
    propagation = _propagate_runs(probe, trials, stacks, moving)
    return _propagate_runs(probe, trials, stacks | propagation.cut, moving) if propagation.cut else propagation


def _propagate_runs(probe: Probe, trials: list[Trial], stacks: dict[str, int], buffers: Params) -> Propagation:
    propagation = Propagation(probe.params, stacks, buffers)
    for name, p in probe.params.items():
        if not p.requires_grad:
            propagation.freeze(name, f"{name} is frozen")
        elif not p.is_floating_point():
            propagation.freeze(name, f"{name} is {'complex' if p.is_complex() else str(p.dtype)}")
    with WithoutDropout():
        outputs = [probe.outputs(t.call, t.training, t.seed, (*t.modes(), propagation)) for t in trials]
    propagation.finish([tensor for found in outputs for tensor in found])
    propagation.fix_unexercised()
    return propagation


def _reasons_unmoved(propagation: Propagation, params: Params, factors: list[NeuronSymmetry]) -> list[str]:
    """Why the rows of matrices stay."""
    moved = {(leg.name, leg.dim) for f in factors for leg in f.legs}
    still = [
        s
        for s in propagation.parameter_axes
        if s[1] == 0 and params[s[0]].ndim > 1 and s[0] in propagation.used and s[:2] not in moved
    ]
    whys: dict[str, list[str]] = defaultdict(list)
    for (name, _, _), why in zip(
        still, reasons_of(propagation.constraints, [propagation.parameter_axes[s] for s in still]), strict=True
    ):
        if why and not (factors and why == RETURNED):
            whys[why].append(name)
    return [f"rows of {', '.join(names)}: {why}" for why, names in whys.items()]
