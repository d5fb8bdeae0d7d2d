"""Which teleport helps plain SGD most? Objectives, radii and schedules side by side.

    TELEPORT_LITE_DATA=... python experiments/sgd_search.py [--data cifar10] [--quick]

MNIST, 784-16-10-10, leaky ReLU of slope 0.1, no biases, batches of 20, 40 epochs, as in `optimizers.py`. Every arm
moves along the exact scaling symmetry, once before the first step or at the start of every epoch, on a batch of 200
training images. All arms and rates of a seed train together. Results go to book/results/sgd_search.json, seed by seed;
what is there is not computed again. For other data see `datasets.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import SETTINGS, Setting, split
from ensemble import Ensemble, evaluate
from mnist_teleport import alone, command_line, mlp, provenance, resumed, save, scalings
from torch import Tensor, nn
from tqdm import tqdm

import teleport_lite as tl

RESULTS = Path(__file__).resolve().parent.parent / "book" / "results" / "sgd_search.json"
BATCH, EPOCHS, SEEDS, TELEPORT_BATCH = 20, 40, 5, 200
RATES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
LAST = "4.weight"
ARMS = {  # whether it teleports at every epoch, and how
    "plain": (False, None),
    "steepest, radius 0.5, once": (False, {"radius": 0.5}),
    "steepest, radius 1, once": (False, {"radius": 1.0}),
    "flattest, radius 1, once": (False, {"radius": 1.0, "maximize": False}),
    "flattest, radius 2, once": (False, {"radius": 2.0, "maximize": False}),
    "one-step loss, radius 0.5, once": (False, {"radius": 0.5, "objective": "one_step_loss", "maximize": False}),
    "small last layer, radius 1, once": (False, {"radius": 1.0, "objective": "last", "maximize": False}),
    "steepest, radius 0.1, every epoch": (True, {"radius": 0.1}),
    "flattest, radius 0.3, every epoch": (True, {"radius": 0.3, "maximize": False}),
    "balanced, every epoch": (True, {"radius": 1.0, "objective": "weight_norm", "maximize": False}),
    "random, radius 0.2, every epoch": (True, {"radius": 0.2, "search": "random"}),
}


def last_layer(params: dict[str, Tensor]) -> Tensor:
    return params[LAST].norm()


def move(
    net: nn.Module, symmetry: tl.Product, options: dict, rate: float, x: Tensor, y: Tensor, draw: torch.Generator
) -> None:
    """Teleport `net` in place; the objective that looks one step ahead is told the rate."""
    goals = {"last": last_layer, "one_step_loss": tl.one_step_loss(rate)}
    objective = options.get("objective", "gradient_norm")
    options = {**options, "objective": goals.get(objective, objective)}
    generator = draw if options.get("search") == "random" else None
    tl.teleport(net, lambda n: F.cross_entropy(n(x), y), symmetry, generator=generator, **options)


def run(setting: Setting, seed: int, epochs: int, data) -> dict:
    """All arms and rates of one seed; curves are [arms, rates, epochs + 1], null where a loss is not finite."""
    train, validation, test = data
    widths, rates = setting.training, setting.rates(RATES)
    start = [p.detach() for p in mlp(widths, seed).parameters()]
    members = len(ARMS) * len(rates)
    ensemble = Ensemble([p.expand(members, *p.shape).clone() for p in start], torch.tensor(rates).repeat(len(ARMS)))
    order, pick = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000 + seed)
    draw = torch.Generator().manual_seed(2000 + seed)
    curves: dict[str, list] = {"train_loss": [], "validation_loss": [], "test_loss": []}

    def record() -> None:
        found = (
            evaluate(ensemble.weights, train.x[:10000], train.y[:10000])[0],
            evaluate(ensemble.weights, validation.x, validation.y)[0],
            evaluate(ensemble.weights, test.x, test.y)[0],
        )
        for values, value in zip(curves.values(), found, strict=True):
            values.append(value)

    record()
    for epoch in tqdm(range(epochs), desc=f"seed {seed}", leave=False):
        x, y = train.batch(TELEPORT_BATCH, generator=pick)
        for m in range(members):
            often, options = list(ARMS.values())[m // len(rates)]
            finite = all(w[m].isfinite().all() for w in ensemble.weights)
            if options is not None and finite and (often or epoch == 0):
                net = alone(ensemble.weights, m)
                move(net, scalings(widths), options, rates[m % len(rates)], x, y, draw)
                for p, w in zip(net.parameters(), ensemble.weights, strict=True):
                    w[m] = p.detach()
        for xs, ys in train.batches(BATCH, generator=order):
            ensemble.step(xs, ys)
        record()

    def table(values: list[Tensor]) -> list:
        stacked = torch.stack(values, -1).unflatten(0, (len(ARMS), len(rates)))
        return [[[float(f"{v:.4g}") if abs(v) < 1e9 else None for v in c] for c in arm] for arm in stacked.tolist()]

    return {"seed": seed, **{name: table(values) for name, values in curves.items()}}


def main() -> None:
    options = command_line(
        __doc__, RESULTS, "a smoke test: synthetic images, one seed, one epoch", data=SETTINGS, seeds=SEEDS
    )
    seeds, epochs = (1, 1) if options.quick else (options.seeds, EPOCHS)
    data, setting = split(options.quick, options.data), SETTINGS[options.data]
    config = {
        "widths": list(setting.training),
        "batch": BATCH,
        "arms": list(ARMS),
        "rates": list(setting.rates(RATES)),
        "epochs": epochs,
        "teleport_batch": TELEPORT_BATCH,
        **provenance(data),
    }
    results = resumed(options.out, config)
    for seed in range(seeds):
        if all(r["seed"] != seed for r in results["runs"]):
            results["runs"].append(run(setting, seed, epochs, data))
            save(results, options.out)


if __name__ == "__main__":
    main()
