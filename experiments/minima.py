"""Teleport a half-trained network to lower or raise sharpness or curvature, and train on.

    TELEPORT_LITE_DATA=... python experiments/minima.py [--data cifar10] [--quick]

After arXiv:2305.13404, Figure 4: leaky ReLU of slope 0.1, no biases, SGD in batches of 20; teleports after 20 epochs,
then more epochs. Each seed is a training of its own. At each rate all its arms start from the same half-trained network
and see the same batches. The arms `scaling` move once along the exact scaling symmetry. The arms `published` move as
the published code does: by the mini-batch symmetry, on 2000 fresh images in each of several rounds, with a step of SGD
between. Random arms have the size of another arm. Results go to book/results/minima.json, seed by seed; what is there
is not computed again. For other data see `datasets.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import REMARKS, SETTINGS, Setting, split
from ensemble import SLOPE, Ensemble, evaluate, forward, gradients, widths_of
from generalization import around, hessian_trace, published_curvature, unit
from mnist_teleport import alone, command_line, mlp, provenance, resumed, save, scalings
from torch import Tensor
from torch.func import jvp
from tqdm import tqdm

import teleport_lite as tl
from teleport_lite import geometry, objectives

RESULTS = Path(__file__).resolve().parent.parent / "book" / "results" / "minima.json"
BATCH, SEEDS = 20, 10
RATES = {"mnist": (0.001, 0.003, 0.01, 0.03, 0.1), "fashion_mnist": (0.003, 0.01, 0.03), "cifar10": (0.005, 0.02, 0.05)}
EPOCHS = {  # before the teleport, and after it those at whose end to look
    "mnist": (20, (1, 2, 5, 10, 20)),
    "fashion_mnist": (20, (1, 2, 5, 10)),
    "cifar10": (10, (1, 2, 5)),
}
TELEPORT_BATCH, RADIUS = 2000, 1.0
SMALL_RADII, DRAWS = (0.02, 0.05, 0.1, 0.15, 0.2), 10  # of the search that does not move, and its directions
PUBLISHED_RADII = tuple(round(0.1 * k, 1) for k in range(1, 10))
SCALINGS = {  # arms: objective and direction, or the arm whose size a random one has
    "sharper": ("trace", True),
    "flatter": ("trace", False),
    "flatter by phi": ("sharpness", False),
    "more curved": ("curvature", True),
    "less curved": ("curvature", False),
    "random, as sharper": "sharper",
    "random, as flatter": "flatter",
}
PUBLISHED = {  # arms: objective, rounds, steps a round, signed ascent rate; or the arm whose size a random one has
    "sharper": ("sharpness", 2, 10, 0.05),
    "flatter": ("sharpness", 10, 10, -0.05),
    "more curved": ("curvature", 10, 1, 0.2),
    "less curved": ("curvature", 5, 1, -0.05),
    "random, as flatter": "flatter",
}
ROUNDS, CAP, DIRECTIONS = 10, 2.0, 4  # published: 100 directions a step; from one orthant, they are nearly parallel
FEWER = ["fewer epochs than the paper's 20 + 20"]
FEW_DIRECTIONS = f"{DIRECTIONS} directions in each published step, not 100"
ARMS = ["plain", *(f"scaling, {goal}" for goal in SCALINGS), *(f"published, {goal}" for goal in PUBLISHED)]


def measures(weights: list[Tensor], x: Tensor, y: Tensor, data, radii: Sequence[float], draws: int) -> dict:
    """What a point is like, for each member, by the same images, directions and curves for all."""
    finite = torch.stack([w.flatten(1).isfinite().all(1) for w in weights]).all(0)
    weights = [w.nan_to_num(0.0, 0.0, 0.0) for w in weights]
    found: dict[str, Tensor] = {"loss": evaluate(weights, x, y)[0]}
    found["trace"] = torch.stack([hessian_trace(weights, part) for part in x.split(250)]).mean(0)
    found["squared_gradient"] = sum(g.square().sum((1, 2)) for g in gradients(weights, x, y)[1])
    for name, kind, at in (("phi", torch.randn, radii), ("phi_published", torch.rand, PUBLISHED_RADII)):
        draw = torch.Generator().manual_seed(7)
        rings = []
        for _ in range(draws):
            way = unit([w[:1] for w in weights], kind, draw)
            ways = [d.expand_as(w) for d, w in zip(way, weights, strict=True)]
            rings.append(around(weights, ways, x, y, at).mean(0))
        found[name] = torch.stack(rings).mean(0)
    nets = [alone(weights, m) for m in range(len(weights[0]))]
    seeded = lambda: torch.Generator().manual_seed(7)  # noqa: E731
    curved = [tl.curvature(net, scalings(widths_of(weights)), samples=100, generator=seeded()) for net in nets]
    found["psi"] = torch.stack(curved)
    found["psi_published"] = published_curvature(weights, data, draws)
    return {name: values.where(finite, math.nan).tolist() for name, values in found.items()}


# --- along the exact symmetry -----------------------------------------------------------------------------------------


def scaled(net, goal: str, x: Tensor, y: Tensor, radii: Sequence[float], draws: int, seed: int) -> dict:
    """Teleport `net` along its scalings as the arm says; whether it moved, and how far."""
    symmetry, objective, maximize = scalings(tuple(len(p) for p in [x[0], *net.parameters()])), *SCALINGS[goal]
    draw = torch.Generator().manual_seed(seed)
    objective = {
        "trace": lambda params: hessian_trace([p[None] for p in params.values()], x)[0],
        "sharpness": objectives.sharpness(radii, draws, generator=draw, chunk_size=5),
        "curvature": objectives.curvature(draws, generator=draw),
    }[objective]
    old = [p.detach().clone() for p in net.parameters()]
    report = tl.teleport(net, lambda n: F.cross_entropy(n(x), y), symmetry, objective, maximize, radius=RADIUS)
    rows = [(p.detach().norm(dim=1) / w.norm(dim=1)).log() for p, w in zip(net.parameters(), old, strict=True)]
    columns = (list(net.parameters())[-1].detach().norm(dim=0) / old[-1].norm(dim=0)).log()
    return {
        "accepted": report.accepted,
        "invariance_error": report.invariance_error,
        "objective": [report.objective_before, report.objective_after],
        "xi": [rows[0], -columns],
    }


@torch.no_grad()
def random_signs(net, xi: list[Tensor], x: Tensor, y: Tensor, seed: int) -> dict:
    """Teleport `net` by coordinates of the same sizes as `xi` and with random signs."""
    draw = torch.Generator().manual_seed(2000 + seed)
    xi = [(2.0 * torch.randint(2, v.shape, generator=draw) - 1) * v for v in xi]
    params = {name: p.detach() for name, p in net.named_parameters()}
    before = float(F.cross_entropy(net(x), y))
    moved = scalings(tuple(len(p) for p in [x[0], *params.values()])).act(params, tuple(xi))
    for name, p in net.named_parameters():
        p.data.copy_(moved[name])
    return {"accepted": True, "invariance_error": abs(float(F.cross_entropy(net(x), y)) / before - 1), "xi": xi}


# --- as published -----------------------------------------------------------------------------------------------------


def solve(matrix: Tensor, target: Tensor) -> Tensor:
    """The W with matrix @ W.T nearest to target."""
    return torch.linalg.solve(matrix.T @ matrix, matrix.T @ target).T


def mixed(weights: list[Tensor], h: Tensor, a: Tensor, elements: list[Tensor]) -> list[Tensor]:
    """The published action of g = I + T, for both hidden layers; `h` is X V^T, and `a` the inputs of the second layer.

    Each layer acts on V as g, and on U as the least-squares solution that keeps U A on the batch, from below.
    """
    v, u, top = weights
    one, two = elements
    u = solve(F.leaky_relu(h + h @ one.T, SLOPE), F.leaky_relu(h, SLOPE) @ u.T)
    inner = a @ u.T
    top = solve(F.leaky_relu(inner + inner @ two.T, SLOPE), F.leaky_relu(inner, SLOPE) @ top.T)
    return [v + one @ v, u + two @ u, top]


def sharpness_round(weights: list[Tensor], x: Tensor, y: Tensor, steps: int, lr: float, draw) -> tuple:
    """A round of ascent of the mean loss at radii 0.1 to 0.9 in directions of the positive orthant.

    Fresh directions in each step, the hidden states carried along by I + T, and an end where the mean exceeds `CAP`.

    Returns:
        The new weights, and the sum of the elements T of each layer.
    """
    a, sums = F.leaky_relu(x @ weights[0].T, SLOPE), [torch.zeros(len(w), len(w)).to(x) for w in weights[:-1]]
    for _ in range(steps):
        h = x @ weights[0].T
        elements = [torch.zeros_like(t).requires_grad_() for t in sums]
        moved, mean = mixed(weights, h, a, elements), 0.0
        still = h + h @ elements[0].T
        for _ in range(DIRECTIONS):
            way = [d[0] for d in unit([w[None] for w in weights], torch.rand, draw)]
            slope = x @ way[0].T
            for t in PUBLISHED_RADII:
                z = still + t * slope
                for w, d in zip(moved[1:], way[1:], strict=True):
                    z = F.leaky_relu(z, SLOPE) @ (w + t * d).T
                mean = mean + F.cross_entropy(z, y) / (DIRECTIONS * (len(PUBLISHED_RADII) + 1))  # 10 in their code
        if mean > CAP:
            break
        elements = [lr * g for g in torch.autograd.grad(mean, elements)]
        weights = mixed(weights, h, a, elements)
        a = a + a @ elements[0].T
        sums = [s + t for s, t in zip(sums, elements, strict=True)]
    return weights, sums


def curvature_round(weights: list[Tensor], x: Tensor, y: Tensor, steps: int, lr: float, draw) -> tuple:
    """One step up or down the curvature of the curve exp(tM) of the second hidden layer, along one positive M.

    Returns:
        The new weights, and tM in place of the element of each layer.
    """
    v, u, top = weights
    h = F.leaky_relu(x @ v.T, SLOPE) @ u.T
    m = torch.rand(len(u), len(u), generator=draw).to(x)
    target, slope, eye = F.leaky_relu(h, SLOPE) @ top.T, torch.ones_like(h).where(h > 0, SLOPE), torch.eye(len(u)).to(x)
    powers = [eye, m, m @ m / 2, m @ m @ m / 6]

    def point(t):  # to third order at t = 0
        g = sum(t**k * p for k, p in enumerate(powers))
        return torch.cat([solve(slope * (h @ g.T), target).flatten(), (g @ u).flatten()])

    def derivative(function):
        return lambda t: jvp(function, (t,), (torch.ones_like(t),))[1]

    def kappa(t):
        first, second = derivative(point)(t), derivative(derivative(point))(t)
        return (second - (first @ second) / (first @ first) * first).norm() / (first @ first)

    t = lr * derivative(kappa)(torch.zeros(()).to(x))
    g = torch.linalg.matrix_exp(t * m)
    moved = [v, g @ u, solve(F.leaky_relu(h @ g.T, SLOPE), target)]
    return moved, [torch.zeros(len(v), len(v)).to(x), t * m]


def random_round(weights: list[Tensor], x: Tensor, sizes: list[Tensor], draw) -> list[Tensor]:
    """One move by random elements as long as `sizes`."""
    drawn = [torch.randn(s.shape, generator=draw).to(x) for s in sizes]
    elements = [d * s.norm() / d.norm() for d, s in zip(drawn, sizes, strict=True)]
    return mixed(weights, x @ weights[0].T, F.leaky_relu(x @ weights[0].T, SLOPE), elements)


def published_round(weights: list[Tensor], number: int, x: Tensor, y: Tensor, seed: int) -> dict[str, tuple]:
    """Round `number` of the published arms; `weights` are those of all arms, [arms, out, in].

    Returns:
        For each arm that moves to a finite loss, its new weights, and how the loss on the batch changed, relatively.
    """
    moves = {"sharpness": sharpness_round, "curvature": curvature_round}
    x, found, sizes = x.double(), {}, {}
    for goal, options in PUBLISHED.items():
        own = [w[ARMS.index(f"published, {goal}")].double() for w in weights]
        draw = torch.Generator().manual_seed(100 * seed + number)
        if isinstance(options, str):
            moved = random_round(own, x, sizes[options], draw)
        elif number < options[1]:
            moved, sizes[goal] = moves[options[0]](own, x, y, *options[2:], draw)
        else:
            continue
        before, after = (F.cross_entropy(forward([v[None] for v in w], x)[-1][0], y) for w in (own, moved))
        if after.isfinite():
            moved = [w.detach().to(weights[0].dtype) for w in moved]
            found[f"published, {goal}"] = moved, float(after / before - 1)
    return found


# ----------------------------------------------------------------------------------------------------------------------


def rounded(value):
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    if isinstance(value, Tensor):
        return rounded(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def run(setting: Setting, rates, seed: int, before: int, moments, draws: int, data) -> list[dict]:
    """All arms of one seed; a row for each arm, with an entry for each rate.

    Losses and accuracies [rates, 2 + moments] are those before, right after, and after so many epochs.
    """
    train, validation, test = data
    began, order = time.perf_counter(), torch.Generator().manual_seed(seed)
    start = [p.detach().expand(len(rates), -1, -1).clone() for p in mlp(setting.minima, seed).parameters()]
    ensemble = Ensemble(start, torch.tensor(rates))
    for _ in tqdm(range(before), desc=f"seed {seed}, before", leave=False):
        for x, y in train.batches(BATCH, generator=order):
            ensemble.step(x, y)
    pick = torch.Generator().manual_seed(1000 + seed)
    x, y = train.batch(min(TELEPORT_BATCH, len(train)), generator=pick)
    rows: dict[str, dict] = {arm: {"seed": seed, "arm": arm, "moves": [], "losses_kept": []} for arm in ARMS}
    points: list[list[Tensor]] = []  # by arm and rate
    for arm in tqdm(ARMS, desc=f"seed {seed}, teleports", leave=False):
        for k in range(len(rates)):
            net, (family, _, goal) = alone(start, k), arm.partition(", ")
            if family == "scaling":
                options = x, y, setting.radii(SMALL_RADII), draws, seed
                source = SCALINGS[goal]
                if isinstance(source, str):
                    move = random_signs(net, rows[f"scaling, {source}"]["moves"][k]["xi"], x, y, seed)
                else:
                    move = scaled(net, goal, *options)
                rows[arm]["moves"].append(move)
            points.append([p.detach() for p in net.parameters()])
    weights = [torch.stack(layer) for layer in zip(*points, strict=True)]
    ensemble = Ensemble(weights, torch.tensor(rates).repeat(len(ARMS)))
    curves: dict[str, list] = {}

    def record(members: list[Tensor], repeat: int = 1) -> None:
        for name, part in (("train", train[:10000]), ("validation", validation), ("test", test)):
            for what, values in zip(("loss", "accuracy"), evaluate(members, part.x, part.y), strict=True):
                curves.setdefault(f"{name}_{what}", []).append(values.repeat(repeat))

    def look() -> dict[str, list]:
        return measures(weights, x, y, train, setting.radii(geometry.RADII), draws // 2 or 1)

    record(start, len(ARMS))
    record(weights)
    stages = {"right_after": look()}
    for epoch in tqdm(range(1, max(moments) + 1), desc=f"seed {seed}, after", leave=False):
        for step, (xs, ys) in enumerate(train.batches(BATCH, generator=order)):
            if epoch == 1 and step < ROUNDS:
                images = train.batch(min(TELEPORT_BATCH, len(train)), generator=pick)
                for k in range(len(rates)):
                    for arm, (moved, change) in published_round(
                        [w[k :: len(rates)] for w in weights], step, *images, seed
                    ).items():
                        for w, new in zip(weights, moved, strict=True):
                            w[ARMS.index(arm) * len(rates) + k] = new
                        rows[arm]["losses_kept"].append([k, change])
            if epoch == 1 and step == ROUNDS - 1:
                stages["after_rounds"] = look()
            ensemble.step(xs, ys)
        if epoch in moments:
            record(weights)
    by_arm = lambda values: torch.as_tensor(values).unflatten(0, (len(ARMS), len(rates)))  # noqa: E731
    for k, (arm, row) in enumerate(rows.items()):
        row |= {name: by_arm(torch.stack(values, 1))[k] for name, values in curves.items()}
        row |= {stage: {n: by_arm(v)[k] for n, v in found.items()} for stage, found in stages.items()}
        if arm.startswith("published"):
            kept = [[abs(change) for rate, change in row["losses_kept"] if rate == j] for j in range(len(rates))]
            row["moves"] = [{"rounds": len(v), "invariance_error": sum(v) / max(len(v), 1)} for v in kept]
        del row["losses_kept"]
        row["minutes"] = round((time.perf_counter() - began) / 60, 2)
    return rounded(list(rows.values()))


def main() -> None:
    options = command_line(
        __doc__, RESULTS, "a smoke test: synthetic images, one seed, few epochs", data=SETTINGS, seeds=SEEDS
    )
    few = (1, 1, (1,), 2)
    seeds, before, moments, draws = few if options.quick else (options.seeds, *EPOCHS[options.data], DRAWS)
    data, setting, rates = split(options.quick, options.data), SETTINGS[options.data], RATES[options.data]
    config = {
        "widths": list(setting.minima),
        "batch": BATCH,
        "rates": list(rates),
        "epochs": [before, max(moments)],
        "moments": list(moments),
        "teleport_batch": TELEPORT_BATCH,
        "radius": RADIUS,
        "radii": list(setting.radii(geometry.RADII)),
        "small_radii": list(setting.radii(SMALL_RADII)),
        "published_radii": list(PUBLISHED_RADII),
        "draws": draws,
        "directions": DIRECTIONS,
        "scalings": {k: list(v) if isinstance(v, tuple) else v for k, v in SCALINGS.items()},
        "published": {k: list(v) if isinstance(v, tuple) else v for k, v in PUBLISHED.items()},
        "arms": ARMS,
        "cut": "; ".join([*FEWER * (before + max(moments) < 40), FEW_DIRECTIONS]),
        **provenance(data),
        **REMARKS.get(options.data, {}),
    }
    results = resumed(options.out, config)
    for seed in range(seeds):
        if all(row["seed"] != seed for row in results["runs"]):
            results["runs"] += run(setting, rates, seed, before, moments, draws, data)
            save(results, options.out)


if __name__ == "__main__":
    main()
