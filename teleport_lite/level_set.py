"""Teleports without a group, along the level set of the loss: steps of sequential quadratic programming.

Gradients and Hessian-vector products only, one product a step. Derived in the chapter *Level sets without a group*,
after [Mishkin, Bietti, Gower 2024](https://arxiv.org/abs/2403.03362).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from teleport_lite.errors import LossError, ParameterError, TeleportError
from teleport_lite.exactness import LARGEST, largest_change
from teleport_lite.functional import Params, check_complete, gradients, loss_of, stacked, trainable, value_and_grad
from teleport_lite.report import Report
from teleport_lite.runtime import TOLERANCES, LossFn, eager_mode, unfused_attention, unwrap_compiled, widest
from teleport_lite.transaction import commit

HALVINGS = 30  # of a step that does not improve
DONE, SPENT, STUCK = "KKT residual reached", "all steps are taken", "no step along the direction improves"


@dataclass(frozen=True)
class LevelSetReport(Report):
    """What a teleport without a group did.

    Attributes:
        dimension: of the space to move in; d - 1 for a level set.
        steps: how many were taken.
        gradients: how many gradients were evaluated.
        products: how many Hessian-vector products.
        kkt_residual: 0 where the first-order conditions of a constrained maximum hold, about 1 far from it.
        stopped: why no more steps were taken.
    """

    dimension: int = 0
    steps: int = 0
    gradients: int = 0
    products: int = 0
    kkt_residual: float = math.nan
    stopped: str = ""

    def __str__(self) -> str:
        cost = f"{self.steps} steps, {self.gradients} gradients, {self.products} Hessian-vector products"
        return f"{super().__str__()}\n  {cost}\n  KKT residual {self.kkt_residual:.1e}; stopped: {self.stopped}"


class _NotFiniteError(Exception):
    """The loss or its gradient is NaN, or infinite at the start."""


class _RefusedError(Exception):
    """Undoes the move that was just written."""


@dataclass
class Point:
    """A place, its loss and its gradient `g`, which keeps its graph: the Hessian costs one reverse pass more."""

    x: Tensor
    loss: float
    g: Tensor
    norm: float


class Walk:
    """A loss as a function of one vector of all trainable parameters, with its cost counted.

    A product belongs to the point that was evaluated last, whose parameters are still in the model: layers that are
    checkpointed run again for it.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, steps: int, tol: float | None, kkt_tol: float) -> None:
        if steps < 1 or not kkt_tol > 0 or not (tol is None or tol > 0):
            got = f"steps={steps}, tol={tol}, kkt_tol={kkt_tol}"
            raise TeleportError("at least one step, a positive tol and kkt_tol", got, "leave them out for the defaults")
        model = unwrap_compiled(model)
        self.model, self.loss, self.began = model, loss_of(model, loss_fn), time.perf_counter()
        self.params = {name: p.detach() for name, p in trainable(model).items()}
        finite = stacked([p.isfinite().all() for p in self.params.values()]).tolist()
        for (name, p), well in zip(self.params.items(), finite, strict=True):
            if p.is_complex() or not well:
                got = "complex" if p.is_complex() else "NaN or infinity in it"
                raise ParameterError(name, "real and finite", got, "freeze it, or restore it from a checkpoint")
        first = next(iter(self.params.values()))
        self.tol, self.noise = tol or TOLERANCES[first.dtype], 8 * torch.finfo(first.dtype).eps
        self.x = torch.cat([p.reshape(-1).to(first.device) for p in self.params.values()])
        self.gradients = self.products = 0
        self.start: Point | None = None
        self.outputs: list[Tensor] = []  # of the model at the start, where they have to stay

    def split(self, x: Tensor) -> Params:
        """The parameters that a vector holds."""
        parts = zip(self.params.items(), x.split([p.numel() for p in self.params.values()]), strict=True)
        return {name: part.view_as(p).to(p) for (name, p), part in parts}

    def at(self, x: Tensor) -> Point:
        """The loss and its gradient.

        Raises:
            _NotFiniteError: when one of them is NaN, or infinite at the first point.
        """
        x = x.detach().requires_grad_()
        loss, grads = value_and_grad(lambda p: self.loss(self.split(p["x"])), {"x": x}, create_graph=True)
        self.gradients += 1
        value, norm = stacked([loss.detach(), wider(grads["x"].detach()).norm()]).tolist()
        point = Point(x, value, grads["x"], norm if math.isfinite(value) else math.inf)
        if math.isnan(value) or math.isnan(point.norm) or (self.start is None and math.isinf(point.norm)):
            raise _NotFiniteError
        self.start = self.start or point
        return point

    def product(self, p: Point) -> Tensor:
        """Hessian times gradient: the gradient of half the squared gradient norm.

        Raises:
            LossError: when torch cannot differentiate the gradient.
            _NotFiniteError: when it is not finite.
        """
        self.products += 1
        check_complete([p.g])
        h = gradients(p.g, [p.x], along=p.g.detach())[0] if p.g.requires_grad else None
        if h is not None and not h.isfinite().all():
            raise _NotFiniteError
        return torch.zeros_like(p.x) if h is None else h  # zero for a loss that is linear

    def now(self) -> tuple[float, float]:
        """The loss of the model as it is, and the length of its gradient."""
        value, grads = value_and_grad(self.loss, {name: p.detach() for name, p in trainable(self.model).items()})
        self.loss.rest()
        g = torch.cat([g.reshape(-1).to(self.x) for g in grads.values()])  # as in `at`, so that equal points are equal
        return float(value), float(wider(g).norm())


def dots(*pairs: tuple[Tensor, Tensor]) -> list[float]:
    """Inner products of vectors, accumulated in float64 where there is float64."""
    return torch.stack([torch.dot(wider(a.detach()), wider(b.detach())) for a, b in pairs]).tolist()


def wider(x: Tensor) -> Tensor:
    """`x` in the `widest` type of its device."""
    return x.to(widest(x.device))


def level_set_teleport(
    model: nn.Module,
    loss_fn: LossFn,
    steps: int = 50,
    *,
    sublevel: bool = False,
    radius: float | None = None,
    tol: float = 1e-6,
    kkt_tol: float = 1e-6,
) -> LevelSetReport:
    r"""Move `model` along the level set of its loss, in place, to a longer gradient; no group is needed.

    With the loss in excess of that at the start $c$, gradient $g$ and Hessian $H$, each step maximises the linearised
    $\log \lVert g \rVert$ less $\lVert d \rVert^2 / (2 \rho)$ on the linearised level set $c + g^\top d = 0$:

    $$ d = \rho \frac{H g}{\lVert g \rVert^2} - v\, g, \qquad
       v = \frac{1}{\lVert g \rVert^2} \Big(c + \rho\, \frac{g^\top H g}{\lVert g \rVert^2}\Big) . $$

    A line search on $\log \lVert g \rVert - \gamma \lvert c \rvert$ guards the step, and the change of the tangential
    part of $Hg / \lVert g \rVert^2$ sets the next $\rho$ (Barzilai and Borwein). Newton steps along $g$ then bring the
    loss back to within `tol`. The model is moved there, or is bit for bit what it was. The maximum found is local.

    Args:
        model: the model; frozen parameters are never moved.
        loss_fn: net -> scalar loss, deterministic, twice differentiable.
        steps: at most so many. A maximum need not exist: then the steps or the radius decide how far to go.
        sublevel: allow smaller losses too, $c \le 0$.
        radius: bound on the Euclidean distance that the parameters move.
        tol: relative tolerance for the loss; 8 machine epsilons more are always allowed.
        kkt_tol: stop when the sine of the angle between $Hg$ and $g$ is no larger. It is
            $\lVert H g - \lambda g \rVert / \lVert H g \rVert$, zero where $g$ is an eigenvector of the Hessian.

    Raises:
        EmptyModelError: when nothing is trainable.
        LossError: when the loss is no scalar, ignores the net, or changes from call to call.
        ParameterError: when a parameter is complex or not finite.
        TeleportError: when steps, radius, tol or kkt_tol is not positive.

    >>> model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 1.0]]))
    >>> ellipse = lambda net: (net(torch.diag(torch.tensor([1.0, 3.0]).double())) ** 2).sum()  # w1^2 + 9 w2^2
    >>> report = level_set_teleport(model, ellipse)
    >>> report.stopped, [round(abs(w), 4) for w in model.weight.flatten().tolist()]  # at the end of the short axis
    ('KKT residual reached', [0.0, 1.4142])
    """
    if not (radius is None or radius > 0):
        raise TeleportError("a positive radius", radius, "leave it out to move as far as the steps go")

    def conditions(walk: Walk, p: Point, c: float, near: float) -> tuple[Tensor, Tensor, float, float]:
        """Hg / |g|^2, its tangential part, the multiplier and the KKT residual."""
        h, g = walk.product(p) / p.norm**2, p.g.detach()
        multiplier = dots((g, h))[0] / p.norm**2
        inside = sublevel and (multiplier < 0 or c < -near)
        tangent = h if inside else h - multiplier * g
        tt, hh = dots((tangent, tangent), (h, h))
        return h, tangent, multiplier, math.sqrt(tt / hh) if hh else 0.0

    def search(walk: Walk) -> tuple[Point, float, dict]:
        p = start = walk.at(walk.x)
        near = 0.5 * (tol + walk.noise) * abs(start.loss)
        c, gamma, rho, share, taken, stopped = 0.0, 0.0, 0.0, 1.0, 0, SPENT

        def excess(c: float) -> float:
            return max(c, 0.0) if sublevel else abs(c)

        def merit(p: Point) -> float:
            return math.log(p.norm) - gamma * excess(p.loss - start.loss) if 0 < p.norm < math.inf else -math.inf

        if not p.norm:
            return p, 0.0, {"stopped": "the gradient is zero", "dimension": walk.x.numel() - 1}
        h, tangent, multiplier, residual = conditions(walk, p, c, near)
        for taken in range(steps + 1):
            if residual <= kkt_tol and excess(c) <= near:
                stopped = DONE
            if taken == steps or stopped == DONE:
                break
            g, n2 = p.g.detach(), p.norm**2
            rho = rho or 1 / dots((h, h))[0]
            v = c / n2 + rho * multiplier
            d = rho * h - (max(v, 0.0) if sublevel else v) * g
            gamma, share = max(gamma, 2 * abs(multiplier)), 1.0
            e = p.x.detach() - start.x.detach()
            slope, dd, ed, ee = dots((h, d), (d, d), (e, d), (e, e))
            slope += gamma * excess(c)
            if radius is not None:  # the largest share that stays inside, with one per cent kept for the way back
                room = max((0.99 * radius) ** 2 - ee, 0.0)
                share = min(1.0, (math.sqrt(ed**2 + dd * room) - ed) / (dd or 1.0))
                if share * math.sqrt(dd) < 1e-3 * radius:
                    stopped = "radius reached"
                    break
            for _ in range(HALVINGS):
                q = walk.at(p.x + share * d)
                if merit(q) >= merit(p) + 1e-4 * share * slope:
                    break
                share /= 2
            else:
                stopped = STUCK
                break
            old, step, p, c = tangent, q.x.detach() - p.x.detach(), q, q.loss - start.loss
            h, tangent, multiplier, residual = conditions(walk, p, c, near)
            ss, sy = dots((step, step), (step, tangent - old))
            rho *= share
            rho = min(max(ss / abs(sy), 0.1 * rho), 10 * rho) if sy else 2 * rho
        moved = p
        for _ in range(HALVINGS):  # Newton's method for c = 0, along g
            if excess(c) <= near or not 0 < p.norm < math.inf:
                break
            p = walk.at(p.x - c / p.norm**2 * p.g.detach())
            c = p.loss - start.loss
        if p is not moved and 0 < p.norm < math.inf:
            residual = conditions(walk, p, c, near)[-1]
        if radius is not None and dots((p.x - start.x, p.x - start.x))[0] > radius**2:
            p, stopped = start, "the way back to the level set leaves the radius"
        return p, residual, {"steps": taken, "stopped": stopped, "dimension": walk.x.numel() - 1}

    return carry_out(Walk(model, loss_fn, steps, tol, kkt_tol), search, sublevel)


def carry_out(
    walk: Walk, search: Callable[[Walk], tuple[Point, float, dict]], sublevel: bool = False
) -> LevelSetReport:
    """Search, verify on a fresh evaluation, commit or not, report.

    Raises:
        LossError: when the loss changes from call to call.
    """
    p: Point | None = None
    facts: dict[str, Any] = {"stopped": "a number was not finite"}
    residual = after = new = math.nan
    reason = "the loss or its gradient is not finite"

    def verify() -> None:
        """Compare the model, which has moved, with what it was."""
        nonlocal after, new
        with walk.loss.observed() as outputs:
            after, new = walk.now()
        if p is not None and abs(after - p.loss) > allowed and abs((again := walk.now()[0]) - after) > allowed:
            got = f"{after:.6g} and {again:.6g} at the same parameters"
            remedy = "fix the batch, and seed what draws from a generator of its own at each call"
            raise LossError("a deterministic loss", got, remedy)
        if not math.isfinite(after) or not math.isfinite(new):
            raise _RefusedError(reason)
        if (after - before if sublevel else abs(after - before)) > allowed:
            raise _RefusedError(
                f"the loss moved from {before:.6g} to {after:.6g}, beyond the relative tolerance {walk.tol:g}"
            )
        if walk.outputs and (gap := float(largest_change(walk.outputs, outputs))) > LARGEST * walk.tol:
            raise _RefusedError(f"the outputs moved by {gap:.1e} of the largest, beyond {LARGEST} times {walk.tol:g}")
        if p is walk.start or not new > (1 + walk.noise) * old:
            raise _RefusedError(f"nothing steeper was found: {facts['stopped']}")

    with eager_mode(walk.x.device.type), walk.loss, unfused_attention():
        with suppress(_NotFiniteError):
            p, residual, facts = search(walk)
        before, old = (walk.start.loss, walk.start.norm) if walk.start else (math.nan, math.nan)
        allowed = (walk.tol + walk.noise) * abs(before)
        if p is not None:
            walk.loss.rest()
            try:
                commit(walk.model, walk.split(p.x.detach()), verify)
                reason = ""
            except _RefusedError as refusal:
                reason = str(refusal)
    error = abs(after - before) / abs(before) if after != before else 0.0
    return LevelSetReport(
        "gradient_norm",
        *(before, after, old, new, error, time.perf_counter() - walk.began, not reason, reason),
        gradients=walk.gradients,
        products=walk.products,
        kkt_residual=residual,
        **facts,
    )
