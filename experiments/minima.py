"""Teleport a half-trained network to lower or raise sharpness or curvature, and train on.

    TELEPORT_LITE_DATA=... python experiments/minima.py [--data cifar10] [--quick]

The protocol of arXiv:2305.13404, Figure 4, on MNIST: 784-16-10-10, leaky ReLU of slope 0.1, no biases, SGD with rate
0.01 and batches of 20; a teleport after 20 epochs, 20 more epochs after it. For each seed all arms start from the same
half-trained network and see the same batches. The arms `scaling` move along the exact scaling symmetry; the arms
`mixing` along the mini-batch symmetry of the paper, on the same 2000 images. Two controls: no teleport, and random
teleports of the same radius. Results go to book/results/minima.json, seed by seed; what is there is not computed again.
For other data see `datasets.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import SETTINGS, Setting, split
from ensemble import Ensemble, evaluate
from mnist_teleport import alone, command_line, mlp, provenance, resumed, save
from torch import nn
from tqdm import tqdm

import teleport_lite as tl
from teleport_lite import objectives

RESULTS = Path(__file__).resolve().parent.parent / "book" / "results" / "minima.json"
BATCH, RATE, BEFORE, AFTER, SEEDS = 20, 0.01, 20, 20, 10
TELEPORT_BATCH = 2000
RADII, DRAWS = (0.02, 0.05, 0.1, 0.15, 0.2), 20
RADIUS = {"scaling": 1.0, "mixing": 0.05}  # a mixing changes the loss on other images, the more the larger its radius
GOALS = {
    "random": None,
    "sharper": ("sharpness", True),
    "flatter": ("sharpness", False),
    "more curved": ("curvature", True),
    "less curved": ("curvature", False),
}
ARMS = ["plain", *(f"{family}, {goal}" for family in RADIUS for goal in GOALS)]


def symmetry_of(family: str, net: nn.Module, x) -> tl.Product:
    if family == "scaling":
        return tl.find_symmetries(net, x[:1]).continuous
    return tl.minibatch_symmetries(net, x)


def measures(net: nn.Module, symmetry: tl.Product, x, y, radii: Sequence[float], draws: int) -> dict[str, float]:
    """Sharpness on the batch and curvature of the orbits, of the same directions and curves for all arms."""
    draw = torch.Generator().manual_seed(7)
    phi = tl.sharpness(
        net, lambda n: F.cross_entropy(n(x), y), radii=radii, directions=5 * draws, generator=draw, chunk_size=10
    )
    psi = tl.curvature(net, symmetry, samples=5 * draws, generator=draw)
    return {"sharpness": float(phi), "curvature": float(psi)}


def teleport(net: nn.Module, arm: str, x, y, seed: int, radii: Sequence[float], draws: int) -> dict:
    """Teleport `net` as the arm says; what it changed. `draws` is how many directions or curves an objective has."""
    family, _, goal = arm.partition(", ")
    family = family if goal else "scaling"
    symmetry = symmetry_of(family, net, x)
    row: dict = {"before": measures(net, symmetry, x, y, radii, draws)}
    if goal:
        draw, options = torch.Generator().manual_seed(seed), {"radius": RADIUS[family], "tol": math.inf}
        if GOALS[goal] is None:
            report = tl.teleport(
                net, lambda n: F.cross_entropy(n(x), y), symmetry, generator=draw, search="random", **options
            )
        else:
            name, maximize = GOALS[goal]
            objective = (
                objectives.sharpness(radii, draws, generator=draw, chunk_size=5)
                if name == "sharpness"
                else objectives.curvature(draws, generator=draw)
            )
            report = tl.teleport(net, lambda n: F.cross_entropy(n(x), y), symmetry, objective, maximize, **options)
        row |= {
            "accepted": report.accepted,
            "reason": report.reason,
            "invariance_error": report.invariance_error,
            "seconds": report.seconds,
        }
    return row | {"after": measures(net, symmetry, x, y, radii, draws)}


def rounded(value):
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def run(setting: Setting, seed: int, before: int, after: int, draws: int, data) -> list[dict]:
    """All arms of one seed; losses and accuracies are those before, right after, and after each epoch that follows."""
    train, _, test = data
    (rate,), radii = setting.rates([RATE]), setting.radii(RADII)
    order = torch.Generator().manual_seed(seed)
    ensemble = Ensemble(
        [p.detach()[None].clone() for p in mlp(setting.minima, seed).parameters()], torch.tensor([rate])
    )
    for _ in tqdm(range(before), desc=f"seed {seed}, before", leave=False):
        for x, y in train.batches(BATCH, generator=order):
            ensemble.step(x, y)
    start = ensemble.weights
    x, y = train.batch(min(TELEPORT_BATCH, len(train)), generator=torch.Generator().manual_seed(1000 + seed))
    rows, nets = [], []
    for arm in tqdm(ARMS, desc=f"seed {seed}, teleports", leave=False):
        net = alone(start, 0)
        rows.append({"seed": seed, "arm": arm, **teleport(net, arm, x, y, seed, radii, draws)})
        nets.append([p.detach() for p in net.parameters()])
    ensemble = Ensemble([torch.stack(layer) for layer in zip(*nets, strict=True)], torch.full((len(ARMS),), rate))
    curves: dict[str, list] = {"train_loss": [], "test_loss": [], "test_accuracy": []}

    def record(weights) -> None:
        found = (evaluate(weights, train.x[:10000], train.y[:10000])[0], *evaluate(weights, test.x, test.y))
        for values, value in zip(curves.values(), found, strict=True):
            values.append(value.expand(len(ARMS)))

    record(start)
    record(ensemble.weights)
    for _ in tqdm(range(after), desc=f"seed {seed}, after", leave=False):
        for xs, ys in train.batches(BATCH, generator=order):
            ensemble.step(xs, ys)
        record(ensemble.weights)
    for name, values in curves.items():
        for row, curve in zip(rows, torch.stack(values, 1).tolist(), strict=True):
            row[name] = curve
    return rounded(rows)


def main() -> None:
    options = command_line(
        __doc__, RESULTS, "a smoke test: synthetic images, one seed, few epochs", data=SETTINGS, seeds=SEEDS
    )
    seeds, before, after, draws = (1, 1, 1, 1) if options.quick else (options.seeds, BEFORE, AFTER, DRAWS)
    data, setting = split(options.quick, options.data), SETTINGS[options.data]
    config = {
        "widths": list(setting.minima),
        "batch": BATCH,
        "rate": setting.rates([RATE])[0],
        "epochs": [before, after],
        "teleport_batch": TELEPORT_BATCH,
        "radius": RADIUS,
        "radii": list(setting.radii(RADII)),
        "draws": draws,
        "arms": ARMS,
        **provenance(data),
    }
    results = resumed(options.out, config)
    for seed in range(seeds):
        if all(row["seed"] != seed for row in results["runs"]):
            results["runs"] += run(setting, seed, before, after, draws, data)
            save(results, options.out)


if __name__ == "__main__":
    main()
