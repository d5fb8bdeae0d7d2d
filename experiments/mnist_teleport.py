"""One teleport of a network on MNIST: what it changes at once, and what becomes of the ten epochs that follow.

    TELEPORT_LITE_DATA=... python experiments/mnist_teleport.py [--network 784-16-10-10] [--data cifar10] [--quick]

For every seed, all arms and learning rates start from the same function and see the same batches; they are trained
together as one ensemble. Results go to book/results/mnist_teleport.json, seed by seed as they come; what is there is
not computed again, so an interrupted run goes on where it stopped. For other data see `datasets.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import SETTINGS, split
from ensemble import SLOPE, evaluate, sgd_step, widths_of
from torch import Tensor, nn
from tqdm import tqdm

import teleport_lite as tl
from teleport_lite.book.data import Dataset
from teleport_lite.functional import hvp, loss_of, trainable, value_and_grad

RESULTS = Path(__file__).resolve().parent.parent / "book" / "results" / "mnist_teleport.json"
ARMS = {  # by name, the options of its teleport
    "plain": {},
    "teleport": {"radius": 1.0},
    "random": {"radius": 1.0, "search": "random"},
    "half": {"radius": 0.5},
    "balance": {"radius": 1.0, "objective": "weight_norm", "maximize": False},
}
RATES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
WIDE_RATES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
NETWORKS = {  # by name: widths, batch size, arms, learning rates
    "-".join(map(str, widths)): (widths, batch, arms, setting.rates(rates))
    for setting in SETTINGS.values()
    for widths, batch, arms, rates in (
        (setting.training, 20, tuple(ARMS), RATES),
        ((setting.training[0], 512, 512, 10), 100, ("plain", "teleport", "random"), WIDE_RATES),
    )
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


def alone(weights: list[Tensor], m: int) -> nn.Sequential:
    """Member m of an ensemble, as a module."""
    net = mlp(widths_of(weights), 0)
    for p, w in zip(net.parameters(), weights, strict=True):
        p.data.copy_(w[m])
    return net


@cache
def scalings(widths: tuple[int, ...]) -> tl.Product:
    """The neuron scalings of such a network."""
    return tl.find_symmetries(mlp(widths, 0), torch.ones(1, widths[0])).continuous


def loss_on(data: Dataset):
    return lambda net: F.cross_entropy(net(data.x), data.y)


def jump(widths, seed: int, train: Dataset, options: dict) -> tuple[nn.Sequential, tl.Report | None]:
    """The network of that seed, teleported with `options` on a batch of the training set."""
    net = mlp(widths, seed)
    if not options:
        return net, None
    x, y = train.batch(TELEPORT_BATCH, generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(1000 + seed)
    report = tl.teleport(net, lambda n: F.cross_entropy(n(x), y), generator=generator, **options)
    assert report.accepted, report
    return net, report


def slope(net: nn.Module, data: Dataset) -> tuple[float, float, float]:
    """The loss, the squared norm of its gradient g, and its curvature along g, which is g.Hg / g.g."""
    loss, params = loss_of(net, loss_on(data)), {name: p.detach() for name, p in trainable(net).items()}
    value, g = value_and_grad(loss, params)
    hg = hvp(loss, params, g)
    gg, ghg = (float(sum((a[n] * b[n]).sum() for n in params)) for a, b in ((g, g), (g, hg)))
    return float(value), gg, ghg / gg


def moves(widths, seed: int, train: Dataset, held_out: Dataset) -> list[dict]:
    """What teleports from the initial weights change, by how much, on a batch and on images never used."""
    rows = []
    start = slope(mlp(widths, seed), held_out)
    for arm, options in ARMS.items():
        for radius in RADII if arm in ("teleport", "random") else [options.get("radius")]:
            net, report = jump(widths, seed, train, options and {**options, "radius": radius})
            if report is None:
                continue
            with torch.no_grad():
                before, after = mlp(widths, seed)(held_out.x), net(held_out.x)
            end = slope(net, held_out)
            row = {
                "arm": arm,
                "radius": radius,
                "invariance_error": report.invariance_error,  # on the batch, relative
                "held_out_loss_change": abs(end[0] - start[0]) / start[0],
                "held_out_output_change": float((after - before).abs().max() / before.abs().max()),
                "held_out_squared_gradient_gain": end[1] / start[1],
                "held_out_curvature_gain": end[2] / start[2],
            }
            if report.objective == "gradient_norm":
                row["squared_gradient_gain"] = (report.objective_after / report.objective_before) ** 2
            rows.append({"seed": seed, **{k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}})
    return rows


def run(widths, batch: int, arms, rates, seed: int, epochs: int, data) -> dict:
    """Train all arms and rates of one seed; curves are [arms, rates, epochs + 1], null where a loss is not finite."""
    train, validation, test = data
    starts = [[p.detach() for p in jump(widths, seed, train, ARMS[arm])[0].parameters()] for arm in arms]
    weights = [torch.stack([start[k] for start in starts for _ in rates]) for k in range(len(widths) - 1)]
    lr = torch.tensor(rates).repeat(len(arms))
    curves: dict[str, list] = {name: [] for name in ("train_loss", "validation_loss", "test_loss", "test_accuracy")}

    def record() -> None:
        measured = (
            evaluate(weights, train.x[:10000], train.y[:10000])[0],
            evaluate(weights, validation.x, validation.y)[0],
            *evaluate(weights, test.x, test.y),
        )
        for values, found in zip(curves.values(), measured, strict=True):
            values.append(found)

    generator, start = torch.Generator().manual_seed(seed), time.perf_counter()
    record()
    for _ in tqdm(range(epochs), desc=f"seed {seed}", leave=False):
        for xs, ys in train.batches(batch, generator=generator):
            sgd_step(weights, xs, ys, lr)
        record()

    def table(values: list) -> list:
        stacked = torch.stack(values, -1).unflatten(0, (len(arms), len(rates)))
        return [[[float(f"{v:.5g}") if abs(v) < 1e9 else None for v in c] for c in arm] for arm in stacked.tolist()]

    minutes = round((time.perf_counter() - start) / 60, 2)
    return {"seed": seed, "minutes": minutes, **{name: table(values) for name, values in curves.items()}}


def save(results: dict, path: Path) -> None:
    """Write, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results))
    part.replace(path)


def provenance(data: Sequence[Dataset] = ()) -> dict:
    """What a record says of where it comes from."""
    found = {"data": data[0].name, "images": [len(part) for part in data]} if data else {}
    return {**found, "torch": torch.__version__.split("+")[0], "teleport_lite": tl.__version__}


def resumed(path: Path, config: dict) -> dict:
    """The record that is there, when it is of the same configuration, else one without runs."""
    results = json.loads(path.read_text()) if path.exists() else {}
    return results if results.get("config") == config else {"config": config, "runs": []}


def command_line(
    doc: str, results: Path, quick: str, *, data: Iterable[str] = (), **options: int | Iterable[str]
) -> argparse.Namespace:
    """What was asked for: `--out`, `--quick`, one of `data`, and for each of `options` a number, or some names."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in options.items():
        if isinstance(value, int):
            parser.add_argument(f"--{name}", type=int, default=value)
        else:
            parser.add_argument(f"--{name}", choices=list(value), action="append", help=f"this {name} only")
    if data:
        parser.add_argument("--data", choices=list(data), default="mnist", help="the images")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--out", type=Path, help=f"{results.name}, with other data {results.stem}-DATA.json")
    found = parser.parse_args()
    if found.quick and not found.out:
        parser.error("--quick needs --out, so that it does not replace the results")
    other = "" if getattr(found, "data", "mnist") == "mnist" else f"-{found.data}"
    found.out = found.out or results.with_stem(results.stem + other)
    return found


def main() -> None:
    options = command_line(
        __doc__,
        RESULTS,
        "a smoke test: synthetic images, one seed, one epoch",
        data=SETTINGS,
        network=NETWORKS,
        epochs=EPOCHS,
        seeds=SEEDS,
    )
    epochs, seeds = (1, 1) if options.quick else (options.epochs, options.seeds)

    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    data = split(options.quick, options.data)
    fit = [name for name, (widths, *_) in NETWORKS.items() if widths[0] == data[0].x.shape[1]]
    if wrong := set(options.network or ()) - set(fit):
        raise SystemExit(f"{', '.join(wrong)} does not fit {options.data}, {', '.join(fit)} do")
    for name in options.network or fit:
        widths, batch, arms, rates = NETWORKS[name]
        config = {
            "widths": list(widths),
            "batch": batch,
            "arms": {arm: ARMS[arm] for arm in arms},
            "rates": list(rates),
            "epochs": epochs,
            "teleport_batch": TELEPORT_BATCH,
            **provenance(data),
        }
        if results.get(name, {}).get("config") != config:
            results[name] = {"config": config, "cores": os.cpu_count(), "moves": [], "runs": []}
        entry = results[name]
        for seed in range(seeds):
            if all(row["seed"] != seed for row in entry["moves"]):
                entry["moves"] += moves(widths, seed, data[0], data[1])
                save(results, options.out)
        for seed in range(seeds):
            if all(r["seed"] != seed for r in entry["runs"]):
                entry["runs"].append(run(widths, batch, arms, rates, seed, epochs, data))
                save(results, options.out)


if __name__ == "__main__":
    main()
