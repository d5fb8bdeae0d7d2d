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
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from teleport_lite.distributed import Ranks
from teleport_lite.errors import ActivationError, BatchError, NoSymmetryError, TeleportError, UnknownNameError
from teleport_lite.functional import Evaluation, Params
from teleport_lite.groups import GeneralLinear
from teleport_lite.host import copy_of, on_host
from teleport_lite.runtime import as_inputs
from teleport_lite.symmetries.base import Symmetry
from teleport_lite.symmetries.hidden import Hidden, hidden_layers, other_effect
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


class MiniBatchMixing(Symmetry):
    """Mixing of the neurons of one hidden layer that keeps the outputs on one batch.

    Args:
        model: the model; only read.
        inputs: the batch, as the positional arguments of the model.
        hidden: the hidden layer.
        minimum_change: whether to add the smallest correction (the identity stays the identity), or to solve for the
            weights outright, as published.
    """

    exact = False
    linear = False

    def __init__(self, model: nn.Module, inputs: object, hidden: Hidden, *, minimum_change: bool = True) -> None:
        self.model, self.inputs, self.minimum_change = model, as_inputs(inputs), minimum_change
        self.activation = _single_activation(hidden)
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

        def stop_at_input(module, args):
            seen.append(args[0])
            raise _Stop

        with suppress(_Stop), self.model.get_submodule(self.layer).register_forward_pre_hook(stop_at_input):
            Evaluation(self.model, lambda net: net(*self.inputs))(params)
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

    def _solve_towards(self, matrix: Tensor, old: Tensor, now: Tensor, target: Tensor) -> Tensor:
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
    """

    def solve(self, x, v, u, xi):
        v_new = self.group.exp(xi) @ v
        before, after = self.activation(x @ v.mT), self.activation(x @ v_new.mT)
        return v_new, self._solve_towards(after, u, after @ u.mT, before @ u.mT)

    def rank_matrix(self, x, v):
        return self.activation(x @ v.mT)


class IncomingMixing(MiniBatchMixing):
    r"""Mix the outgoing weights, solve for the incoming ones (arXiv:2205.10637).

    With samples as columns, $U \mapsto U g^{-1}$ and $V \mapsto V + (\sigma^{-1}(g\sigma(H)) - H)\,X^+$; as published,
    $V \mapsto \sigma^{-1}(g\sigma(H))\,X^+$. Propositions 3.1 and 3.5 of the chapter *Mini-batch symmetries*.

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
        return self._solve_towards(x, v, now, target), u @ g_inverse

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
    probe, batch = copy_of(model), tuple(map(on_host, as_inputs(inputs)))
    drawing = {
        copied
        for m, copied in zip(model.modules(), probe.modules(), strict=True)
        if isinstance(m, nn.Dropout) and m.training and m.p > 0
    }
    layers, reasons = hidden_layers(probe, batch)
    factors = []
    for hidden in layers:
        factor = COMPENSATIONS[compensate](model, inputs, hidden, minimum_change=minimum_change)
        reason = other_effect(probe, batch, hidden)
        if not reason and not drawing.isdisjoint(hidden.between):
            reason = "the dropout in it draws anew in training mode; call model.eval()"
        if reason:
            reasons.append(f"{hidden}: {reason}")
        else:
            factors.append(factor)
    if not factors:
        raise NoSymmetryError(reasons)
    return Product(factors, reasons)


def _single_activation(hidden: Hidden) -> nn.Module:
    """The one activation of a hidden layer."""
    modules = [m for m in hidden.between if not isinstance(m, (nn.Identity, nn.Dropout))]
    if len(modules) > 1 or any(list(m.parameters()) for m in modules):
        raise ActivationError(hidden.between, "a single module without parameters", "build the symmetry by hand")
    activation = modules[0] if modules else nn.Identity()
    with torch.no_grad():
        if activation(hidden.sample.clone()).shape != hidden.sample.shape:
            raise ActivationError(activation, "shape-preserving", "leave this layer out")
    return activation
