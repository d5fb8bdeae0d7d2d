"""Do teleports speed up a convnet trained with momentum, and a transformer trained with Adam?

    TELEPORT_LITE_DATA=... python experiments/architectures.py [--network convnet] [--seeds 5] [--quick]

MNIST, 6000 images to train on, 3000 to choose with, 5000 to test on; batches of 50, six epochs. The symmetries are
those that `find_symmetries` finds. Teleports are on, with `Teleporter`, after the first step of each of the first three
epochs; all arms of a seed begin with the same weights and see the same batches. The radius is chosen first, on a seed
of its own, as that with which a teleported network can be brought to the least validation loss. Results go to
book/results/architectures.json, run by run; what is there is not computed again. They have this shape:

    config: what was asked for          networks: by network, its parameters, the group's dimension and its factors
    radius: by network, the one chosen  rates: by network, the learning rates of every arm
    trials: the runs that chose the radius, each as a run below, with the arm "teleport"
    runs: one for each network, arm, seed and rate:
        network, arm, seed, rate, radius (null without teleports)
        train_loss: by epoch, the mean over its batches as they came      (so one number fewer than in the next three)
        validation_loss, test_loss, test_accuracy: before the first step, and after each epoch
        seconds_training, seconds_teleporting: of the steps, and of the teleports; measuring is in neither
        teleports: of each, step, accepted, reason, invariance_error, gain (objective after / before), seconds

A number is null where it is not finite: once a loss is not, that run ends.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from mnist_teleport import command_line, provenance, resumed, save, split
from torch import Tensor, nn
from tqdm import tqdm

import teleport_lite as tl
from teleport_lite.book.data import Dataset

RESULTS = Path(__file__).resolve().parent.parent / "book" / "results" / "architectures.json"
BATCH, EPOCHS, SEEDS, TELEPORT_BATCH = 50, 6, 5, 200
TELEPORTS = 3  # one in each of the first epochs
RADII, TRIAL_SEED = (0.25, 0.5, 1.0), 100
ARMS = {  # by name, the options of its Teleporter; None without one
    "plain": None,
    "reset": None,  # a new optimizer whenever the others teleport
    "random": {"search": "random"},
    "teleport": {},
    "teleport and reset": {"state": "reset"},
    "balance": {"objective": "weight_norm", "maximize": False},
}


class Transformer(nn.Module):
    """An image is read as 28 tokens, its rows; two pre-norm layers of width 16 with four heads."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(28, width), nn.Parameter(0.02 * torch.randn(28, width))
        layer = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        self.layers = nn.Sequential(*(nn.TransformerEncoderLayer(width, 4, 2 * width, **layer) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.unflatten(1, (28, 28))) + self.position
        return self.head(self.norm(self.layers(x)).mean(1))


def convnet() -> nn.Module:
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10)),
    )


def momentum(params, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


NETWORKS = {  # how it is made, its optimizer, learning rates
    "convnet": (convnet, momentum, (0.005, 0.01, 0.02, 0.04, 0.08)),
    "transformer": (Transformer, torch.optim.Adam, (0.002, 0.004, 0.008, 0.016, 0.032)),
}


def made(network: str, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[network][0]()


@torch.no_grad()
def measured(net: nn.Module, data: Dataset) -> tuple[float, float]:
    """Mean loss and accuracy."""
    logits = torch.cat([net(x) for x in data.x.split(500)])
    return F.cross_entropy(logits, data.y).item(), (logits.argmax(1) == data.y).float().mean().item()


def run(network: str, arm: str, seed: int, rate: float, radius: float, symmetry: tl.Product, epochs: int, data) -> dict:
    """Train one network; its curves, and what each teleport did."""
    train, validation, test = data
    net, options = made(network, seed), ARMS[arm]
    optimizer = NETWORKS[network][1](net.parameters(), lr=rate)
    due = {epoch * (len(train) // BATCH) for epoch in range(TELEPORTS)}
    teleporter = None
    if options is not None:
        jump = torch.Generator().manual_seed(2000 + seed)
        teleporter = tl.Teleporter(
            net, optimizer, symmetry, every=due, radius=TELEPORTS * radius, generator=jump, **options
        )
    order, draw = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000 + seed)
    train_loss, curves, reports = [], [], []
    clock = {"seconds_training": 0.0, "seconds_teleporting": 0.0}
    step, finite = 0, True

    def record() -> None:
        curves.append((measured(net, validation)[0], *measured(net, test)))

    record()
    for _ in range(epochs):
        losses = []
        for x, y in train.batches(BATCH, generator=order):
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            middle = time.perf_counter()
            clock["seconds_training"] += middle - start
            weights = net.parameters() if step in due else ()
            finite = math.isfinite(losses[-1]) and all(p.isfinite().all() for p in weights)
            if not finite:
                break
            if step in due:
                x, y = train.batch(TELEPORT_BATCH, generator=draw)
            if arm == "reset" and step in due:
                optimizer.state.clear()
            if teleporter and (report := teleporter.step(lambda n, x=x, y=y: F.cross_entropy(n(x), y))):
                reports.append({"step": step, **described(report)})
            clock["seconds_teleporting"] += time.perf_counter() - middle
            step += 1
        if not finite:
            break
        train_loss.append(sum(losses) / len(losses))
        record()
    train_loss += [math.nan] * (epochs - len(train_loss))
    curves += [(math.nan,) * 3] * (epochs + 1 - len(curves))
    names = ("validation_loss", "test_loss", "test_accuracy")
    return {
        "network": network,
        "arm": arm,
        "seed": seed,
        "rate": rate,
        "radius": radius if teleporter else None,
        "train_loss": [rounded(v) for v in train_loss],
        **{name: [rounded(v) for v in curve] for name, curve in zip(names, zip(*curves, strict=True), strict=True)},
        **{name: round(seconds, 3) for name, seconds in clock.items()},
        "teleports": reports,
    }


def described(report: tl.Report) -> dict:
    return {
        "accepted": report.accepted,
        "reason": report.reason,
        "invariance_error": rounded(report.invariance_error),
        "gain": rounded(report.objective_after / report.objective_before),
        "seconds": rounded(report.seconds),
    }


def rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def least(runs: list[dict]) -> dict:
    """The run that ends with the least validation loss."""
    return min(runs, key=lambda r: math.inf if r["validation_loss"][-1] is None else r["validation_loss"][-1])


def main() -> None:
    quick = "a smoke test: synthetic images, one seed, one epoch, one rate and one radius"
    options = command_line(__doc__, RESULTS, quick, network=NETWORKS, seeds=SEEDS)
    seeds, epochs, some = (1, 1, 1) if options.quick else (options.seeds, EPOCHS, None)
    torch.set_num_threads(1)
    train, validation, test = split(options.quick)
    data = (train[:6000], validation[:3000], test[:5000])
    config = {
        "batch": BATCH,
        "epochs": epochs,
        "teleport_batch": TELEPORT_BATCH,
        "teleports": TELEPORTS,
        "radii": list(RADII[:some]),
        "trial_seed": TRIAL_SEED,
        "arms": list(ARMS),
        **provenance(data),
    }
    results = {"networks": {}, "radius": {}, "rates": {}, "trials": [], **resumed(options.out, config)}

    def complete(kind: str, todo: list[tuple]) -> None:
        """Run what is not among the results of that kind yet."""
        done = [(r["network"], r["arm"], r["seed"], r["rate"], r["radius"]) for r in results[kind]]
        todo = [(*t[:4], t[4] if ARMS[t[1]] is not None else None) for t in todo]
        for network, arm, seed, rate, radius in tqdm([t for t in todo if t not in done], desc=kind):
            found = run(network, arm, seed, rate, radius, symmetries[network], epochs, data)
            results[kind].append(found)
            save(results, options.out)

    symmetries = {}
    for network in options.network or NETWORKS:
        net, rates = made(network, 0), NETWORKS[network][2][:some]
        start = time.perf_counter()
        found = tl.find_symmetries(net, train.x[:2])  # without translations and rotations, which no teleport here uses
        symmetries[network] = tl.Product(f for f in found if f.group.kind in ("scaling", "mixing"))
        results["networks"][network] = {
            "parameters": sum(p.numel() for p in net.parameters()),
            "dimension": symmetries[network].dim,
            "factors": dict(Counter(str(factor.group) for factor in symmetries[network])),
            "seconds_to_find": round(time.perf_counter() - start, 3),
        }
        results["rates"][network] = list(rates)
        complete("trials", [(network, "teleport", TRIAL_SEED, rate, r) for r in RADII[:some] for rate in rates])
        results["radius"][network] = least([r for r in results["trials"] if r["network"] == network])["radius"]
    for seed in range(seeds):
        for network in symmetries:
            radius, rates = results["radius"][network], results["rates"][network]
            complete("runs", [(network, arm, seed, rate, radius) for arm in ARMS for rate in rates])


if __name__ == "__main__":
    main()
