"""The reference knows every public name and every chapter that uses it; the scorecard says what the records say."""

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

import teleport_lite
from teleport_lite import symmetries

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
sys.path.insert(0, str(BOOK / "_ext"))
reference = importlib.import_module("reference")
recorded = importlib.import_module("recorded")
citations = importlib.import_module("citations")

FOLDER = BOOK / "reference"
OPEN = ("groups", "errors", "book.data", "book.plot", "book.explorer")  # modules all of whose names are public


def text(name):
    return (BOOK / name).read_text("utf8")


# --- no orphans -------------------------------------------------------------------------------------------------------


def public():
    """By full name, every public class and function."""
    names = {f"teleport_lite.{n}": getattr(teleport_lite, n) for n in teleport_lite.__all__}
    names |= {f"teleport_lite.symmetries.{n}": getattr(symmetries, n) for n in symmetries.__all__}
    for module in (importlib.import_module(f"teleport_lite.{m}") for m in OPEN):
        for name, value in vars(module).items():
            if callable(value) and name[0] != "_" and getattr(value, "__module__", "").startswith(module.__name__):
                names[f"{module.__name__}.{name}"] = value
    return {name: value for name, value in names.items() if not inspect.ismodule(value)}


def explanations():
    """What the prose of the reference says, in backticks; the fences that list the names apart."""
    prose = "\n".join(reference.FENCE.sub("", p.read_text("utf8")) for p in FOLDER.glob("*.md"))
    return set(re.findall(r"`(\w+)`", prose))


def orphans(names, documented, used, explained):
    """The public names that no page describes, or that are neither used in a chapter nor explained."""
    described = {id(reference.resolve(name)): name for name in documented}
    return [
        name
        for name, value in names.items()
        if id(value) not in described
        or not (used.get(described[id(value)]) or described[id(value)].rpartition(".")[2] in explained)
    ]


def test_no_public_name_is_an_orphan():
    used = reference.uses(ROOT, FOLDER)
    assert orphans(public(), reference.documented(FOLDER), used, explanations()) == []


def test_an_orphan_would_be_found():
    names = {"teleport_lite.teleport": teleport_lite.teleport}
    place = [reference.Place("book/x", 1, "X", "")]
    assert orphans(names, {}, {}, {"teleport"}) == ["teleport_lite.teleport"]
    assert orphans(names, {"teleport_lite.teleport": "page"}, {}, set()) == ["teleport_lite.teleport"]
    assert orphans(names, {"teleport_lite.teleport": "page"}, {}, {"teleport"}) == []
    assert orphans(names, {"teleport_lite.teleport": "page"}, {"teleport_lite.teleport": place}, set()) == []


def test_the_pages_name_what_exists_and_the_book_uses_most_of_it():
    documented = reference.documented(FOLDER)
    assert [name for name in documented if reference.resolve(name) is None] == []
    used = reference.uses(ROOT, FOLDER)
    chapters = {place.page for places in used.values() for place in places}
    assert len(chapters) == len([c for c in reference.chapters(ROOT) if (ROOT / f"{c}.ipynb").is_file()])
    assert sum(map(bool, used.values())) > len(documented) / 3


SHOWN = [ROOT / "README.md", BOOK / "intro.md", BOOK / "reproducing.md", *sorted(FOLDER.glob("*.md"))]
SHOWN = [page for page in SHOWN if "```python" in page.read_text("utf8")]


ROUNDING = re.compile(r"\b(?:\d(?:\.\d+)?e-(?:0[789]|[1-9]\d)|0(?:\.0)?e\+00)\b")  # differs from machine to machine


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.name)
def test_the_snippets_of_a_page_print_what_it_shows(page):
    """Run one after the other: the text that follows a snippet is its output, but for the seconds of a report."""
    fences = re.findall(r"^```(\w*).*?\n(.*?)^```$", page.read_text("utf8"), re.M | re.S)
    code = "print(chr(0))\n".join(text for kind, text in fences if kind == "python")
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    outputs = iter(re.sub(r"  seconds .*\n", "", done.stdout).split("\0"))
    for (kind, _), (follows, shown) in pairwise([*fences, ("", "")]):
        if kind == "python":
            printed = next(outputs).strip()
            printed, shown = (ROUNDING.sub("<rounding>", said) for said in (printed, shown.strip()))
            assert follows != "text" or printed == shown


# --- the machinery ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [reference, recorded, citations])
def test_the_examples_in_their_docstrings_hold(module):
    assert doctest.testmod(module).failed == 0


def test_uses_of_names_are_found_under_all_their_aliases():
    known = {}
    code = "import teleport_lite as tl\n%pip install x\nfrom teleport_lite.book import plot as p"
    code += "\nf = tl.symmetries.scaling"
    index = {id(symmetries.scaling): "scaling", id(importlib.import_module("teleport_lite.book.plot").path): "path"}
    found = [reference.described(path, index) for path in reference.names_in_code(code + "\np.path(ax)", known)]
    assert found == ["scaling", "path"]
    assert list(reference.names_in_code("tl = 3; x.tl.teleport", dict(known))) == []


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("`x` of $a_b$", "``x`` of :math:`a_b`"),
        ("|a - b|", r"\|a - b\|"),
        ("$|a|$ and `|b|`", ":math:`|a|` and ``|b|``"),
        ("in *italics*", "in *italics*"),
        (">>> f('$x$ | `y`')", ">>> f('$x$ | `y`')"),
    ],
)
def test_docstrings_become_restructured_text(written, expected):
    assert "\n".join(reference.to_rst([written], {})) == expected


def test_a_page_that_names_what_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"teleport_lite\.nothing, which does not exist"):
        reference.expand("```{api} teleport_lite\nnothing\n```\n", {})


# --- scorecard, records, glossary, references -------------------------------------------------------------------------


def test_every_number_of_the_scorecard_is_computed():
    page = text("scorecard.md")
    names = recorded.ROLE.findall(page)
    assert names and set(names) <= set(recorded.NUMBERS)
    assert "{recorded}" not in recorded.fill_in(page)
    numbers = r"[+−]?\d+\.\d+(?: ± \d\.\d+| \[−?\d+\.\d+, −?\d+\.\d+\])?"
    shape = re.compile(numbers + r"|not recorded yet|none, since trainings fail")
    counts = {"long seeds", *(f"rows {status}" for status in recorded.STATUSES)}
    assert all(shape.fullmatch(recorded.NUMBERS[name]()) for name in set(names) - counts)
    assert int(recorded.NUMBERS["long seeds"]()) > 2


def test_a_correlation_is_pearsons():
    networks = recorded.record("generalization")["networks"]
    x, y = (networks[k] for k in ("sharpness_isotropic", "validation_loss"))
    mx, my = sum(x) / len(x), sum(y) / len(y)
    cov = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    by_hand = cov / (sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y)) ** 0.5
    assert recorded.correlation("sharpness_isotropic") == pytest.approx(by_hand)


def clearly(sign, value):
    """Whether an interval lies on one side of zero."""
    mean, half = value
    return sign * mean > half


MINIMA = ("minima", "minima-cifar10")  # records of chapter 14


def test_the_verdicts_follow_from_the_numbers():
    for optimizer in ("sgd", "momentum", "adagrad", "rmsprop", "adam"):
        for arm in ("teleport", "paper"):
            assert not clearly(-1, recorded.optimizer_gain(optimizer, arm)), "not confirmed: no gain at tuned rates"
    assert clearly(+1, recorded.optimizer_gain("sgd", "teleport")), "the steepest teleport of SGD seems worse"

    sharpness, positive = (recorded.correlation(f"sharpness_{k}") for k in ("isotropic", "positive"))
    assert sharpness > 0.5, "clearly positive"
    assert recorded.correlation("train_loss") > sharpness - 0.05, "the training loss says as much"
    assert abs(recorded.correlation("sharpness_isotropic", "gap")) < 0.2, "and nothing is said on the gap"
    assert abs(sharpness - positive) < 0.05, "hardly changes"
    assert recorded.correlation("curvature_scaling") > 0.2, "not negative"
    assert abs(recorded.correlation("curvature_mixing")) < 0.2, "near zero"

    goals = ("sharper", "flatter", "more curved", "less curved")
    at_best = {(record, goal): recorded.minimum(record, f"scaling, {goal}") for record in MINIMA for goal in goals}
    ends = {key: tuple(map(float, found.replace("−", "-").split(" ± "))) for key, found in at_best.items()}
    assert all(clearly(+1, ends[record, "sharper"]) for record in MINIMA), "the sharper ones are worse"
    assert [key for key, end in ends.items() if clearly(-1, end)] == [("minima-cifar10", "flatter")], (
        "alone, uncorrected"
    )

    for arm, base in recorded.LEARNED.items():
        assert recorded.learned_ratio(arm, base)[2] >= 1, "no learned teleport clearly lowers the final loss"


def claims():
    """The rows of the scorecard's tables that have a column of statuses, each with the prose since the heading."""
    for section in re.split(r"^##+ ", text("scorecard.md"), flags=re.M):
        for table in re.findall(r"(?:^\|.*\n)+", section, re.M):
            head, _, *rows = table.splitlines()
            if "| Status |" in head:
                yield from ((row, section.split("|")[0]) for row in rows)


def test_every_claim_of_the_scorecard_has_a_status_and_a_chapter():
    rows = list(claims())
    assert len(rows) > 20
    for row, prose in rows:
        status = [s.lower() for s in re.findall(r"\*\*([a-z A-Z]+)\*\*", row)]
        assert status and set(status) <= set(recorded.STATUSES), row
        assert ".ipynb" in row + prose, row


def test_the_statuses_are_counted_and_coloured():
    first = [re.search(r"\*\*([a-z ]+)\*\*", row)[1] for row, _ in claims()]
    assert recorded.statuses() == {s: first.count(s) for s in set(first)}
    page = recorded.badges(recorded.fill_in(text("scorecard.md")))
    assert page.count('class="tl-status tl-not-decided"') > 1
    assert not re.search(r"\*\*(?:not )?(?:confirmed|decided|proved)\*\*", page)


def test_every_record_and_every_experiment_is_listed():
    page = text("reproducing.md")
    records = {p.name for p in (BOOK / "results").glob("*.json")}
    scripts = {p.name for p in (ROOT / "experiments").glob("*.py")}
    listed = set(re.findall(r"`([\w-]+\.json)`", page)) - {"NAME-DATA.json"}
    assert records <= listed, "a record is missing on the page"
    assert {re.split(r"[-.]", name)[0] + ".py" for name in listed} <= scripts, "no script makes this record"
    assert scripts == set(re.findall(r"experiments/(\w+\.py)", page)), "experiments/ and the page differ"
    for row in re.findall(r"^\| `[\w-]+\.json` .*", page, re.M):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 3 and all(cells)
        assert "experiments/" in cells[0] and re.search(r"hour|minute", cells[1])


def test_the_glossary_is_sorted_and_links_every_term():
    for part in text("glossary.md").split("\n## ")[1:]:
        entries = re.findall(r"^- \*\*(.+?)\*\*(.*?)(?=^- |\Z)", part, re.M | re.S)
        terms = [re.sub(r"\W", " ", term).lower() for term, _ in entries]
        assert terms == sorted(terms)
        assert all(re.search(r"\]\(\S+\.(?:ipynb|md)", rest) for _, rest in entries)


SITES = r"https://(?:(?:arxiv|doi|jmlr)\.org|openreview\.net)/"


def test_every_reference_has_an_address():
    entries = citations.ENTRY.findall(text("references.md"))
    assert len(entries) > 50
    assert [e[:60] for e in entries if not re.search(rf"\]\({SITES}\S+\)", e)] == []


def test_what_chapters_cite_is_listed_and_what_is_listed_is_cited():
    page, chapters = text("references.md"), citations.texts(ROOT)
    assert len(citations.cite(page, chapters)) > len(page)
    with pytest.raises(ValueError, match=r"no chapter cites https://arxiv\.org/abs/0\.0"):
        citations.cite("- A, [B](https://arxiv.org/abs/0.0), 1900.\n", chapters)
    listed = {citations.unquote(citations.ADDRESS.search(entry)[1]) for entry in citations.ENTRY.findall(page)}
    address = re.compile(rf"\]\(({SITES}(?:[^\s()]|\(\S*?\))+)")
    cited = {found for chapter in chapters for said in chapter.values() for found in address.findall(said)}
    assert cited and cited <= listed


def test_the_extensions_are_those_of_the_folder():
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf8"))
    assert set(config["sphinx"]["local_extensions"]) == {p.stem for p in (BOOK / "_ext").glob("*.py")}


def sentences(folder):
    """All that the package says: the constants of its code, the parts between the braces of an f-string apart."""
    trees = (ast.parse(path.read_text("utf8")) for path in folder.rglob("*.py"))
    return [
        n.value for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    ]


def test_the_messages_on_the_page_of_errors_are_said_by_the_package():
    said = sentences(ROOT / "teleport_lite")
    cells = re.findall(r"^\| (.*?) \|", text("reference/errors.md"), re.M)
    quoted = [quote for cell in cells for quote in re.findall(r"`([^`]* [^`]*)`", cell)]
    assert len(quoted) > 14
    parts = [part.strip() for quote in quoted for part in quote.split("…") if len(part.strip()) > 3]
    assert [part for part in parts if not any(part in sentence for sentence in said)] == []
