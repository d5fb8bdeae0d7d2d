r"""Symmetries of the loss on one mini-batch: mixing of neurons through a nonlinearity.

With inputs X [k, n] of a layer, pre-activations $H = X V^\top + b$ [k, h] and $A = \sigma(H)$, GL(h) can mix neurons
through any activation when one of the two weights makes up for it on the k samples at hand:

- `OutgoingMixing` (arXiv:2305.13404): $V \mapsto gV$; U' solves $B\,U'^\top = A\,U^\top$, where $B = \sigma(H g^\top)$.
- `IncomingMixing` (arXiv:2205.10637): $U \mapsto U g^{-1}$; V' solves $X V'^\top = \sigma^{-1}(A g^\top)$.

Both keep the outputs on the batch when the matrix to be inverted ($B$, $X$) has full row rank k; otherwise they are
least-squares approximations. The published formulas solve for the new weights outright, and so replace them by a
projection even at g = I; the minimum-change solution, the default here, adds the smallest correction and is the
identity at g = I. Of the four, the minimum-change `IncomingMixing` alone obeys both laws of a group action, where it is
exact: Proposition 3.6 of the chapter *Mini-batch symmetries*.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jvp

from teleport_lite.distributed import Ranks
from teleport_lite.errors import ActivationError, BatchError, NoSymmetryError, TeleportError, UnknownNameError
from teleport_lite.functional import Evaluation, Params
from teleport_lite.groups import GeneralLinear
from teleport_lite.host import copy_of, on_host
from teleport_lite.layers import Hidden, trace
from teleport_lite.outputs import distance, tensors_of
from teleport_lite.runtime import as_inputs
from teleport_lite.symmetries.base import Symmetry
from teleport_lite.symmetries.product import Product

INVERSES: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    nn.Identity: lambda module, y: y,
    nn.LeakyReLU: lambda module, y: torch.where(y > 0, y, y / module.negative_slope),
    nn.Tanh: lambda module, y: y.atanh(),
    nn.Sigmoid: lambda module, y: y.logit(),
    nn.Softplus: lambda module, y: torch.where(
        y * module.beta > module.threshold, y, (y * module.beta).expm1().log() / module.beta
    ),
}


class _Stop(Exception):
    """Ends a forward pass once the wanted input is known."""


Derivatives = tuple[Tensor, Tensor]  # the first and the second


class Moving(NamedTuple):
    """A layer at t = 0, whose inputs and weights move because the layer before it is mixed: with their derivatives."""

    x: Tensor  # X
    v: Tensor  # V
    dx: Tensor | None  # None where X stands still
    dv: Tensor
    ddv: Tensor
    drift: Tensor  # the derivative of H


class MiniBatchMixing(Symmetry):
    """Mixing of the neurons of one hidden layer that keeps the outputs on one batch.

    Args:
        model: the model; only read.
        inputs: the batch, as the positional arguments of the model.
        hidden: the hidden layer, from `teleport_lite.layers`.
        minimum_change: whether to add the smallest correction (the identity stays the identity), or to solve for the
            weights outright, as published.
    """

    exact = False
    linear = False

    def __init__(self, model: nn.Module, inputs: object, hidden: Hidden, *, minimum_change: bool = True) -> None:
        self.model, self.inputs, self.minimum_change = model, as_inputs(inputs), minimum_change
        self.activation = _single(hidden)
        self.layer = hidden.incoming
        self.group = GeneralLinear(hidden.width)
        first, second = model.get_submodule(hidden.incoming), model.get_submodule(hidden.outgoing)
        by_id = {id(p): name for name, p in model.named_parameters()}
        self.incoming, self.outgoing = by_id[id(first.weight)], by_id[id(second.weight)]
        self.bias = None if first.bias is None else by_id[id(first.bias)]
        self.names = tuple(name for name in (self.incoming, self.bias, self.outgoing) if name is not None)

    def features(self, params: Params) -> Tensor:
        """The inputs X of the layer on the batch, [k, in_features], with a column of ones when it has a bias."""
        seen: list[Tensor] = []

        def stop(module, args):
            seen.append(args[0])
            raise _Stop

        handle = self.model.get_submodule(self.layer).register_forward_pre_hook(stop)
        try:
            Evaluation(self.model, lambda net: net(*self.inputs))(params)
        except _Stop:
            pass
        finally:
            handle.remove()
        return self.widened(seen[0].flatten(0, -2))

    def widened(self, x: Tensor) -> Tensor:
        """`x`, with a column of ones when the layer has a bias."""
        return x if self.bias is None else torch.cat([x, x.new_ones(len(x), 1)], 1)

    def weights(self, params: Params) -> tuple[Tensor, Tensor]:
        """V (with the bias as its last column), and U."""
        v = params[self.incoming]
        return v if self.bias is None else torch.cat([v, params[self.bias][:, None]], 1), params[self.outgoing]

    def move(self, params, xi):
        return self.parts(*self.solve(self.features(params), *self.weights(params), xi))

    def parts(self, v: Tensor, u: Tensor) -> Params:
        """By name, what `weights` put together."""
        parts = {self.incoming: v, self.outgoing: u}
        return parts if self.bias is None else parts | {self.incoming: v[..., :-1], self.bias: v[..., -1]}

    @abstractmethod
    def solve(self, x: Tensor, v: Tensor, u: Tensor, xi: Tensor) -> tuple[Tensor, Tensor]:
        """The new V and U."""

    def jet(self, params, xi):
        return jets([self], params, (xi,)) if self.minimum_change else super().jet(params, xi)

    @abstractmethod
    def bend(self, layer: Moving, u: Tensor, xi: Tensor) -> tuple[Derivatives, Derivatives, Tensor, Tensor]:
        """Derivatives of V and of U along the curve of the minimum-change solution, the activations, and their slope.

        In closed form, with M = `xi` [..., h, h], on a layer that moves by itself.
        """

    @abstractmethod
    def rank_matrix(self, x: Tensor, v: Tensor) -> Tensor:
        """The matrix [k, ...] that must have rank k for the action to be exact."""

    def require_exact(self, params: Params) -> None:
        """Check that the batch outputs are kept exactly at `params`, near the identity.

        Raises:
            BatchError: when the rank condition fails.
        """
        v, _ = self.weights(params)
        matrix = self.rank_matrix(self.features(params), v).detach()
        rank = int(torch.linalg.matrix_rank(matrix))
        if rank < len(matrix):
            raise BatchError(
                f"a matrix of rank {len(matrix)} (the batch size) at layer {self.layer}",
                f"rank {rank} of a {matrix.shape[0]} x {matrix.shape[1]} matrix",
                f"use a batch of at most {rank} samples, or accept an approximation by a larger tol",
            )

    def transport(self, grads, xi, params=None):
        raise TeleportError(
            "a symmetry that is a group action",
            type(self).__name__,
            "compute the gradient at the moved parameters instead",
        )

    def _slopes(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The activation at h, and its first and second derivative."""
        one = torch.ones_like(h)
        value, change = jvp(lambda z: jvp(self.activation, (z.clone(),), (one,)), (h,), (one,))[:2]
        return *value, change[1]

    def _towards(self, matrix: Tensor, old: Tensor, now: Tensor, target: Tensor) -> Tensor:
        """The solution W of matrix @ W.T = target: nearest to `old`, which gives `now`, or the one of least norm."""
        inverse = torch.linalg.pinv(matrix)
        return old + (inverse @ (target - now)).mT if self.minimum_change else (inverse @ target).mT

    def __str__(self) -> str:
        inputs = [name for name in self.names if name != self.outgoing]
        return f"{', '.join(inputs)} -> {self.outgoing}"


class OutgoingMixing(MiniBatchMixing):
    r"""Mix the incoming weights, solve for the outgoing ones (arXiv:2305.13404).

    With samples as columns, $V \mapsto gV$ and $U \mapsto U + (U\sigma(H) - U\sigma(gH))\,\sigma(gH)^+$; as published,
    $U \mapsto U\sigma(H)\,\sigma(gH)^+$. Propositions 3.2 and 3.5 of the chapter *Mini-batch symmetries*.

    Along $g = e^{tM}$ the error $E = U\sigma(H) - U\sigma(gH)$ has at t = 0 the derivatives $-U(\sigma' \odot MH)$ and
    $-U(\sigma' \odot M^2H + \sigma'' \odot (MH)^2)$; `_corrections` gets those of U from them.
    """

    def solve(self, x, v, u, xi):
        v_new = self.group.exp(xi) @ v
        before, after = self.activation(x @ v.mT), self.activation(x @ v_new.mT)
        return v_new, self._towards(after, u, after @ u.mT, before @ u.mT)

    def bend(self, layer, u, xi):
        h, m = layer.x @ layer.v.mT, xi.mT
        a, s, b = self._slopes(h)
        once = h @ m  # H moves by D, the drift, and B by D + HM^T; of A - B remains what the mixing adds
        both, twice = once + layer.drift, once + 2 * layer.drift
        gaps = -s * once, -(s * (twice @ m) + b * once * twice)
        du = _corrections(a, s * both, *(gap @ u.mT for gap in gaps))
        mv = xi @ layer.v
        return (mv + layer.dv, xi @ (mv + 2 * layer.dv) + layer.ddv), du, a, s * both

    def rank_matrix(self, x, v):
        return self.activation(x @ v.mT)


class IncomingMixing(MiniBatchMixing):
    r"""Mix the outgoing weights, solve for the incoming ones (arXiv:2205.10637).

    With samples as columns, $U \mapsto U g^{-1}$ and $V \mapsto V + (\sigma^{-1}(g\sigma(H)) - H)\,X^+$; as published,
    $V \mapsto \sigma^{-1}(g\sigma(H))\,X^+$. Propositions 3.1 and 3.5 of the chapter *Mini-batch symmetries*; velocity
    and acceleration in Proposition 11.5 of *Sharpness and curvature*.

    The activation must be invertible, and $g\sigma(H)$ must stay in its range: elsewhere the new weights are NaN, which
    a teleport refuses.
    """

    def __init__(self, model: nn.Module, inputs: object, hidden: Hidden, *, minimum_change: bool = True) -> None:
        super().__init__(model, inputs, hidden, minimum_change=minimum_change)
        if type(self.activation) not in INVERSES or getattr(self.activation, "negative_slope", 1) <= 0:
            known = ", ".join(kind.__name__ for kind in INVERSES)
            raise ActivationError(self.activation, f"invertible ({known})", "use compensate='outgoing'")

    def solve(self, x, v, u, xi):
        g, g_inverse = self.group.exp(xi), self.group.exp(-xi)
        hidden = self.activation(x @ v.mT)
        now, target = (INVERSES[type(self.activation)](self.activation, a) for a in (hidden, hidden @ g.mT))
        return self._towards(x, v, now, target), u @ g_inverse

    def bend(self, layer, u, xi):
        h, m = layer.x @ layer.v.mT, xi.mT
        a, s, b = self._slopes(h)
        once = a @ m / s  # H moves by D, and what the new V has to give by D + AM^T/s
        twice = once + 2 * layer.drift
        v1, v2 = _corrections(layer.x, layer.dx, once, ((s * twice) @ m - b * once * twice) / s)
        um = u @ xi
        return (layer.dv + v1, layer.ddv + v2), (-um, um @ xi), a, s * (layer.drift + layer.x @ v1.mT)

    def rank_matrix(self, x, v):
        return x


COMPENSATIONS: dict[str, type[MiniBatchMixing]] = {"outgoing": OutgoingMixing, "incoming": IncomingMixing}


def minibatch_symmetries(
    model: nn.Module, inputs: object, *, compensate: str = "outgoing", minimum_change: bool = True
) -> Product:
    """The mini-batch mixings of the hidden layers of `model`, one factor a layer.

    Layers whose weights have an effect on the outputs by another way too, as beside a skip connection, are left out.

    Args:
        model: with hidden layers between two `nn.Linear`, called one after the other.
        inputs: the batch; the symmetries hold on it alone.
        compensate: the weight that is solved for: "outgoing" (arXiv:2305.13404) or "incoming" (arXiv:2205.10637).
        minimum_change: the smallest correction (default), or the published formula.

    Raises:
        NoSymmetryError: when the model has no such layer.
        ActivationError: when the activation does not fit.
        UnknownNameError: when `compensate` is neither.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> minibatch_symmetries(net, torch.ones(5, 4))
    Product of 1 symmetry, dim 64
      parameters                      group  dim  holds on
      0.weight, 0.bias -> 2.weight    GL(8)  64   one batch
    """
    if compensate not in COMPENSATIONS:
        raise UnknownNameError("compensation", compensate, COMPENSATIONS)
    model = Ranks(model).model
    probe, batch, kind = copy_of(model), tuple(map(on_host, as_inputs(inputs))), COMPENSATIONS[compensate]
    traced = trace(probe, batch)
    factors, reasons = [], list(traced.reasons)
    for hidden in traced.hidden:
        factor = kind(model, inputs, hidden, minimum_change=minimum_change)
        if reason := _other_effect(probe, batch, factor, hidden) or _random_between(model, probe, hidden):
            reasons.append(f"{hidden}: {reason}")
        else:
            factors.append(factor)
    if not factors:
        raise NoSymmetryError(reasons)
    return Product(factors, reasons)


def _other_effect(probe: nn.Module, inputs: tuple, factor: MiniBatchMixing, hidden: Hidden) -> str:
    """What the weights of a hidden layer do besides giving the output of its outgoing map; or nothing.

    With other weights in their places, and that output what it was, all outputs of the model have to be what they were,
    and so has the input of the layer.
    """
    given: list[Tensor] = []  # by the outgoing map, at first
    inside: list[Tensor] = []  # what went in in this run
    outside: list[Tensor] = []  # what came out
    calls = 0

    def hold(module, args, output):
        nonlocal calls
        calls += 1
        given.append(output)
        return given[0] if calls == 1 else None

    def run(net):
        outside[:] = tensors_of(net(*inputs))
        return torch.zeros(())

    def with_weights(params: Params) -> list[Tensor]:
        nonlocal calls
        calls = 0
        inside.clear()
        evaluation(params)
        return inside + outside

    weights = {name: p.detach() for name, p in probe.named_parameters() if name in factor.names}
    draw = torch.Generator().manual_seed(0)
    others = {n: w + torch.randn(w.shape, generator=draw, dtype=w.dtype).to(w) for n, w in weights.items()}
    evaluation = Evaluation(probe, run)
    first, second = probe.get_submodule(hidden.incoming), probe.get_submodule(hidden.outgoing)
    watch = [
        first.register_forward_pre_hook(lambda module, args: inside.append(args[0])),
        second.register_forward_hook(hold),
    ]
    try:
        for mode in ("evaluation", "training"):
            probe.train(mode == "training")
            given.clear()
            try:
                with torch.no_grad():
                    before, after = with_weights(weights), with_weights(others)
            except Exception:  # a batch norm in training needs two samples
                if mode == "evaluation":
                    raise
                continue
            if len(inside) != 1:
                return f"{hidden.incoming} is called {len(inside)} times"
            if not outside:
                return "the outputs of the model are no tensors, so that nothing can be verified"
            if distance(after, before) > 1e-8:
                return f"its weights change the outputs in {mode} mode by another way than through {hidden.outgoing}"
    finally:
        for handle in watch:
            handle.remove()
        probe.eval()
    return ""


def _random_between(model: nn.Module, probe: nn.Module, hidden: Hidden) -> str:
    """Whether numbers are drawn between the two maps, in the mode in which the model is."""
    between = set(hidden.between)
    pairs = zip(model.modules(), probe.modules(), strict=True)
    drops = [m for m, copied in pairs if copied in between and isinstance(m, nn.Dropout) and m.training and m.p > 0]
    return "the dropout in it draws anew in training mode; call model.eval()" if drops else ""


def is_chain(factors: Sequence[Symmetry]) -> bool:
    """Whether these are minimum-change mixings, each of the layer that follows the one before."""
    mixings = [f for f in factors if isinstance(f, MiniBatchMixing) and f.minimum_change]
    return len(mixings) == len(factors) and all(a.outgoing == b.incoming for a, b in pairwise(mixings))


def jets(factors: Sequence[MiniBatchMixing], params: Params, curves: tuple[Tensor, ...]) -> tuple[Params, Params]:
    r"""First and second derivative at t = 0 of $e^{t\xi_n} \cdots e^{t\xi_1} \cdot w$, in closed form.

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
        (v1, v2), (u1, u2), a, da = factor.bend(Moving(x, v, dx, dv, ddv, drift), u, xi)
        first |= factor.parts(v1, u1)
        second |= factor.parts(v2, u2)
        x, dx, dv, ddv, drift = a, da, u1, u2, da @ u.mT + a @ u1.mT
    return first, second


def _corrections(matrix: Tensor, slope: Tensor | None, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    r"""First and second derivative of W(t) at t = 0, where $W^\top = B^+ E$ with B(t) and E(t), and E(0) = 0.

    $W'^\top = B^+ E'$ and $W''^\top = B^+ E'' + 2 (B^+)' E'$, with the derivative of a pseudo-inverse of constant rank
    (G. H. Golub, V. Pereyra, SIAM Journal on Numerical Analysis 10, 1973) applied to the few columns of E'.

    Args:
        matrix: B.
        slope: B', or None where B stands still.
        first: E'.
        second: E''.
    """
    inverse, back = torch.linalg.pinv(matrix), 0.0
    w = inverse @ first
    if slope is not None:
        back = slope.mT @ (inverse.mT @ w)
        second = second + 2 * (inverse.mT @ (slope.mT @ (first - matrix @ w)) - slope @ w - matrix @ back)
    return w.mT, (inverse @ second + 2 * back).mT


def _single(hidden: Hidden) -> nn.Module:
    """The one activation of a hidden layer.

    Raises:
        ActivationError: when several modules stand there, or the width changes.
    """
    modules = [m for m in hidden.between if not isinstance(m, (nn.Identity, nn.Dropout))]
    if len(modules) > 1 or any(list(m.parameters()) for m in modules):
        raise ActivationError(hidden.between, "a single module without parameters", "build the symmetry by hand")
    activation = modules[0] if modules else nn.Identity()
    with torch.no_grad():
        if activation(hidden.sample.clone()).shape != hidden.sample.shape:
            raise ActivationError(activation, "shape-preserving", "leave this layer out")
    return activation
