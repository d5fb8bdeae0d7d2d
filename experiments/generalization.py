"""Do sharpness and curvature predict how well a network generalizes? A hundred networks, and many measures of each.

    TELEPORT_LITE_DATA=... python experiments/generalization.py [--data cifar10] [--quick]

The setting of arXiv:2305.13404, Table 1, on MNIST: 784-16-10-10, leaky ReLU of slope 0.1, no biases, SGD with rate 0.01
and batches of 20 for 40 epochs; the networks differ in their initial weights and see the same batches. Results go to
book/results/generalization.json, some measures at a time; the trained weights stay beside them, so that an interrupted
run goes on where it stopped. For other data see `datasets.py`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import REMARKS, SETTINGS, split
from ensemble import SLOPE, Ensemble, evaluate, forward, widths_of
from mnist_teleport import alone, command_line, mlp, provenance, resumed, save, scalings
from torch import Tensor
from tqdm import tqdm

import teleport_lite as tl
from teleport_lite import geometry
from teleport_lite.functional import norm

RESULTS = Path(__file__).resolve().parent.parent / "book" / "results" / "generalization.json"
BATCH, RATE, NETWORKS, BATCH_SIZE = 20, 0.01, 100, 200
EFFORT = {  # epochs; batches of the sharpness and the published curvature; curves; whether eigenvalues and probes
    "mnist": (40, 200, 50, True),
    "fashion_mnist": (40, 200, 50, True),
    "cifar10": (40, 25, 20, False),
}
CUT = {"cifar10": {"cut": "25 batches in place of 200, 20 curves in place of 50, no eigenvalues"}}
TOGETHER = 1_300_000  # weights of the first layers that are trained together: few enough to stay in the cache


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
    size = max(1, TOGETHER // (widths[0] * widths[1]))
    parts = [[w[k : k + size] for w in weights] for k in range(0, networks, size)]
    ensembles = [Ensemble(part, torch.full((len(part[0]),), rate)) for part in parts]
    for epoch in tqdm(range(done, epochs), desc="training", initial=done, total=epochs, leave=False):
        start, first = time.perf_counter(), order.get_state()
        for ensemble in ensembles:
            order.set_state(first)
            for x, y in data.batches(BATCH, generator=order):
                ensemble.step(x, y)
        minutes += (time.perf_counter() - start) / 60
        state = {"weights": weights, "epochs": epoch + 1, "minutes": minutes, "order": order.get_state()}
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    return weights, minutes


def unit(weights: list[Tensor], draw, generator: torch.Generator) -> list[Tensor]:
    """A direction of length 1 for each network; its entries are proportional to those of `draw`."""
    drawn = [draw(w.shape, generator=generator, dtype=w.dtype) for w in weights]
    length = sum(d.flatten(1).square().sum(1) for d in drawn).sqrt()[:, None, None]
    return [d.div_(length) for d in drawn]


def relative(weights: list[Tensor], way: list[Tensor]) -> list[Tensor]:
    """The direction with each entry in proportion to the weight that it moves; of the same expected length."""
    size = sum(w.flatten(1).square().sum(1) for w in weights).sqrt()[:, None, None]
    root = sum(w[0].numel() for w in weights) ** 0.5
    return [d * w.abs() * (root / size) for d, w in zip(way, weights, strict=True)]


def around(weights: list[Tensor], way: list[Tensor], x: Tensor, y: Tensor, radii: Sequence[float]) -> Tensor:
    """The losses L(w + t d) of all networks for all radii, [radii, networks]; the first layer is linear in t."""
    still, slope = (forward([w], x)[-1] for w in (weights[0], way[0]))
    losses = []
    for t in radii:
        h = still + t * slope
        for w, d in zip(weights[1:], way[1:], strict=True):
            h = torch.bmm(F.leaky_relu(h, SLOPE), (w + t * d).transpose(1, 2))
        losses.append((h.logsumexp(2) - h[:, range(len(y)), y]).mean(1))
    return torch.stack(losses)


def sharpness(weights: list[Tensor], data, batches: int, radii: Sequence[float]) -> dict[str, Tensor]:
    """The mean loss around each network, over all radii and a direction for each batch; the batches never differ.

    Directions are isotropic, of the networks as they are and balanced; or from the positive orthant, where all entries
    are uniform in [0, 1); or relative. `base` is the loss at the networks themselves on the same batches, and `added`
    what isotropic directions in opposite pairs add to it: in a pair the slope cancels. What is left is tiny; float64.
    """
    pick, draw, draw_positive = (torch.Generator().manual_seed(seed) for seed in (2, 1, 1))
    still, wide, both = balanced(weights), [w.double() for w in weights], [0.0, *radii, *(-t for t in radii)]
    total: dict[str, Tensor] = {}
    for _ in tqdm(range(batches), desc="sharpness", leave=False):
        x, y = data.batch(BATCH_SIZE, generator=pick)
        way = unit(weights, torch.randn, draw)
        found = around(wide, [d.double() for d in way], x.double(), y, both)
        means = {
            "isotropic": found[1 : 1 + len(radii)].mean(0),
            "balanced": around(still, way, x, y, radii).mean(0),
            "relative": around(weights, relative(weights, way), x, y, radii).mean(0),
            "positive": around(weights, unit(weights, torch.rand, draw_positive), x, y, radii).mean(0),
            "base": found[0],
            "added": found[1:].mean(0) - found[0],
        }
        for name, values in means.items():
            total[name] = total.get(name, 0) + values.double() / batches
    return {f"sharpness_{name}": values for name, values in total.items()}


def published_curvature(weights: list[Tensor], data, curves: int) -> Tensor:
    """The curvature of the orbit curves as the code published with arXiv:2305.13404 computes it, [networks].

    A mean over curves that mix all hidden layers at once: of each pair V, U with inputs X and H = XV^T (samples in
    rows) the derivatives are (X^+ (AM^T / s))^T and -UM, (X^+ (A (M^2)^T / s))^T and UM^2, with A and s the activation
    and its slope at H. Those of the pairs are added up, as if each were mixed alone. Each curve has a batch of its own,
    and its M is uniform in [0, 1) and divided by its Frobenius norm.
    """
    pick, draw = (torch.Generator().manual_seed(seed) for seed in (6, 7))
    weights, total = [w.double() for w in weights], 0
    for _ in tqdm(range(curves), desc="published curvature", leave=False):
        x = data.batch(BATCH_SIZE, generator=pick)[0].double()
        left, size, _ = torch.linalg.svd(x, full_matrices=False)
        size = torch.where(size > max(x.shape) * torch.finfo(torch.float32).eps * size[0], 1 / size.square(), 0)
        gram = (left * size) @ left.T  # (X X^T)^+, all that lengths and angles of X^+ B depend on
        states, dots, moving = forward(weights, x), torch.zeros(3, len(weights[0])), None
        for k, (v, u) in enumerate(pairwise(weights)):
            a = states[k + 1]
            m = torch.rand(v.shape[1], v.shape[1], generator=draw).double()
            m /= m.norm()
            s = torch.ones_like(a).where(a > 0, SLOPE)
            once, twice = a @ m.T / s, a @ (m @ m).T / s
            if k == 0:
                images = [torch.einsum("kl,mlh->mkh", gram, b) for b in (once, twice)]
                pairs = (once, images[0]), (once, images[1]), (twice, images[1])
                dots = torch.stack([(p * q).sum((1, 2)) for p, q in pairs])
            else:
                back = torch.linalg.pinv(states[k])
                moved = [f + (back @ b).transpose(1, 2) for f, b in zip(moving, (once, twice), strict=True)]
                dots += inner(*moved)
            moving = -u @ m, u @ m @ m
        speed, along, bend = dots + inner(*moving)
        total = total + (speed * bend - along.square()).sqrt() / speed**1.5 / curves
    return total


def inner(first: Tensor, second: Tensor) -> Tensor:
    """The products of two lists of matrices with themselves and each other: [3, networks]."""
    return torch.stack([(p * q).sum((1, 2)) for p, q in ((first, first), (first, second), (second, second))])


def balanced(weights: list[Tensor]) -> list[Tensor]:
    """Each network at the point of its scaling orbit where the weight norm is least."""
    rows, x, symmetry = [], torch.ones(1, weights[0].shape[2]), scalings(widths_of(weights))
    for m in range(len(weights[0])):
        net = alone(weights, m)
        tl.teleport(net, lambda n: n(x).sum() * 0 + 1, symmetry, "weight_norm", False, radius=5)
        rows.append([p.detach() for p in net.parameters()])
    return [torch.stack(layer) for layer in zip(*rows, strict=True)]


def hessian_trace(weights: list[Tensor], x: Tensor) -> Tensor:
    r"""The trace of the Hessian of the mean cross-entropy, exactly, [members]; differentiable.

    The outputs z are linear in each single weight, but for kinks, so $\partial^2 L$ is that of the loss along
    $\partial z$. For a layer with inputs a and $J_c$ the derivative of $z_c$ at its outputs, the second derivatives sum
    to $\|a\|^2$ times the variance of $J_c$ under the predicted probabilities.
    """
    *states, logits = forward(weights, x)
    p = logits.softmax(-1)[..., None]  # [members, batch, classes, 1]
    jacobian = torch.eye(logits.shape[-1]).to(x).expand(*p.shape[:2], -1, -1)
    total = torch.zeros(len(logits)).to(x)
    for k in range(len(weights) - 1, -1, -1):
        variance = (p * jacobian.square()).sum((2, 3)) - (p * jacobian).sum(2).square().sum(2)
        total = total + (states[k].square().sum(-1) * variance).mean(1)
        if k:
            slope = torch.ones_like(states[k]).where(states[k] > 0, SLOPE)
            jacobian = (jacobian @ weights[k][:, None]) * slope[:, :, None]
    return total


def traces(weights: list[Tensor], data) -> Tensor:
    """The exact traces of all networks on 2000 images."""
    x, _ = data.batch(min(2000, len(data)), generator=torch.Generator().manual_seed(4))
    parts = x.split(250 if len(x) % 250 == 0 else len(x))
    return torch.stack([hessian_trace(weights, part) for part in parts]).mean(0)


def one_by_one(weights: list[Tensor], data, curves: int, hessian: bool) -> dict[str, Tensor]:
    """Measures of one network at a time: curvature of orbits, if wanted the Hessian, the weight norm."""
    x, _ = data.batch(BATCH_SIZE, generator=torch.Generator().manual_seed(3))
    rows: dict[str, list[Tensor]] = {}
    xs, ys = data.batch(min(2000, len(data)), generator=torch.Generator().manual_seed(4))
    for m in tqdm(range(len(weights[0])), desc="one by one", leave=False):
        net = alone(weights, m)
        mixing = tl.minibatch_symmetries(net, x, compensate="incoming")[0]
        draw = torch.Generator().manual_seed(5)
        loss_fn = lambda n: F.cross_entropy(n(xs), ys)  # noqa: E731
        row = {
            "curvature_scaling": tl.curvature(net, scalings(widths_of(weights)), samples=curves, generator=draw),
            "curvature_mixing": tl.curvature(net, mixing, samples=curves, generator=draw),
            "weight_norm": norm({n: p.detach() for n, p in net.named_parameters()}),
        }
        if hessian:
            row["hessian_eigenvalue"] = tl.hessian_eigenvalues(net, loss_fn, generator=draw)[0]
            row["hessian_trace"] = tl.hessian_trace(net, loss_fn, samples=20, generator=draw)
        for name, value in row.items():
            rows.setdefault(name, []).append(value)
    return {name: torch.stack(values) for name, values in rows.items()}


def losses(weights: list[Tensor], data) -> dict[str, Tensor]:
    """Loss and accuracy of all networks on the three parts of the data."""
    return {
        f"{name}_{what}": values
        for name, part in zip(("train", "validation", "test"), data, strict=True)
        for what, values in zip(("loss", "accuracy"), evaluate(weights, part.x, part.y), strict=True)
    }


def main() -> None:
    options = command_line(__doc__, RESULTS, "a smoke test: synthetic images, 3 networks, 1 epoch", data=SETTINGS)
    quick = (3, 1, 2, 2, True)
    networks, epochs, batches, curves, hessian = quick if options.quick else (NETWORKS, *EFFORT[options.data])
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
        "published_curves": batches,
        **provenance(data),
        **REMARKS.get(options.data, {}),
        **({} if options.quick else CUT.get(options.data, {})),
    }
    results = resumed(options.out, config)
    results.pop("runs", None)
    found = results.setdefault("networks", {})
    weights: list[Tensor] = []
    pieces = {
        "test_loss": lambda: losses(weights, data),
        "sharpness_base": lambda: sharpness(weights, data[0], batches, radii),
        "curvature_published": lambda: {"curvature_published": published_curvature(weights, data[0], batches)},
        "hessian_trace_exact": lambda: {"hessian_trace_exact": traces(weights, data[0])},
        "weight_norm": lambda: one_by_one(weights, data[0], curves, hessian),
    }
    for name, piece in pieces.items():
        if name not in found:
            if not weights:
                path = options.out.with_suffix(".pt")
                weights, minutes = train(setting.minima, rate, networks, epochs, data[0], path)
                results["minutes_of_training"] = round(minutes, 1)
            for key, values in piece().items():
                found[key] = [float(f"{v:.6g}") for v in values]
            save(results, options.out)


if __name__ == "__main__":
    main()
