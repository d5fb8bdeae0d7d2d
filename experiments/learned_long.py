"""One family of learned optimizers at the size of the paper's, with a meta-rate of its own for each arm.

    python experiments/learned_long.py [--arm "update, tele"] [--quick]

The problems are those of `learned.py`. An LSTM of 300 units emits the whole update; 640 batches of 4 problems and 100
steps, with an update of the network every 10 steps: 6,400 updates, for every arm alike. The published runs have 5,400
of one problem without a teleport, and 6,300 with one. Each arm is trained with each meta-rate, and the one that is best
on problems to tune on stands for it. Results go to book/results/learned_long.json, one training at a time; an
interrupted one goes on from its last checkpoint.
"""

from __future__ import annotations

import learned
from learned import EXACT, PAPER, RANDOM, STEPS, UNROLL, UNSEEN, UPDATE, WIDTH, one
from mnist_teleport import command_line, provenance, resumed, save

RESULTS = learned.RESULTS.with_name("learned_long.json")
TELEPORTS = {"update": {}, "update, tele": PAPER, "update, random tele": RANDOM, "update, exact tele": EXACT}
RATES, SEEDS = (1e-3, 3e-4, 3e-3), 5
SIZE = {"hidden": 300, "problems": 4, "batches": 640}


def main() -> None:
    options = command_line(
        __doc__, RESULTS, "a smoke test: one seed, one batch of problems", arm=TELEPORTS, seeds=SEEDS
    )
    seeds, steps, rates = (1, UNROLL, RATES[:1]) if options.quick else (options.seeds, STEPS, RATES)
    arms = {
        (arm, rate): SIZE | UPDATE | teleport | {"lr": rate} for rate in rates for arm, teleport in TELEPORTS.items()
    }
    if options.quick:
        arms = {key: arm | {"hidden": 8, "batches": 1} for key, arm in arms.items()}
    config = {
        "width": WIDTH,
        "steps": steps,
        "unroll": UNROLL,
        "unseen": UNSEEN,
        "arms": TELEPORTS,
        "size": SIZE,
        "rates": list(rates),
        **provenance(),
    }
    results = resumed(options.out, config)
    for seed in range(seeds):
        for (arm, rate), settings in arms.items():
            wanted = not options.arm or arm in options.arm
            if wanted and all((r["arm"], r["rate"], r["seed"]) != (arm, rate, seed) for r in results["runs"]):
                learned.ARMS[arm] = settings
                name = f"{options.out.stem}-{arm}-{rate}-{seed}.pt".replace(" ", "")
                checkpoint = options.out.with_name(name)
                found = one(arm, seed, settings["batches"], steps, checkpoint)
                checkpoint.unlink()
                found["test"] = {"as trained": found["test"]["as trained"]}
                results["runs"].append({**found, "rate": rate})
                save(results, options.out)


if __name__ == "__main__":
    main()
