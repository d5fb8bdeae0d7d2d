"""Do teleports speed up SGD, momentum, AdaGrad, RMSProp and Adam, or does the forgotten optimizer state?

    TELEPORT_LITE_DATA=... python experiments/optimizers.py [--data cifar10] [--optimizer adam] [--arm teleport]

The setting of arXiv:2305.13404, Figures 5 and 13: leaky ReLU of slope 0.1, no biases, batches of 20; eight teleports on
the first eight steps of an epoch. Every arm of an optimizer is trained at the same rates; the grid grows by a rate as
long as an arm is best at an edge of it. Results go to book/results/optimizers.json, entries of an optimizer, an arm, a
seed and some rates; what is there is not computed again. For other data see `datasets.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from datasets import REMARKS, SETTINGS, Setting, split
from ensemble import SECOND_MOMENTS, SLOPE, Ensemble, evaluate, widths_of
from mnist_teleport import alone, command_line, mlp, provenance, resumed, save, scalings
from torch import Tensor, nn
from tqdm import tqdm

import teleport_lite as tl

RESULTS = Path(__file__).resolve().parent.parent / "book" / "results" / "optimizers.json"
BATCH, SEEDS, TELEPORT_BATCH = 20, 5, 200
TIMES, RADIUS = 8, 0.125  # eight teleports of radius 1/8 reach as far as one of radius 1
EPOCHS = {"mnist": 40, "fashion_mnist": 4, "cifar10": 1}
CUT = {  # what a record says of what it lacks
    "fashion_mnist": "4 epochs in place of 40, for want of computing time",
    "cifar10": "1 epoch in place of 40, for want of computing time",
}
MANY = 350_000  # weights of the networks that train together, about what a core has in its cache
OPTIMIZERS = {  # learning rates to begin with, and the epoch whose first steps are teleports
    "sgd": ((0.005, 0.01, 0.02, 0.05, 0.1), 2),
    "momentum": ((0.0005, 0.001, 0.002, 0.005, 0.01), 0),
    "adagrad": ((0.005, 0.01, 0.02, 0.05, 0.1), 2),
    "rmsprop": ((0.0001, 0.0003, 0.001, 0.003, 0.01), 0),
    "adam": ((0.0001, 0.0003, 0.001, 0.003, 0.01), 0),
}
WIDEST = 9  # rates of a grid, however far it would have to grow


class Job(NamedTuple):
    """What a move may need to know."""

    symmetry: tl.Product
    radius: float
    corner: tuple[Tensor, ...]  # a sign for each neuron, held over all teleports of a training
    draw: torch.Generator
    optimizer: str


def exact(net: nn.Module, loss_fn, job: Job) -> bool:
    """To the steepest point of the scaling orbit."""
    return tl.teleport(net, loss_fn, job.symmetry, radius=job.radius).accepted


def at_random(net: nn.Module, loss_fn, job: Job) -> bool:
    """To a corner drawn once: as large a step as to the steepest one, and in the same direction every time."""
    params = {name: p.detach() for name, p in net.named_parameters()}
    moved = job.symmetry.act(params, tuple(job.radius * signs for signs in job.corner))
    for name, p in net.named_parameters():
        p.data.copy_(moved[name])
    return True


def redrawn(net: nn.Module, loss_fn, job: Job) -> bool:
    """To a random point, drawn anew each time: eight of these walk about a fifth as far as eight to the same corner."""
    return tl.teleport(net, loss_fn, job.symmetry, radius=job.radius, search="random", generator=job.draw).accepted


def paper(net: nn.Module, loss_fn, job: Job) -> bool:
    """As published, with the ascent rate that was published for the optimizer."""
    return tl.paper_teleport(net, loss_fn, lr=1e-4 if job.optimizer in ("sgd", "adagrad") else 5e-2).accepted


@dataclass(frozen=True)
class Arm:
    """How it moves, what becomes of the optimizer's state, how often and how far at once."""

    move: Callable[[nn.Module, Callable, Job], bool] | None
    state: str = "transport"
    times: int = TIMES
    radius: float = RADIUS


ARMS = {
    "plain": Arm(None),
    "reset": Arm(None, "reset"),
    "random": Arm(at_random),
    "teleport": Arm(exact),
    "teleport, reset": Arm(exact, "reset"),
    "paper": Arm(paper, "reset"),
    "paper, transport": Arm(paper),
    "random, redrawn": Arm(redrawn),
    "start": Arm(exact, times=1, radius=TIMES * RADIUS),  # another initialisation, and then plain
}


def arms_of(optimizer: str, epochs: int) -> list[str]:
    """Those that differ: SGD has no state to lose, and a new initialisation must come before the first step."""
    memory, first = optimizer != "sgd", min(OPTIMIZERS[optimizer][1], epochs - 1) == 0
    return [
        name
        for name in ARMS
        if (memory or name not in ("reset", "teleport, reset", "paper, transport")) and (first or name != "start")
    ]


# --- one teleport -----------------------------------------------------------------------------------------------------


def carry(ensemble: Ensemble, m: int, old: list[Tensor]) -> None:
    """Carry the state of member m along a scaling: gradients by before / after, their squares by its square."""
    for layer, before, weight in zip(ensemble.states, old, ensemble.weights, strict=True):
        factor = torch.where(before == 0, 1.0, before / weight[m])
        for name, entry in layer.items():
            entry[m] *= factor.square() if name in SECOND_MOMENTS else factor


def carry_mixing(ensemble: Ensemble, m: int, old: list[Tensor], x: Tensor) -> None:
    """The same along a mixing, as far as there is a rule: M -> P M Q, and squares by the squares of P and Q.

    The published move keeps no matrix, so P and Q are what takes the outputs and the inputs of a layer on the batch, by
    least squares, from where they were: H = H' P^T and b Q = b'.
    """
    below = above = x.double()
    for k, (layer, before, weight) in enumerate(zip(ensemble.states, old, ensemble.weights, strict=True)):
        q = torch.linalg.lstsq(below, above).solution if k else None
        h, moved = below @ before.double().T, above @ weight[m].double().T
        p = torch.linalg.lstsq(moved, h).solution if k + 1 < len(old) else None
        for name, entry in layer.items():
            square = name in SECOND_MOMENTS
            carried = entry[m].double()
            if p is not None:
                carried = (p.square() if square else p) @ carried
            if q is not None:
                carried = carried @ (q.square() if square else q)
            entry[m] = carried.to(entry.dtype)
        below, above = F.leaky_relu(h, SLOPE), F.leaky_relu(moved, SLOPE)


def slope(net: nn.Module, loss_fn) -> tuple[float, float]:
    """The loss, and the squared norm of its gradient."""
    loss = loss_fn(net)
    grads = torch.autograd.grad(loss, list(net.parameters()))
    return float(loss.detach()), float(sum(g.square().sum() for g in grads))


def teleport(ensemble: Ensemble, m: int, arm: Arm, job: Job, x: Tensor, y: Tensor) -> dict | None:
    """Teleport a member and its optimizer state; what the teleport did, or nothing where training has diverged."""
    net, old = alone(ensemble.weights, m), [w[m].clone() for w in ensemble.weights]
    if arm.move is None or not all(w.isfinite().all() for w in old):
        return None

    def loss_fn(net):
        return F.cross_entropy(net(x), y)

    loss, square = slope(net, loss_fn)
    accepted = arm.move(net, loss_fn, job)
    new_loss, new_square = slope(net, loss_fn)
    for w, p in zip(ensemble.weights, net.parameters(), strict=True):
        w[m] = p.detach()
    if arm.state == "transport" and accepted and any(ensemble.states):
        if arm.move is paper:
            carry_mixing(ensemble, m, old, x)
        else:
            carry(ensemble, m, old)
    return {
        "accepted": int(accepted),
        "squared_gradient_gain": float(f"{new_square / square:.4g}"),
        "invariance_error": float(f"{abs(new_loss - loss) / loss:.2g}"),
        "walk": (ensemble.weights[0][m].norm(dim=1) / old[0].norm(dim=1)).log(),  # of the neurons of the first layer
    }


def columns(rows: list[list[dict | None]]) -> dict[str, list]:
    """What the teleports did, each number as a table [rates, teleports], null where training had diverged.

    `stretched` counts the neurons of the first layer whose incoming weights grew; `walked` [rates] is how far the
    logarithm of their length went in all, mean over the neurons.
    """
    found: dict[str, list] = {
        key: [[row and row[key] for row in member] for member in rows]
        for key in ("accepted", "squared_gradient_gain", "invariance_error")
    }
    found["stretched"] = [[row and int((row["walk"] > 0).sum()) for row in member] for member in rows]
    walks = [[row["walk"] for row in member if row] for member in rows]
    found["walked"] = [
        float(f"{float(torch.stack(member).sum(0).abs().mean()):.4g}") if member else None for member in walks
    ]
    return found


# --- training ---------------------------------------------------------------------------------------------------------


def run(setting: Setting, optimizer: str, work: list[tuple[str, list[float]]], seed: int, epochs: int, data, **how):
    """Train some arms from one seed, each at some rates; one entry an arm, its curves [rates, epochs + 1]."""
    train, validation, test = data
    when = OPTIMIZERS[optimizer][1]
    members = [(arm, rate) for arm, rates in work for rate in rates]
    start = mlp(setting.training, seed)
    weights = [p.detach().expand(len(members), *p.shape).clone() for p in start.parameters()]
    ensemble = Ensemble(weights, torch.tensor([rate for _, rate in members]), optimizer, **how)
    curves: dict[str, list[Tensor]] = {k: [] for k in ("train_loss", "validation_loss", "test_loss", "test_accuracy")}
    moves: list[list[dict | None]] = [[] for _ in members]

    def record(weights: list[Tensor]) -> None:
        found = (
            evaluate(weights, train.x[:10000], train.y[:10000])[0],
            evaluate(weights, validation.x, validation.y)[0],
            *evaluate(weights, test.x, test.y),
        )
        for values, value in zip(curves.values(), found, strict=True):
            values.append(value.expand(len(members)))

    record([w[:1] for w in weights])  # all begin alike
    order, draw = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000 + seed)
    symmetry = scalings(widths_of(weights))
    params = {name: p.detach() for name, p in start.named_parameters()}
    corner = symmetry.sample(params, generator=torch.Generator().manual_seed(2000 + seed))
    signs = tuple(xi.sign() for xi in corner)
    jumps = [torch.Generator().manual_seed(3000 + seed) for _ in members]  # a training does not depend on the others
    for epoch in tqdm(range(epochs), desc=f"{optimizer} {'+'.join(arm for arm, _ in work)} seed {seed}", leave=False):
        for step, (x, y) in enumerate(train.batches(BATCH, generator=order)):
            if epoch == min(when, epochs - 1) and step < TIMES:
                batch = train.batch(TELEPORT_BATCH, generator=draw)
                for m, (name, _) in enumerate(members):
                    arm = ARMS[name]
                    if step < arm.times:
                        if arm.state == "reset":
                            ensemble.reset(slice(m, m + 1))
                        job = Job(symmetry, arm.radius, signs, jumps[m], optimizer)
                        moves[m].append(teleport(ensemble, m, arm, job, *batch))
            ensemble.step(x, y)
        record(weights)
    full = evaluate(weights, train.x, train.y)[0]

    def short(values: Tensor) -> list[float | None]:
        return [float(f"{v:.4g}") if abs(v) < 1e9 else None for v in values.tolist()]

    entries, done = [], 0
    for name, rates in work:
        part = slice(done, done := done + len(rates))
        entry = {"optimizer": optimizer, "arm": name, "seed": seed, "rates": rates}
        for key, values in curves.items():
            entry[key] = [short(curve) for curve in torch.stack(values, -1)[part]]
        entry["full_train_loss"] = short(full[part])  # after the last epoch; train_loss is of 10,000 images
        if ARMS[name].move:
            entry["teleports"] = columns(moves[part])
        entries.append(entry)
    return entries


def missing(runs: list[dict], optimizer: str, arms: list[str], seed: int, rates: list[float]) -> Iterator[tuple]:
    """The arms that some rates have not been trained of, and these rates."""
    for arm in arms:
        done = [r["rates"] for r in runs if (r["optimizer"], r["arm"], r["seed"]) == (optimizer, arm, seed)]
        if left := sorted(set(rates) - {rate for found in done for rate in found}):
            yield arm, left


def grown(runs: list[dict], optimizer: str, arms: list[str], rates: list[float]) -> list[float]:
    """The grid, with a rate more at each end at which some arm has its lowest mean validation loss."""
    ratio, found = rates[1] / rates[0], list(rates)
    for arm in arms:
        sums = dict.fromkeys(rates, 0.0)
        for run in runs:
            if (run["optimizer"], run["arm"]) == (optimizer, arm):
                for rate, curve in zip(run["rates"], run["validation_loss"], strict=True):
                    if rate in sums:
                        sums[rate] += float("inf") if curve[-1] is None else curve[-1]
        best = min(sums, key=lambda rate: sums[rate])
        if best == rates[0]:
            found.append(float(f"{rates[0] / ratio:.1g}"))
        elif best == rates[-1]:
            found.append(float(f"{rates[-1] * ratio:.1g}"))
    return sorted(set(found))


def together(work: list[tuple[str, list[float]]], size: int) -> Iterator[list[tuple[str, list[float]]]]:
    """Arms in groups of at most `size` trainings, or of one arm."""
    group: list[tuple[str, list[float]]] = []
    for arm, rates in work:
        if group and sum(len(r) for _, r in group) + len(rates) > size:
            yield group
            group = []
        group.append((arm, rates))
    if group:
        yield group


def seconds(widths, data, turns: int) -> dict[str, dict[str, float]]:
    """How long a step of each optimizer takes in a plain loop of torch, and a teleport of each kind: taken in turns."""
    train = data[0]
    make = {
        "sgd": torch.optim.SGD,
        "momentum": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
        "adagrad": torch.optim.Adagrad,
        "rmsprop": torch.optim.RMSprop,
        "adam": torch.optim.Adam,
    }
    nets = {name: mlp(widths, 0) for name in OPTIMIZERS}
    loops = {name: make[name](net.parameters(), lr=1e-4) for name, net in nets.items()}
    tx, ty = train.batch(TELEPORT_BATCH, generator=torch.Generator().manual_seed(0))
    draw, symmetry = torch.Generator().manual_seed(0), scalings(widths)
    corner = symmetry.sample({name: p.detach() for name, p in mlp(widths, 0).named_parameters()}, generator=draw)
    job = Job(symmetry, RADIUS, corner, draw, "adam")
    steps: dict[str, list[float]] = {name: [] for name in loops}
    teleports: dict[str, list[float]] = {name: [] for name in ("random", "teleport", "paper")}
    for _ in tqdm(range(turns), desc="times", leave=False):
        for name, loop in loops.items():
            batches = train[: 20 * BATCH].batches(BATCH, generator=draw)
            start = time.perf_counter()
            for x, y in batches:
                loop.zero_grad()
                F.cross_entropy(nets[name](x), y).backward()
                loop.step()
            steps[name].append((time.perf_counter() - start) / 20)
        for name, times in teleports.items():
            net = mlp(widths, 0)
            start = time.perf_counter()
            ARMS[name].move(net, lambda n: F.cross_entropy(n(tx), ty), job)
            times.append(time.perf_counter() - start)
    return {
        what: {name: float(f"{torch.tensor(times).median():.3g}") for name, times in found.items()}
        for what, found in (("step", steps), ("teleport", teleports))
    }


def main() -> None:
    options = command_line(
        __doc__,
        RESULTS,
        "a smoke test: synthetic images, one seed, one epoch",
        data=SETTINGS,
        optimizer=OPTIMIZERS,
        arm=ARMS,
        seeds=SEEDS,
    )
    epochs, seeds = (1, 1) if options.quick else (EPOCHS[options.data], options.seeds)

    data, setting = split(options.quick, options.data), SETTINGS[options.data]
    config = {
        "widths": list(setting.training),
        "batch": BATCH,
        "epochs": epochs,
        "teleports": TIMES,
        "radius": RADIUS,
        "teleport_batch": TELEPORT_BATCH,
        "epoch_of_teleports": {name: min(when, epochs - 1) for name, (_, when) in OPTIMIZERS.items()},
        **provenance(data),
    }
    results = resumed(options.out, config)
    if "seconds" not in results:
        results["seconds"] = seconds(setting.training, data, 2 if options.quick else 50)
        save(results, options.out)
    if not options.quick:
        results |= {"cut": CUT.get(options.data, "nothing"), **REMARKS.get(options.data, {})}
    size = MANY // sum(n * m for n, m in pairwise(setting.training))
    for optimizer in options.optimizer or OPTIMIZERS:
        arms = [arm for arm in arms_of(optimizer, epochs) if arm in (options.arm or ARMS)]
        known = {rate for run in results["runs"] if run["optimizer"] == optimizer for rate in run["rates"]}
        rates, wider = [], sorted(known | set(setting.rates(OPTIMIZERS[optimizer][0])))
        while wider != rates:
            rates = wider
            for seed in range(seeds):
                work = list(missing(results["runs"], optimizer, arms, seed, rates))
                for group in together(work, size):
                    how = {} if options.quick else {"compiled": True}
                    results["runs"] += run(setting, optimizer, group, seed, epochs, data, **how)
                    save(results, options.out)
            if not options.quick and len(rates) < WIDEST:
                wider = grown(results["runs"], optimizer, arms, rates)


if __name__ == "__main__":
    main()
