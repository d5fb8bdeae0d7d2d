"""Does it help a learned optimizer to teleport? The regression problem of the paper, with the arms that tell why.

    python experiments/learned.py [--quick]

Y = U sigma(V X) with X, Y, V, U 20 x 20, all entries uniform in [0, 1), leaky ReLU of slope 0.1, squared loss. Arms:
gradient descent and Adam with rates tuned on a grid; an LSTM that reads the whole gradient; and one that reads it
coordinate by coordinate, which also runs on other widths. Each with no teleport, with learned ones (exact scalings, or
the mini-batch action that the authors use here) and with random ones. All meet the same 50 unseen problems, also with
other input scales and widths. Results go to book/results/learned.json, one arm of one meta-training seed at a time;
what is there is not computed again.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from mnist_teleport import command_line, provenance, resumed, save
from torch import nn
from tqdm import tqdm

import teleport_lite as tl
from teleport_lite.learned import LearnedOptimizer, Task, meta_train, on_batch, run
from teleport_lite.symmetries import scaling

RESULTS = Path(__file__).resolve().parent.parent / "book" / "results" / "learned.json"
WIDTH, SLOPE, STEPS, UNROLL, SEEDS, UNSEEN = 20, 0.1, 100, 10, 5, 50
WHOLE = {"hidden": 64, "problems": 16, "batches": 44}
EACH = {"hidden": 16, "problems": 8, "batches": 25, "coordinatewise": True}
RATE, UPDATE = {"emits": "rate", "size": 1e-4, "lr": 3e-4}, {"emits": "update", "size": 1e-2, "lr": 3e-3}
PAPER, EXACT = {"symmetry": "mini-batch", "radius": 0.01}, {"symmetry": "scaling", "radius": 0.1}
RANDOM = EXACT | {"teleports": "random"}
ARMS = {
    "LSTM(lr)": WHOLE | RATE,
    "LSTM(lr, tele)": WHOLE | RATE | PAPER,
    "LSTM(lr, exact tele)": WHOLE | RATE | EXACT,
    "LSTM(lr, small exact tele)": WHOLE | RATE | EXACT | {"radius": 0.01},
    "LSTM(update)": WHOLE | UPDATE,
    "LSTM(update, tele)": WHOLE | UPDATE | PAPER,
    "LSTM(update, exact tele)": WHOLE | UPDATE | EXACT,
    "LSTM(update, random tele)": WHOLE | UPDATE | RANDOM,
    "coordinatewise(update)": EACH | UPDATE,
    "coordinatewise(update, exact tele)": EACH | UPDATE | EXACT,
    "coordinatewise(update, random tele)": EACH | UPDATE | RANDOM,
}
GRIDS = {  # optimizer and rates
    "GD": (torch.optim.SGD, (3e-5, 1e-4, 1.5e-4, 2e-4, 2.5e-4, 3e-4, 3.5e-4, 4e-4, 5e-4)),
    "Adam": (torch.optim.Adam, (0.01, 0.02, 0.03, 0.04, 0.06, 0.1)),
}
SETTINGS = {  # scale of the inputs, hidden width
    "as trained": (1.0, WIDTH),
    "inputs x 0.5": (0.5, WIDTH),
    "inputs x 2": (2.0, WIDTH),
    "hidden 10": (1.0, 10),
    "hidden 40": (1.0, 40),
}
V, U = "0.weight", "2.weight"


def loss(params, data):
    x, y = data
    return 0.5 * (y - F.leaky_relu(x @ params[V].mT, SLOPE) @ params[U].mT).square().sum()


def sampler(problems: int, scale: float = 1.0, width: int = WIDTH):
    """Draws a batch of problems: weights, and (inputs, targets), samples in rows."""

    def sample(generator: torch.Generator):
        def uniform(*shape):
            return torch.rand(problems, *shape, generator=generator)

        params = {V: uniform(width, WIDTH), U: uniform(WIDTH, width)}
        return params, (scale * uniform(WIDTH, WIDTH), uniform(WIDTH, WIDTH))

    return sample


def task_of(kind: str | None, problems: int, scale: float = 1.0, width: int = WIDTH):
    """The problems, and the symmetry of one of them; `kind` is None, scaling or mini-batch."""
    if kind is None:
        return Task(loss, sampler(problems, scale, width)), None
    if kind == "scaling":
        exact = tl.Product([scaling(width, V, U)])
        return Task(loss, sampler(problems, scale, width), exact), exact
    shape = [nn.Linear(WIDTH, width, bias=False), nn.LeakyReLU(SLOPE), nn.Linear(width, WIDTH, bias=False)]
    paper = tl.minibatch_symmetries(nn.Sequential(*shape), torch.rand(WIDTH, WIDTH), compensate="incoming")
    return Task(loss, sampler(problems, scale, width), lambda data: on_batch(paper, data[0])), paper


def learner(arm: str, seed: int) -> LearnedOptimizer:
    """An untrained optimizer."""
    options = {k: v for k, v in ARMS[arm].items() if k not in ("lr", "problems", "batches")}
    kind = options.pop("symmetry", None)
    if kind is None:
        options["teleports"] = "none"
    torch.manual_seed(seed)
    params = {V: torch.zeros(WIDTH, WIDTH), U: torch.zeros(WIDTH, WIDTH)}
    return LearnedOptimizer(params, task_of(kind, 1)[1], **options)


def hand_made(name: str, rate: float, params, data, steps: int) -> torch.Tensor:
    """The losses of all problems before every step and after the last, of an optimizer of torch."""
    params = {k: p.clone().requires_grad_() for k, p in params.items()}
    optimizer = GRIDS[name][0](params.values(), lr=rate)
    values = []
    for _ in range(steps):
        losses = torch.func.vmap(loss)(params, data)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        values.append(losses.detach())
    return torch.stack([*values, torch.func.vmap(loss)(params, data).detach()])


def summary(losses: torch.Tensor) -> dict:
    """Geometric means over the problems that did not diverge: whose losses all stay below ten times the first."""
    bad = ~(losses <= 10 * losses[0]).all(0)
    curve = losses[:, ~bad].log().mean(1).exp() if not bad.all() else losses[:, 0] * float("nan")
    return {
        "loss": [float(f"{v:.4g}") if v == v else None for v in curve.tolist()],
        "final": [float(f"{v:.4g}") if abs(v) < 1e12 else None for v in losses[-1].tolist()],
        "diverged": int(bad.sum()),
    }


def unseen(setting: str):
    scale, width = SETTINGS[setting]
    return sampler(UNSEEN, scale, width)(torch.Generator().manual_seed(12345))


def problems_to_tune_on():
    """64 problems that no arm is trained or tested on."""
    return sampler(64)(torch.Generator().manual_seed(54321))


def fits(arm: str) -> list[str]:
    """The settings in which an arm runs."""
    return [s for s, (_, width) in SETTINGS.items() if width == WIDTH or ARMS[arm].get("coordinatewise")]


def baselines(steps: int) -> list[dict]:
    """GD and Adam at the rate whose geometric mean loss after the last step is best on problems to tune on."""
    runs = []
    for name, (_, rates) in GRIDS.items():
        params, data = problems_to_tune_on()
        ends = {}
        for rate in rates:
            losses = hand_made(name, rate, params, data, steps)
            ends[rate] = float(losses[-1].log().mean().exp()) if losses.isfinite().all() else None
        best = min((e, r) for r, e in ends.items() if e is not None)[1]
        found = {s: summary(hand_made(name, best, *unseen(s), steps)) for s in SETTINGS}
        runs.append(
            {"arm": name, "seed": None, "rate": best, "grid": {str(r): e for r, e in ends.items()}, "test": found}
        )
    return runs


def one(arm: str, seed: int, batches: int, steps: int, checkpoint: Path | None = None) -> dict:
    """Meta-train one arm with one seed, and test it; `tuning` is how it does on the problems to tune on."""
    options = ARMS[arm]
    kind = options.get("symmetry")
    optimizer = learner(arm, seed)
    start = time.perf_counter()
    history = meta_train(
        optimizer,
        task_of(kind, options["problems"])[0],
        batches=batches,
        steps=steps,
        unroll=UNROLL,
        lr=options["lr"],
        generator=torch.Generator().manual_seed(seed),
        every=5,
        checkpoint=checkpoint,
        progress=lambda r: tqdm(r, desc=f"{arm}, seed {seed}", leave=False),
    )
    seconds = time.perf_counter() - start
    tuning = run(optimizer, task_of(kind, 64)[0], *problems_to_tune_on(), steps, torch.Generator().manual_seed(seed))
    return {
        "arm": arm,
        "seed": seed,
        "score": [float(f"{s:.4g}") for s in history.score],
        "failures": history.failures,
        "seconds": float(f"{seconds:.3g}"),
        "parameters": sum(p.numel() for p in optimizer.parameters()),
        "tuning": summary(tuning),
        "test": {s: summary(learned_run(optimizer, arm, seed, s, steps)) for s in fits(arm)},
    }


def learned_run(optimizer: LearnedOptimizer, arm: str, seed: int, setting: str, steps: int) -> torch.Tensor:
    """The losses of all unseen problems of a setting, before every step and after the last."""
    scale, width = SETTINGS[setting]
    task = task_of(ARMS[arm].get("symmetry"), UNSEEN, scale, width)[0]
    return run(optimizer, task, *unseen(setting), steps, torch.Generator().manual_seed(1000 + seed))


def milliseconds_a_step(steps: int, turns: int) -> dict[str, float]:
    """The time of a step of all unseen problems together, by arm, all arms in turns: medians."""
    actions = {name: partial(hand_made, name, rates[0], *unseen("as trained")) for name, (_, rates) in GRIDS.items()}
    actions |= {arm: partial(learned_run, learner(arm, 0), arm, 0, "as trained") for arm in ARMS}
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in tqdm(range(turns), desc="times", leave=False):
        for name, action in actions.items():
            start = time.perf_counter()
            action(steps=steps)
            times[name].append(1e3 * (time.perf_counter() - start) / steps)
    return {name: float(f"{median(found):.3g}") for name, found in times.items()}


def main() -> None:
    options = command_line(
        __doc__, RESULTS, "a smoke test: one seed, one batch of problems, ten steps", arm=ARMS, seeds=SEEDS
    )
    seeds, steps = (1, UNROLL) if options.quick else (options.seeds, STEPS)
    config = {
        "width": WIDTH,
        "steps": steps,
        "unroll": UNROLL,
        "unseen": UNSEEN,
        "arms": ARMS,
        "settings": {name: list(value) for name, value in SETTINGS.items()},
        **provenance(),
    }
    results = resumed(options.out, config)
    if not results["runs"]:
        results["runs"] = baselines(steps)
        save(results, options.out)
    if "milliseconds_a_step" not in results:
        results["milliseconds_a_step"] = milliseconds_a_step(*((2, 1) if options.quick else (20, 7)))
        save(results, options.out)
    for seed in range(seeds):
        for arm in options.arm or ARMS:
            if all((r["arm"], r["seed"]) != (arm, seed) for r in results["runs"]):
                results["runs"].append(one(arm, seed, 1 if options.quick else ARMS[arm]["batches"], steps))
                save(results, options.out)


if __name__ == "__main__":
    main()
