"""Sphinx extension: numbers of the recorded runs, computed from book/results when a page is read.

A page says {recorded}`name`, and shows what the function of that name gives, so that it cannot say anything else.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from teleport_lite.book import evidence

RESULTS = Path(__file__).resolve().parent.parent / "results"
ROLE = re.compile(r"\{recorded\}`([^`]+)`")
NUMBERS: dict[str, Callable[[], str]] = {}


@cache
def record(name: str) -> dict[str, Any]:
    """One file of book/results."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf8"))


# --- do sharpness and curvature predict? ------------------------------------------------------------------------------


PLACES = {
    "": "generalization",
    "fashion": "generalization-fashion_mnist",
    "cifar": "generalization-cifar10",
}


def correlation(measure: str, against: str = "validation_loss", data: str = "") -> float:
    """Pearson's, over the hundred networks of a data set; "gap" is validation loss minus training loss."""
    networks = {k: np.array(v) for k, v in record(PLACES[data])["networks"].items()}
    networks["gap"] = networks["validation_loss"] - networks["train_loss"]
    return float(np.corrcoef(networks[measure], networks[against])[0, 1])


def fisher(measure: str, against: str = "validation_loss", data: str = "") -> tuple[float, float, float]:
    """The same with its 95% interval by Fisher's transformation."""
    r, half = (
        correlation(measure, against, data),
        1.96 / (len(record(PLACES[data])["networks"][measure]) - 3) ** 0.5,
    )
    return r, float(np.tanh(np.arctanh(r) - half)), float(np.tanh(np.arctanh(r) + half))


def beyond(measure: str, data: str = "") -> float:
    """Partial correlation of a measure and the loss on all new images, given the training loss."""
    networks = {k: np.array(v) for k, v in record(PLACES[data])["networks"].items()}
    fresh = (networks["validation_loss"] + networks["test_loss"]) / 2
    inverse = np.linalg.inv(np.cov([networks[measure], fresh, networks["train_loss"]]))
    return float(-inverse[0, 1] / (inverse[0, 0] * inverse[1, 1]) ** 0.5)


# --- arms, paired by seed ---------------------------------------------------------------------------------------------


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval from Student's t."""
    n = len(differences)
    return float(differences.mean()), float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / n**0.5)


def minimum(name: str, arm: str, rule: str = "at_best") -> str:
    """Final test loss of an arm of that record minus that without a teleport, at the best rates or over them."""
    runs = {(run["seed"], run["arm"]): run for run in record(name)["runs"]}

    def last(arm: str, key: str) -> np.ndarray:
        curves = [[curve[-1] for curve in runs[seed, arm][key]] for seed in sorted({seed for seed, _ in runs})]
        return np.array([[np.inf if v is None else v for v in row] for row in curves])

    tables = [last(a, key) for key in ("test_loss", "validation_loss") for a in (arm, "plain")]
    found = evidence.compare(
        *tables[:2],
        arm_validation=tables[2],
        base_validation=tables[3],
        ceiling=float(np.log(10)),
    )
    effect = getattr(found, rule)
    return str(effect) if np.isfinite(effect.half) else "none, since trainings fail"


def ends(data: str, optimizer: str, arm: str, key: str) -> np.ndarray:
    """After the last epoch, [seeds, rates] at the rates that have all seeds; infinite where training diverged."""
    runs = [r for r in record(data)["runs"] if r["optimizer"] == optimizer]

    def cells(arm: str) -> dict[tuple[int, float], float | None]:
        mine = (r for r in runs if r["arm"] == arm)
        return {(r["seed"], rate): c[-1] for r in mine for rate, c in zip(r["rates"], r[key], strict=True)}

    found, published = (
        cells(arm),
        [cells(name).keys() for name in ("plain", "teleport", "paper")],
    )
    seeds, rates = (sorted({pair[k] for pair in published[0]}) for k in (0, 1))
    rates = [rate for rate in rates if all((seed, rate) in pairs for seed in seeds for pairs in published)]
    rows = [[found[seed, rate] for rate in rates] for seed in seeds]
    return np.array([[np.inf if value is None else value for value in row] for row in rows])


def optimizer_effect(optimizer: str, arm: str, data: str = "optimizers") -> evidence.Comparison:
    """Final test loss of an arm against that without a teleport, by the rule of Chapter 9."""
    tables = {key: [ends(data, optimizer, a, key) for a in (arm, "plain")] for key in ("test_loss", "validation_loss")}
    valid = dict(
        zip(
            ("arm_validation", "base_validation"),
            tables["validation_loss"],
            strict=True,
        )
    )
    return evidence.compare(*tables["test_loss"], **valid, ceiling=np.log(10))


def optimizer_gain(optimizer: str, arm: str, data: str = "optimizers") -> tuple[float, float]:
    """The same, each at its best rate."""
    return optimizer_effect(optimizer, arm, data).at_best[:2]


def optimizer_over_rates(optimizer: str, arm: str, data: str = "optimizers") -> tuple[float, float]:
    """The same, over all rates."""
    return optimizer_effect(optimizer, arm, data).over_rates[:2]


def learned_ratio(arm: str, base: str) -> tuple[float, float, float]:
    """Final loss of an arm of `learned` over that of its base: geometric mean over seeds, and its 95% interval."""
    ends: dict[str, list[float]] = {}
    for name in (arm, base):
        runs = sorted(
            (r for r in record("learned")["runs"] if r["arm"] == name),
            key=lambda r: r["seed"],
        )
        final = ([np.inf if x is None else x for x in r["test"]["as trained"]["final"]] for r in runs)
        ends[name] = [float(np.quantile(values, 0.5, method="higher")) for values in final]
    mean, half = interval(np.log(ends[arm]) - np.log(ends[base]))
    return float(np.exp(mean)), float(np.exp(mean - half)), float(np.exp(mean + half))


def learned_along(arm: str, base: str, step: int) -> tuple[float, float, float]:
    """The same after some steps, of the geometric means over problems."""
    logs = []
    for name in (arm, base):
        runs = sorted(
            (r for r in record("learned")["runs"] if r["arm"] == name),
            key=lambda r: r["seed"],
        )
        logs.append(np.log([r["test"]["as trained"]["loss"][step] for r in runs]))
    mean, half = interval(logs[0] - logs[1])
    return float(np.exp(mean)), float(np.exp(mean - half)), float(np.exp(mean + half))


def long_runs(arm: str) -> dict[int, Any]:
    """The trainings of an arm of `learned_long`, by seed, at the meta-rate that is best for its first seed."""
    runs = [r for r in record("learned_long")["runs"] if r["arm"] == arm]
    rate = min(
        (r for r in runs if r["seed"] == 0),
        key=lambda r: r["tuning"]["loss"][-1] or np.inf,
    )["rate"]
    return {r["seed"]: r["test"]["as trained"]["loss"] for r in runs if r["rate"] == rate}


def long_ratio(arm: str, step: int) -> tuple[float, float, float]:
    """The loss of `learned_long` with a teleport over that without, after some steps, and its 95% interval."""
    with_it, without = long_runs(arm), long_runs("update")
    logs = [np.log(with_it[seed][step] / without[seed][step]) for seed in with_it.keys() & without.keys()]
    mean, half = interval(np.array(logs))
    return float(np.exp(mean)), float(np.exp(mean - half)), float(np.exp(mean + half))


def gain(network: str, radius: float = 1.0, key: str = "squared_gradient_gain") -> float:
    """What the steepest teleport of `mnist_teleport` multiplies, median over seeds."""
    moves = record("mnist_teleport")[network]["moves"]
    return float(np.median([m[key] for m in moves if m["arm"] == "teleport" and m["radius"] == radius]))


def mnist(network: str, key: str) -> tuple[list[str], np.ndarray]:
    """The arms of one network of `mnist_teleport`, and [seeds, arms, rates, epochs + 1]."""
    entry = record("mnist_teleport")[network]
    runs = [[[[np.inf if v is None else v for v in c] for c in arm] for arm in run[key]] for run in entry["runs"]]
    return list(entry["config"]["arms"]), np.array(runs)


def mnist_gain(network: str, arm: str, epoch: int) -> tuple[float, float]:
    """Test loss minus that of the plain arm, each at the rate that is best on the held-out images at that epoch."""
    arms, validation = mnist(network, "validation_loss")
    _, test = mnist(network, "test_loss")
    ends = {name: test[:, k, validation[:, k, :, epoch].mean(0).argmin(), epoch] for k, name in enumerate(arms)}
    return interval(ends[arm] - ends["plain"])


def mnist_slow(network: str) -> float:
    """At the smallest rate and the last epoch: test loss with a teleport over that without, median over seeds."""
    arms, test = mnist(network, "test_loss")
    last = test[:, :, 0, -1]
    ratios = last[:, arms.index("teleport")] / last[:, arms.index("plain")]
    return float(np.median(ratios))


def mnist_change() -> float:
    """The largest relative change of any held-out output by any teleport of `mnist_teleport`."""
    networks = record("mnist_teleport").values()
    return max(move["held_out_output_change"] for e in networks for move in e["moves"])


# --- by name, as text -------------------------------------------------------------------------------------------------

MEASURES = (
    "sharpness_isotropic",
    "sharpness_positive",
    "curvature_scaling",
    "curvature_mixing",
    "train_loss",
)
LEARNED = {  # arms with a teleport, and without
    "LSTM(lr, tele)": "LSTM(lr)",
    "LSTM(update, tele)": "LSTM(update)",
    "LSTM(update, exact tele)": "LSTM(update)",
    "LSTM(update, random tele)": "LSTM(update)",
}


def signed(function: Callable[..., float], *arguments: str) -> str:
    """A number with two digits and its sign."""
    return f"{function(*arguments):+.2f}".replace("-", "−")


def plus_minus(function: Callable[..., tuple[float, float]], *arguments: str) -> str:
    """A difference and half its interval, three digits."""
    return "{:+.3f} ± {:.3f}".format(*function(*arguments)).replace("-", "−")


def ratio(function: Callable[..., tuple[float, float, float]], *arguments: Any) -> str:
    """A ratio and its interval, two digits."""
    return "{:.2f} [{:.2f}, {:.2f}]".format(*function(*arguments))


def so_far(show: Callable[..., str], *arguments: Any) -> str:
    """What `show` gives, or that there is nothing in the record yet."""
    try:
        return show(*arguments).replace("-", "−")
    except (FileNotFoundError, KeyError):
        return "not recorded yet"


for measure in MEASURES:
    NUMBERS[f"r {measure}"] = partial(signed, correlation, measure)
    NUMBERS[f"r {measure} gap"] = partial(signed, correlation, measure, "gap")
for data in PLACES:
    for measure in (*MEASURES, "curvature_published"):
        name = f"{data} {measure}".strip()
        NUMBERS[f"interval {name}"] = partial(so_far, ratio, fisher, measure, "validation_loss", data)
        NUMBERS[f"interval {name} gap"] = partial(so_far, ratio, fisher, measure, "gap", data)
    NUMBERS[f"given {data} trace".replace("  ", " ")] = partial(so_far, signed, beyond, "hessian_trace_exact", data)
for goal in ("flatter", "sharper", "more curved", "less curved"):
    for family in ("scaling", "published"):
        for data, name in (("mnist", "minima"), ("cifar", "minima-cifar10")):
            NUMBERS[f"{data} {family}, {goal}"] = partial(minimum, name, f"{family}, {goal}")
            over = partial(minimum, name, f"{family}, {goal}", "over_rates")
            NUMBERS[f"{data} {family}, {goal}, all rates"] = over
for step in (10, 30, 100):
    for arm, base in LEARNED.items():
        NUMBERS[f"{arm} at {step}"] = partial(ratio, learned_along, arm, base, step)
    for kind in ("tele", "random tele", "exact tele"):
        NUMBERS[f"long {kind} at {step}"] = partial(ratio, long_ratio, f"update, {kind}", step)
NUMBERS["long seeds"] = lambda: str(len(long_runs("update, tele").keys() & long_runs("update").keys()))
for data, title in {
    "optimizers": "",
    "optimizers-fashion_mnist": "Fashion-MNIST ",
    "optimizers-cifar10": "CIFAR-10 ",
}.items():
    for optimizer in ("sgd", "momentum", "adagrad", "rmsprop", "adam"):
        for arm in ("teleport", "reset", "random", "paper"):
            NUMBERS[f"{title}{optimizer} {arm}"] = partial(plus_minus, optimizer_gain, optimizer, arm, data)
            over = partial(plus_minus, optimizer_over_rates, optimizer, arm, data)
            NUMBERS[f"{title}{optimizer} {arm}, all rates"] = over
for arm, base in LEARNED.items():
    NUMBERS[arm] = partial(ratio, learned_ratio, arm, base)
for network in ("784-16-10-10", "784-512-512-10"):
    NUMBERS[f"gain {network}"] = lambda network=network: f"{gain(network):.1f}"


LARGE = "784-512-512-10"
for arm in ("teleport", "random"):
    for epoch in (1, 10):
        NUMBERS[f"mnist {arm}, epoch {epoch}"] = partial(plus_minus, mnist_gain, LARGE, arm, epoch)
NUMBERS["mnist slow"] = lambda: f"{mnist_slow(LARGE):.2f}"
NUMBERS["mnist change"] = lambda: f"{mnist_change():.0e}".replace("e-0", "e-")


STATUSES = ("proved", "confirmed", "corrected", "not confirmed", "not decided")
STATUS = re.compile(rf"\*\*({'|'.join(STATUSES)})\*\*", re.I)


def statuses() -> Counter[str]:
    """How many rows of the scorecard have each status; a row counts once, by the first that it names."""
    rows = [line for line in (RESULTS.parent / "scorecard.md").read_text("utf8").split("\n") if line[:2] == "| "]
    return Counter(found[1].lower() for row in rows if (found := STATUS.search(row)))


for status in STATUSES:
    NUMBERS[f"rows {status}"] = lambda status=status: str(statuses()[status])


DEVICES = RESULTS.parent.parent / "benchmarks" / "results"
COSTS = {
    "time": "Time, in gradients",
    "waits": "Waits of the host",
    "kernels": "Kernels, in those of a gradient",
    "memory": "Memory, in copies",
}


def device_tables() -> str:
    """What `make bench` has recorded: for each device a table of each cost, calls by models."""
    tables = []
    for path in sorted(DEVICES.glob("*.json")):
        found = json.loads(path.read_text("utf8"))
        threads = f"{found['threads']} thread{'s' * (found['threads'] > 1)}"
        tables.append(f"**{found['device']}**, PyTorch {found['torch']}, {threads}; counted on {found['counted on']}.")
        rows: dict[str, dict[str, Any]] = {}  # by call and model
        for row in found["rows"]:
            precision = "" if row["precision"] == "float32" else f", {row['precision']}"
            model = f"{row['model']}, {row['parameters'] / 1e6:.2g} M{precision}"
            rows.setdefault(row["call"], {})[model] = row
        one = rows["gradient"]
        for cost, title in COSTS.items():
            lines = [f"| {title} | {' | '.join(one)} |", "|---" * (len(one) + 1) + "|"]
            for call, by_model in rows.items():
                numbers = [r[cost] / (one[m]["kernels"] if cost == "kernels" else 1) for m, r in by_model.items()]
                cells = (f"{n:.2g}" if n < 100 else f"{n:.0f}" for n in numbers)
                lines.append(f"| {call} | {' | '.join(cells)} |")
            tables.append("\n".join(lines))
    return "\n\n".join(tables)


NUMBERS["devices"] = device_tables


INSIDE = re.compile(r" (?=±|\[)|(?<=±) |(?<=\d,) (?=[−\d])")  # the spaces of a number and its interval


def fill_in(markdown: str, space: str = " ") -> str:
    """A page with its numbers, whose intervals are set with this space."""
    return ROLE.sub(lambda match: INSIDE.sub(space, NUMBERS[match[1]]()), markdown)


SAID = re.compile(r"(\*\*)?\{recorded\}`([^`]+)`(?:\*\*)?")
SCALES = (
    ("interval", -1.0, 0.0, 1.0),
    ("long|LSTM", 0.8, 1.0, 1.2),
    ("", -0.12, 0.0, 0.12),
)  # ends, and no effect


def interval_strip(name: str, clear: bool) -> str:
    """An interval drawn on the scale of its kind, cut off at its ends: a filled dot where it is clear.

    >>> interval_strip("cifar published, more curved", clear=False)  # trainings fail: nothing to draw
    ''
    """
    low, none, high = next(scale for kind, *scale in SCALES if re.match(kind, name))
    numbers = [float(x) for x in re.findall(r"[+-]?\d+\.\d+", NUMBERS[name]().replace("−", "-"))]
    if len(numbers) < 2:
        return ""
    mean, *ends = numbers
    ends = ends if len(ends) == 2 else [mean - ends[0], mean + ends[0]]
    place = [4 + 112 * (min(max(v, low), high) - low) / (high - low) for v in (none, *ends, mean)]
    x = [f"{v:.1f}" for v in place]
    mark = f'<circle cx="{x[3]}" cy="7" r="3.2"/>'
    if not low < mean < high:  # beyond the scale
        mark = f'<path class="tl-beyond" d="M{x[3]} 7l{-7 if mean > none else 7} -4v8z"/>'
    return (
        f'<svg class="tl-strip{" tl-clear" * clear}" viewBox="0 0 120 14" aria-hidden="true"><path class="tl-none" '
        f'd="M{x[0]} 0V14"/><path d="M{x[1]} 7H{x[2]}"/>{mark}</svg>'
    )


def draw_intervals(markdown: str) -> str:
    """Each number that fills a cell of a table, with its interval drawn above it."""

    def drawn(row: str) -> str:
        return re.sub(
            rf"(?<=\| ){SAID.pattern}(?= \|)",
            lambda m: interval_strip(m[2], clear=bool(m[1])) + m[0],
            row,
        )

    return "\n".join(drawn(line) if line.startswith("| ") else line for line in markdown.split("\n"))


def badges(markdown: str) -> str:
    """Statuses as coloured labels."""
    label = '<span class="tl-status tl-{}">{}</span>'
    return STATUS.sub(
        lambda match: label.format(match[1].lower().replace(" ", "-"), match[1]),
        markdown,
    )


README = RESULTS.parent.parent / "README.md"
FOUND = re.compile(r"(?<=<!-- found -->\n).*?(?=<!-- end -->)", re.S)


def findings() -> str:
    """What the first page says was found, for the README: the numbers filled in, the links from there."""
    page = (RESULTS.parent / "intro.md").read_text("utf8")
    text = fill_in(FOUND.search(page)[0])
    return re.sub(r"\]\((?!https?:)([^()]+)\)", r"](book/\1)", text)


def on_source_read(app, docname: str, source: list[str]) -> None:
    """Fill in a page, and read it again when a record changes."""
    if ROLE.search(source[0]):
        record.cache_clear()
        source[0] = fill_in(draw_intervals(source[0]), space="\N{NO-BREAK SPACE}")
        if docname.endswith("scorecard"):
            source[0] = badges(source[0])
        for path in (*RESULTS.glob("*.json"), *DEVICES.glob("*.json")):
            app.env.note_dependency(str(path))


def setup(app) -> dict:
    """Connect to Sphinx."""
    app.connect("source-read", on_source_read, priority=400)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":  # the README says what the first page says
    README.write_text(FOUND.sub(lambda _: findings(), README.read_text("utf8")), "utf8")
