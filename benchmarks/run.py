"""What a teleport costs and gains, as ratios measured side by side in one run.

`make bench` prints one line a measurement: the median over seeds or repetitions, the limit that the project promises,
and whether it is met; it fails when one is not. Real MNIST is used where TELEPORT_LITE_DATA points to it, random images
of the same shape elsewhere (the gains are then printed but not judged).
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import teleport_lite as tl
from teleport_lite.params import loss_of, norm, value_and_grad
from teleport_lite.search import closed_form

SEEDS = range(5)
REPEATS = 40
NETWORKS = {"784-16-10-10": (784, 16, 10, 10), "784-512-512-10": (784, 512, 512, 10)}
PROMISED = {"784-16-10-10": (7.0, 10.0), "784-512-512-10": (15.0, 3.0)}  # squared gain, cost in gradients


def mlp(widths: tuple[int, ...], seed: int) -> nn.Sequential:
    """Leaky ReLU 0.1, no biases, torch's own uniform initialisation."""
    torch.manual_seed(seed)
    layers = [[nn.Linear(n, m, bias=False), nn.LeakyReLU(0.1)] for n, m in pairwise(widths)]
    return nn.Sequential(*[module for pair in layers for module in pair][:-1])


def batch() -> tuple[Tensor, Tensor, bool]:
    """200 images and labels, and whether they are real."""
    generator = torch.Generator().manual_seed(0)
    try:
        train, _ = tl.data.load("mnist")
        x, y = train.batch(200, generator=generator)
        return x, y, True
    except tl.TeleportError:
        x = torch.rand(200, 784, generator=generator)
        return x, torch.randint(10, (200,), generator=generator), False


def alternate(*actions: Callable[[], object]) -> list[float]:
    """Median seconds of each action, taken in turns so that all see the same machine."""
    seconds: list[list[float]] = [[] for _ in actions]
    for _ in range(REPEATS):
        for action, times in zip(actions, seconds, strict=True):
            start = time.perf_counter()
            action()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def long_search(symmetry: tl.Product, grads: dict[str, Tensor], restarts: int = 20, sweeps: int = 30) -> float:
    """The largest gradient norm found from random corners, by automatic differentiation alone.

    Factor after factor is set to the corner that the slope at its centre points to, until nothing changes any more.
    """
    generator, best = torch.Generator().manual_seed(0), 0.0
    factors = symmetry.continuous
    for _ in range(restarts):
        xi = [x.sign() for x in factors.sample(grads, generator=generator)]
        for _ in range(sweeps):
            old = list(xi)
            for k in range(len(xi)):
                xi[k] = torch.zeros_like(xi[k], requires_grad=True)
                (slope,) = torch.autograd.grad(norm(factors.transport(grads, tuple(xi))), xi[k])
                xi[k] = slope.sign()
            if all(torch.equal(a, b) for a, b in zip(old, xi, strict=True)):
                break
        best = max(best, float(norm(factors.transport(grads, tuple(xi)))))
    return best


class Board:
    """Prints the measurements and remembers whether all promises were kept."""

    failed = False

    def row(self, what: str, value: float, limit: float | None = None, *, at_least: bool = False) -> None:
        kept = limit is None or (value >= limit if at_least else value <= limit)
        self.failed |= not kept
        promise = "" if limit is None else f"{'at least' if at_least else 'at most'} {limit:g}"
        print(
            f"{what:<58} {value:>9.3g}   {promise:<14} {'' if limit is None else 'yes' if kept else 'NO'}", flush=True
        )


def main() -> int:
    x, y, real = batch()
    board = Board()
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} thread{'s' * (threads > 1)}, {'MNIST' if real else 'random images'}\n")

    def loss_fn(net):
        return F.cross_entropy(net(x), y)

    for name, widths in NETWORKS.items():
        gain, cost = PROMISED[name]
        ratios, quality = [], []
        for seed in SEEDS:
            model = mlp(widths, seed)
            symmetry = tl.find_symmetries(model, x)
            params = {n: p.detach() for n, p in model.named_parameters()}
            grads = value_and_grad(loss_of(model, loss_fn), params)[1]
            best = long_search(symmetry, grads)
            report = tl.teleport(model, loss_fn, symmetry)
            assert report.accepted, report
            ratios.append((report.objective_after / report.objective_before) ** 2)
            quality.append(report.objective_after**2 / best**2)
        board.row(
            f"{name}: squared gradient norm, times", statistics.median(ratios), gain if real else None, at_least=True
        )
        board.row(f"{name}: squared gradient norm / best of 20 restarts", min(quality), 0.99, at_least=True)

        fresh = copy.deepcopy(model.state_dict())

        def gradient(model=model):
            model.zero_grad()
            loss_fn(model).backward()

        def teleport(model=model, symmetry=symmetry):
            tl.teleport(model, loss_fn, symmetry)

        def search(symmetry=symmetry, grads=grads):
            closed_form(symmetry, grads, True)

        def restore(model=model, fresh=fresh):
            model.load_state_dict(fresh)

        one, whole, part, _ = alternate(gradient, teleport, search, restore)
        board.row(f"{name}: teleport / gradient (batch 200)", whole / one, cost)
        board.row(f"{name}: of which the search", part / one)
        (found,) = alternate(lambda model=model: tl.find_symmetries(model, x))
        board.row(f"{name}: find_symmetries / gradient", found / one)
    return int(board.failed)


if __name__ == "__main__":
    sys.exit(main())
