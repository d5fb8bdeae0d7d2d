"""Train many small MLPs at once: the same architecture and batches, different weights, learning rates and states.

All members see the same batches, so the first layer of the whole ensemble is one matrix product and every other layer
one batched product. Gradients are written out: for leaky ReLU MLPs without biases and a cross-entropy loss they are
three lines a layer. The update rules are those of torch.optim, entry by entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SLOPE = 0.1  # of the leaky ReLU

State = dict[str, Tensor]  # of one layer, each entry of the shape of its weights


def widths_of(weights: list[Tensor]) -> tuple[int, ...]:
    """Of the inputs, and of each layer."""
    return (weights[0].shape[2], *(w.shape[1] for w in weights))


def forward(weights: list[Tensor], x: Tensor) -> list[Tensor]:
    """Inputs of each layer, and the logits [members, batch, classes] last; weights are [members, out, in]."""
    members, width, _ = weights[0].shape
    z = (x @ weights[0].flatten(0, 1).T).unflatten(1, (members, width)).transpose(0, 1)
    states = [x]
    for weight in weights[1:]:
        states.append(F.leaky_relu(z, SLOPE))
        z = torch.bmm(states[-1], weight.transpose(1, 2))
    return [*states, z]


def backward(weights: list[Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The losses [members] and, for each layer, the gradient at its outputs [members, batch, out] and its inputs."""
    *states, logits = forward(weights, x)
    logs = logits.log_softmax(-1)
    losses = -logs.gather(2, y.expand(len(logits), -1)[..., None]).mean((1, 2))
    delta = (logs.exp() - F.one_hot(y, logits.shape[-1])) / len(y)
    found = [(delta, states[-1])]
    for weight, state, below in zip(reversed(weights[1:]), reversed(states[1:]), reversed(states[:-1]), strict=True):
        back = torch.bmm(delta, weight)
        delta = torch.where(state > 0, back, SLOPE * back)
        found.append((delta, below))
    return losses, found[::-1]


def sgd_step(weights: list[Tensor], x: Tensor, y: Tensor, rates: Tensor) -> Tensor:
    """One step of SGD for each member, in place; the losses [members] before the step."""
    losses, ((delta, inputs), *rest) = backward(weights, x, y)
    scaled = (rates[:, None, None] * delta).transpose(0, 1).flatten(1)
    weights[0].view(-1, x.shape[1]).addmm_(scaled.T, inputs, alpha=-1)
    for weight, (delta, inputs) in zip(weights[1:], rest, strict=True):
        weight.baddbmm_((rates[:, None, None] * delta).transpose(1, 2), inputs, alpha=-1)
    return losses


def gradients(weights: list[Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The losses [members] and the gradients [members, out, in]."""
    losses, ((delta, inputs), *rest) = backward(weights, x, y)
    first = (delta.transpose(0, 1).flatten(1).T @ inputs).view_as(weights[0])
    return losses, [first, *(torch.bmm(delta.transpose(1, 2), inputs) for delta, inputs in rest)]


# --- update rules: weights, gradient, state; learning rate and number of the step, from 1, are [members, 1, 1] --------


def _sgd(w: Tensor, g: Tensor, state: State, lr: Tensor, step: Tensor) -> None:
    w.sub_(g.mul_(lr))


def _momentum(w: Tensor, g: Tensor, state: State, lr: Tensor, step: Tensor) -> None:
    w.addcmul_(state["momentum_buffer"].mul_(0.9).add_(g), lr, value=-1)


def _adagrad(w: Tensor, g: Tensor, state: State, lr: Tensor, step: Tensor) -> None:
    root = state["sum"].addcmul_(g, g).sqrt().add_(1e-10)
    w.sub_(g.mul_(lr).div_(root))


def _rmsprop(w: Tensor, g: Tensor, state: State, lr: Tensor, step: Tensor) -> None:
    root = state["square_avg"].mul_(0.99).addcmul_(g, g, value=0.01).sqrt().add_(1e-8)
    w.sub_(g.mul_(lr).div_(root))


def _adam(w: Tensor, g: Tensor, state: State, lr: Tensor, step: Tensor) -> None:
    mean = state["exp_avg"].lerp_(g, 0.1)
    root = (
        state["exp_avg_sq"]
        .mul_(0.999)
        .addcmul_(g, g, value=0.001)
        .sqrt()
        .div_((-torch.expm1(step * math.log(0.999))).sqrt())
    )
    w.sub_((mean * (lr / -torch.expm1(step * math.log(0.9)))).div_(root.add_(1e-8)))


Rule = Callable[[Tensor, Tensor, State, Tensor, int], None]
RULES: dict[str, tuple[Rule, tuple[str, ...]]] = {  # by optimizer, its rule and what it remembers
    "sgd": (_sgd, ()),
    "momentum": (_momentum, ("momentum_buffer",)),
    "adagrad": (_adagrad, ("sum",)),
    "rmsprop": (_rmsprop, ("square_avg",)),
    "adam": (_adam, ("exp_avg", "exp_avg_sq")),
}
SECOND_MOMENTS = {"sum", "square_avg", "exp_avg_sq"}  # averages of squared gradients; the others are of gradients


class Ensemble:
    """Members of one architecture under one optimizer.

    Args:
        weights: for each layer, [members, out, in]; moved in place.
        rates: learning rates, [members].
        optimizer: a key of RULES, with torch.optim's defaults (momentum: 0.9).
        compiled: whether its update is one loop over the weights instead of one for each operation; that needs a C++
            compiler, and takes half the time for wide layers.
    """

    def __init__(self, weights: list[Tensor], rates: Tensor, optimizer: str = "sgd", *, compiled: bool = False) -> None:
        self.weights, self.rates = weights, rates
        rule, entries = RULES[optimizer]
        self.rule = torch.compile(rule) if compiled and entries else rule
        self.states: list[State] = [{entry: torch.zeros_like(w) for entry in entries} for w in weights]
        self.steps = torch.zeros_like(rates)  # a member that was reset counts anew

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step of each member on a batch; the losses [members] before it."""
        if not self.states[0]:
            return sgd_step(self.weights, x, y, self.rates)
        losses, grads = gradients(self.weights, x, y)
        self.steps += 1
        lr, step = self.rates[:, None, None], self.steps[:, None, None]
        for w, g, state in zip(self.weights, grads, self.states, strict=True):
            self.rule(w, g, state, lr, step)
        return losses

    def reset(self, members: slice) -> None:
        """Forget the optimizer state of some members, as a new optimizer would."""
        self.steps[members] = 0
        for state in self.states:
            for entry in state.values():
                entry[members] = 0


def evaluate(weights: list[Tensor], x: Tensor, y: Tensor, chunk: int = 2000) -> tuple[Tensor, Tensor]:
    """Mean loss and accuracy of each member."""
    loss, hits = 0.0, 0.0
    for xs, ys in zip(x.split(chunk), y.split(chunk), strict=True):
        logits = forward(weights, xs)[-1]
        labels = ys.expand(len(logits), -1)
        loss = loss + F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
        hits = hits + (logits.argmax(-1) == labels).sum(1)
    return loss / len(y), hits / len(y)
