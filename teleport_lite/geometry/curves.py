r"""The curvature of orbits of scalings, and of mini-batch mixings, at a small part of what `Symmetry.jet` costs.

A chain of minimum-change mixings, each of the layer that follows the one before, acts from below: a layer whose inputs
and weights move already is mixed by $e^{tM}$. Velocity and acceleration in Proposition 11.5 of the chapter *Sharpness
and curvature*.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp

from teleport_lite.functional import Params
from teleport_lite.groups import PositiveScaling
from teleport_lite.runtime import widest_dtype
from teleport_lite.symmetries.axes import NeuronSymmetry
from teleport_lite.symmetries.base import Symmetry
from teleport_lite.symmetries.minibatch import IncomingMixing, MiniBatchMixing, OutgoingMixing

Derivatives = tuple[Tensor, Tensor]  # the first and the second


class Moving(NamedTuple):
    """A layer at t = 0, whose inputs and weights move because the layer before it is mixed: with their derivatives."""

    x: Tensor  # X
    v: Tensor  # V
    dx: Tensor | None  # None where X stands still
    dv: Tensor
    ddv: Tensor
    drift: Tensor  # the derivative of H


def is_chain(factors: Sequence[Symmetry]) -> bool:
    """Whether these are minimum-change mixings, each of the layer that follows the one before."""
    mixings = [f for f in factors if isinstance(f, MiniBatchMixing) and f.minimum_change]
    return len(mixings) == len(factors) and all(a.outgoing == b.incoming for a, b in pairwise(mixings))


def product_jets(factors: Sequence[Any], params: Params, curves: tuple[Tensor, ...]) -> tuple[Params, Params]:
    r"""First and second derivative at t = 0 of $e^{t\xi_n} \cdots e^{t\xi_1} \cdot w$.

    Args:
        factors: as `is_chain` wants them.
        params: w.
        curves: for each factor, coordinates [..., h, h]; the result has the same leading dimensions.
    """
    first: Params = {}
    second: Params = {}
    x, dx = factors[0].features(params), None
    dv = ddv = drift = x.new_zeros(())
    for factor, xi in zip(factors, curves, strict=True):
        v, u = factor.weights(params)
        if dx is not None and factor.bias is not None:
            x, (dx, dv, ddv) = F.pad(x, (0, 1), value=1.0), (F.pad(d, (0, 1)) for d in (dx, dv, ddv))
        bend = next(bend for kind, bend in BENDS.items() if isinstance(factor, kind))
        (v1, v2), (u1, u2), a, da = bend(factor.activation, Moving(x, v, dx, dv, ddv, drift), u, xi)
        first |= factor.parts(v1, u1)
        second |= factor.parts(v2, u2)
        x, dx, dv, ddv, drift = a, da, u1, u2, da @ u.mT + a @ u1.mT
    return first, second


def _bend_outgoing(
    activation: Callable, layer: Moving, u: Tensor, xi: Tensor
) -> tuple[Derivatives, Derivatives, Tensor, Tensor]:
    r"""Derivatives of V and of U, the activations, and their slope.

    The error $E = U\sigma(H) - U\sigma(gH)$ has at t = 0 the derivatives $-U(\sigma' \odot MH)$ and
    $-U(\sigma' \odot M^2H + \sigma'' \odot (MH)^2)$; `_correction_derivatives` gets those of U from them.
    """
    h, m = layer.x @ layer.v.mT, xi.mT
    a, s, b = _activation_derivatives(activation, h)
    once = h @ m  # H moves by D, the drift, and B by D + HM^T; of A - B remains what the mixing adds
    both, twice = once + layer.drift, once + 2 * layer.drift
    gaps = -s * once, -(s * (twice @ m) + b * once * twice)
    du = _correction_derivatives(a, s * both, *(gap @ u.mT for gap in gaps))
    mv = xi @ layer.v
    return (mv + layer.dv, xi @ (mv + 2 * layer.dv) + layer.ddv), du, a, s * both


def _bend_incoming(
    activation: Callable, layer: Moving, u: Tensor, xi: Tensor
) -> tuple[Derivatives, Derivatives, Tensor, Tensor]:
    h, m = layer.x @ layer.v.mT, xi.mT
    a, s, b = _activation_derivatives(activation, h)
    once = a @ m / s  # H moves by D, and what the new V has to give by D + AM^T/s
    twice = once + 2 * layer.drift
    v1, v2 = _correction_derivatives(layer.x, layer.dx, once, ((s * twice) @ m - b * once * twice) / s)
    um = u @ xi
    return (layer.dv + v1, layer.ddv + v2), (-um, um @ xi), a, s * (layer.drift + layer.x @ v1.mT)


BENDS: dict[type[MiniBatchMixing], Callable] = {OutgoingMixing: _bend_outgoing, IncomingMixing: _bend_incoming}


def _activation_derivatives(activation: Callable, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The activation at h, and its first and second derivative."""
    one = torch.ones_like(h)
    value, change = jvp(lambda z: jvp(activation, (z.clone(),), (one,)), (h,), (one,))[:2]
    return *value, change[1]


def _correction_derivatives(matrix: Tensor, slope: Tensor | None, first: Tensor, second: Tensor) -> Derivatives:
    r"""Derivatives of W(t) at t = 0, where $W^\top = B^+ E$ with B (`matrix`) of slope B' and E(0) = 0, E', E''.

    $W'^\top = B^+ E'$ and $W''^\top = B^+ E'' + 2 (B^+)' E'$, with the derivative of a pseudo-inverse of constant rank
    (G. H. Golub, V. Pereyra, SIAM Journal on Numerical Analysis 10, 1973) applied to the few columns of E'.
    """
    inverse, back = torch.linalg.pinv(matrix), 0.0
    w = inverse @ first
    if slope is not None:
        back = slope.mT @ (inverse.mT @ w)
        second = second + 2 * (inverse.mT @ (slope.mT @ (first - matrix @ w)) - slope @ w - matrix @ back)
    return w.mT, (inverse @ second + 2 * back).mT


def is_matrix_scaling(factor: Symmetry) -> bool:
    """Whether it multiplies rows and columns, the first two dimensions of tensors, by positive numbers."""
    legs = factor.legs if isinstance(factor, NeuronSymmetry) and isinstance(factor.group, PositiveScaling) else ()
    return len(legs) > 0 and all(leg.dim < 2 and leg.groups == 1 for leg in legs)


def scaling_kappas(params: Params, scalings: Sequence[Any], curves: tuple[Tensor, ...]) -> Tensor:
    r"""`kappa` of curves of scalings, [curves], by a few matrix products; differentiable in `params`.

    Such a curve is $w_i(t) = e^{\theta_i t} w_i$, so that $|\gamma'|^2$, $\gamma' \cdot \gamma''$ and
    $|\gamma''|^2$ are $\sum_i \theta_i^m w_i^2$ for m = 2, 3, 4. For a matrix $\theta_{ij} = a_i + b_j$, and all
    follows from $\sum_{ij} a_i^p\, w_{ij}^2\, b_j^q$. The sums are of float64, for $\kappa$ is a difference of them.

    Args:
        params: w.
        scalings: of rows and columns.
        curves: from `sample_curves`.

    >>> from teleport_lite.symmetries import scaling
    >>> w = {"v": torch.tensor([[2.0]]), "u": torch.tensor([[1.0]])}
    >>> scaling_kappas(w, [scaling(1, "v", "u")], (torch.ones(1, 1),))  # of (2 e^t, e^-t): 4 / 5^(3/2)
    tensor([0.3578])
    """
    tables = []
    for name in dict.fromkeys(name for f in scalings for name in f.names):
        moves = zip(scalings, curves, strict=True)
        legs = [(xi, leg) for f, xi in moves for leg in f.legs if leg.name == name]
        w = params[name].to(widest_dtype(params[name].device)).square()
        w = w.flatten(2).sum(2) if w.ndim > 2 else w.reshape(len(w), -1)
        for dim in {0, 1} - {leg.dim for *_, leg in legs}:
            w = w.sum(dim, keepdim=True)
        rates = [w.new_zeros(len(curves[0]), n) for n in w.shape]
        for xi, leg in legs:
            rate = (leg.exponent * xi).repeat_interleave(leg.each, 1)
            rates[leg.dim].narrow(1, leg.start, rate.shape[1]).add_(rate.to(w))
        a, b = (torch.linalg.vander(rate, N=5) for rate in rates)
        tables.append(torch.einsum("kip,ij,kjq->pqk", a, w, b))
    table = torch.stack([t.to(tables[0]) for t in tables]).sum(0)
    speed, along, bend = (  # by the binomial theorem
        torch.stack([math.comb(m, p) * table[p, m - p] for p in range(m + 1)]).sum(0) for m in (2, 3, 4)
    )
    across = (bend - along.square() / speed).clamp(min=torch.finfo(bend.dtype).eps * bend)
    return (across.sqrt() / speed).to(params[scalings[0].names[0]])
