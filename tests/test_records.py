"""The headline numbers of the recorded runs, computed a second time from the records, in another way than the book."""

from __future__ import annotations

import json
import math
import re
import statistics as st
from collections import Counter
from itertools import combinations
from pathlib import Path

import nbformat
import pytest
from scipy import stats

BOOK = Path(__file__).resolve().parent.parent / "book"
FIVE_OPTIMIZERS = BOOK / "03-convergence" / "five-optimizers.ipynb"


def record(name):
    return json.loads((BOOK / "results" / f"{name}.json").read_text("utf8"))


def printed(chapter):
    """All that a chapter prints."""
    cells = nbformat.read(chapter, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "\n".join(output.text for output in outputs if output.output_type == "stream")


def final(runs, optimizer, arm, key, rate, epoch=-1):
    """By seed, at one rate."""
    mine = [r for r in runs if (r["optimizer"], r["arm"]) == (optimizer, arm) and rate in r["rates"]]
    return {r["seed"]: r[key][r["rates"].index(rate)][epoch] for r in mine}


def tuned(runs, optimizer, arm):
    """Test losses by seed, where the mean validation loss is smallest among the rates that never diverged, if any."""
    rates = sorted({rate for r in runs if (r["optimizer"], r["arm"]) == (optimizer, arm) for rate in r["rates"]})
    valid = {rate: final(runs, optimizer, arm, "validation_loss", rate).values() for rate in rates}
    best = min(((sum(v), rate) for rate, v in valid.items() if None not in v and len(v) == 5), default=None)
    return final(runs, optimizer, arm, "test_loss", best[1]) if best else {}


def minus(a, b):
    """Differences of two dictionaries by seed."""
    assert a.keys() == b.keys() and len(a) == 5
    return [a[seed] - b[seed] for seed in sorted(a)]


def t_interval(d):
    """Mean and half-width, from tables of t and the definition."""
    return st.mean(d), 2.7764451051977987 * st.stdev(d) / len(d) ** 0.5  # t with 4 degrees of freedom


def test_the_exact_teleport_under_sgd():
    runs = record("optimizers")["runs"]
    mean, half = t_interval(minus(tuned(runs, "sgd", "teleport"), tuned(runs, "sgd", "plain")))
    assert (mean, half) == pytest.approx((0.015, 0.008), abs=5e-4)
    assert re.search(r"SGD +teleport .*\+0\.015 ± 0\.008", printed(FIVE_OPTIMIZERS))


def test_the_steepest_corner_under_sgd_is_no_better_than_a_random_one_as_far_away():
    runs = record("optimizers")["runs"]
    steepest, chance, plain = (tuned(runs, "sgd", arm) for arm in ("teleport", "random", "plain"))
    mean, half = t_interval(minus(steepest, chance))
    assert abs(mean) < half
    assert f"MNIST         SGD           {mean:+.3f} ± {half:.3f}" in printed(FIVE_OPTIMIZERS).replace("−", "-")
    assert round(st.mean(minus(chance, plain)), 3) == 0.014  # what the text says


@pytest.mark.parametrize("name", ["optimizers", "optimizers-fashion_mnist", "optimizers-cifar10"])
def test_an_arm_without_all_its_seeds_is_called_missing(name):
    """By counting entries: at every rate of the published arms, an arm that is shown has five seeds."""
    runs = record(name)["runs"]
    title = {"optimizers": "MNIST", "optimizers-fashion_mnist": "Fashion-MNIST"}.get(name, "CIFAR-10")
    text = printed(FIVE_OPTIMIZERS).split(f"{title}: ")[1].split("\n\n")[0].splitlines()
    for label in ("SGD", "momentum", "AdaGrad", "RMSProp", "Adam"):
        seen = {}
        for run in (r for r in runs if r["optimizer"] == label.lower()):
            for rate in run["rates"]:
                seen.setdefault(run["arm"], {}).setdefault(rate, set()).add(run["seed"])
        full = {arm: {rate for rate, seeds in rates.items() if len(seeds) == 5} for arm, rates in seen.items()}
        grid = set.intersection(*(full.get(arm, set()) for arm in ("plain", "teleport", "paper")))
        row = next((line for line in text if line.startswith(f"  {label} ")), None)
        assert (row is not None) == bool(grid), label
        if row:
            count, *arms = re.split("; ", row.removeprefix(f"  {label}").strip())
            assert count == f"{len(grid)} rates" and set(arms) == {arm for arm, rates in full.items() if grid <= rates}


def test_no_arm_is_better_at_its_best_rate():
    for name in ("optimizers", "optimizers-fashion_mnist", "optimizers-cifar10"):
        runs = record(name)["runs"]
        seeds = {(r["optimizer"], r["arm"], r["seed"]) for r in runs if r["arm"] != "plain"}
        count = Counter(key[:2] for key in seeds)
        for optimizer, arm in (key for key, n in count.items() if n == 5):  # the record of others is growing
            arms, plain = (tuned(runs, optimizer, a) for a in (arm, "plain"))
            if arms.keys() == plain.keys() and len(arms) == 5:
                mean, half = t_interval(minus(arms, plain))
                assert mean + half > 0, (name, optimizer, arm)


def test_the_share_of_the_reset_in_the_gain_of_adagrad():
    runs = record("optimizers")["runs"]
    plain, reset, published = (
        final(runs, "adagrad", arm, "train_loss", 0.01, epoch=10) for arm in ("plain", "reset", "paper")
    )
    top, bottom = minus(reset, plain), minus(published, plain)

    def kept(ratio):
        """Whether a t test cannot tell reset - ratio * published from zero."""
        return stats.ttest_1samp([a - ratio * b for a, b in zip(top, bottom, strict=True)], 0).pvalue > 0.05

    held = [k for k in range(400) if kept(k / 100)]
    assert held == list(range(held[0], held[-1] + 1)), "an interval"
    found = re.search(r"share of the reset (\d+)% \((\d+)% to (\d+)%\)", printed(FIVE_OPTIMIZERS))
    share, low, high = map(int, found.groups())
    assert share == round(100 * st.mean(top) / st.mean(bottom))
    assert abs(low - held[0]) <= 1 and abs(high - held[-1]) <= 1


def test_holms_rule_by_its_closure():
    """A row is clear when every set of rows that holds it is, by Bonferroni: the closed test, by brute force."""
    p = [0.001, 0.02, 0.03, 0.2]
    closed = [
        max(min(1, len(s) * min(p[j] for j in s)) for n in range(1, 5) for s in combinations(range(4), n) if i in s)
        for i in range(4)
    ]
    from teleport_lite.book.evidence import holm

    assert holm(p) == pytest.approx(closed)


def test_the_flattest_point_is_below_plain_at_every_rate():
    searched = record("sgd_search")
    flat, rates = searched["config"]["arms"].index("flattest, radius 1, once"), searched["config"]["rates"]
    by_seed = [
        [run["test_loss"][flat][k][-1] - run["test_loss"][0][k][-1] for k in range(len(rates))]
        for run in searched["runs"]
    ]
    assert all(st.mean(d[k] for d in by_seed) < 0 for k in range(len(rates)))
    means = [st.mean(d) for d in by_seed]
    assert st.mean(means) == pytest.approx(-0.0105, abs=5e-5)
    assert stats.ttest_1samp(means, 0).pvalue == pytest.approx(0.030, abs=5e-4)
    assert "below plain at 6 of 6 rates, uncorrected p 0.030" in printed(FIVE_OPTIMIZERS)


def test_what_the_teleports_did():
    runs = record("optimizers")["runs"]
    gains = {}
    for run in runs:
        if run["arm"] in ("teleport", "paper"):
            table = run["teleports"]["squared_gradient_gain"]
            gains.setdefault((run["arm"], run["optimizer"]), []).extend(
                g for row in table for g in row if g is not None
            )
    medians = {key: st.median(values) for key, values in gains.items()}
    for (arm, optimizer), median in medians.items():
        low, high = (1.25, 1.41) if arm == "teleport" else (1.0, 1.07)
        assert low < median < high, (arm, optimizer)
        name = {"sgd": "SGD", "adagrad": "AdaGrad", "rmsprop": "RMSProp", "adam": "Adam"}.get(optimizer, optimizer)
        mnist = printed(FIVE_OPTIMIZERS).split("squared gradient x")[1].split("Fashion-MNIST")[0]
        (found,) = re.findall(rf"{name} +{arm} +(\d\.\d+) ", mnist)
        assert float(found) == pytest.approx(median, abs=6e-4)


@pytest.mark.parametrize(
    ("name", "optimizer", "arm"),
    [
        ("optimizers", "adagrad", "reset"),
        ("optimizers-fashion_mnist", "adam", "teleport"),
        ("optimizers-fashion_mnist", "adagrad", "teleport"),
        ("optimizers-cifar10", "momentum", "teleport"),
        ("optimizers-cifar10", "momentum", "random"),
    ],
)
def test_what_is_clear_over_all_rates(name, optimizer, arm):
    runs = record(name)["runs"]
    rates = sorted({rate for r in runs if (r["optimizer"], r["arm"]) == (optimizer, "plain") for rate in r["rates"]})
    by_seed: dict[int, list[float]] = {}
    for rate in rates:
        mine, plain = (final(runs, optimizer, a, "test_loss", rate) for a in (arm, "plain"))
        assert mine.keys() == plain.keys() and max(mine.values()) < 2.3026 and max(plain.values()) < 2.3026
        for seed in mine:
            by_seed.setdefault(seed, []).append(mine[seed] - plain[seed])
    mean, half = t_interval([st.mean(d) for d in by_seed.values()])
    assert abs(mean) > half
    label = {"adagrad": "AdaGrad", "adam": "Adam"}.get(optimizer, optimizer)
    tables = printed(FIVE_OPTIMIZERS).split("each at its best rate")
    table = tables[1 + ("optimizers", "optimizers-fashion_mnist", "optimizers-cifar10").index(name)]
    row = next(line for line in table.split("\n") if re.match(rf" +{label} +{arm} ", line))
    shown = f"{mean:+.3f} ± {half:.3f}".replace("-", "−")
    assert row.split("   ")[-1].startswith(shown), row


def test_the_long_trainings():
    """The ratio of Chapter 15, by Student's t test of the ratios' logarithms, from scipy."""
    runs = record("learned_long")["runs"]
    best = {}
    for arm in ("update", "update, tele", "update, random tele", "update, exact tele"):
        first = [r for r in runs if r["arm"] == arm and r["seed"] == 0]
        rate = sorted(first, key=lambda r: r["tuning"]["loss"][-1])[0]["rate"]
        best[arm] = {r["seed"]: r["test"]["as trained"]["loss"] for r in runs if (r["arm"], r["rate"]) == (arm, rate)}
    seeds = sorted(set.intersection(*(set(found) for found in best.values())))
    text = printed(BOOK / "05-learning/learning-to-teleport.ipynb")
    for arm, base in (
        ("update, tele", "update"),
        ("update, random tele", "update"),
        ("update, exact tele", "update"),
        ("update, exact tele", "update, tele"),
        ("update, tele", "update, random tele"),
    ):
        row = next(line for line in text.split("\n") if line.startswith(f"{arm} / {base} "))
        for k, step in enumerate((10, 30, 100)):
            logs = [math.log(best[arm][s][step] / best[base][s][step]) for s in seeds]
            test = stats.ttest_1samp(logs, 0.0)
            low, high = test.confidence_interval(0.95)
            mean = st.fmean(logs)
            expected = f"{math.exp(mean):.2f} [{math.exp(low):.2f}, {math.exp(high):.2f}]"
            assert re.findall(r"\d\.\d\d \[.*?\]", row)[k] == expected


def step_down(p):
    """By name: the smallest corrected level at which Holm's procedure, walked through from the smallest, rejects."""
    left, level, found = sorted(p, key=p.__getitem__), 0.0, {}
    for k, name in enumerate(left):
        level = found[name] = min(1.0, max(level, (len(left) - k) * p[name]))
    return found


def number(values):
    return [math.inf if v is None else v for v in values]


def test_one_teleport_of_two_networks():
    """Each row of Chapter 5: the difference at the best rates, and its p-value after the correction of all twelve."""
    gaps = {}
    for name, entry in record("mnist_teleport").items():
        arms, rates = list(entry["config"]["arms"]), entry["config"]["rates"]
        for epoch in (1, 10):
            ends = {}
            for a, arm in enumerate(arms):
                by_rate = [[run["validation_loss"][a][j][epoch] for run in entry["runs"]] for j in range(len(rates))]
                best = min(range(len(rates)), key=lambda j: sum(number(by_rate[j])))
                ends[arm] = [run["test_loss"][a][best][epoch] for run in entry["runs"]]
            gaps |= {
                (name, epoch, arm): [x - y for x, y in zip(ends[arm], ends["plain"], strict=True)] for arm in arms[1:]
            }
    p = step_down({key: stats.ttest_1samp(d, 0.0).pvalue for key, d in gaps.items()})
    text = printed(BOOK / "02-teleportation" / "teleporting-a-network.ipynb")
    for (name, epoch, arm), d in gaps.items():
        mean, half = t_interval(d)
        row = re.search(rf"^{name} *, epoch +{epoch}  {arm} .*$", text, re.M)[0]
        assert row.endswith(f"minus plain {mean:+.3f} +- {half:.3f}  Holm p {p[name, epoch, arm]:.3f}")


def test_the_race_under_sgd():
    """Epochs until an arm has the test loss that plain training ends at, seed by seed."""
    runs = record("optimizers")["runs"]
    grid = sorted({rate for r in runs if (r["optimizer"], r["arm"]) == ("sgd", "plain") for rate in r["rates"]})

    def curves(arm, key, rate):
        return {r["seed"]: r[key][r["rates"].index(rate)] for r in runs if (r["optimizer"], r["arm"]) == ("sgd", arm)}

    def arrival(arm, key, rate, target):
        found = curves(arm, key, rate)
        return [next((k for k, v in enumerate(number(found[s])) if v <= target[s]), 41) for s in range(5)]

    slow = min(grid, key=lambda rate: sum(c[-1] for c in curves("plain", "validation_loss", rate).values()))
    aims = {key: {s: c[-1] for s, c in curves("plain", key, slow).items()} for key in ("validation_loss", "test_loss")}
    text, epochs = printed(FIVE_OPTIMIZERS).split("epochs to plain's final test loss")[1], {}
    for arm in ("plain", "random", "teleport", "paper"):
        fast = min(grid, key=lambda rate: sum(arrival(arm, "validation_loss", rate, aims["validation_loss"])))
        epochs[arm] = arrival(arm, "test_loss", fast, aims["test_loss"])
        row = re.search(rf"^(?:SGD)? +{arm}  +rate {fast} .*$", text, re.M)[0]
        assert f" {st.median(epochs[arm]):2.0f}  ({min(epochs[arm])} to {max(epochs[arm])})" in row
        if arm != "plain":
            mean, half = t_interval([a - b for a, b in zip(epochs[arm], epochs["plain"], strict=True)])
            assert f"{mean:+5.1f} ± {half:4.1f}" in row


def test_a_convnet_and_a_transformer():
    runs = record("architectures")["runs"]
    text = printed(BOOK / "06-beyond" / "what-teleports-are-good-for.ipynb").replace("−", "-")
    for network, rule in (("convnet", "momentum"), ("transformer", "Adam")):
        ends = {}
        for arm in ("plain", "teleport", "random"):
            by_rate = {}
            for r in (r for r in runs if (r["network"], r["arm"]) == (network, arm)):
                by_rate.setdefault(r["rate"], {})[r["seed"]] = r
            best = min(by_rate.values(), key=lambda d: sum(number(r["validation_loss"][-1] for r in d.values())))
            ends[arm] = {seed: r["test_loss"][-1] for seed, r in best.items()}
        shown = [
            "{:+.3f} ± {:.3f}".format(*t_interval(minus(ends[arm], ends["plain"]))) for arm in ("teleport", "random")
        ]
        assert re.search(rf"^{rule}, {network} +\d\.\d+ +{re.escape(shown[0])} +{re.escape(shown[1])} ", text, re.M)
