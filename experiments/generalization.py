"""Do sharpness and curvature predict how well a network generalizes? A hundred networks, and many measures of each.

    TELEPORT_LITE_DATA=... python experiments/generalization.py [--data cifar10] [--quick]

The setting of arXiv:2305.13404, Table 1, on MNIST: 784-16-10-10, leaky ReLU of slope 0.1, no biases, SGD with rate 0.01
and batches of 20 for 40 epochs; the networks differ in their initial weights and train as one ensemble, on the same
batches. Results go to book/results/generalization.json; the trained weights are kept beside the output while the
measures are taken, so that an interrupted run goes on where it stopped. For other data see `datasets.py`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import SETTINGS, split
from ensemble import Ensemble, evaluate, forward, widths_of
from mnist_teleport import alone, command_line, mlp, provenance, resumed, save, scalings
from torch import Tensor
from tqdm import tqdm

import teleport_lite as tl
from teleport_lite import geometry
from teleport_lite.functional import norm

RESULTS = Path(__file__).resolve().parent.parent / "book" / "results" / "generalization.json"
BATCH, RATE, EPOCHS, NETWORKS = 20, 0.01, 40, 100
BATCHES, BATCH_SIZE = 200, 200  # of the sharpness: a direction for each of the batches
CURVES = 50


def train(widths, rate: float, networks: int, epochs: int, data, path: Path) -> tuple[list[Tensor], float]:
    """The trained weights [networks, out, in], and how many minutes it took; saved after each epoch."""
    starts = [[p.detach() for p in mlp(widths, seed).parameters()] for seed in range(networks)]
    weights = [torch.stack(layer) for layer in zip(*starts, strict=True)]
    order = torch.Generator().manual_seed(0)
    done, minutes = 0, 0.0
    if path.exists():
        saved = torch.load(path)
        weights, done, minutes = saved["weights"], saved["epochs"], saved["minutes"]
        order.set_state(saved["order"])
    ensemble = Ensemble(weights, torch.full((networks,), rate))
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


def sharpness(weights: list[Tensor], kind: str, data, batches: int, radii: Sequence[float]) -> Tensor:
    """The mean loss around each network, over all radii and a direction for each batch; the batches never differ."""
    draw, total = torch.Generator().manual_seed(1), torch.zeros(len(weights[0]))
    pick = torch.Generator().manual_seed(2)
    for _ in tqdm(range(batches), desc=f"sharpness, {kind}", leave=False):
        x, y = data.batch(BATCH_SIZE, generator=pick)
        way = directions(weights, kind, draw)
        for t in radii:
            logits = forward([w + t * d for w, d in zip(weights, way, strict=True)], x)[-1]
            losses = F.cross_entropy(logits.transpose(1, 2), y.expand(len(logits), -1), reduction="none")
            total += losses.mean(1)
    return total / (batches * len(radii))


def balanced(weights: list[Tensor]) -> list[Tensor]:
    """Each network at the point of its scaling orbit where the weight norm is least."""
    rows, x, symmetry = [], torch.ones(1, weights[0].shape[2]), scalings(widths_of(weights))
    for m in range(len(weights[0])):
        net = alone(weights, m)
        tl.teleport(net, lambda n: n(x).sum() * 0 + 1, symmetry, "weight_norm", False, radius=5)
        rows.append([p.detach() for p in net.parameters()])
    return [torch.stack(layer) for layer in zip(*rows, strict=True)]


def measures(weights: list[Tensor], data, batches: int, curves: int, radii: Sequence[float]) -> dict[str, list[float]]:
    """All measures of all networks."""
    x, _ = data.batch(BATCH_SIZE, generator=torch.Generator().manual_seed(3))
    kinds = ("isotropic", "positive", "relative")
    found = {f"sharpness_{kind}": sharpness(weights, kind, data, batches, radii) for kind in kinds}
    found["sharpness_balanced"] = sharpness(balanced(weights), "isotropic", data, batches, radii)
    base = sharpness(weights, "isotropic", data, batches, [0.0])  # the loss itself, on the same batches
    around = sharpness(weights, "isotropic", data, batches, [*radii, *(-t for t in radii)])
    found |= {"sharpness_base": base, "sharpness_added": around - base}  # in opposite pairs the slope cancels
    rows: dict[str, list[Tensor]] = {}
    xs, ys = data.batch(min(2000, len(data)), generator=torch.Generator().manual_seed(4))
    for m in tqdm(range(len(weights[0])), desc="curvature", leave=False):
        net = alone(weights, m)
        mixing = tl.minibatch_symmetries(net, x, compensate="incoming")[0]
        draw = torch.Generator().manual_seed(5)
        loss_fn = lambda n: F.cross_entropy(n(xs), ys)  # noqa: E731
        row = {
            "curvature_scaling": tl.curvature(net, scalings(widths_of(weights)), samples=curves, generator=draw),
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
    options = command_line(__doc__, RESULTS, "a smoke test: synthetic images, 3 networks, 1 epoch", data=SETTINGS)
    quick = (3, 1, 2, 2)
    networks, epochs, batches, curves = quick if options.quick else (NETWORKS, EPOCHS, BATCHES, CURVES)
    data, setting = split(options.quick, options.data), SETTINGS[options.data]
    (rate,), radii = setting.rates([RATE]), setting.radii(geometry.RADII)
    config = {
        "widths": list(setting.minima),
        "batch": BATCH,
        "rate": rate,
        "epochs": epochs,
        "networks": networks,
        "radii": list(radii),
        "directions": batches,
        "curves": curves,
        **provenance(data),
    }
    if "networks" in resumed(options.out, config):
        return
    checkpoint = options.out.with_suffix(".pt")
    weights, minutes = train(setting.minima, rate, networks, epochs, data[0], checkpoint)
    losses = {
        f"{name}_{what}": [float(f"{v:.6g}") for v in values]
        for name, part in zip(("train", "validation", "test"), data, strict=True)
        for what, values in zip(("loss", "accuracy"), evaluate(weights, part.x, part.y), strict=True)
    }
    found = measures(weights, data[0], batches, curves, radii)
    save({"config": config, "minutes_of_training": round(minutes, 1), "networks": losses | found}, options.out)
    checkpoint.unlink()


if __name__ == "__main__":
    main()
