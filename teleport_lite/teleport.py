"""Teleport a model: search, verify, commit in place or not at all, report."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from teleport_lite.discovery import find_symmetries
from teleport_lite.distributed import Ranks
from teleport_lite.errors import LossError, NoSymmetryError, ParameterError, TeleportError, UnknownNameError
from teleport_lite.exactness import (
    MOVED,
    RefusedError,
    change_by_rounding,
    check_deterministic,
    largest_change,
    why_refused,
)
from teleport_lite.functional import Evaluation, Params, as_vector, check_finite, entry_norms, trainable
from teleport_lite.objectives import Objective, as_objective
from teleport_lite.problem import Problem
from teleport_lite.report import Report
from teleport_lite.rounding import relative_gap
from teleport_lite.runtime import TOLERANCES, LossFn, check_generator, coarsest_dtype, named_tensors, unwrap_compiled
from teleport_lite.search import search as find
from teleport_lite.search import searched_factors
from teleport_lite.symmetries.base import Symmetry, check_radius
from teleport_lite.symmetries.minibatch import MiniBatchMixing
from teleport_lite.symmetries.product import Product, check_symmetry
from teleport_lite.transaction import Check, Finish, commit

Commit = Callable[[nn.Module, Product, Any, Params, Finish], None]  # model, symmetry, xi, moved, finish


def teleport(
    model: nn.Module,
    loss_fn: LossFn,
    symmetry: Symmetry | None = None,
    objective: str | Objective | Callable[[Params], Tensor] = "gradient_norm",
    maximize: bool | None = None,
    radius: float = 1.0,
    tol: float | None = None,
    generator: torch.Generator | None = None,
    search: str | None = None,
) -> Report:
    r"""Move the parameters of `model` along its symmetry orbit, in place, to improve `objective`.

    Exact or nothing, on the model itself: when it has moved, its loss and the outputs that the loss saw are compared
    with those before. The move stays only if they agree within `tol`, the objective improves and all is finite.
    Otherwise, and when anything raises (a KeyboardInterrupt too), the model is bit for bit what it was. Parameters keep
    their identity, so optimizers stay valid; `p.grad` is left as it was, and is then that of the old weights: teleport
    after `optimizer.step()`, before the next backward pass. Modes and the global random state are left as they were,
    and so are buffers, but for those that a symmetry names, as a permutation does the running statistics of a
    BatchNorm.

    For exact symmetries one gradient tells the whole orbit (Proposition 4.1 of the chapter *Teleporting*), so a
    gradient-norm teleport costs 1.4 to 6 gradients, verification included, and more in networks of a few thousand
    weights. When a symmetry is first used on a model, the gradient at the new point is computed as well: it has to be
    the one that was foretold, which it is not where a backward pass is no derivative (straight-through estimators).

    A compiled model is teleported too; what is evaluated for the teleport runs uncompiled.

    Under `DistributedDataParallel` all ranks call it, each with the loss on its own shard; the loss and the objective
    are the means over the ranks, which are those of the global batch when the shards are equally large. All ranks end
    with the same weights, or, when one refuses, fails or is interrupted, each with its own old ones. Names of
    parameters are those of the module inside.

    Args:
        model: the model; frozen parameters are never moved.
        loss_fn: net -> scalar loss; `net` is the model, at other parameters. Global random numbers (dropout) are the
            same at each call; what else changes from call to call is refused.
        symmetry: where to move; by default `find_symmetries` on the inputs with which loss_fn calls the net (pass it
            when teleporting often).
        objective: "gradient_norm", "weight_norm", "one_step_loss", "sharpness", "curvature", "hessian_trace", an
            `Objective`, or any callable on params.
        maximize: True for up, False for down; by default the natural direction of the objective: up for
            "gradient_norm", "curvature" and callables, down for the others.
        radius: bound on the operator norm of the coordinates of each group element, which stretches nothing by more
            than e^radius; a weight between two layers that are both scaled can change by e^(2 radius).
        tol: relative tolerance for the loss, and ten times that for the largest change of an output; by default 1e-10
            in float64, 1e-5 in float32, by dtype. The dtype is the coarsest of the parameters, the outputs of the net,
            the loss, and of autocast where it is on when loss_fn calls the net. In 16 bits 1e-2 (float16) or 5e-2, and
            outputs change by no more than twice what a unit in the last place of the weights makes of them. A loss that
            is small beside its terms may move as far as rounding moves it, if the outputs agree, and it itself does in
            float64.
        generator: for random choices; needed by search="random".
        search: "closed_form", "ascent" or "random"; by default the closed form where there is one, ascent elsewhere.
            Factors without a closed form stay as long as others have one; `report.symmetry` are those that moved.

    Returns:
        A `Report`.

    Raises:
        NoSymmetryError: when there is nothing to move along.
        LossError: when the loss is no scalar, ignores the net, or changes from call to call.
        ParameterError: when the symmetry moves a frozen parameter, or a parameter is not finite, or sharded (FSDP).
        RankError: when another rank fails, or the ranks do not hold the same parameters, symmetry, generator, ...
        UnknownNameError: when the objective, the search or a parameter of the symmetry is not known.
        TeleportError: when the radius or tol is not positive, or model, loss_fn, maximize are not what they should be.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    >>> x, y = torch.randn(32, 8), torch.randn(32, 1)
    >>> report = teleport(model, lambda net: nn.functional.mse_loss(net(x), y))
    >>> report.accepted, report.objective_after > 1.5 * report.objective_before, report.invariance_error < 1e-6
    (True, True, True)
    """
    ranks = Ranks(model)
    with ranks.together():
        options: dict[str, Any] = {
            "maximize": maximize,
            "radius": radius,
            "tol": tol,
            "generator": generator,
            "search": search,
        }
        return carry_out(ranks, loss_fn, symmetry, objective, **options)


def carry_out(
    ranks: Ranks,
    loss_fn: LossFn,
    symmetry: Symmetry | None,
    objective: str | Objective | Callable[[Params], Tensor],
    *,
    maximize: bool | None,
    radius: float,
    tol: float | None,
    generator: torch.Generator | None,
    search: str | None,
    commit: Commit | None = None,
    carries: bool = False,
) -> Report:
    """A `teleport` that leaves the writing to `commit`, with what else moves along; by default only the model moves.

    What is written is verified before `commit` returns, and undone by it when the verification raises. Where the state
    of an optimizer `carries` what was made of gradients, they are verified as well.

    Raises:
        LossError: when the loss changes from call to call.
        NoSymmetryError: as `teleport`.
        TeleportError: as `teleport`.
    """
    start = time.perf_counter()
    goal = as_objective(objective)
    maximize = goal.goes_up(maximize)
    check_radius(radius)
    check_generator(generator)
    if tol is not None and not (isinstance(tol, (int, float)) and tol > 0):
        raise TeleportError("a positive tol", tol, "leave it out for the default of the dtype")
    if search == "random" and generator is None:
        remedy = "pass generator=torch.Generator().manual_seed(0)"
        raise TeleportError("a generator for a random teleport", None, remedy)
    symmetry = symmetries_of(ranks.model, loss_fn) if symmetry is None else symmetry
    product = check_symmetry(symmetry)
    model = unwrap_compiled(ranks.model, product.names)
    parameters = trainable(model)
    params = {name: p.detach() for name, p in parameters.items()}  # in the same memory
    tensors = named_tensors(model)

    with Evaluation(model, loss_fn) as loss:
        if not len(product):
            raise NoSymmetryError(product.reasons)
        check_movable(model, product)
        if search != "random":
            groups = ", ".join(dict.fromkeys(str(f.group) for f in product))
            product = product.continuous
            if not len(product):
                remedy = "pass search='random' and a generator to move along them, or use level_set_teleport"
                raise NoSymmetryError([f"all its groups are finite: {groups}", *product.reasons], remedy)
        if search in (None, "closed_form"):
            product = searched_factors(product, goal)

        ranks.check_same(
            parameters=params,
            symmetry=product,
            batch_of_the_symmetry=[f.inputs for f in product if isinstance(f, MiniBatchMixing)],
            generator=None if generator is None else generator.get_state().tolist(),
            request=(goal.name, maximize, radius, tol, search),
        )
        problem = Problem(loss, params, ranks, {name: tensors[name].detach() for name in product.buffers})
        steep = goal.quadratic == "gradient"
        checked = vars(symmetry).setdefault("_checked", weakref.WeakSet())  # models whose gradient it has foretold
        first = product.exact and model not in checked
        measured = first and (steep or goal.transports or carries) if product.exact else steep  # at the new point
        with loss.observed() as outputs:
            if measured or steep:
                problem.differentiate()  # gives the value along with it
            loss_before = problem.value
        with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined] # of numbers that are not finite, which are refused below
            xi = product.zeros(params)
            xi = find(problem, product, goal, how=search, maximize=maximize, radius=radius, generator=generator)
        xi = ranks.first(xi)
        scores, foretold = [goal.before(problem, product)], loss_before.new_zeros(0)
        if product.exact and (measured or steep):
            foretold = entry_norms(product.transport(problem.gradient, xi, None if product.linear else params))
        scores.append(foretold.norm() if steep else problem.along(goal, product)(xi).detach())
        problem.forget()
        point = product.act(problem.point, xi)
        moved = ranks.first({name: point[name] for name in product.names})
        moved |= {name: point[name] for name in product.buffers}  # each rank has its own
        del point
        numbers: list[float] = []

        def verify_model(more: Sequence[Tensor] = (), check: Check = lambda _: None) -> None:
            """Compare the real model, which has moved, with what it was; `check` looks at `more` numbers likewise."""
            now = Problem(loss, {name: p.detach() for name, p in parameters.items()}, ranks, problem.buffers)
            zero = loss_before.new_zeros(())
            with loss.observed() as new_outputs:
                found = entry_norms(now.gradient) if measured else foretold
                loss_after = now.value
            scores[1] = found.norm() if steep else scores[1]
            same = product.exact and product.of == "outputs"
            gap = largest_change(outputs, new_outputs) if same and outputs else zero + torch.nan
            false = relative_gap(found, foretold) if measured and product.exact else zero
            now.forget()
            dtype = _coarsest_of(loss, product, params)
            allowed = tol or TOLERANCES[dtype]
            ranks.check_same(tolerance=allowed)
            half = same and not tol and torch.finfo(dtype).bits < 32
            explained = change_by_rounding(now, loss, new_outputs, dtype) if half else zero
            loss.rest()
            table = (loss_before, loss_after, *scores, gap, explained, false)
            numbers[:] = as_vector([*table, *more]).tolist()  # the one time that the host waits
            check(numbers[len(table) :])
            del numbers[len(table) :]
            reason = why_refused(numbers, now, product, xi, allowed, bool(new_outputs), maximize, search)
            if refused := ranks.ask(bool(reason)):
                raise RefusedError(reason or f"refused on rank {refused[0]}", moved=reason.startswith(MOVED))
            ranks.ask(False)

        loss.rest()
        reason = ""
        try:
            (commit or _commit_moved)(model, product, xi, moved, verify_model)
        except RefusedError as refusal:
            reason = refusal.reason
            if refusal.moved:
                check_deterministic(problem, numbers[0], tol or TOLERANCES[_coarsest_of(loss, product, params)])
        if first and measured and not reason:
            checked.add(model)
    before, after, old, new = numbers[:4]
    error = abs(after - before) / abs(before) if after != before else 0.0
    seconds = time.perf_counter() - start
    return Report(goal.name, before, after, old, new, error, seconds, not reason, reason, product, xi, numbers[4])


def _commit_moved(model: nn.Module, product: Product, xi: Any, moved: Params, finish: Callable[[], None]) -> None:
    commit(model, moved, finish)


def symmetries_of(model: nn.Module, loss_fn: LossFn) -> Product:
    """`find_symmetries` on the arguments with which `loss_fn` calls its net.

    Raises:
        LossError: when it does not call it.
        ParameterError: when a parameter is not finite.
    """
    loss = Evaluation(unwrap_compiled(Ranks(model).model), loss_fn)
    params: Params = {name: p.detach() for name, p in trainable(loss.model).items()}
    check_finite(params)
    with torch.no_grad():
        loss(params)
    if loss.call is None:
        remedy = "call net(x) inside loss_fn, or pass symmetry=find_symmetries(model, x)"
        raise LossError("a loss_fn that calls the given net", "one that does not, or within torch.func alone", remedy)
    return find_symmetries(loss.model, loss.call)


def check_movable(model: nn.Module, symmetry: Symmetry) -> None:
    """Check that the symmetry fits the model.

    Raises:
        ParameterError: when it moves a frozen parameter.
        UnknownNameError: when the model has no buffer of a name.
    """
    everything: dict[str, Any] = named_tensors(model)
    point = {name: p.detach() for name, p in everything.items()}
    for factor in symmetry if isinstance(symmetry, Product) else [symmetry]:
        factor.check(point)
        if missing := factor.missing(point):
            raise UnknownNameError("buffer", missing[0], dict(model.named_buffers()))
    for name in symmetry.names:
        if not everything[name].requires_grad:
            remedy = "unfreeze it, or call find_symmetries again, which leaves frozen parameters out"
            raise ParameterError(name, "trainable", "requires_grad=False", remedy)


def _coarsest_of(loss: Evaluation, product: Product, params: Params) -> torch.dtype:
    return coarsest_dtype([loss.dtype, *(params[name].dtype for name in product.names)])
