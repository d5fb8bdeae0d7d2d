"""Train many small MLPs at once: the same architecture and batches, different weights and learning rates.

All members see the same batches, so the first layer of the whole ensemble is one matrix product and every other layer
one batched product. Gradients are written out: for leaky ReLU MLPs without biases and a cross-entropy loss they are
three lines a layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SLOPE = 0.1  # of the leaky ReLU


def forward(weights: list[Tensor], x: Tensor) -> list[Tensor]:
    """Inputs of each layer, and the logits [members, batch, classes] last; weights are [members, out, in]."""
    members, width, _ = weights[0].shape
    z = (x @ weights[0].flatten(0, 1).T).unflatten(1, (members, width)).transpose(0, 1)
    states = [x]
    for weight in weights[1:]:
        states.append(F.leaky_relu(z, SLOPE))
        z = torch.bmm(states[-1], weight.transpose(1, 2))
    return [*states, z]


def sgd_step(weights: list[Tensor], x: Tensor, y: Tensor, rates: Tensor) -> Tensor:
    """One step of SGD for each member, in place; the losses [members] before the step."""
    *states, logits = forward(weights, x)
    logs = logits.log_softmax(-1)
    losses = -logs.gather(2, y.expand(len(logits), -1)[..., None]).mean((1, 2))
    delta = (logs.exp() - F.one_hot(y, logits.shape[-1])) / len(y)  # gradient at the logits
    for weight, state in zip(reversed(weights[1:]), reversed(states[1:]), strict=True):
        back = torch.bmm(delta, weight)
        weight.baddbmm_((rates[:, None, None] * delta).transpose(1, 2), state, alpha=-1)
        delta = torch.where(state > 0, back, SLOPE * back)
    first = (rates[:, None, None] * delta).transpose(0, 1).flatten(1)
    weights[0].view(-1, x.shape[1]).addmm_(first.T, x, alpha=-1)
    return losses


def evaluate(weights: list[Tensor], x: Tensor, y: Tensor, chunk: int = 2000) -> tuple[Tensor, Tensor]:
    """Mean loss and accuracy of each member."""
    loss, hits = 0.0, 0.0
    for xs, ys in zip(x.split(chunk), y.split(chunk), strict=True):
        logits = forward(weights, xs)[-1]
        labels = ys.expand(len(logits), -1)
        loss = loss + F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
        hits = hits + (logits.argmax(-1) == labels).sum(1)
    return loss / len(y), hits / len(y)
