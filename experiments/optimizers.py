"""Do teleports speed up SGD, momentum, AdaGrad, RMSProp and Adam, or does the forgotten optimizer state?

    TELEPORT_LITE_DATA=... python experiments/optimizers.py [--optimizer adam] [--arm teleport] [--data cifar10]

The setting of arXiv:2305.13404, Figure 5: MNIST, 784-16-10-10, leaky ReLU of slope 0.1, no biases, batches of 20, 40
epochs; eight teleports, on the first eight steps of an epoch. All rates of all arms asked for train together. Results
go to book/results/optimizers.json, one entry for each optimizer, arm and seed; what is there is not computed again. For
other data see `datasets.py`.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import SETTINGS, Setting, split
from ensemble import SECOND_MOMENTS, Ensemble, evaluate, widths_of
from mnist_teleport import alone, command_line, mlp, provenance, resumed, save, scalings
from torch import Tensor, nn
from tqdm import tqdm

import teleport_lite as tl

RESULTS = Path(__file__).resolve().parent.parent / "book" / "results" / "optimizers.json"
BATCH, EPOCHS, SEEDS = 20, 40, 5
TIMES, RADIUS, TELEPORT_BATCH = 8, 0.125, 200  # eight teleports of radius 1/8 reach as far as one of radius 1
OPTIMIZERS = {  # learning rates, and the epoch whose first steps are teleports
    "sgd": ((0.005, 0.01, 0.02, 0.05, 0.1), 2),
    "momentum": ((0.0005, 0.001, 0.002, 0.005, 0.01), 0),
    "adagrad": ((0.005, 0.01, 0.02, 0.05, 0.1), 2),
    "rmsprop": ((0.0001, 0.0003, 0.001, 0.003, 0.01), 0),
    "adam": ((0.0001, 0.0003, 0.001, 0.003, 0.01), 0),
}


def exact(net: nn.Module, loss_fn, symmetry: tl.Product, generator: torch.Generator, optimizer: str) -> tl.Report:
    """To the steepest point of the scaling orbit."""
    return tl.teleport(net, loss_fn, symmetry, radius=RADIUS, generator=generator)


def at_random(net: nn.Module, loss_fn, symmetry: tl.Product, generator: torch.Generator, optimizer: str) -> tl.Report:
    """To a random point of the scaling orbit, as far away."""
    return tl.teleport(net, loss_fn, symmetry, radius=RADIUS, search="random", generator=generator)


def paper(net: nn.Module, loss_fn, symmetry: tl.Product, generator: torch.Generator, optimizer: str) -> tl.Report:
    """As published, with the ascent rate that was published for the optimizer."""
    return tl.paper_teleport(net, loss_fn, lr=1e-4 if optimizer in ("sgd", "adagrad") else 5e-2)


ARMS = {  # how each arm moves, and what becomes of the optimizer's state
    "plain": (None, "transport"),
    "reset": (None, "reset"),
    "random": (at_random, "transport"),
    "paper": (paper, "reset"),
    "teleport": (exact, "transport"),
}


def carry(state: dict[str, Tensor], before: Tensor, after: Tensor, m: int) -> None:
    """Carry the state of one layer of member m along: gradients by before / after, their squares by its square."""
    factor = torch.where(before == 0, 1.0, before / after)
    for name, entry in state.items():
        entry[m] *= factor.square() if name in SECOND_MOMENTS else factor


def teleport(
    ensemble: Ensemble, members: slice, arm: str, optimizer: str, x: Tensor, y: Tensor, generator: torch.Generator
) -> list[dict]:
    """Teleport some members, one by one, and their optimizer state; what each teleport did."""
    move, state = ARMS[arm]
    if state == "reset":
        ensemble.reset(members)
    rows = []
    for m in range(members.start, members.stop) if move else ():
        net, old = alone(ensemble.weights, m), [w[m].clone() for w in ensemble.weights]
        if not all(w.isfinite().all() for w in old):  # diverged: nothing is left to teleport
            continue
        symmetry = scalings(widths_of(ensemble.weights))
        report = move(net, lambda n: F.cross_entropy(n(x), y), symmetry, generator, optimizer)
        for w, p, layer, before in zip(ensemble.weights, net.parameters(), ensemble.states, old, strict=True):
            w[m] = p.detach()
            if state == "transport" and report.accepted:
                carry(layer, before, w[m], m)
        gain = (report.objective_after / report.objective_before) ** 2
        grown = ensemble.weights[0][m].norm(dim=1) > old[0].norm(dim=1)
        rows.append(
            {
                "first_layer_stretched": int(grown.sum()),  # neurons whose incoming weights became larger
                "accepted": report.accepted,
                "squared_gradient_gain": float(f"{gain:.4g}"),
                "invariance_error": float(f"{report.invariance_error:.3g}"),
                "seconds": float(f"{report.seconds:.3g}"),
            }
        )
    return rows


def run(setting: Setting, optimizer: str, arms: list[str], seed: int, epochs: int, data) -> list[dict]:
    """Train all rates of some arms from one seed; one entry an arm, its curves [rates, epochs + 1]."""
    train, validation, test = data
    rates, when = OPTIMIZERS[optimizer]
    rates = setting.rates(rates)
    start = [p.detach() for p in mlp(setting.training, seed).parameters()]
    members = len(arms) * len(rates)
    ensemble = Ensemble(
        [p.expand(members, *p.shape).clone() for p in start], torch.tensor(rates).repeat(len(arms)), optimizer
    )
    slices = {arm: slice(k * len(rates), (k + 1) * len(rates)) for k, arm in enumerate(arms)}
    curves: dict[str, list[Tensor]] = {k: [] for k in ("train_loss", "validation_loss", "test_loss", "test_accuracy")}
    moves: dict[str, list[dict]] = {arm: [] for arm in arms}

    def record() -> None:
        found = (
            evaluate(ensemble.weights, train.x[:10000], train.y[:10000])[0],
            evaluate(ensemble.weights, validation.x, validation.y)[0],
            *evaluate(ensemble.weights, test.x, test.y),
        )
        for values, value in zip(curves.values(), found, strict=True):
            values.append(value)

    record()
    order, draw = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000 + seed)
    jumps = {arm: torch.Generator().manual_seed(2000 + seed) for arm in arms}  # an arm does not depend on the others
    for epoch in tqdm(range(epochs), desc=f"{optimizer} {'+'.join(arms)} seed {seed}", leave=False):
        for step, (x, y) in enumerate(train.batches(BATCH, generator=order)):
            if epoch == min(when, epochs - 1) and step < TIMES:
                tx, ty = train.batch(TELEPORT_BATCH, generator=draw)
                for arm in arms:
                    moves[arm] += teleport(ensemble, slices[arm], arm, optimizer, tx, ty, jumps[arm])
            ensemble.step(x, y)
        record()

    def table(values: list[Tensor], part: slice) -> list:
        rows = torch.stack(values, -1)[part].tolist()
        return [[float(f"{v:.4g}") if abs(v) < 1e9 else None for v in row] for row in rows]

    return [
        {
            "optimizer": optimizer,
            "arm": arm,
            "seed": seed,
            "rates": list(rates),
            "teleports": moves[arm],
            **{name: table(values, slices[arm]) for name, values in curves.items()},
        }
        for arm in arms
    ]


def seconds(widths, data, turns: int) -> dict[str, dict[str, float]]:
    """How long a step of each optimizer takes in a plain loop of torch, and a teleport of each arm: taken in turns."""
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
    steps: dict[str, list[float]] = {name: [] for name in loops}
    teleports: dict[str, list[float]] = {arm: [] for arm, (move, _) in ARMS.items() if move}
    for _ in tqdm(range(turns), desc="times", leave=False):
        for name, loop in loops.items():
            batches = train[: 20 * BATCH].batches(BATCH, generator=draw)
            start = time.perf_counter()
            for x, y in batches:
                loop.zero_grad()
                F.cross_entropy(nets[name](x), y).backward()
                loop.step()
            steps[name].append((time.perf_counter() - start) / 20)
        for arm, times in teleports.items():
            move, net = ARMS[arm][0], mlp(widths, 0)
            start = time.perf_counter()
            move(net, lambda n: F.cross_entropy(n(tx), ty), symmetry, draw, "adam")
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
        epochs=EPOCHS,
        seeds=SEEDS,
    )
    epochs, seeds = (1, 1) if options.quick else (options.epochs, options.seeds)

    data, setting = split(options.quick, options.data), SETTINGS[options.data]
    config = {
        "widths": list(setting.training),
        "batch": BATCH,
        "epochs": epochs,
        "teleports": TIMES,
        "radius": RADIUS,
        "teleport_batch": TELEPORT_BATCH,
        "epoch_of_teleports": {name: when for name, (_, when) in OPTIMIZERS.items()},
        **provenance(data),
    }
    results = resumed(options.out, config)
    if "seconds" not in results:
        results["seconds"] = seconds(setting.training, data, 2 if options.quick else 50)
        save(results, options.out)
    for optimizer in options.optimizer or OPTIMIZERS:
        for seed in range(seeds):
            done = {r["arm"] for r in results["runs"] if (r["optimizer"], r["seed"]) == (optimizer, seed)}
            if arms := [arm for arm in options.arm or ARMS if arm not in done]:
                results["runs"] += run(setting, optimizer, arms, seed, epochs, data)
                save(results, options.out)


if __name__ == "__main__":
    main()
