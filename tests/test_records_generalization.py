"""The headline numbers of chapters 13 to 15, computed a second time from the records, by other routes."""

from __future__ import annotations

import json
import math
import re
import statistics
from functools import cache
from pathlib import Path

import nbformat
import numpy as np
import pytest
from scipy import stats
from test_records import step_down

BOOK = Path(__file__).resolve().parent.parent / "book"
T_9, T_4 = 2.262157, 2.776445  # Student's t, two-sided 95%, from a printed table
PREDICT, MINIMA = "04-generalization/does-it-predict.ipynb", "04-generalization/teleporting-minima.ipynb"
LEARN = "05-learning/learning-to-teleport.ipynb"
NUMBER = re.compile(r"[+-]?\d+\.\d+")


def record(name: str) -> dict:
    path = BOOK / "results" / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{name} is not recorded yet")
    return json.loads(path.read_text("utf8"))


def lines(chapter: str) -> list[str]:
    """What the chapter printed, as it is stored."""
    notebook = nbformat.read(BOOK / chapter, 4)
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "stream"]
    return "".join(o.text for o in outputs).splitlines()


def printed(chapter: str, start: str, occurrence: int = 0) -> list[float]:
    """The decimal numbers of a printed line, after its label."""
    found = [line for line in lines(chapter) if line.lstrip().startswith(start)]
    assert len(found) > occurrence, f"no line begins with {start!r}"
    return [float(v) for v in NUMBER.findall(found[occurrence].lstrip()[len(start) :])]


def fisher(r: float, n: int) -> tuple[float, float]:
    """The ends of the 95% interval of a correlation by Fisher's transformation."""
    return math.tanh(math.atanh(r) - 1.96 / math.sqrt(n - 3)), math.tanh(math.atanh(r) + 1.96 / math.sqrt(n - 3))


def partial(a, b, c) -> float:
    """The partial correlation of a and b given c, from the inverse of the covariance matrix."""
    precision = np.linalg.inv(np.cov([a, b, c]))
    return float(-precision[0, 1] / math.sqrt(precision[0, 0] * precision[1, 1]))


# --- chapter 13 -------------------------------------------------------------------------------------------------------

ROWS = {
    "sharpness, isotropic": "sharpness_isotropic",
    "sharpness, positive": "sharpness_positive",
    "trace, 20 probes": "hessian_trace",
    "curvature, scaling": "curvature_scaling",
    "curvature, mixing": "curvature_mixing",
    "weight norm": "weight_norm",
}


@pytest.mark.parametrize("label", ROWS)
def test_correlations_of_the_table(label):
    networks = record("generalization")["networks"]
    measure, validation, train = (networks[k] for k in (ROWS[label], "validation_loss", "train_loss"))
    gap = [v - t for v, t in zip(validation, train, strict=True)]
    found = printed(PREDICT, label, 1)  # after the table of means
    for k, other in enumerate((train, validation, gap)):
        r = statistics.correlation(measure, other)
        assert found[3 * k] == pytest.approx(r, abs=0.0051)
        assert found[3 * k + 1 : 3 * k + 3] == pytest.approx(fisher(r, len(measure)), abs=0.08)  # bootstrap there


def test_what_the_text_of_chapter_13_says():
    networks = {k: np.array(v) for k, v in record("generalization")["networks"].items()}
    gap = networks["validation_loss"] - networks["train_loss"]
    said = {"sharpness_isotropic": (0.98, 0.84, -0.04), "sharpness_added": (0.61, 0.62, 0.15)}
    for measure, values in said.items():
        for other, value in zip((networks["train_loss"], networks["validation_loss"], gap), values, strict=True):
            assert round(statistics.correlation(networks[measure], other), 2) == value
    given = partial(networks["sharpness_added"], networks["validation_loss"], networks["train_loss"])
    assert round(given, 2) == 0.23
    assert round(partial(networks["sharpness_added"], gap, networks["train_loss"]), 2) == 0.23  # Proposition 13.4
    text = "".join(cell.source for cell in nbformat.read(BOOK / PREDICT, 4).cells)
    assert all(value in text for value in ("$+0.84$", "$-0.04$", "$+0.62$", "$+0.15$"))


@pytest.mark.parametrize(
    "label", [name for name in ROWS if name not in ("sharpness, isotropic", "sharpness, positive")]
)
def test_the_second_look_at_pooled_images(label):
    networks = {k: np.array(v) for k, v in record("generalization")["networks"].items()}
    fresh = (10_000 * networks["validation_loss"] + 10_000 * networks["test_loss"]) / 20_000
    value = partial(networks[ROWS[label]], fresh, networks["train_loss"])
    rows = [line for line in lines(PREDICT) if line.startswith(label)]
    assert f"{value:5.2f} [" in "".join(rows)


def test_what_the_exact_trace_and_the_norm_tell_beyond_the_training_loss():
    """By regression: the slope of the loss on new images on a measure, with the training loss in the model."""
    said = {"generalization": (0.30, 0.24, -0.03), "generalization-fashion_mnist": (0.32, 0.36, 0.05)}
    for name, values in said.items():
        networks = {k: np.array(v) for k, v in record(name)["networks"].items()}
        fresh = (networks["validation_loss"] + networks["test_loss"]) / 2
        for measure, value in zip(("hessian_trace_exact", "weight_norm", "sharpness_isotropic"), values, strict=True):
            columns = np.stack([networks[measure], networks["train_loss"], np.ones(100)], 1)
            slope, *_ = np.linalg.lstsq(columns, fresh, rcond=None)[0]
            error = (fresh - columns @ np.linalg.lstsq(columns, fresh, rcond=None)[0]).std() * math.sqrt(100 / 97)
            t = slope / (error * math.sqrt(np.linalg.inv(columns.T @ columns)[0, 0]))
            assert t / math.sqrt(t**2 + 97) == pytest.approx(value, abs=0.006)  # r from t
            assert (abs(t) > 1.985) == (measure != "sharpness_isotropic")  # Student's t, 97 degrees of freedom


@pytest.mark.parametrize("data", ["mnist", "fashion_mnist", "cifar10"])
def test_each_data_set(data):
    found = record("generalization" if data == "mnist" else f"generalization-{data}")
    networks, title = (
        found["networks"],
        {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}[data],
    )
    assert found["config"].get("images_from", "") == ("a copy that went through JPEG once" if data == "cifar10" else "")
    text = lines(PREDICT)
    start = next(k for k, line in enumerate(text) if line.startswith(f"{title}: "))
    assert text[start].startswith(f"{title}: {len(networks['test_loss'])} of 100 networks")
    labels = {"sharpness, isotropic": "sharpness_isotropic", "curvature, as published": "curvature_published"}
    for label, measure in labels.items():
        line = next(line for line in text[start:] if line.lstrip().startswith(label))
        if measure not in networks:
            assert "not recorded yet" in line
            continue
        r = statistics.correlation(networks[measure], networks["validation_loss"])
        assert float(NUMBER.findall(line)[0]) == pytest.approx(r, abs=0.0051)


# --- chapter 14 -------------------------------------------------------------------------------------------------------


def minima(data: str):
    """By arm and seed, and [seed][rate] of a key after the last epoch; infinite where training failed."""
    runs = {(r["arm"], r["seed"]): r for r in record({"cifar": "minima-cifar10", "mnist": "minima"}[data])["runs"]}

    def last(arm: str, key: str) -> list[list[float]]:
        return [[math.inf if c[-1] is None else c[-1] for c in runs[arm, seed][key]] for seed in range(10)]

    return runs, last


def tuned_minima(last, arm: str) -> list[float]:
    means = [statistics.mean(column) for column in zip(*last(arm, "validation_loss"), strict=True)]
    return [row[means.index(min(means))] for row in last(arm, "test_loss")]


def shown(differences: list[float]) -> str:
    half = T_9 * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{statistics.mean(differences):+.3f} ± {half:.3f}".replace("-", "−")


MINIMA_ROWS = {  # data, arm, by what it is reduced: the verdict
    ("cifar", "scaling, sharper", "plain"): "worse, both",
    ("cifar", "scaling, flatter", "plain"): "better, over rates",
    ("cifar", "scaling, more curved", "plain"): "worse, best rates",
    ("cifar", "scaling, less curved", "plain"): "not decided",
    ("cifar", "scaling, sharper", "scaling, random, as sharper"): "not decided",
    ("cifar", "scaling, less curved", "scaling, random, as sharper"): "better, both",
    ("cifar", "scaling, flatter", "scaling, random, as flatter"): "better, over rates",
    ("cifar", "scaling, more curved", "scaling, random, as flatter"): "not decided",
    ("cifar", "scaling, sharper", "scaling, less curved"): "worse, both",
    ("mnist", "scaling, sharper", "plain"): "worse, best rates",
    ("mnist", "scaling, flatter", "plain"): "worse, over rates",
    ("mnist", "scaling, flatter by phi", "plain"): "worse, best rates",
    ("mnist", "scaling, more curved", "plain"): "better, over rates",
    ("mnist", "scaling, less curved", "plain"): "not decided",
    ("mnist", "scaling, random, as sharper", "plain"): "worse, best rates",
    ("mnist", "scaling, sharper", "scaling, less curved"): "not decided",
    ("mnist", "scaling, sharper", "scaling, random, as sharper"): "better, over rates",
    ("mnist", "scaling, more curved", "scaling, random, as flatter"): "better, over rates",
    ("mnist", "published, flatter", "published, random, as flatter"): "not decided",
}
GUESS = math.log(10)  # the loss of a network that guesses


@cache
def all_comparisons(data: str):
    """By pair of arms: what is shown at the best rates and over the rates, and the verdict by one correction of all."""
    runs, last = minima(data)
    size = {"sharper": "as sharper", "less curved": "as sharper", "flatter": "as flatter", "more curved": "as flatter"}
    pairs = [(arm, "plain") for arm in sorted({arm for arm, _ in runs} - {"plain"})]
    pairs += [(f"scaling, {goal}", f"scaling, random, {other}") for goal, other in size.items()]
    pairs += [("published, flatter", "published, random, as flatter"), ("scaling, sharper", "scaling, less curved")]
    found, p = {}, {}
    for pair in pairs:
        tables = [last(arm, "test_loss") for arm in pair]
        good = [k for k in range(len(tables[0][0])) if all(row[k] < GUESS for table in tables for row in table)]
        at_best = [a - b for a, b in zip(*(tuned_minima(last, arm) for arm in pair), strict=True)]
        over = [statistics.mean(a[k] - b[k] for k in good) for a, b in zip(*tables, strict=True)] if good else at_best
        found[pair] = at_best, over
        for k, values in enumerate(found[pair]):
            failed = not np.isfinite(values).all() or (k and not good)
            p[pair, k] = 1.0 if failed else stats.ttest_1samp(values, 0.0).pvalue
    corrected, shown_as = step_down(p), {}
    for pair, both in found.items():
        signs = [np.sign(statistics.mean(both[k])) if corrected[pair, k] < 0.05 else 0 for k in (0, 1)]
        signs[0] = 0 if any(at_an_edge(last, arm) for arm in pair) else signs[0]
        word = {1: "worse", -1: "better", 0: "not decided"}[np.sign(sum(signs))]
        where = ", both" if all(signs) else ", best rates" if signs[0] else ", over rates" if signs[1] else ""
        shown_as[pair] = both, [corrected[pair, k] for k in (0, 1)], word + where
    return shown_as


def at_an_edge(last, arm: str) -> bool:
    means = [statistics.mean(column) for column in zip(*last(arm, "validation_loss"), strict=True)]
    return means.index(min(means)) in (0, len(means) - 1)


@pytest.mark.parametrize("case", MINIMA_ROWS)
def test_minima(case):
    data, arm, base = case
    both, p, verdict = all_comparisons(data)[arm, base]
    text = lines(MINIMA)
    starts = [k for k, line in enumerate(text) if "test loss minus plain's, which has its best rate at" in line]
    text = text[starts[0] : starts[1]] if data == "cifar" else text[starts[1] :]
    if base == "scaling, less curved":
        label = "sharper minus less curved"
    else:
        label, heads = arm, [k for k, line in enumerate(text) if line == "minus the random arm of the same size"]
        text = text[: heads[0]] if base == "plain" else text[heads[-1 if arm.startswith("published") else 0] :]
    row = next(line for line in text if line.startswith(label + " ") and "±" in line)
    cells = [f"{shown(values)}  {q:.3f}" for values, q in zip(both, p, strict=True)]
    assert row[len(label) :].split() == [*" ".join(cells).split(), *MINIMA_ROWS[case].split()]
    assert verdict == MINIMA_ROWS[case]


def test_the_trace_is_not_the_dial():
    """Two arms as sharp and as far away: the one to weakly curved points ends lower, on each seed."""
    runs, last = minima("cifar")
    traces = {
        arm: statistics.geometric_mean(
            after / before
            for seed in range(10)
            for after, before in zip(
                runs[arm, seed]["right_after"]["trace"], runs["plain", seed]["right_after"]["trace"], strict=True
            )
        )
        for arm in ("scaling, sharper", "scaling, less curved", "scaling, flatter")
    }
    assert 5.5 < traces["scaling, less curved"] < 7 and 5.5 < traces["scaling, sharper"] < 7
    assert 0.5 < traces["scaling, flatter"] < 0.7
    sharper, less = (tuned_minima(last, f"scaling, {goal}") for goal in ("sharper", "less curved"))
    assert all(a < b for a, b in zip(less, sharper, strict=True))
    text = "".join(cell.source for cell in nbformat.read(BOOK / MINIMA, 4).cells)
    for data in ("cifar", "mnist"):  # the two differences that the text says
        (differences, _), *_ = all_comparisons(data)["scaling, sharper", "scaling, less curved"]
        assert shown(differences).removeprefix("+") in text


@pytest.mark.parametrize("data", ["cifar", "mnist"])
def test_what_became_of_the_published_moves(data):
    runs, last = minima(data)
    for arm in sorted({arm for arm, _ in runs if arm.startswith("published")}):
        failed = [sum(map(math.isinf, column)) for column in zip(*last(arm, "test_loss"), strict=True)]
        row = [line for line in lines(MINIMA) if line.startswith(arm + " ") and "[" in line][data == "mnist"]
        assert row.endswith(str(failed)) and row.split("[")[0].split()[-1] == str(sum(failed)), row


@pytest.mark.parametrize(("data", "times"), [("cifar", 1.0), ("mnist", 2.0)])
def test_the_exact_trace_falls_where_the_search_by_phi_goes_up_or_stands_still(data, times):
    runs, _ = minima(data)

    def traces(arm: str) -> list[float]:
        pairs = zip(
            *([x for seed in range(10) for x in runs[a, seed]["right_after"]["trace"]] for a in (arm, "plain")),
            strict=True,
        )
        return [after / before for after, before in pairs if after is not None and before]

    assert max(traces("scaling, flatter")) < 1
    assert statistics.median(traces("scaling, flatter by phi")) >= times


# --- chapter 15 -------------------------------------------------------------------------------------------------------


def ratio(arm: str, base: str, step: int) -> tuple[float, float, float]:
    """The geometric mean over seeds of the ratios of two losses, and its 95% interval."""
    runs = record("learned")["runs"]
    loss = {(r["arm"], r["seed"]): r["test"]["as trained"]["loss"][step] for r in runs}
    logs = [math.log(loss[arm, s] / loss[base, s]) for s in range(5)]
    mean, half = statistics.mean(logs), T_4 * statistics.stdev(logs) / math.sqrt(5)
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def test_the_early_harm_of_a_learned_teleport():
    assert [round(v, 2) for v in ratio("LSTM(lr, tele)", "LSTM(lr)", 10)] == [1.47, 1.12, 1.93]
    assert [round(ratio("LSTM(lr, tele)", "LSTM(lr)", step)[0], 2) for step in (30, 100)] == [1.12, 1.02]
    shown = printed(LEARN, "LSTM(lr, tele)", 1)  # after the table of losses
    for k, step in enumerate((10, 30, 100)):
        assert shown[3 * k : 3 * k + 3] == pytest.approx(ratio("LSTM(lr, tele)", "LSTM(lr)", step), abs=0.0051)


def test_what_is_not_decided():
    runs = record("learned")["runs"]
    (gd,) = (r["test"]["as trained"]["loss"] for r in runs if r["arm"] == "GD")
    for base, undecided in (("LSTM(lr)", ()), ("LSTM(update)", (100,)), ("coordinatewise(update)", ())):
        losses = [r["test"]["as trained"]["loss"] for r in runs if r["arm"] == base]
        for step in (10, 30, 100):
            logs = [math.log(loss[step] / gd[step]) for loss in losses]
            ahead = statistics.mean(logs) + T_4 * statistics.stdev(logs) / math.sqrt(5) < 0
            assert ahead == (step not in undecided)
    row = next(line for line in lines(LEARN) if line.startswith("  LSTM(update, tele)"))
    assert row.count("not decided") == 1 and row.endswith("not decided")
