"""Teleport a model: search, verify, commit in place or not at all, report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from teleport_lite.discovery import find_symmetries
from teleport_lite.distributed import Ranks
from teleport_lite.errors import BatchError, LossError, NoSymmetryError, ParameterError, TeleportError
from teleport_lite.functional import Net, Params, loss_of, trainable
from teleport_lite.objectives import Objective, Problem, as_objective
from teleport_lite.runtime import (
    TOLERANCES,
    LossFn,
    PrecisionProbe,
    coarsest,
    eager_mode,
    kept_random_state,
    unwrap_compiled,
)
from teleport_lite.search import search as find
from teleport_lite.symmetries.base import Product, Symmetry, check_radius
from teleport_lite.symmetries.minibatch import MiniBatchMixing
from teleport_lite.transaction import commit

Commit = Callable[[nn.Module, Product, Any, Params, Callable[[], None]], None]  # model, symmetry, xi, moved, finish


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
                f"  {'seconds':<{width}}  {'':>10}  {self.seconds:>10.2g}",
            ]
        )


def teleport(
    model: nn.Module,
    loss_fn: LossFn,
    symmetry: Symmetry | None = None,
    objective: str | Objective | Callable[[Params], Tensor] = "gradient_norm",
    maximize: bool = True,
    radius: float = 1.0,
    tol: float | None = None,
    generator: torch.Generator | None = None,
    search: str | None = None,
) -> Report:
    r"""Move the parameters of `model` along its symmetry orbit, in place, to improve `objective`.

    Exact or nothing: the move is kept only if the loss stays within `tol`, the objective improves and all is finite.
    Otherwise, and when anything raises (a KeyboardInterrupt too), the model is bit for bit what it was. Parameters keep
    their identity, so optimizers stay valid; buffers, modes and the global random state are left as they were.

    For exact symmetries one gradient tells the whole orbit (Proposition 4.1 of the chapter *Teleporting*), so the cost
    of a gradient-norm teleport is that of about two gradients, verification included.

    A compiled model is teleported too; what is evaluated for the teleport runs uncompiled.

    Under `DistributedDataParallel` all ranks call it, each with the loss on its own shard; the loss and the objective
    are the means over the ranks, which are those of the global batch when the shards are equally large. All ranks end
    with the same weights, or, when one refuses, fails or is interrupted, each with its own old ones. Names of
    parameters are those of the module inside.

    Args:
        model: the model; frozen parameters are never moved.
        loss_fn: net -> scalar loss, deterministic; `net` is a callable with the signature of the model.
        symmetry: where to move; by default `find_symmetries` on the inputs with which loss_fn calls the net (pass it
            when teleporting often).
        objective: "gradient_norm", "weight_norm", "one_step_loss", "sharpness", "curvature", "hessian_trace", an
            `Objective`, or any callable on params.
        maximize: the direction; pass False for "weight_norm" and "one_step_loss", and to go to a flatter point.
        radius: bound on the operator norm of the coordinates: nothing is stretched by more than e^radius.
        tol: relative tolerance for the loss; by default 1e-10 in float64, 1e-5 in float32, by dtype. Rounding noise of
            8 machine epsilons is always allowed. The dtype is the coarsest of the parameters, the outputs of the net,
            the loss, and of autocast where it is on when loss_fn calls the net.
        generator: for random choices; needed by search="random".
        search: "closed_form", "ascent" or "random"; by default the closed form where there is one, ascent elsewhere.

    Returns:
        A `Report`.

    Raises:
        NoSymmetryError: when there is nothing to move along.
        LossError: when the loss is no scalar, ignores the net, or changes from call to call.
        ParameterError: when the symmetry moves a frozen parameter, or a parameter is not finite, or sharded (FSDP).
        RankError: when another rank fails, or the ranks do not hold the same parameters, symmetry, generator, ...
        UnknownNameError: when the objective, the search or a parameter of the symmetry is not known.
        TeleportError: when the radius or tol is not positive.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    >>> x, y = torch.randn(32, 8), torch.randn(32, 1)
    >>> report = teleport(model, lambda net: nn.functional.mse_loss(net(x), y))
    >>> report.accepted, report.objective_after > 1.5 * report.objective_before, report.invariance_error < 1e-6
    (True, True, True)
    """
    ranks = Ranks(model)
    with ranks.together():
        return carry_out(
            ranks,
            loss_fn,
            symmetry,
            objective,
            maximize=maximize,
            radius=radius,
            tol=tol,
            generator=generator,
            search=search,
        )


def carry_out(
    ranks: Ranks,
    loss_fn: LossFn,
    symmetry: Symmetry | None,
    objective: str | Objective | Callable[[Params], Tensor],
    *,
    maximize: bool,
    radius: float,
    tol: float | None,
    generator: torch.Generator | None,
    search: str | None,
    commit: Commit | None = None,
) -> Report:
    """A `teleport` that leaves the last step, once all is verified, to `commit`; by default only the model moves.

    Raises:
        NoSymmetryError: as `teleport`.
        TeleportError: as `teleport`.
    """
    start = time.perf_counter()
    goal = as_objective(objective)
    check_radius(radius)
    if tol is not None and not tol > 0:
        raise TeleportError("a positive tol", tol, "leave it out for the default of the dtype")
    if search == "random" and generator is None:
        remedy = "pass generator=torch.Generator().manual_seed(0)"
        raise TeleportError("a generator for a random teleport", None, remedy)
    if symmetry is None:
        symmetry = symmetries_of(ranks.model, loss_fn)
    model = unwrap_compiled(ranks.model, symmetry.names)
    params = {name: p.detach() for name, p in trainable(model).items()}
    loss_fn = watched = PrecisionProbe(loss_fn, next(iter(params.values())))

    with kept_random_state(model), eager_mode(watched.device):
        product = symmetry if isinstance(symmetry, Product) else Product([symmetry])
        if not len(product):
            raise NoSymmetryError(product.reasons)
        check_movable(model, product)
        if search != "random":
            product = product.continuous
            if not len(product):
                raise NoSymmetryError(["all its groups are finite: only search='random' moves along them"])

        ranks.check_same(
            parameters=params,
            symmetry=product,
            batch_of_the_symmetry=[f.inputs for f in product if isinstance(f, MiniBatchMixing)],
            generator=None if generator is None else generator.get_state().tolist(),
            request=(goal.name, maximize, radius, tol, search),
        )
        problem = Problem(loss_of(model, loss_fn), params, ranks)
        if goal.quadratic == "gradient" and product.exact:
            _ = problem.gradient  # gives the value along with it
        loss_before = problem.value
        xi = find(problem, product, goal, how=search, maximize=maximize, radius=radius, generator=generator)
        xi = ranks.first(xi)
        scores = [goal.before(problem, product), goal.along(problem, product)(xi).detach()]
        problem.forget()
        moved = product.act(params, xi)
        moved = {**params, **ranks.first({name: moved[name] for name in product.names})}

        measured = torch.stack([t.double() for t in (loss_before, problem.at(moved), *scores)])
        before, after, old, new = measured.tolist()  # the one time that the host waits for the device
        dtype = coarsest([watched.dtype, *(params[name].dtype for name in product.names)])
        ranks.check_same(precision=dtype)
        tol = TOLERANCES[dtype] if tol is None else tol
        noise = 8 * torch.finfo(dtype).eps
        if not _close(after, before, tol, noise):
            _check_deterministic(problem, before, tol, noise)
        reason = _reason(before, after, old, new, tol, noise, product, params, maximize, search)
        if refused := ranks.ask(bool(reason)):
            reason = reason or f"refused on rank {refused[0]}"
        else:
            (commit or _move)(model, product, xi, moved, ranks.join)
    error = abs(after - before) / abs(before) if after != before else 0.0
    seconds = time.perf_counter() - start
    return Report(goal.name, before, after, old, new, error, seconds, accepted=not reason, reason=reason)


def _move(model: nn.Module, product: Product, xi: Any, moved: Params, finish: Callable[[], None]) -> None:
    commit(model, {name: moved[name] for name in product.names}, finish)


def symmetries_of(model: nn.Module, loss_fn: LossFn) -> Product:
    """`find_symmetries` on the inputs with which `loss_fn` calls its net.

    Raises:
        LossError: when it does not call it.
    """
    model = unwrap_compiled(Ranks(model).model)
    watched = PrecisionProbe(loss_fn, next(iter(trainable(model).values())))
    net = Net(model, {})
    with kept_random_state(model), eager_mode(watched.device):
        with torch.no_grad():
            watched(net)
        if net.inputs is None:
            raise LossError("a loss_fn that calls the given net", "one that does not", "call net(x) inside loss_fn")
        return find_symmetries(model, net.inputs)


def check_movable(model: nn.Module, symmetry: Symmetry) -> None:
    """Check that the symmetry fits the model.

    Raises:
        ParameterError: when it moves a frozen parameter.
    """
    everything: dict[str, Any] = dict(model.named_parameters())
    product_params = {name: p.detach() for name, p in everything.items()}
    for factor in symmetry if isinstance(symmetry, Product) else [symmetry]:
        factor.check(product_params)
    for name in symmetry.names:
        if not everything[name].requires_grad:
            remedy = "unfreeze it, or call find_symmetries again, which leaves frozen parameters out"
            raise ParameterError(name, "trainable", "requires_grad=False", remedy)


def _check_deterministic(problem: Problem, before: float, tol: float, noise: float) -> None:
    """Evaluate the loss again at the old parameters, to tell a broken symmetry from a loss that changes by itself.

    Raises:
        LossError: when it does.
    """
    again = float(problem.at(problem.params))
    if not _close(again, before, tol, noise):
        raise LossError(
            "a deterministic loss",
            f"{before:.6g} and {again:.6g} at the same parameters",
            "fix the batch and the random numbers, and put dropout in evaluation mode (model.eval())",
        )


def _close(a: float, b: float, tol: float, noise: float) -> bool:
    """Whether two losses agree; two that are not finite count as agreeing here, and are refused elsewhere."""
    return a == b or abs(a - b) <= tol * abs(b) + noise or a - b != a - b


def _reason(
    before: float,
    after: float,
    old: float,
    new: float,
    tol: float,
    noise: float,
    product: Product,
    params: Params,
    maximize: bool,
    search: str | None,
) -> str:
    """Why the move must not be committed, or nothing.

    Raises:
        ParameterError: when a parameter is not finite.
    """
    finite = torch.tensor([before, after, old, new]).isfinite().tolist()
    if not finite[0] or not finite[2]:
        for name, p in params.items():
            if not p.isfinite().all():
                raise ParameterError(name, "finite", "NaN or infinity in it", "restore it from a checkpoint")
    if not all(finite):
        names = ("loss", "loss after the move", "objective", "objective after the move")
        return f"the {names[finite.index(False)]} is not finite"
    if not _close(after, before, tol, noise):
        hint = ""
        for factor in product:
            if isinstance(factor, MiniBatchMixing):
                try:
                    factor.require_exact(params)
                except BatchError as error:
                    hint = f" ({error})"
        return f"the loss moved from {before:.6g} to {after:.6g}, beyond the relative tolerance {tol:g}{hint}"
    if search != "random" and not (new > old if maximize else new < old):
        return f"nothing {'larger' if maximize else 'smaller'} was found within the radius"
    return ""
