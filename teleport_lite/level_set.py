"""Teleports without a group, along the level set of the loss: steps of sequential quadratic programming.

Gradients and Hessian-vector products only, one product a step. Derived in the chapter *Level sets without a group*,
after [Mishkin, Bietti, Gower 2024](https://arxiv.org/abs/2403.03362).
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from teleport_lite.errors import TeleportError
from teleport_lite.runtime import LossFn
from teleport_lite.walk import DONE, HALVINGS, SPENT, STUCK, LevelSetReport, Point, Walk, dot_products, run_walk


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
        TeleportError: when steps, radius, tol or kkt_tol is not positive, or sublevel no bool.

    >>> import torch
    >>> model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 1.0]]))
    >>> ellipse = lambda net: (net(torch.diag(torch.tensor([1.0, 3.0]).double())) ** 2).sum()  # w1^2 + 9 w2^2
    >>> report = level_set_teleport(model, ellipse)
    >>> report.stopped, [round(abs(w), 4) for w in model.weight.flatten().tolist()]  # at the end of the short axis
    ('KKT residual reached', [0.0, 1.4142])
    """
    if not (radius is None or radius > 0):
        raise TeleportError("a positive radius", radius, "leave it out to move as far as the steps go")
    if not isinstance(sublevel, bool):
        raise TeleportError("True or False as sublevel", repr(sublevel), "pass sublevel=True to allow smaller losses")

    def optimality_conditions(walk: Walk, p: Point, c: float, near: float) -> tuple[Tensor, Tensor, float, float]:
        """Hg / |g|^2, its tangential part, the multiplier and the KKT residual."""
        h, g = walk.product(p) / p.norm**2, p.g.detach()
        multiplier = dot_products((g, h))[0] / p.norm**2
        inside = sublevel and (multiplier < 0 or c < -near)
        tangent = h if inside else h - multiplier * g
        tt, hh = dot_products((tangent, tangent), (h, h))
        return h, tangent, multiplier, math.sqrt(tt / hh) if hh else 0.0

    def search_level_set(walk: Walk) -> tuple[Point, float, dict]:
        p = start = walk.at(walk.x)
        near = 0.5 * (tol + walk.noise) * abs(start.loss)
        c, gamma, rho, share, taken, stopped = 0.0, 0.0, 0.0, 1.0, 0, SPENT

        def excess_of(c: float) -> float:
            return max(c, 0.0) if sublevel else abs(c)

        def merit_function(p: Point) -> float:
            return math.log(p.norm) - gamma * excess_of(p.loss - start.loss) if 0 < p.norm < math.inf else -math.inf

        if not p.norm:
            return p, 0.0, {"steps": 0, "stopped": "the gradient is zero", "dimension": walk.x.numel() - 1}
        h, tangent, multiplier, residual = optimality_conditions(walk, p, c, near)
        for taken in range(steps + 1):
            if residual <= kkt_tol and excess_of(c) <= near:
                stopped = DONE
            if taken == steps or stopped == DONE:
                break
            g, n2 = p.g.detach(), p.norm**2
            rho = rho or 1 / dot_products((h, h))[0]
            v = c / n2 + rho * multiplier
            d = rho * h - (max(v, 0.0) if sublevel else v) * g
            gamma, share = max(gamma, 2 * abs(multiplier)), 1.0
            e = p.x.detach() - start.x.detach()
            slope, dd, ed, ee = dot_products((h, d), (d, d), (e, d), (e, e))
            slope += gamma * excess_of(c)
            if radius is not None:  # the largest share that stays inside, with one per cent kept for the way back
                room = max((0.99 * radius) ** 2 - ee, 0.0)
                inside = (math.sqrt(ed**2 + dd * room) - ed) / (dd or 1.0)
                if dd and inside * math.sqrt(dd) < 1e-3 * radius:
                    stopped = "radius reached"
                    break
                share = min(1.0, inside) if dd else 1.0
            for _ in range(HALVINGS):
                q = walk.at(p.x + share * d)
                if merit_function(q) >= merit_function(p) + 1e-4 * share * slope:
                    break
                share /= 2
            else:
                stopped = STUCK
                break
            old, step, p, c = tangent, q.x.detach() - p.x.detach(), q, q.loss - start.loss
            h, tangent, multiplier, residual = optimality_conditions(walk, p, c, near)
            ss, sy = dot_products((step, step), (step, tangent - old))
            rho *= share
            rho = min(max(ss / abs(sy) if sy else math.inf, 0.1 * rho), 10 * rho)
        moved = p
        for _ in range(HALVINGS):  # Newton's method for c = 0, along g
            if excess_of(c) <= near or not 0 < p.norm < math.inf:
                break
            p = walk.at(p.x - c / p.norm**2 * p.g.detach())
            c = p.loss - start.loss
        if p is not moved and 0 < p.norm < math.inf:
            residual = optimality_conditions(walk, p, c, near)[-1]
        if radius is not None and dot_products((p.x - start.x, p.x - start.x))[0] > radius**2:
            p, stopped = start, "the way back to the level set leaves the radius"
        return p, residual, {"steps": taken, "stopped": stopped, "dimension": walk.x.numel() - 1}

    return run_walk(Walk(model, loss_fn, steps, tol, kkt_tol), search_level_set, sublevel)
