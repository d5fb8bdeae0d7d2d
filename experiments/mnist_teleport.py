"""What one teleport does to a network on MNIST, and to the ten epochs that follow.

    TELEPORT_LITE_DATA=... python experiments/mnist_teleport.py [--network 784-16-10-10] [--quick]

For every seed, all arms and learning rates are trained together from the same initial weights on the same batches.
Results go to book/results/mnist_teleport.json, one entry a network and seed as soon as it is there; entries that are
there are not computed again, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from ensemble import SLOPE, evaluate, sgd_step
from torch import nn
from tqdm import tqdm

import teleport_lite as tl

RESULTS = Path(__file__).resolve().parent.parent / "book" / "results" / "mnist_teleport.json"
NETWORKS = {  # widths, batch size, learning rates
    "784-16-10-10": ((784, 16, 10, 10), 20, (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)),
    "784-512-512-10": ((784, 512, 512, 10), 100, (0.02, 0.05, 0.1, 0.2, 0.4)),
}
ARMS = {  # how each arm moves before training
    "plain": None,
    "teleport": {"radius": 1.0},
    "random": {"radius": 1.0, "search": "random"},
}
RADII = (0.25, 0.5, 1.0, 2.0)
SEEDS = 5
EPOCHS = 10
TELEPORT_BATCH = 200


def mlp(widths, seed: int) -> nn.Sequential:
    """Leaky ReLU, no biases, torch's own uniform initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [[nn.Linear(n, m, bias=False), nn.LeakyReLU(SLOPE)] for n, m in pairwise(widths)]
    return nn.Sequential(*[module for pair in layers for module in pair][:-1])


def split(quick: bool) -> tuple[tl.data.Dataset, tl.data.Dataset, tl.data.Dataset]:
    """50,000 images to train on, 10,000 to choose the learning rate with, 10,000 to test on."""
    if quick:
        generator = torch.Generator().manual_seed(0)
        data = tl.data.Dataset(
            "synthetic", torch.rand(900, 784, generator=generator), torch.randint(10, (900,), generator=generator)
        )
        return data[:500], data[500:700], data[700:]
    train, test = tl.data.load("mnist")
    return train[:50000], train[50000:], test


def loss_on(net, data) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(net(data.x), data.y))


def first_move(widths, seed: int, train, validation) -> list[dict]:
    """Teleports of every radius from the initial weights: what they change, and what they must not."""
    x, y = train.batch(TELEPORT_BATCH, generator=torch.Generator().manual_seed(seed))
    rows = []
    for radius in RADII:
        net = mlp(widths, seed)
        before = loss_on(net, validation)
        report = tl.teleport(net, lambda n: F.cross_entropy(n(x), y), radius=radius, tol=1e-4)
        after = loss_on(net, validation)
        rows.append(
            {
                "radius": radius,
                "accepted": report.accepted,
                "squared_gradient_gain": (report.objective_after / report.objective_before) ** 2,
                "invariance_error": report.invariance_error,
                "held_out_change": abs(after - before) / before,
            }
        )
    return rows


def run(widths, batch: int, rates, seed: int, epochs: int, data) -> dict:
    """Train all arms and rates of one seed; curves are [arms, rates, epochs + 1], infinite where training diverged."""
    train, validation, test = data
    x, y = train.batch(TELEPORT_BATCH, generator=torch.Generator().manual_seed(seed))
    starts = []
    for options in ARMS.values():
        net = mlp(widths, seed)
        if options is not None:
            generator = torch.Generator().manual_seed(1000 + seed)
            report = tl.teleport(net, lambda n: F.cross_entropy(n(x), y), generator=generator, **options)
            assert report.accepted, report
        starts.append([p.detach() for p in net.parameters()])
    weights = [torch.stack([start[k] for start in starts for _ in rates]) for k in range(len(widths) - 1)]
    lr = torch.tensor(rates).repeat(len(ARMS))
    curves: dict[str, list] = {name: [] for name in ("train_loss", "validation_loss", "test_loss", "test_accuracy")}

    def record() -> None:
        measured = (
            evaluate(weights, train.x[:10000], train.y[:10000])[0],
            evaluate(weights, validation.x, validation.y)[0],
            *evaluate(weights, test.x, test.y),
        )
        for name, values in zip(curves, measured, strict=True):
            curves[name].append(values.nan_to_num(torch.inf if "loss" in name else 0.0))

    generator, start = torch.Generator().manual_seed(seed), time.perf_counter()
    record()
    for _ in tqdm(range(epochs), desc=f"seed {seed}", leave=False):
        for xs, ys in train.batches(batch, generator=generator):
            sgd_step(weights, xs, ys, lr)
        record()

    def table(values: list) -> list:
        stacked = torch.stack(values, -1).unflatten(0, (len(ARMS), len(rates)))
        return [[[round(v, 5) if v < 1e4 else None for v in curve] for curve in arm] for arm in stacked.tolist()]

    return {
        "seed": seed,
        "minutes": round((time.perf_counter() - start) / 60, 2),
        "first_move": first_move(widths, seed, train, validation),
        **{name: table(values) for name, values in curves.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, action="append", help="one network only")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--quick", action="store_true", help="a smoke test on synthetic images")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    epochs, seeds = (1, 1) if options.quick else (options.epochs, options.seeds)

    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    data = split(options.quick)
    for name in options.network or NETWORKS:
        widths, batch, rates = NETWORKS[name]
        config = {
            "widths": list(widths),
            "batch": batch,
            "rates": list(rates),
            "arms": {arm: move or {} for arm, move in ARMS.items()},
            "epochs": epochs,
            "teleport_batch": TELEPORT_BATCH,
            "data": data[0].name,
            "torch": torch.__version__.split("+")[0],
        }
        entry = results.get(name)
        if entry is None or entry["config"] != config:
            entry = results[name] = {"config": config, "runs": []}
        done = {r["seed"] for r in entry["runs"]}
        for seed in range(seeds):
            if seed not in done:
                entry["runs"].append(run(widths, batch, rates, seed, epochs, data))
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
