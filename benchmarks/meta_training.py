"""Meta-training of the paper's size, one problem at a time in a plain loop and a batch of problems at once.

Slices of both are timed in turns: unrolls of ten steps with their meta-update, of LSTM(update, exact tele) with 300
hidden units. A whole run of 700 problems x 100 steps is 7000 unrolls of the loop, or 70 of a batch of 100.
"""

from __future__ import annotations

import time
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import teleport_lite as tl
from teleport_lite.learned import LearnedOptimizer, State, Task
from teleport_lite.symmetries import scaling

WIDTH, HIDDEN, UNROLL, BATCH, SLOPE, REPEATS = 20, 300, 10, 100, 0.1, 5
V, U = "0.weight", "2.weight"


def loss(params, data):
    x, y = data
    return 0.5 * (y - F.leaky_relu(x @ params[V].mT, SLOPE) @ params[U].mT).square().sum()


def plain_unroll(net: LearnedOptimizer, v: Tensor, u: Tensor, x: Tensor, y: Tensor) -> list[Tensor]:
    """The losses of one problem along ten steps, as a loop that anybody would write."""
    h, losses = None, []
    for _ in range(UNROLL + 1):
        value = 0.5 * ((y - F.leaky_relu(x @ v.T, SLOPE) @ u.T) ** 2).sum()
        losses.append(value)
        dv, du = torch.autograd.grad(value, (v, u), retain_graph=True)
        g = torch.cat([dv.flatten(), du.flatten()]).detach()
        rms = g.square().mean().sqrt()
        seen = torch.cat([torch.asinh(g / rms), rms.log()[None] / 10])
        out, h = net.memory(seen[None, None], h)
        out = out[0, 0]
        step = net.size * net.heads["size"](out).exp() * net.heads["entries"](out)
        scale = (net.radius * net.heads["element"](out).tanh()).exp()
        v = scale[:, None] * (v + step[: v.numel()].view_as(v))
        u = (u + step[v.numel() :].view_as(u)) / scale
    return losses


def meta_training(board) -> None:
    """Rows for the `Board` of run.py: seconds of a problem-step in the loop / in the batch, and their difference."""
    generator = torch.Generator().manual_seed(0)
    x, y, v, u = (torch.rand(BATCH, WIDTH, WIDTH, generator=generator) for _ in range(4))
    symmetry = tl.Product([scaling(WIDTH, V, U)])
    task = Task(loss, lambda _: ({V: v, U: u}, (x, y)), symmetry)
    torch.manual_seed(0)
    net = LearnedOptimizer({V: v[0], U: u[0]}, symmetry, hidden=HIDDEN)
    for head in net.heads.values():
        nn.init.normal_(head.weight, std=0.02)
    adam = torch.optim.Adam(net.parameters(), lr=0.0)  # the same network all the time

    def finish(losses: list[Tensor]) -> Tensor:
        values = torch.stack(losses)
        adam.zero_grad()
        values[1:].log().mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adam.step()
        return values.detach()

    def loop() -> Tensor:
        return finish(plain_unroll(net, v[0].clone().requires_grad_(), u[0].clone().requires_grad_(), x[0], y[0]))

    def whole() -> Tensor:
        params, state, losses = {V: v.clone().requires_grad_(), U: u.clone().requires_grad_()}, State(), []
        for _ in range(UNROLL + 1):
            values, params, state = task_step(params, state)
            losses.append(values)
        return finish(losses)

    def task_step(params, state):
        return net.step(task, params, (x, y), state)

    gap = float((whole()[:, 0] / loop() - 1).abs().max())
    times: list[list[float]] = [[], []]
    for _ in range(REPEATS):
        for action, found in zip((loop, whole), times, strict=True):
            start = time.perf_counter()
            action()
            found.append(time.perf_counter() - start)
    one, many = map(median, times)
    board.row("meta-training, one problem at a time / batches of 100", BATCH * one / many, 10.0, at_least=True)
    board.row("relative difference of the losses", gap, 1e-4)
