"""A walk without a group: a loss as a function of one vector, and a search that is verified, and committed or not."""

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
from teleport_lite.exactness import LARGEST, RefusedError, largest_change
from teleport_lite.functional import Params, as_vector, check_complete, gradients, loss_of, trainable, value_and_grad
from teleport_lite.report import Report
from teleport_lite.runtime import TOLERANCES, LossFn, eager_mode, unfused_attention, unwrap_compiled, widest_dtype
from teleport_lite.transaction import commit

HALVINGS = 30  # of a step that does not improve
DONE, SPENT, STUCK = "KKT residual reached", "all steps are taken", "no step along the direction improves"


@dataclass(frozen=True, kw_only=True)
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

    dimension: int
    steps: int
    gradients: int
    products: int
    kkt_residual: float
    stopped: str

    def __str__(self) -> str:
        cost = f"{self.steps} steps, {self.gradients} gradients, {self.products} Hessian-vector products"
        return f"{super().__str__()}\n  {cost}\n  KKT residual {self.kkt_residual:.1e}; stopped: {self.stopped}"


class _NotFiniteError(Exception):
    """The loss or its gradient is NaN, or infinite at the start."""


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
        finite = as_vector([p.isfinite().all() for p in self.params.values()]).tolist()
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
        value, norm = as_vector([loss.detach(), to_wide(grads["x"].detach()).norm()]).tolist()
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
        return float(value), float(to_wide(g).norm())


def dot_products(*pairs: tuple[Tensor, Tensor]) -> list[float]:
    """Inner products of vectors, accumulated in float64 where there is float64."""
    return torch.stack([torch.dot(to_wide(a.detach()), to_wide(b.detach())) for a, b in pairs]).tolist()


def to_wide(x: Tensor) -> Tensor:
    """`x` in the `widest_dtype` type of its device."""
    return x.to(widest_dtype(x.device))


def run_walk(walk: Walk, search: Callable[[Walk], tuple[Point, float, dict]], sublevel: bool = False) -> LevelSetReport:
    """Search, verify on a fresh evaluation, commit or not, report.

    Raises:
        LossError: when the loss changes from call to call.
    """
    p: Point | None = None
    facts: dict[str, Any] = {"steps": 0, "stopped": "a number was not finite", "dimension": 0}
    residual = after = new = math.nan
    reason = "the loss or its gradient is not finite"

    def verify_model() -> None:
        """Compare the model, which has moved, with what it was."""
        nonlocal after, new
        with walk.loss.observed() as outputs:
            after, new = walk.now()
        if p is not None and abs(after - p.loss) > allowed and abs((again := walk.now()[0]) - after) > allowed:
            got = f"{after:.6g} and {again:.6g} at the same parameters"
            remedy = "fix the batch, and seed what draws from a generator of its own at each call"
            raise LossError("a deterministic loss", got, remedy)
        if not math.isfinite(after) or not math.isfinite(new):
            raise RefusedError(reason)
        if (after - before if sublevel else abs(after - before)) > allowed:
            raise RefusedError(
                f"the loss moved from {before:.6g} to {after:.6g}, beyond the relative tolerance {walk.tol:g}"
            )
        if walk.outputs and (gap := float(largest_change(walk.outputs, outputs))) > LARGEST * walk.tol:
            raise RefusedError(f"the outputs moved by {gap:.1e} of the largest, beyond {LARGEST} times {walk.tol:g}")
        if p is walk.start or not new > (1 + walk.noise) * old:
            raise RefusedError(f"nothing steeper was found: {facts['stopped']}")

    with eager_mode(walk.x.device.type), walk.loss, unfused_attention():
        with suppress(_NotFiniteError):
            p, residual, facts = search(walk)
        before, old = (walk.start.loss, walk.start.norm) if walk.start else (math.nan, math.nan)
        allowed = (walk.tol + walk.noise) * abs(before)
        if p is not None:
            walk.loss.rest()
            try:
                commit(walk.model, walk.split(p.x.detach()), verify_model)
                reason = ""
            except RefusedError as refusal:
                reason = refusal.reason
    error = abs(after - before) / abs(before) if after != before else 0.0
    return LevelSetReport(
        "gradient_norm",
        *(before, after, old, new, error, time.perf_counter() - walk.began, not reason, reason),
        gradients=walk.gradients,
        products=walk.products,
        kkt_residual=residual,
        **facts,
    )
