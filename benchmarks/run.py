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
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import teleport_lite as tl
from teleport_lite.functional import loss_of, norm, value_and_grad
from teleport_lite.geometry import mean_loss_around, unit_directions
from teleport_lite.search import STEPS, closed_form

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
from costs import costs
from devices import devices
from ensemble import Ensemble
from meta_training import meta_training

SEEDS = range(5)
REPEATS = 40
SLOW_REPEATS = 7
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


def alternate(*actions: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Median seconds of each action, taken in turns so that all see the same machine."""
    seconds: list[list[float]] = [[] for _ in actions]
    for _ in range(repeats):
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


def plain_paper_teleport(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    x: Tensor,
    activation: Callable[[Tensor], Tensor],
    loss: Callable[[Tensor], Tensor],
    *,
    steps: int = 10,
    lr: float = 5e-2,
    stop: float = 100.0,
    carried: bool = False,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """`tl.paper_teleport` as a loop over layers in which automatic differentiation goes through everything."""
    ws, bs = [w.detach() for w in weights], [None if b is None else b.detach() for b in biases]
    count = len(ws) - 1

    def layer(w: Tensor, b: Tensor | None, h: Tensor) -> Tensor:
        return h @ w.T if b is None else h @ w.T + b

    def act(ts: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        moved, shifts, h = list(ws), list(bs), x
        for m in range(count):
            g = torch.eye(len(ts[m]), dtype=x.dtype) + ts[m]
            pre = layer(moved[m], shifts[m], states[m] if carried else h)
            moved[m + 1] = moved[m + 1] @ activation(pre).T @ torch.linalg.pinv(activation(pre @ g.T)).T
            shift = shifts[m]
            moved[m], shifts[m] = g @ moved[m], None if shift is None else g @ shift
            h = activation(layer(moved[m], shifts[m], h))
        return moved, shifts

    states = [x]
    for m in range(count - 1):
        states.append(activation(layer(ws[m], bs[m], states[-1])))
    for _ in range(steps):
        ts = [torch.zeros(len(w), len(w), dtype=x.dtype, requires_grad=True) for w in ws[:-1]]
        moved, shifts = act(ts)
        points = [w.view_as(w) for w in moved]
        offsets = [b if b is None else b.view_as(b).requires_grad_() for b in shifts]
        h = x
        for m in range(count):
            h = activation(layer(points[m], offsets[m], h))
        inputs = [*points, *(b for b in offsets if b is not None)]
        grads = torch.autograd.grad(loss(layer(points[-1], offsets[-1], h)), inputs, create_graph=True)
        square = torch.stack([grad.square().sum() for grad in grads]).sum()
        if square > stop:
            break
        ts = [lr * slope for slope in torch.autograd.grad(square, ts)]
        ws, bs = act(ts)
        states = [x, *(h + h @ t.T for h, t in zip(states[1:], ts[:-1], strict=True))]
    return ws, bs


def published(board: Board, x: Tensor, y: Tensor) -> None:
    """`paper_teleport` beside the plain loop, and the exact scaling teleport beside `paper_teleport`."""
    for name, widths in NETWORKS.items():
        model = mlp(widths, 0)
        fresh, weights = copy.deepcopy(model.state_dict()), [p.detach().clone() for p in model.parameters()]
        symmetry = tl.find_symmetries(model, x)

        def loss_fn(net):
            return F.cross_entropy(net(x), y)

        def plain(weights=weights):
            return plain_paper_teleport(
                weights, [None] * len(weights), x, nn.LeakyReLU(0.1), lambda out: F.cross_entropy(out, y)
            )[0]

        def fast(model=model):
            assert tl.paper_teleport(model, loss_fn).accepted

        def exact(model=model, symmetry=symmetry):
            assert tl.teleport(model, loss_fn, symmetry).accepted

        def restore(model=model, fresh=fresh):
            model.load_state_dict(fresh)

        fast()
        gap = max(float((a.detach() - b).norm() / b.norm()) for a, b in zip(model.parameters(), plain(), strict=True))
        wide = min(widths[1:-1]) >= len(x)
        loop, ours, _, other, _ = alternate(plain, fast, restore, exact, restore, repeats=SLOW_REPEATS)
        board.row(f"{name}: paper_teleport, plain loop / ours", loop / ours, 5.0 if wide else None, at_least=True)
        board.row(f"{name}: relative difference of their weights", gap, 1e-4)
        board.row(f"{name}: paper_teleport / exact scaling teleport", ours / other)


def sharpnesses(board: Board, x: Tensor, y: Tensor) -> None:
    """`sharpness` and its gradient, beside loops over the same losses, for which the directions are drawn before."""
    name, radii = "784-16-10-10", tl.geometry.RADII[:9]
    model = mlp(NETWORKS[name], 0)
    scratch = copy.deepcopy(model)

    def loss_fn(net):
        return F.cross_entropy(net(x), y)

    loss, params = loss_of(model, loss_fn), {n: p.detach() for n, p in model.named_parameters()}
    around = unit_directions(params, 100, generator=torch.Generator().manual_seed(0))
    points = [(d, t) for d in range(100) for t in radii]

    def loop():
        with torch.no_grad():
            losses = [loss({n: p + t * around[n][d] for n, p in params.items()}) for d, t in points]
        return torch.stack(losses).mean()

    def in_place():  # the fastest loop that we know: no functional call, no new parameters
        losses = []
        with torch.no_grad():
            for d, t in points:
                for n, p in scratch.named_parameters():
                    torch.add(params[n], around[n][d], alpha=t, out=p)
                losses.append(loss_fn(scratch))
        return torch.stack(losses).mean()

    def ours():
        generator = torch.Generator().manual_seed(0)
        return tl.sharpness(model, loss_fn, radii=radii, directions=100, generator=generator, chunk_size=50)

    def loop_gradient():
        grads = [value_and_grad(loss, {n: p + t * around[n][d] for n, p in params.items()})[1] for d, t in points]
        return [torch.stack([g[n] for g in grads]).mean(0) for n in params]

    def our_gradient():
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
        return torch.autograd.grad(mean_loss_around(loss, leaves, around, radii), [*leaves.values()])

    gap = float((ours() - loop()).abs() / loop())
    slow, quick, fast = alternate(loop, in_place, ours, repeats=2 * SLOW_REPEATS)
    board.row(f"{name}: 900 losses around, loop / sharpness", slow / fast, 5.0, at_least=True)
    board.row(f"{name}: the same, loop in place / sharpness", quick / fast)
    board.row("relative difference of their values", gap, 1e-5)
    gap = max(float((a - b).norm() / b.norm()) for a, b in zip(our_gradient(), loop_gradient(), strict=True))
    slow, fast = alternate(loop_gradient, our_gradient, repeats=3)
    board.row(f"{name}: gradient of the sharpness, loop / ours", slow / fast, 5.0, at_least=True)
    board.row("relative difference of their gradients", gap, 1e-4)


def curvatures(board: Board, x: Tensor, y: Tensor, samples: int = 10) -> None:
    """The mean curvature of `samples` orbit curves, and a step of a teleport that follows it, beside a gradient."""
    for name, widths in NETWORKS.items():
        model = mlp(widths, 0)
        fresh = copy.deepcopy(model.state_dict())
        symmetry, batch_symmetry = tl.find_symmetries(model, x), tl.minibatch_symmetries(model, x)

        def loss_fn(net):
            return F.cross_entropy(net(x), y)

        def gradient(model=model):
            model.zero_grad()
            loss_fn(model).backward()

        def curvature(model=model, symmetry=symmetry):
            tl.curvature(model, symmetry, samples=samples)

        def teleport(model=model, symmetry=symmetry):
            assert tl.teleport(model, loss_fn, symmetry, objective=tl.objectives.curvature(samples)).accepted

        def restore(model=model, fresh=fresh):
            model.load_state_dict(fresh)

        one, value = alternate(gradient, curvature)
        board.row(f"{name}: curvature, {samples} curves / gradient", value / one, 3.0)
        one, whole, _ = alternate(gradient, teleport, restore, repeats=SLOW_REPEATS)
        board.row(f"{name}: a step of a curvature teleport / gradient", whole / STEPS / one, 20.0)
        one, alone, together = alternate(
            gradient,
            lambda m=model, s=batch_symmetry: tl.curvature(m, s, samples=1),
            lambda m=model, s=batch_symmetry: tl.curvature(m, s, samples=samples),
            repeats=SLOW_REPEATS,
        )
        narrow = widths[1] < len(x)
        board.row(f"{name}: mini-batch mixing, a curve / gradient", alone / one)
        board.row(f"{name}: the same, of {samples} together", together / samples / one, 3.0 if narrow else None)


def ensembles(board: Board, x: Tensor, y: Tensor, members: int = 100) -> None:
    """One step of SGD of the ensemble trainer, beside a loop over as many networks and optimizers."""
    models = [mlp(NETWORKS["784-16-10-10"], seed) for seed in range(members)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in models]
    weights = [
        torch.stack([w.detach() for w in layer]) for layer in zip(*(m.parameters() for m in models), strict=True)
    ]
    ensemble = Ensemble(weights, torch.full((members,), 0.01))
    x, y = x[:20], y[:20]

    def loop():
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    ensemble.step(x, y)
    loop()
    trained = zip(*(m.parameters() for m in models), strict=True)
    gap = max(
        float((a - b).detach().norm() / b.detach().norm())
        for layer, row in zip(weights, trained, strict=True)
        for a, b in zip(layer, row, strict=True)
    )

    def several(step):  # as in training, where the caches are warm
        return lambda: [step() for _ in range(5)]

    one, whole = alternate(several(lambda: ensemble.step(x, y)), several(loop), repeats=SLOW_REPEATS)
    board.row(f"{members} networks 784-16-10-10, batch 20: SGD loop / ensemble", whole / one, 10.0, at_least=True)
    board.row("relative difference of their weights after a step", gap, 1e-5)


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
    sharpnesses(board, x, y)
    curvatures(board, x, y)
    published(board, x, y)
    ensembles(board, x, y)
    costs(board)
    meta_training(board)
    devices(board)
    return int(board.failed)


if __name__ == "__main__":
    sys.exit(main())
