"""Do sharpness and curvature predict how well a network generalizes? A hundred networks, and many measures of each.

    TELEPORT_LITE_DATA=... python experiments/generalization.py [--quick]

The setting of arXiv:2305.13404, Table 1, on MNIST: 784-16-10-10, leaky ReLU of slope 0.1, no biases, SGD with rate 0.01
and batches of 20 for 40 epochs; the networks differ in their initial weights and train as one ensemble, on the same
batches. Results go to book/results/generalization.json; the trained weights are kept beside the output while the
measures are taken, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from ensemble import Ensemble, evaluate, forward
from mnist_teleport import command_line, mlp, save, split
from torch import Tensor
from tqdm import tqdm

import teleport_lite as tl
from teleport_lite import geometry
from teleport_lite.params import norm

RESULTS = Path(__file__).resolve().parent.parent / "book" / "results" / "generalization.json"
WIDTHS, BATCH, RATE, EPOCHS, NETWORKS = (784, 16, 10, 10), 20, 0.01, 40, 100
RADII, BATCHES, BATCH_SIZE = geometry.RADII, 200, 200  # of the sharpness: a direction for each of the batches
CURVES = 50
NAMES = ("0.weight", "2.weight", "4.weight")


def train(networks: int, epochs: int, data, path: Path) -> tuple[list[Tensor], float]:
    """The trained weights [networks, out, in], and how many minutes it took; saved after each epoch."""
    starts = [[p.detach() for p in mlp(WIDTHS, seed).parameters()] for seed in range(networks)]
    weights = [torch.stack(layer) for layer in zip(*starts, strict=True)]
    order = torch.Generator().manual_seed(0)
    done, minutes = 0, 0.0
    if path.exists():
        saved = torch.load(path)
        weights, done, minutes = saved["weights"], saved["epochs"], saved["minutes"]
        order.set_state(saved["order"])
    ensemble = Ensemble(weights, torch.full((networks,), RATE))
    for epoch in tqdm(range(done, epochs), desc="training", initial=done, total=epochs, leave=False):
        start = time.perf_counter()
        for x, y in data.batches(BATCH, generator=order):
            ensemble.step(x, y)
        minutes += (time.perf_counter() - start) / 60
        state = {"weights": weights, "epochs": epoch + 1, "minutes": minutes, "order": order.get_state()}
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    return weights, minutes


def directions(weights: list[Tensor], kind: str, generator: torch.Generator) -> list[Tensor]:
    """A direction of length 1 for each network.

    Isotropic; or from the positive orthant, where all entries are uniform in [0, 1); or relative, where each entry is
    in proportion to the weight that it moves (and its length is that of the direction before).
    """
    draw = torch.rand if kind == "positive" else torch.randn
    drawn = [draw(w.shape, generator=generator) for w in weights]
    length = sum(d.flatten(1).square().sum(1) for d in drawn).sqrt()[:, None, None]
    size = sum(w.flatten(1).square().sum(1) for w in weights).sqrt()[:, None, None]
    root = sum(w[0].numel() for w in weights) ** 0.5
    factors = [w.abs() * root / size if kind == "relative" else 1 for w in weights]
    return [d / length * f for d, f in zip(drawn, factors, strict=True)]


def sharpness(weights: list[Tensor], kind: str, data, batches: int) -> Tensor:
    """The mean loss around each network, over all radii and a direction for each batch."""
    draw, total = torch.Generator().manual_seed(1), torch.zeros(len(weights[0]))
    pick = torch.Generator().manual_seed(2)
    for _ in tqdm(range(batches), desc=f"sharpness, {kind}", leave=False):
        x, y = data.batch(BATCH_SIZE, generator=pick)
        way = directions(weights, kind, draw)
        for t in RADII:
            logits = forward([w + t * d for w, d in zip(weights, way, strict=True)], x)[-1]
            losses = F.cross_entropy(logits.transpose(1, 2), y.expand(len(logits), -1), reduction="none")
            total += losses.mean(1)
    return total / (batches * len(RADII))


def alone(weights: list[Tensor], m: int):
    """Network m as a module."""
    net = mlp(WIDTHS, 0)
    for p, w in zip(net.parameters(), weights, strict=True):
        p.data.copy_(w[m])
    return net


def balanced(weights: list[Tensor], symmetry: tl.Product) -> list[Tensor]:
    """Each network at the point of its scaling orbit where the weight norm is least."""
    rows = []
    for m in range(len(weights[0])):
        net = alone(weights, m)
        tl.teleport(net, lambda n: n(torch.ones(1, WIDTHS[0])).sum() * 0 + 1, symmetry, "weight_norm", False, radius=5)
        rows.append([p.detach() for p in net.parameters()])
    return [torch.stack(layer) for layer in zip(*rows, strict=True)]


def measures(weights: list[Tensor], data, batches: int, curves: int) -> dict[str, list[float]]:
    """All measures of all networks."""
    x, _ = data.batch(BATCH_SIZE, generator=torch.Generator().manual_seed(3))
    scalings = tl.find_symmetries(alone(weights, 0), x).continuous
    found = {f"sharpness_{kind}": sharpness(weights, kind, data, batches) for kind in ("isotropic", "positive")}
    found["sharpness_relative"] = sharpness(weights, "relative", data, batches)
    found["sharpness_balanced"] = sharpness(balanced(weights, scalings), "isotropic", data, batches)
    rows: dict[str, list[Tensor]] = {}
    xs, ys = data.batch(min(2000, len(data)), generator=torch.Generator().manual_seed(4))
    for m in tqdm(range(len(weights[0])), desc="curvature", leave=False):
        net = alone(weights, m)
        mixing = tl.minibatch_symmetries(net, x, compensate="incoming")[0]
        draw = torch.Generator().manual_seed(5)
        loss_fn = lambda n: F.cross_entropy(n(xs), ys)  # noqa: E731
        row = {
            "curvature_scaling": tl.curvature(net, scalings, samples=curves, generator=draw),
            "curvature_mixing": tl.curvature(net, mixing, samples=curves, generator=draw),
            "hessian_eigenvalue": tl.hessian_eigenvalues(net, loss_fn, generator=draw)[0],
            "hessian_trace": tl.hessian_trace(net, loss_fn, samples=20, generator=draw),
            "weight_norm": norm({n: p.detach() for n, p in net.named_parameters()}),
        }
        for name, value in row.items():
            rows.setdefault(name, []).append(value)
    found |= {name: torch.stack(values) for name, values in rows.items()}
    return {name: [float(f"{v:.6g}") for v in values] for name, values in found.items()}


def main() -> None:
    options = command_line(__doc__, RESULTS, "a smoke test: synthetic images, 3 networks, 1 epoch")
    quick = (3, 1, 2, 2)
    networks, epochs, batches, curves = quick if options.quick else (NETWORKS, EPOCHS, BATCHES, CURVES)
    data = split(options.quick)
    config = {
        "widths": list(WIDTHS),
        "batch": BATCH,
        "rate": RATE,
        "epochs": epochs,
        "networks": networks,
        "radii": list(RADII),
        "directions": batches,
        "curves": curves,
        "data": data[0].name,
        "images": [len(part) for part in data],
        "torch": torch.__version__.split("+")[0],
        "teleport_lite": tl.__version__,
    }
    if options.out.exists() and json.loads(options.out.read_text())["config"] == config:
        return
    checkpoint = options.out.with_suffix(".pt")
    weights, minutes = train(networks, epochs, data[0], checkpoint)
    losses = {
        f"{name}_{what}": [float(f"{v:.6g}") for v in values]
        for name, part in zip(("train", "validation", "test"), data, strict=True)
        for what, values in zip(("loss", "accuracy"), evaluate(weights, part.x, part.y), strict=True)
    }
    found = measures(weights, data[0], batches, curves)
    save({"config": config, "minutes_of_training": round(minutes, 1), "networks": losses | found}, options.out)
    checkpoint.unlink()


if __name__ == "__main__":
    main()
