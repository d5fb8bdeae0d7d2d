"""One family of learned optimizers at the size of the paper's, with a meta-rate of its own for each arm.

    python experiments/learned_long.py [--arm "update, tele"] [--quick]

The problems are those of `learned.py`. An LSTM of 300 units emits the whole update; 640 batches of 4 problems and 100
steps, with an update of the network every 10 steps: 6,400 updates, for every arm alike. The published runs have 5,400
of one problem without a teleport, and 6,300 with one. Beside each kind of teleport, the mini-batch one of the paper and
the exact one, stands a random one of the same group and radius. Each arm is tuned alone: with the first seed it is
trained at each meta-rate, at another one as long as the best is at an edge of the grid, and the meta-rate that ends
lowest on problems to tune on is the arm's for the other seeds. Results go to book/results/learned_long.json, one
training at a time; an interrupted one goes on from its last checkpoint.
"""

from __future__ import annotations

import math

import learned
import torch
from learned import EXACT, PAPER, RANDOM, STEPS, UNROLL, UNSEEN, UPDATE, WIDTH, one
from mnist_teleport import command_line, provenance, resumed, save

RESULTS = learned.RESULTS.with_name("learned_long.json")
TELEPORTS = {
    "update": {},
    "update, tele": PAPER,
    "update, random tele": PAPER | {"teleports": "random"},
    "update, exact tele": EXACT,
    "update, random exact tele": RANDOM,
}
RATES, WIDEST, SEEDS = (3e-4, 1e-3, 3e-3), 6, 5
SIZE = {"hidden": 300, "problems": 4, "batches": 640}


def tuned(runs: list[dict], arm: str) -> dict[float, float]:
    """By meta-rate, the last loss on the problems to tune on, with the first seed; infinite where one diverged."""
    found = {r["rate"]: r["tuning"] for r in runs if r["arm"] == arm and r["seed"] == 0}
    return {rate: math.inf if t["diverged"] else t["loss"][-1] for rate, t in sorted(found.items())}


def rate_of(runs: list[dict], arm: str, seed: int, rates: tuple[float, ...]) -> float | None:
    """The meta-rate at which an arm is to be trained next with a seed, None when nothing is left to do."""
    ends = tuned(runs, arm)
    if missing := [rate for rate in rates if rate not in ends and seed == 0]:
        return missing[0]
    best = min(ends, key=ends.__getitem__)
    if seed == 0:
        edges = {min(ends): round(min(ends) / 3, 12), max(ends): round(max(ends) * 3, 12)}
        return edges.get(best) if 1 < len(ends) < WIDEST else None
    return None if any((r["arm"], r["seed"], r["rate"]) == (arm, seed, best) for r in runs) else best


def main() -> None:
    options = command_line(
        __doc__, RESULTS, "a smoke test: one seed, one batch of problems", arm=TELEPORTS, seeds=SEEDS
    )
    seeds, steps, rates = (1, UNROLL, RATES[:1]) if options.quick else (options.seeds, STEPS, RATES)
    size = SIZE | {"hidden": 8, "batches": 1} if options.quick else SIZE
    config = {
        "width": WIDTH,
        "steps": steps,
        "unroll": UNROLL,
        "unseen": UNSEEN,
        "arms": TELEPORTS,
        "size": SIZE,
        **provenance(),
    }
    results = resumed(options.out, config)
    for seed in range(seeds):
        for arm in options.arm or TELEPORTS:
            while (rate := rate_of(results["runs"], arm, seed, rates)) is not None:
                learned.ARMS[arm] = size | UPDATE | TELEPORTS[arm] | {"lr": rate}
                name = f"{options.out.stem}-{arm}-{rate}-{seed}.pt".replace(" ", "")
                checkpoint = options.out.with_name(name)
                with torch.backends.mkldnn.flags(enabled=False):  # whose LSTM is half as fast for batches of four
                    found = one(arm, seed, size["batches"], steps, checkpoint)
                checkpoint.unlink()
                found["test"] = {"as trained": found["test"]["as trained"]}
                results["runs"].append({**found, "rate": rate})
                save(results, options.out)


if __name__ == "__main__":
    main()
