"""Each recorded number of scorecard and first page, computed a second time, in plain Python from the records."""

from __future__ import annotations

import importlib
import math
import re
import statistics as st
import sys
from collections import Counter
from pathlib import Path

import pytest

BOOK = Path(__file__).resolve().parent.parent / "book"
sys.path.insert(0, str(BOOK / "_ext"))
recorded = importlib.import_module("recorded")

from test_records import FIVE_OPTIMIZERS, final, printed, tuned  # noqa: E402
from test_records_generalization import fisher, minima, partial, tuned_minima  # noqa: E402

record = recorded.record  # as it is stored
SETS = {"": "generalization", "fashion ": "generalization-fashion_mnist", "cifar ": "generalization-cifar10"}
DATA = {"": "optimizers", "Fashion-MNIST ": "optimizers-fashion_mnist", "CIFAR-10 ": "optimizers-cifar10"}
STUDENT = {3: 4.302653, 4: 3.182446, 5: 2.776445, 10: 2.262157}  # n numbers: t, two-sided 95%, from a printed table
GUESS = math.log(10)
LARGE = "784-512-512-10"


def mean_and_half(values: list[float]) -> tuple[float, float]:
    return st.fmean(values), STUDENT[len(values)] * st.stdev(values) / len(values) ** 0.5


def minus(arm: dict, base: dict) -> str:
    """The mean of the paired differences and half its interval, of numbers by seed."""
    assert arm.keys() == base.keys()
    return "{:+.3f} ± {:.3f}".format(*mean_and_half([arm[k] - base[k] for k in arm]))


def times(arm: dict, base: dict) -> str:
    """The geometric mean of the paired ratios and its interval, of numbers by seed."""
    mean, half = mean_and_half([math.log(arm[k] / base[k]) for k in sorted(arm.keys() & base.keys())])
    return "{:.2f} [{:.2f}, {:.2f}]".format(*map(math.exp, (mean, mean - half, mean + half)))


def of_optimizer(data: str, optimizer: str, arm: str, over: str | None) -> str:
    runs = record(DATA[data])["runs"]
    if not over:
        return minus(tuned(runs, optimizer, arm), tuned(runs, optimizer, "plain"))
    rates = {rate for r in runs if (r["optimizer"], r["arm"]) == (optimizer, "plain") for rate in r["rates"]}
    pairs = [[final(runs, optimizer, a, "test_loss", rate) for a in (arm, "plain")] for rate in rates]
    trained = [p for p in pairs if all(v is not None and v < GUESS for end in p for v in end.values())]
    return minus(*({s: st.fmean(p[k][s] for p in trained) for s in range(5)} for k in (0, 1)))


def of_network(kind: str, data: str | None, measure: str, gap: str | None) -> str:
    networks = dict(record(SETS[data or ""])["networks"])
    networks["gap"] = [v - t for v, t in zip(networks["validation_loss"], networks["train_loss"], strict=True)]
    r = st.correlation(networks[measure], networks["gap" if gap else "validation_loss"])
    return f"{r:+.2f}" if kind == "r" else "{:.2f} [{:.2f}, {:.2f}]".format(r, *fisher(r, 100))


def given_the_training_loss(data: str | None) -> str:
    networks = record(SETS[data or ""])["networks"]
    fresh = [v + t for v, t in zip(networks["validation_loss"], networks["test_loss"], strict=True)]
    return f"{partial(networks['hessian_trace_exact'], fresh, networks['train_loss']):+.2f}"


def of_minimum(data: str, arm: str, over: str | None) -> str:
    _, last = minima(data)
    ends = [tuned_minima(last, a) for a in (arm, "plain")]
    if over:
        tables = [last(a, "test_loss") for a in (arm, "plain")]
        good = [k for k in range(len(tables[0][0])) if all(row[k] < GUESS for table in tables for row in table)]
        ends = [[st.fmean(row[k] for k in good) if good else math.inf for row in table] for table in tables]
    if math.inf in ends[0]:
        return "none, since trainings fail"
    return minus(*(dict(enumerate(values)) for values in ends))


def of_learned(arm: str, step: str) -> str:
    runs = record("learned")["runs"]
    base = arm.split(", ")[0] + ")"
    loss = [{r["seed"]: r["test"]["as trained"]["loss"][int(step)] for r in runs if r["arm"] == a} for a in (arm, base)]
    return times(*loss)


def long_losses(arm: str) -> dict[int, list[float]]:
    mine = [r for r in record("learned_long")["runs"] if r["arm"] == arm]
    ends = {r["rate"]: r["tuning"]["loss"][-1] for r in mine if r["seed"] == 0}
    rate = sorted(ends, key=lambda rate: (ends[rate] is None, ends[rate]))[0]
    return {r["seed"]: r["test"]["as trained"]["loss"] for r in mine if r["rate"] == rate}


def of_long(arm: str, step: str) -> str:
    return times(*({s: c[int(step)] for s, c in long_losses(a).items()} for a in (f"update, {arm}", "update")))


def of_mnist(arm: str, epoch: str) -> str:
    entry, k = record("mnist_teleport")[LARGE], int(epoch)

    def ends(name: str) -> dict[int, float]:
        a, rates = list(entry["config"]["arms"]).index(name), range(len(entry["config"]["rates"]))
        valid = {j: [run["validation_loss"][a][j][k] for run in entry["runs"]] for j in rates}
        best = min((sum(v), j) for j, v in valid.items() if None not in v)[1]
        return {run["seed"]: run["test_loss"][a][best][k] for run in entry["runs"]}

    return minus(ends(arm), ends("plain"))


def gain(network: str) -> str:
    moves = record("mnist_teleport")[network]["moves"]
    found = [m["squared_gradient_gain"] for m in moves if (m["arm"], m["radius"]) == ("teleport", 1.0)]
    assert len(found) == 5
    return f"{st.median(found):.1f}"


def slow() -> str:
    entry = record("mnist_teleport")[LARGE]
    with_it, without = (list(entry["config"]["arms"]).index(name) for name in ("teleport", "plain"))
    ends = [run["test_loss"] for run in entry["runs"]]
    return f"{st.median(end[with_it][0][-1] / end[without][0][-1] for end in ends):.2f}"


def change() -> str:
    moves = [move for entry in record("mnist_teleport").values() for move in entry["moves"]]
    return re.sub("e-0", "e-", f"{max(move['held_out_output_change'] for move in moves):.0e}")


def rows_with(status: str) -> str:
    """By the columns whose head is Status: how often it is the first word in bold."""
    found, column = Counter(), None
    for line in (BOOK / "scorecard.md").read_text("utf8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not cells or "Status" in cells:
            column = cells.index("Status") if cells else None
        elif column is not None and set(line) - set("|-"):
            found[cells[column].split("**")[1]] += 1
    return str(found[status])


def is_called_clear(name: str) -> bool:
    """Whether the chapter of a number of the scorecard prints it as clear, after Holm and with no rate at an edge."""
    if match := re.fullmatch(
        r"(Fashion-MNIST |CIFAR-10 |)(sgd|momentum|adagrad|rmsprop|adam) (\w+)(, all rates)?", name
    ):
        data, optimizer, arm, over = match.groups()
        tables = printed(FIVE_OPTIMIZERS).split("each at its best rate")
        label = {"sgd": "SGD", "adagrad": "AdaGrad", "rmsprop": "RMSProp", "adam": "Adam"}.get(optimizer, optimizer)
        row = re.search(rf"^ +{label} +{arm} .*$", tables[1 + list(DATA).index(data)], re.M)[0]
        return float(re.findall(r"± \d\.\d+ +(\d\.\d+)", row)[bool(over)]) < 0.05
    if match := re.fullmatch(r"(cifar|mnist) ((?:scaling|published), .+?)(, all rates)?", name):
        text = printed(BOOK / "04-generalization/teleporting-minima.ipynb")
        title = {"cifar": "CIFAR-10", "mnist": "MNIST"}[match[1]]
        tables = [part for part in re.split(r"^(?=CIFAR-10[:,]|MNIST[:,])", text, flags=re.M) if part.startswith(title)]
        row = next(m[0] for part in tables if (m := re.search(rf"^{match[2]} +[+−]\d.*$", part, re.M)))
        p = float(re.findall(r"± \d\.\d+ +(\d\.\d+)", row)[bool(match[3])])
        return p < 0.05 and not row.endswith("(edge)")
    if match := re.fullmatch(r"long (.+) at (\d+)", name):
        text = printed(BOOK / "05-learning/learning-to-teleport.ipynb")
        row = re.search(rf"^update, {match[1]} / update .*$", text, re.M)[0]
        return re.findall(r"\](\*?)", row)[(10, 30, 100).index(int(match[2]))] == "*"
    return False  # small trainings, correlations, counts: nothing is called clear there


RULES = {
    r"(Fashion-MNIST |CIFAR-10 |)(sgd|momentum|adagrad|rmsprop|adam) (\w+)(, all rates)?": of_optimizer,
    r"(interval|r) (fashion |cifar )?(\w+?)( gap)?": of_network,
    r"given (fashion |cifar )?trace": given_the_training_loss,
    r"(mnist|cifar) ((?:scaling|published), .+?)(, all rates)?": of_minimum,
    r"(LSTM.+) at (\d+)": of_learned,
    r"long (.+) at (\d+)": of_long,
    r"long seeds": lambda: str(len(long_losses("update, tele").keys() & long_losses("update").keys())),
    r"mnist (teleport|random), epoch (\d+)": of_mnist,
    r"gain (.+)": gain,
    r"mnist slow": slow,
    r"mnist change": change,
    r"rows (.+)": rows_with,
}
PAGES = [path for path in BOOK.glob("*.md") if recorded.ROLE.search(path.read_text("utf8"))]
SAID = sorted({name for path in PAGES for name in recorded.ROLE.findall(path.read_text("utf8"))})


@pytest.mark.parametrize("name", SAID)
def test_a_number_that_is_said_is_that_of_the_record(name):
    (found,) = [(rule, match) for pattern, rule in RULES.items() if (match := re.fullmatch(pattern, name))]
    rule, match = found
    assert recorded.NUMBERS[name]().replace("−", "-") == rule(*match.groups())


def test_the_scorecard_and_the_first_page_say_numbers():
    assert len(SAID) > 100 and {path.name for path in PAGES} >= {"scorecard.md", "intro.md"}


@pytest.mark.parametrize("name", ["scorecard.md", "findings.md"])
def test_bold_numbers_are_the_clear_ones(name):
    page = (BOOK / name).read_text("utf8")
    if name == "findings.md":  # its text has clear numbers in plain type
        page = "\n".join(line for line in page.splitlines() if line.startswith("| "))
    said = [name for name in recorded.ROLE.findall(page) if not recorded.NUMBERS[name]().startswith("none")]
    bold = re.findall(r"\*\*\{recorded\}`([^`]+)`\*\*", page)
    assert bold and set(bold) == {name for name in said if is_called_clear(name)}
