"""Lint of the chapters: what keeps a notebook readable in Colab and on the site, and true.

    python book/lint.py [NOTEBOOK.ipynb ...]      (all of the book without an argument)

A rule is a function from a notebook to its findings.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import yaml
from matplotlib.colors import is_color_like
from nbformat.validator import iter_validate

BOOK = Path(__file__).resolve().parent
sys.path.insert(0, str(BOOK / "_ext"))
from figures import CAPTION, DIAGRAM
from theorems import HEAD, KINDS, anchor, outside_code

ADDRESS = (
    "https://colab.research.google.com/github/teleport-lite/teleport-lite/blob/main/"
)
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
SETUP = """\
try:
    import teleport_lite as tl
except ImportError:  # on Colab, for example
    %pip install -q "teleport-lite[book] @ git+https://github.com/teleport-lite/teleport-lite"
    import teleport_lite as tl

import torch
import matplotlib.pyplot as plt
from teleport_lite.book import plot

plot.use_style()
generator = torch.Generator().manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
print(f"teleport_lite {tl.__version__}, torch {torch.__version__}, {device}")
"""
STUB = "# your turn"
SOLUTION = "# Solution"
SECTIONS = [
    "What you will learn",
    "When it does not help",
    "Exercises",
    "Summary",
    "What to read next",
]
LIMIT = 2_000_000  # bytes
COLUMNS = 88  # of a line of code
LONG = 14  # lines of a cell that plots, before it is collapsed
LONGEST = 55  # lines of any cell that is not
WIDGET = "application/vnd.jupyter.widget-view+json"

KIND = "|".join(KINDS)
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)")
DISPLAY = re.compile(r"\$\$([^$]+)\$\$")
MATH = re.compile(r"\$\$[^$]+\$\$|\$[^$]+\$")
ENVIRONMENT = re.compile(
    r"\\begin\{([\w*]+)\}.*?\\end\{\1\}|\\substack\{(?:[^{}]|\{[^{}]*\})*\}", re.S
)
PARAGRAPH = re.compile(r"\n[>\s]*\n")
HOLE = "\0"  # where inline code or mathematics was

Rule = Callable[["Notebook"], Iterator[str]]
RULES: dict[str, Rule] = {}


def rule(function: Rule) -> Rule:
    """Register a rule under its name."""
    RULES[function.__name__] = function
    return function


def without_code(text: str) -> list[str]:
    """The lines of some Markdown, blank where there is a code block."""
    lines = text.split("\n")
    outside = outside_code([line.lstrip("> ") for line in lines])
    return [line if out else "" for line, out in zip(lines, outside, strict=True)]


def statements(lines: Iterable[str]) -> dict[str, tuple[str, str]]:
    """By anchor, the kind and the number of each statement."""
    heads = filter(None, map(HEAD.fullmatch, lines))
    return {
        anchor(h["kind"], h["number"]): (h["kind"], h["number"])
        for h in heads
        if h["kind"]
    }


@dataclass(frozen=True)
class Notebook:
    """A notebook, and what the rules look at."""

    path: Path

    @cached_property
    def root(self) -> Path | None:
        """The folder of the table of contents that is nearest above it."""
        return next(
            (p for p in self.path.resolve().parents if (p / "_toc.yml").is_file()), None
        )

    @cached_property
    def name(self) -> str:
        return self.path.resolve().relative_to(self.root).as_posix()

    @cached_property
    def toc(self) -> dict:
        return yaml.safe_load((self.root / "_toc.yml").read_text("utf8"))

    @cached_property
    def below(self) -> list[str]:
        """The pages that belong to a chapter."""
        chapters = [c for part in self.toc["parts"] for c in part["chapters"]]
        return [f"{s['file']}.ipynb" for c in chapters for s in c.get("sections", [])]

    @cached_property
    def number(self) -> int | None:
        """Which chapter it is; None for a page that is not a chapter."""
        parts = [part for part in self.toc["parts"] if part.get("numbered", True)]
        chapters = [f"{c['file']}.ipynb" for part in parts for c in part["chapters"]]
        return 1 + chapters.index(self.name) if self.name in chapters else None

    @cached_property
    def content(self) -> dict:
        return json.loads(self.path.read_text("utf8"))

    @cached_property
    def code(self) -> list[dict]:
        return [c for c in self.content["cells"] if c["cell_type"] == "code"]

    @cached_property
    def markdown(self) -> list[str]:
        return [
            source(c) for c in self.content["cells"] if c["cell_type"] == "markdown"
        ]

    @cached_property
    def lines(self) -> list[str]:
        """All Markdown; blank where there is a code block, and between two cells."""
        return [line for text in self.markdown for line in [*without_code(text), ""]]

    @cached_property
    def prose(self) -> str:
        """The Markdown without code."""
        return CODE.sub(HOLE, "\n".join(self.lines).replace(r"\$", ""))

    @cached_property
    def words(self) -> str:
        """The Markdown without code and mathematics."""
        return MATH.sub(HOLE, self.prose)

    def section(self, title: str) -> list[dict]:
        """The cells from a heading of the second level on, up to the next."""
        found, inside = [], False
        for cell in self.content["cells"]:
            headings = sections(source(cell)) if cell["cell_type"] == "markdown" else []
            found += [cell] * (title in headings or (inside and not headings))
            inside = headings[-1] == title if headings else inside
        return found


def sections(text: str) -> list[str]:
    """The headings of the second level."""
    return [line[3:].strip() for line in without_code(text) if line.startswith("## ")]


def source(cell: dict) -> str:
    """The text of a cell."""
    return "".join(cell["source"])


def where(cell: dict) -> str:
    """How a reader finds a code cell."""
    first = source(cell).strip().partition("\n")[0]
    return f"In [{cell['execution_count'] or ' '}] ({first[:30]})"


def collapsed(cell: dict) -> bool:
    """Whether the site hides the code until it is asked for."""
    tags = cell["metadata"].get("tags", [])
    return "hide-input" in tags or "hide-cell" in tags


def pictures(cell: dict) -> list[dict]:
    """The outputs of a code cell that are pictures."""
    return [
        o
        for o in cell["outputs"]
        if any(mime.startswith("image/") for mime in o.get("data", {}))
    ]


# --- text -------------------------------------------------------------------------------------------------------------

FOREIGN = {
    "a directive": re.compile(r"^[>\s]*(?:[`~]{3,}\s*\{|:{3,}).*", re.M),
    "a role": re.compile(r"\{[\w:.+-]+\}" + HOLE),
    "a label": re.compile(r"^\([\w.-]+\)=", re.M),
    "a comment": re.compile(r"^%.*|^\+\+\+.*", re.M),
    "a footnote": re.compile(r"\[\^[\w-]+\]"),
    "a link without text": re.compile(r"(?<!!)\[\]\([^)]*\)"),
    "a picture beside the notebook": re.compile(
        r"!\[[^\]]*\]\((?!https?:|data:|attachment:)[^)]*\)"
    ),
}
FOREIGN_MATH = re.compile(
    r"\\(?:(?:re)?newcommand|def|let|DeclareMathOperator|label|ref|eqref)\b"
)


@rule
def renders_everywhere(nb: Notebook) -> Iterator[str]:
    """No syntax that only the site understands."""
    fences = "\n".join(nb.markdown)
    for name, pattern in FOREIGN.items():
        for match in pattern.finditer(fences if name == "a directive" else nb.words):
            yield f"{name} does not show in Colab: {match[0].strip().replace(HOLE, '`…`')}"
    for match in FOREIGN_MATH.finditer(nb.prose):
        yield f"a macro or a reference does not show in Colab: {match[0]}"


@rule
def mathematics_is_whole(nb: Notebook) -> Iterator[str]:
    r"""Every dollar sign has its partner in the same paragraph; \\ stands inside an environment."""
    for paragraph in PARAGRAPH.split(nb.prose):
        if "$" in (rest := MATH.sub(HOLE, paragraph)):
            yield f"a $ without its partner in its paragraph: {rest[max(0, rest.index('$') - 30) :][:60].strip()!r}"
        for formula in DISPLAY.findall(paragraph):
            if r"\\" in ENVIRONMENT.sub("", formula):
                yield rf"a \\ outside of \begin{{aligned}}: {formula.strip()[:60]!r}"


@rule
def statements_are_boxes(nb: Notebook) -> Iterator[str]:
    """What looks like a statement or a proof is one, and each of its lines starts with >."""
    looks = re.compile(
        rf"[>\s]*\*\*(?:{KIND}) \d|>[>\s]*\*\*(?:[A-Z]\w+ \d|(?:{KIND}|Proof)\b)"
    )
    for line in nb.lines:
        if looks.match(line) and not HEAD.fullmatch(line):
            yield f"neither '> **Theorem 1.2 (Title).** …' nor '> **Proof.** …': {line[:60]!r}"
    for line, following in pairwise(nb.lines):
        if line.startswith(">") and following.strip() and not following.startswith(">"):
            yield f"no blank line and no > after a block quote: {following[:60]!r}"


@rule
def statements_are_numbered(nb: Notebook) -> Iterator[str]:
    """Statements count 1, 2, 3 ... within their chapter, whatever their kind."""
    found = [h["number"] for h in map(HEAD.fullmatch, nb.lines) if h and h["kind"]]
    expected = [f"{nb.number}.{k}" for k in range(1, 1 + len(found))]
    if nb.number and found != expected:
        k = next(
            k
            for k, pair in enumerate(zip(found, expected, strict=True))
            if len(set(pair)) > 1
        )
        yield f"statement {found[k]} where {expected[k]} is expected"


@rule
def equations_are_numbered(nb: Notebook) -> Iterator[str]:
    r"""Each \tag starts with the number of the chapter and is its only one."""
    tags = re.findall(r"\\tag\*?\{([^}]*)\}", nb.prose)
    if nb.number:
        yield from (
            f"\\tag{{{t}}} in chapter {nb.number}"
            for t in tags
            if not re.fullmatch(rf"{nb.number}\.\d+", t)
        )
    yield from (
        f"\\tag{{{t}}} stands {n} times" for t, n in Counter(tags).items() if n > 1
    )


@rule
def links_lead_somewhere(nb: Notebook) -> Iterator[str]:
    """A relative link finds its file; a link to a statement finds the statement that it names."""
    for text, target in LINK.findall(nb.words):
        if re.match(r"[a-z]+:", target):
            continue
        page, _, fragment = target.partition("#")
        goal = nb.path.parent / page if page else nb.path
        if not goal.is_file():
            yield f"no file {page}"
            continue
        numbers, kinds = re.findall(r"\d+\.\d+", text), re.findall(KIND, text)
        if not re.fullmatch(rf"(?:{KIND.lower()})-\d+-\d+", fragment):
            if numbers and kinds:
                yield f"[{text}] leads to no statement, but to {target}"
            continue
        lines = (
            Notebook(goal).lines
            if goal.suffix == ".ipynb"
            else without_code(goal.read_text("utf8"))
        )
        if fragment not in (found := statements(lines)):
            yield f"no statement {fragment} in {page or 'this notebook'}"
            continue
        kind, number = found[fragment]
        if (numbers and numbers != [number]) or (kinds and kinds != [kind]):
            yield f"[{text}] leads to {kind} {number}"


# --- template ---------------------------------------------------------------------------------------------------------


@rule
def is_listed(nb: Notebook) -> Iterator[str]:
    """The table of contents names it."""
    listed = [
        nb.toc["root"],
        *(c["file"] for part in nb.toc["parts"] for c in part["chapters"]),
    ]
    if nb.name.removesuffix(".ipynb") not in listed and nb.name not in nb.below:
        yield "not in _toc.yml"


@rule
def starts_alike(nb: Notebook) -> Iterator[str]:
    """A title, a badge that opens this file in Colab, and the setup cell."""
    if not nb.number and nb.name not in nb.below:
        return
    first = source(nb.content["cells"][0])
    titles = re.findall(r"^# .+", "\n".join(nb.lines), re.M)
    if len(titles) != 1 or not first.startswith(titles[0]):
        yield f"one title, in the first line, is expected; got {titles}"
    if f"{BADGE}({ADDRESS}{nb.name})" not in first:
        yield f"no badge in the first cell: {BADGE}({ADDRESS}{nb.name})"
    if "**Prerequisites.**" not in nb.prose:
        yield "no '**Prerequisites.**'"
    if not nb.code or source(nb.code[0]).strip() != SETUP.strip():
        yield "the first code cell is not the setup cell, SETUP in book/lint.py"
    elif "nbval-ignore-output" not in nb.code[0]["metadata"].get("tags", []):
        yield "the setup cell prints versions and has no tag nbval-ignore-output"


@rule
def keeps_the_template(nb: Notebook) -> Iterator[str]:
    """The sections in their order, each with what belongs into it; an explorer."""
    if not nb.number:
        return
    headings = [h for text in nb.markdown for h in sections(text) if h in SECTIONS]
    if headings != SECTIONS:
        yield f"sections {headings}, expected {SECTIONS}"
    if not any(
        "html" in mime and "tl-player" in "".join(html) for mime, html in outputs(nb)
    ):
        yield "no explorer"
    if not any(c["cell_type"] == "code" for c in nb.section("When it does not help")):
        yield "'When it does not help' measures nothing: it has no code cell"
    exercises = nb.section("Exercises")
    text = "\n\n".join(source(c) for c in exercises if c["cell_type"] == "markdown")
    asked = len(re.findall(r"^(?:#+ |\*\*)Exercise \d", text, re.M))
    solved = len(re.findall(r"<summary>[^<]*[Ss]olution", text))
    if asked < 3 or solved < asked:
        yield f"{asked} exercises ('**Exercise 1') and {solved} solutions, expected at least 3, and a solution for each"
    stubs = 0
    for cell in exercises:
        if cell["cell_type"] != "code":
            continue
        if source(cell).startswith(SOLUTION):
            if "hide-cell" not in cell["metadata"].get("tags", []):
                yield f"{where(cell)} shows the solution: tag it hide-cell"
        elif STUB in source(cell) and "assert " in source(cell):
            stubs += 1
        else:
            yield (
                f"{where(cell)} is neither a stub, with '{STUB}' and asserts that run once it is written, "
                f"nor a '{SOLUTION}'"
            )
    if not stubs:
        yield "the exercises have no stub to fill in"
    wanted = len(re.findall(r"^(?:#+ |\*\*)Exercise \d[^.\n]*\bcode\b", text, re.M))
    if stubs < wanted:
        yield f"{wanted} exercises ask for code, {stubs} have a stub"


def checks(stub: ast.Module) -> Iterator[str]:
    """What a stub asserts once it is written, and the answer that it looks at."""
    for node in ast.walk(stub):
        match node:
            case ast.NamedExpr(target=name, value=value):
                yield f"{name.id} = {ast.unparse(value)}"
            case ast.Assert():
                yield ast.unparse(node)


@rule
def solutions_pass_their_stubs(nb: Notebook) -> Iterator[str]:
    """The next cell with a solution defines what a stub leaves open, and runs its checks."""
    cells = [c for c in nb.section("Exercises") if c["cell_type"] == "code"]
    for k, cell in enumerate(cells):
        if STUB not in source(cell):
            continue
        later = (c for c in cells[k:] if source(c).startswith(SOLUTION))
        if (solution := next(later, None)) is None:
            yield f"{where(cell)} is a stub that no '{SOLUTION}' follows"
            continue
        stub, solved = ast.parse(source(cell)), ast.parse(source(solution)).body
        lines = source(cell).split("\n")
        wanted = {
            part.name
            for part in stub.body
            if isinstance(part, ast.FunctionDef)
            and any(STUB in line for line in lines[part.lineno : part.end_lineno])
        }
        given = {part.name for part in solved if isinstance(part, ast.FunctionDef)}
        run = {ast.unparse(part) for part in solved}
        for name in sorted(wanted - given):
            yield f"{where(solution)} does not define {name}, which its stub asks for"
        for check in checks(stub):
            if check not in run:
                yield f"{where(solution)} does not run what its stub does: {check[:60]}"


QUESTION = re.compile(r"(?<!\*)\*(?![*\s])[^*]+(?<!\*)\*(?!\*)")
ASKS = re.compile(r"\?|\b(?:[Gg]uess|[Bb]ets|[Ss]ketch|[Bb]efore you)\b")


@rule
def questions_come_first(nb: Notebook) -> Iterator[str]:
    """A reader is asked, in italics, what a figure or a table will show, before he sees it."""
    if nb.number and not any(ASKS.search(q) for q in QUESTION.findall(nb.words)):
        yield "asks nothing before it shows: '*Before you look: ...?*' ahead of the main figure"


VERDICT = re.compile(
    r"\b(?:agree\w*|kept|unchanged|conserved|the same|holds?|right)\b[^\n]*: True\b"
)


@rule
def errors_are_printed(nb: Notebook) -> Iterator[str]:
    """A check shows how large the error is, not that it passed."""
    for mime, text in outputs(nb):
        if mime == "text/plain":
            for match in VERDICT.finditer("".join(text)):
                yield f"an output is a verdict, not an error: {match[0][:60]!r}"


@rule
def solutions_open(nb: Notebook) -> Iterator[str]:
    """Markdown inside <details> has blank lines around it and no heading, or it would not be rendered."""
    for text in nb.markdown:
        parts = re.findall(r"<details>(.*?)</details>", text, re.S)
        if not len(parts) == text.count("<details") == text.count("</details>"):
            yield "a <details> is not closed in its own cell"
        for part in parts:
            if not re.fullmatch(
                r"\s*<summary>[^\n]+</summary>[ \t]*\n[ \t]*\n.*\n[ \t]*\n", part, re.S
            ):
                yield f"no blank line after </summary> or before </details>: {part.strip()[:60]!r}"
            if any(re.match("#+ ", line) for line in without_code(part)):
                yield f"a heading inside <details>: {part.strip()[:60]!r}"


# --- code and outputs -------------------------------------------------------------------------------------------------


def outputs(nb: Notebook) -> Iterator[tuple[str, str | list[str]]]:
    """All stored outputs, as pairs of a type and a text."""
    for cell in nb.code:
        for output in cell["outputs"]:
            yield from output.get(
                "data", {"text/plain": output.get("text", "")}
            ).items()


@rule
def was_run(nb: Notebook) -> Iterator[str]:
    """Every code cell was run, from top to bottom in a fresh kernel, without an error or a warning."""
    counts = [c["execution_count"] for c in nb.code]
    if counts != list(range(1, 1 + len(counts))):
        yield f"not run from top to bottom in a fresh kernel: {counts}"
    for cell in nb.code:
        if any(
            o["output_type"] == "error" or o.get("name") == "stderr"
            for o in cell["outputs"]
        ):
            yield f"{where(cell)} shows an error or a warning"


@rule
def figures_speak(nb: Notebook) -> Iterator[str]:
    """A figure has a cell of its own that ends with plt.show(), a name, alt text, and a caption in the text below."""
    names: Counter[str] = Counter()
    cells = nb.content["cells"]
    below = {
        id(c): source(d) for c, d in pairwise(cells) if d["cell_type"] == "markdown"
    }
    for cell in nb.code:
        last = source(cell).rstrip().rpartition("\n")[2]
        if last.endswith(";"):
            yield f"{where(cell)} ends with ';', which hides nothing from nbval"
        if not (shown := pictures(cell)):
            continue
        meta = cell["metadata"].get("mystnb", {})
        name = meta.get("figure", {}).get("name", "")
        names[name] += 1
        if len(shown) > 1:
            yield f"{where(cell)} shows {len(shown)} figures under one caption"
        if last != "plt.show()":
            yield f"{where(cell)} plots and does not end with plt.show()"
        if not name.startswith("fig-") or names[name] > 1:
            yield f"{where(cell)} needs a figure name of its own, 'fig-…', not {name!r}"
        if "caption" in meta.get("figure", {}):
            yield f"{where(cell)} has its caption in its metadata: '**Figure.** ...' below it is read everywhere"
        elif not CAPTION.match(below.get(id(cell), "")):
            yield f"{where(cell)} shows a figure and no '**Figure.** ...' stands below it"
        if not meta.get("image", {}).get("alt", "").strip():
            yield f"{where(cell)} shows a figure without alt text"


@rule
def diagrams_are_there(nb: Notebook) -> Iterator[str]:
    """A diagram is one that book/diagrams.py draws, says in words what it shows, and has a caption."""
    for text in nb.markdown:
        for match in DIAGRAM.finditer(text):
            name = match["name"]
            if not (BOOK / "_static" / "diagrams" / f"{name}.svg").is_file():
                yield f"no diagram {name}: add it to book/diagrams.py"
            if not match["alt"].strip():
                yield f"the diagram {name} does not say in words what it shows"
            if not match["text"]:
                yield f"no '**Figure.** ...' stands below the diagram {name}"


@rule
def code_is_narrow(nb: Notebook) -> Iterator[str]:
    """Code fits the column of the site, and a long cell that only plots or plays is collapsed there."""
    for cell in nb.code:
        lines = source(cell).split("\n")
        for line in lines:
            if len(line) > COLUMNS and "%pip" not in line:
                yield f"{where(cell)} has a line of {len(line)} columns, more than {COLUMNS}: {line.strip()[:40]}"
        plots = pictures(cell) or "plot.explorer(" in source(cell)
        if plots and len(lines) > LONG and not collapsed(cell):
            yield f"{where(cell)} plots in {len(lines)} lines and has no tag hide-input"
        elif len(lines) > LONGEST and not collapsed(cell):
            yield f"{where(cell)} has {len(lines)} lines and no tag hide-input"


COLOUR = re.compile(r"[ef]?c|m[ef]c|\w*colors?")
FORMAT = re.compile(
    r"[-:.,o^v<>1-4sPp*hH+xXDd|_]*(?:[bgrcmykw]|C\d)[-:.,o^v<>1-4sPp*hH+xXDd|_]*"
)
NEUTRAL = {"none", "white"}


def raw_colours(code: str) -> Iterator[str]:
    """Colours that are written down: hexadecimal anywhere; names, letters and C0 where matplotlib takes a colour."""
    tree = ast.parse(re.sub(r"^(\s*)[%!].*", r"\1pass", code, flags=re.M))
    places: list[ast.AST] = []
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if re.fullmatch(
                "#(?:[0-9A-Fa-f]{3,4}){1,2}", text
            ):
                yield text
            case ast.Call(
                func=ast.Attribute(attr=method), args=arguments, keywords=keywords
            ):
                places += [
                    k.value for k in keywords if k.arg and COLOUR.fullmatch(k.arg)
                ]
                places += arguments if re.fullmatch(r"set_\w*color", method) else []
                if re.fullmatch("plot|semilog[xy]|loglog|errorbar|step|stem", method):
                    texts = [
                        a.value
                        for a in arguments
                        if isinstance(a, ast.Constant) and isinstance(a.value, str)
                    ]
                    yield from filter(FORMAT.fullmatch, texts)
            case ast.Call(keywords=keywords):
                places += [
                    k.value for k in keywords if k.arg and COLOUR.fullmatch(k.arg)
                ]
            case ast.Dict(keys=keys, values=values):
                pairs = zip(keys, values, strict=True)
                places += [
                    v
                    for k, v in pairs
                    if isinstance(k, ast.Constant) and str(k.value).endswith("color")
                ]
    for node in (inner for place in places for inner in ast.walk(place)):
        match node:
            case ast.Constant(value=str(text)) if (
                text[:1] != "#" and text not in NEUTRAL and is_color_like(text)
            ):
                yield text


@rule
def colours_are_the_palette(nb: Notebook) -> Iterator[str]:
    """Colours come from plot.COLOURS, so that one arm looks the same everywhere."""
    for cell in nb.code:
        try:
            yield from (
                f"{where(cell)} uses the colour {c!r}: take plot.COLOURS"
                for c in raw_colours(source(cell))
            )
        except SyntaxError as error:
            yield f"{where(cell)} is not Python: {error.msg}"


FLEETING = {
    "measures time": re.compile(
        r"\b(?:perf_counter|process_time|timeit|time\.(?:time|monotonic))\b|^%%?time\b",
        re.M,
    ),
    "shows how long a teleport took": re.compile(r"\.seconds\b"),
    "moves while it runs": re.compile(r"\btqdm\b|\bclear_output\b"),
}


@rule
def runs_alike(nb: Notebook) -> Iterator[str]:
    """Nothing that differs from run to run: no times, no progress bars, no addresses of objects."""
    for cell in nb.code:
        yield from (
            f"{where(cell)} {what}"
            for what, pattern in FLEETING.items()
            if pattern.search(source(cell))
        )
    for mime, text in outputs(nb):
        if mime == "text/plain" and (
            match := re.search(r"\S+ (?:object )?at 0x[0-9a-fA-F]+", "".join(text))
        ):
            yield f"an output shows where an object lies in memory: {match[0]}"


@rule
def is_clean(nb: Notebook) -> Iterator[str]:
    """A small notebook of format 4.5 for the kernel python3, without what editors and runs leave behind."""
    if (size := nb.path.stat().st_size) > LIMIT:
        yield f"{size / 1e6:.1f} MB, more than {LIMIT / 1e6:g}"
    if (version := (nb.content["nbformat"], nb.content["nbformat_minor"])) < (4, 5):
        yield f"notebook format {version}, expected at least 4.5"
    ids = Counter(c.get("id") for c in nb.content["cells"])
    yield from (f"{n} cells with the id {i}" for i, n in ids.items() if n > 1)
    meta = nb.content["metadata"]
    if meta.get("kernelspec", {}).get("name") != "python3":
        yield "the kernel is not python3"
    left = [k for k in meta if k not in ("kernelspec", "language_info", "widgets")]
    left += [
        f"language_info.{k}"
        for k in meta.get("language_info", {})
        if k not in ("name", "pygments_lexer")
    ]
    left += [
        k
        for c in nb.content["cells"]
        for k in c["metadata"]
        if k not in ("tags", "mystnb")
    ]
    if left:
        yield f"metadata that changes by itself, or that nothing reads: {sorted(set(left))} (make refresh)"
    views = [
        o["data"] for c in nb.code for o in c["outputs"] if WIDGET in o.get("data", {})
    ]
    if any("text/html" in data for data in views) or (views and "widgets" not in meta):
        yield "stores a widget that waits for its kernel (make refresh)"


# --- front ------------------------------------------------------------------------------------------------------------


def lint(path: Path) -> list[str]:
    """What is wrong with a notebook, in words; empty when nothing is."""
    nb = Notebook(Path(path))
    try:
        if invalid := [
            f"not a valid notebook: {error.message[:200]}"
            for error in iter_validate(nb.content)
        ]:
            return invalid
    except ValueError as error:
        return [f"not a notebook: {error}"]
    if nb.root is None:
        return ["in no book: no folder above it has a _toc.yml"]
    return [
        f"{finding} [{name}]" for name, check in RULES.items() for finding in check(nb)
    ]


def notebooks(folder: Path = BOOK) -> list[Path]:
    """All notebooks of the book."""
    return sorted(
        p for p in folder.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
    )


def main(arguments: list[str]) -> int:
    """Lint the notebooks named, or all; 1 when there is a finding."""
    findings = [
        f"{path}: {finding}"
        for path in map(Path, arguments or notebooks())
        for finding in lint(path)
    ]
    print("\n".join(findings), end="\n" if findings else "")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
