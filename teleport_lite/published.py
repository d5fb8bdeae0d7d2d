r"""The teleport of the code published with arXiv:2305.13404, to compare with.

What that code does, and the text of the paper does not say: g is I + T, not exp(T); every ascent step starts at T = 0
and replaces the weights. The gradient is taken after the action of the identity, which moves the weights where the
batch is smaller than a width. The hidden states enter as constants and are then multiplied by I + T, although a
nonlinearity stands between: from three layers on the batch loss moves even where the rank condition holds ("carried"
below). Nothing compares the loss before and after, and the training script makes a new optimizer at each teleport.
"""

from __future__ import annotations

import math
import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.linalg import solve_triangular

from teleport_lite.errors import LossError, NoSymmetryError, TeleportError, UnknownNameError
from teleport_lite.functional import Loss, Params, loss_of, norm, trainable, value_and_grad
from teleport_lite.groups import GeneralLinear
from teleport_lite.host import copy_of, on_host
from teleport_lite.outputs import traced
from teleport_lite.report import Report
from teleport_lite.runtime import TOLERANCES, LossFn, unwrap_compiled
from teleport_lite.symmetries.hidden import Hidden, hidden_layers
from teleport_lite.symmetries.minibatch import OutgoingMixing
from teleport_lite.symmetries.product import Product
from teleport_lite.teleport import check_movable
from teleport_lite.transaction import commit


class Additive(GeneralLinear):
    """GL(n) near the identity in the coordinates T = g - I."""

    def exp(self, xi):
        return xi + torch.eye(self.n, dtype=xi.dtype, device=xi.device)


class Mixing(OutgoingMixing):
    """The published action of one hidden layer, by g = I + T."""

    def __init__(self, model: nn.Module, inputs: object, hidden: Hidden) -> None:
        super().__init__(model, inputs, hidden, minimum_change=False)
        self.group, self.above = Additive(hidden.width), hidden.outgoing


def paper_teleport(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    steps: int = 10,
    lr: float = 5e-2,
    stop: float = 100.0,
    hidden: str = "recomputed",
) -> Report:
    r"""Teleport an MLP as the code published with arXiv:2305.13404 does, in place.

    Each step acts on every hidden layer, from below, with incoming weights V (and bias), outgoing weights U, inputs X:
    $V \mapsto (I + T)V$ and $U \mapsto U\,\sigma(VX)\,\sigma((I + T)VX)^+$, where
    $T = \eta\,\partial\|\nabla L\|^2 / \partial T$ at T = 0, for all layers at once. The steps end before the squared
    gradient norm exceeds `stop`.

    A reference: it commits whatever becomes of the loss, and reports it. The exact alternative is `teleport`. Biases,
    which the authors do not have, are moved with V as a further column.

    Args:
        model: linear layers with one activation between; nothing else may be trainable.
        loss_fn: net -> scalar loss on one batch, deterministic.
        steps: how many, at most.
        lr: the ascent rate $\eta$; the authors use 1e-4 before SGD and AdaGrad.
        stop: bound on the squared gradient norm.
        hidden: "recomputed" after each move, or "carried" along by I + T, as published.

    Returns:
        A `Report`; not accepted when the first step is beyond `stop` or a number is not finite.

    Raises:
        NoSymmetryError: when the model has no hidden layer.
        LossError: when the loss is no scalar, ignores the net, or changes from call to call.
        ParameterError: when a parameter to be moved is frozen.
        UnknownNameError: when `hidden` is neither.
        TeleportError: when an argument is not positive, or other parameters are trainable.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.LeakyReLU(0.1), nn.Linear(16, 1, bias=False))
    >>> x, y = torch.randn(4, 8), torch.randn(4, 1)
    >>> report = paper_teleport(model, lambda net: nn.functional.mse_loss(net(x), y), steps=1, lr=1e-9)
    >>> report.accepted, report.objective_after < report.objective_before  # the identity moves the weights
    (True, True)
    """
    began = time.perf_counter()
    if hidden not in ("recomputed", "carried"):
        raise UnknownNameError("rule for the hidden states", hidden, ["recomputed", "carried"])
    if steps < 1 or not lr > 0 or not stop > 0:
        got = f"steps={steps}, lr={lr}, stop={stop}"
        raise TeleportError("at least one step, a positive lr and stop", got, "leave them out for the authors' values")
    model = unwrap_compiled(model)
    params = {name: p.detach() for name, p in trainable(model).items()}
    loss = loss_of(model, loss_fn)
    with loss:
        value, grads = value_and_grad(loss, params)
        before, old = float(value), float(norm(grads))
        if loss.call is None:
            raise LossError("a loss_fn that calls the given net", "one that does not", "call net(x) inside loss_fn")
        loss.rest()
        factors = mlp_layers(model, loss.call.args, params)
        check_movable(model, Product(factors))
        try:
            moved = None if hidden == "carried" else by_outputs(model, factors, loss, params, steps, lr, stop)
            if moved is None:
                moved = by_weights(factors, loss, params, steps, lr, stop, hidden == "carried")
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            moved = {name: p * math.nan for name, p in params.items()}
        value, grads = value_and_grad(loss, moved)
        after, new, reason = float(value), float(norm(grads)), ""
        again = before if after == before else float(loss(params))
        if abs(again - before) > TOLERANCES[value.dtype] * abs(before):
            got = f"{before:.6g} and {again:.6g} at the same parameters"
            raise LossError("a deterministic loss", got, "put dropout in evaluation mode (model.eval())")
        if not math.isfinite(after + new + old) or not all(p.isfinite().all() for p in moved.values()):
            reason = "the loss, its gradient or a weight is not finite"
        elif moved is params:
            reason = f"the squared gradient norm exceeds {stop:g} at the start"
        else:
            loss.rest()
            commit(model, moved)
    error = abs(after - before) / abs(before) if after != before else 0.0
    seconds = time.perf_counter() - began
    return Report("gradient_norm", before, after, old, new, error, seconds, accepted=not reason, reason=reason)


def mlp_layers(model: nn.Module, inputs: tuple, params: Params) -> list[Mixing]:
    """The hidden layers of an MLP.

    Raises:
        NoSymmetryError: when there is none.
        TeleportError: when it is no MLP.
    """
    sample = tuple(x[:1] if isinstance(x, Tensor) and x.ndim else x for x in inputs)
    layers, reasons = hidden_layers(copy_of(model), tuple(map(on_host, sample)))
    if not layers:
        raise NoSymmetryError(reasons)
    factors = [Mixing(model, inputs, hidden) for hidden in layers]
    known = {name for factor in factors for name in factor.names} | {f"{factors[-1].above}.bias"}
    weights = {factors[0].incoming, *(factor.outgoing for factor in factors)}
    broken = len(weights) <= len(factors) or any(a.above != b.layer for a, b in pairwise(factors))
    if broken or params.keys() - known:
        got = ", ".join(sorted(params.keys() - known)) or "tied weights or several chains"
        raise TeleportError("one chain of linear layers", got, "freeze other parameters, or use teleport")
    return factors


def by_weights(
    factors: list[Mixing], loss: Loss, params: Params, steps: int, lr: float, stop: float, carried: bool
) -> Params:
    """The moved parameters, by automatic differentiation of the action."""
    inputs: list[Any] = [f.features(params) if carried or f is factors[0] else None for f in factors]
    zeros = [xi.requires_grad_() for xi in Product(factors).zeros(params)]

    def act_on_layers(xis: list[Tensor]) -> Params:
        moved, above = dict(params), torch.empty(0)
        for factor, x, xi in zip(factors, inputs, xis, strict=True):
            x = factor.widened(above) if x is None else x
            v, u = factor.solve(x, *factor.weights(moved), xi)
            moved |= factor.parts(v, u)
            above = factor.activation(x @ v.mT)
        return moved

    for _ in range(steps):
        _, grads = value_and_grad(loss, act_on_layers(zeros), create_graph=True)
        square = torch.stack([grad.square().sum() for grad in grads.values()]).sum()
        if square > stop:
            break
        ts = [lr * slope for slope in torch.autograd.grad(square, zeros)]
        params = act_on_layers(ts)
        for k, (t, h) in enumerate(zip(ts, inputs[1:], strict=False), 1):
            if h is not None:
                inputs[k] = torch.cat([h[:, : len(t)] + h[:, : len(t)] @ t.mT, h[:, len(t) :]], 1)
    return params


def by_outputs(
    model: nn.Module, factors: list[Mixing], loss: Loss, params: Params, steps: int, lr: float, stop: float
) -> Params | None:
    """The same, faster, where the batch is no larger than the widths and all ranks are full; None elsewhere.

    There the action keeps what each layer gives on the batch, c = X V^T [k, h], up to c -> c g^T, and the weights
    follow from it: V^T = b^+ c, where b are the features below. So a step moves c alone, the gradient at the outputs
    of the net stays as it was, and neither the inputs of the net nor any weights enter a product.
    """
    seen: list[Tensor] = []

    def cut_graph(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    layers = [*(factor.layer for factor in factors), factors[-1].above]
    with traced(map(model.get_submodule, layers), cut_graph):
        (top,) = torch.autograd.grad(loss(params), seen[-1:])
    x, top = factors[0].features(params), top.flatten(0, -2)
    k, width = len(x), factors[0].group.n
    frozen = model.get_submodule(layers[-1]).bias is not None and f"{layers[-1]}.bias" not in params
    if frozen or len(seen) > len(layers) or k > min(factor.group.n for factor in factors):
        return None

    state = [out.detach().flatten(0, -2) for out in seen]  # of each layer above the first: c and, below it, the bias
    biases = [None, *(params.get(f"{layer}.bias") for layer in layers[1:])]
    state = [c if bias is None else torch.cat([c - bias, bias[None]]) for c, bias in zip(state, biases, strict=True)]
    gram, left = x @ x.mT, torch.eye(width, dtype=x.dtype, device=x.device)
    for step in range(steps + 1):
        free = [p.detach().requires_grad_() for p in state]
        sums = [add_bias(p, k) for p in free[:-1]]
        features = [factor.activation(z) for factor, z in zip(factors, sums, strict=True)]
        roots = [j for b in features if (j := inverse_root(b.detach())) is not None]
        if len(roots) < len(features):
            return None
        if step == steps:
            break
        d, square = top, x.new_zeros(())
        for m in range(len(factors), 0, -1):
            if biases[m] is not None:
                square = square + d.sum(0).square().sum()
            back, part = Through.apply(d, features[m - 1], free[m] if biases[m] is None else free[m][:k], roots[m - 1])
            (d,) = torch.autograd.grad(features[m - 1], sums[m - 1], back, create_graph=True)
            square = square + part
        inner = torch.dot(d.flatten(), (gram @ d.detach()).flatten())
        square = square + 2 * inner - inner.detach()  # to first order
        if square > stop:
            break
        slopes = torch.autograd.grad(square, free[:-1])
        left.addmm_(slopes[0].mT, state[0] @ left, alpha=lr)
        for p, e in zip(state[:-1], slopes, strict=True):
            p.addmm_(p @ p.mT, e, alpha=lr)
    if step == 0:
        return params
    moved = {**params, factors[0].incoming: left @ params[factors[0].incoming]}
    if factors[0].bias is not None:
        moved[factors[0].bias] = left @ params[factors[0].bias]
    for factor, p, b, j in zip(factors, state[1:], features, roots, strict=True):
        moved[factor.outgoing] = (b.detach().mT @ (j @ (j.mT @ p[:k]))).mT
    for factor, p in zip(factors[1:], state[1:], strict=False):
        if factor.bias is not None:
            moved[factor.bias] = p[k]
    return moved


def add_bias(p: Tensor, k: int) -> Tensor:
    """The outputs of a layer with the bias, which stands in row k where there is one."""
    return p[:k] + p[k:] if len(p) > k else p


def inverse_root(b: Tensor) -> Tensor | None:
    """The j with (b b^T)^-1 = j j^T, by QR; None where the rank of b [k, h] may be below k."""
    r = torch.linalg.qr(b.mT, mode="r").R
    j = solve_triangular(r, torch.eye(len(r), dtype=r.dtype, device=r.device), upper=True)
    return j if r.norm() * j.norm() * max(b.shape) * torch.finfo(b.dtype).eps < 1 else None


class Through(torch.autograd.Function):
    """d W and ||d^T b||^2, the gradient of W, for W^T = b^+ c and b^+ = b^T j j^T [k, h]."""

    @staticmethod
    def forward(ctx, d, b, c, j):
        ctx.narrow = c.shape[1] < len(b)
        if ctx.narrow:
            a, e = b.mT @ (j @ (j.mT @ c)), d.mT @ b  # W^T and its gradient
            back, square = d @ a.mT, e.square().sum()
        else:
            a, e = (d @ c.mT) @ j @ j.mT, b @ b.mT
            back, square = a @ b, ((d @ d.mT) * e).sum()
        ctx.save_for_backward(d, b, c, j, a, e)
        return back, square

    @staticmethod
    @once_differentiable
    def backward(ctx, g, s):
        d, b, c, j, a, e = ctx.saved_tensors
        if ctx.narrow:
            w = g.mT @ d
            grad_c = j @ (j.mT @ (b @ w))
            across = w.mT - grad_c.mT @ b
            t = j @ (j.mT @ c)
            grad_b = torch.cat([t, grad_c, d], 1) @ torch.cat([across, -a.mT, 2 * s * e])
            grad_d = g @ a + b @ (2 * s * e).mT
        else:
            v = (g @ b.mT) @ j @ j.mT
            turn = a.mT @ v
            grad_c = v.mT @ d
            grad_b = (a.mT @ g).addmm_(2 * s * (d @ d.mT) - turn - turn.mT, b)
            grad_d = (v @ c).addmm_(2 * s * e, d)
        return grad_d, grad_b, grad_c, None
