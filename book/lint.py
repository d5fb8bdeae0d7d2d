"""Lint of the chapters: what keeps a notebook readable in Colab and on the site, and true.

    python book/lint.py [CHAPTER.ipynb ...]      (all chapters without an argument)

Each rule is a function from a `Chapter` to findings; `make lint` runs them all.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

BOOK = Path(__file__).resolve().parent
sys.path.insert(0, str(BOOK / "_ext"))
from theorems import FENCE, HEAD, LINK, anchor

SECTIONS = ("What you will learn", "When it does not help", "Exercises", "Summary", "What to read next")
LIMIT_MB = 2.0
Rule = Callable[["Chapter"], Iterator[str]]
RULES: dict[str, Rule] = {}


def rule(function: Rule) -> Rule:
    """Register a rule."""
    RULES[function.__name__] = function
    return function


def toc() -> list[str]:
    """The chapters of the table of contents, in order, as paths relative to the repository."""
    text = (BOOK.parent / "_toc.yml").read_text()
    return [f"{name}.ipynb" for name in re.findall(r"file: (book/\d\S+)", text)]


@dataclass(frozen=True)
class Chapter:
    """A notebook, its number in the book, and where it lies."""

    path: Path
    number: int
    text: str

    @cached_property
    def notebook(self) -> dict:
        return json.loads(self.text)

    def cells(self, kind: str) -> list[dict]:
        return [c for c in self.notebook["cells"] if c["cell_type"] == kind]

    @cached_property
    def prose(self) -> str:
        """All Markdown, without its code blocks."""
        out, fence = [], ""
        for line in "\n\n".join("".join(c["source"]) for c in self.cells("markdown")).split("\n"):
            mark = FENCE.match(line)
            if mark and not fence:
                fence = mark[1]
            elif mark and line.strip().startswith(fence):
                fence = ""
            elif not fence:
                out.append(line)
        return "\n".join(out)

    @cached_property
    def plain(self) -> str:
        """The prose without inline code and mathematics."""
        text = re.sub(r"\$\$.+?\$\$", "", re.sub(r"`[^`\n]+`", "", self.prose), flags=re.S)
        return re.sub(r"(?<!\\)\$[^$]+?(?<!\\)\$", "", text, flags=re.S)

    @cached_property
    def code(self) -> list[dict]:
        return [c for c in self.cells("code") if "".join(c["source"]).strip()]

    @cached_property
    def statements(self) -> list[re.Match]:
        return [m for line in self.prose.split("\n") if (m := HEAD.match(line)) and m["kind"]]


def read(path: Path) -> Chapter:
    """The chapter at `path`."""
    chapters = toc()
    name = path.resolve().relative_to(BOOK.parent).as_posix()
    return Chapter(path, 1 + chapters.index(name) if name in chapters else 0, path.read_text())


@rule
def renders_everywhere(chapter: Chapter) -> Iterator[str]:
    """No directive, role, label, macro or cross-document syntax that only the site understands."""
    for cell in chapter.cells("markdown"):
        source = "".join(cell["source"])
        for pattern, name in [
            (r"^\s*(`{3,}|:{3,}|~{3,})\s*\{", "a directive"),
            (r"\{[a-z:-]+\}`", "a role"),
            (r"^\([\w-]+\)=", "a label"),
            (r"\\(newcommand|def|DeclareMathOperator)\b", "a macro"),
            (r"\{\{", "a substitution"),
        ]:
            if match := re.search(pattern, source, re.M):
                yield f"{name} does not render in Colab: {match[0].strip()!r}"


@rule
def mathematics_is_closed(chapter: Chapter) -> Iterator[str]:
    """Every dollar sign has its partner, and display mathematics stands on lines of its own."""
    rest = chapter.plain.replace(r"\$", "  ")
    if "$" in rest:
        yield f"an unpaired $ near {rest[max(0, rest.index('$') - 40) :][:60]!r}"


@rule
def statements_are_numbered(chapter: Chapter) -> Iterator[str]:
    """Statements count 1, 2, 3 ... within their chapter, and what looks like one is one."""
    numbers = [m["number"] for m in chapter.statements]
    expected = [f"{chapter.number}.{i}" for i in range(1, len(numbers) + 1)]
    if numbers != expected:
        yield f"statements are numbered {numbers}, expected {expected}"
    for line in chapter.prose.split("\n"):
        if re.match(r"> ?\*\*[A-Z][a-z]+ ?[\d.]*", line) and not HEAD.match(line):
            yield f"not a statement, nor a proof: {line[:60]!r}"


@rule
def links_lead_somewhere(chapter: Chapter) -> Iterator[str]:
    """Links to statements find them under the name they give, relative links find a file."""
    for text, page, target in LINK.findall(chapter.prose):
        goal = chapter if not page else None
        if page and (chapter.path.parent / page).is_file():
            goal = read(chapter.path.parent / page)
        found = {anchor(m["kind"], m["number"]): f"{m['kind']} {m['number']}" for m in goal.statements} if goal else {}
        if target not in found:
            yield f"no statement {target} in {page or 'this chapter'}"
        elif re.search(r"\d+\.\d+", text) and found[target].split()[1] not in text:
            yield f"the link {text!r} leads to {found[target]}"
    for page in re.findall(r"\]\((?!https?:|#|mailto:)([^)\s#]+)", chapter.prose):
        if not (chapter.path.parent / page).is_file():
            yield f"no file {page}"


@rule
def equations_are_numbered(chapter: Chapter) -> Iterator[str]:
    r"""Each \tag is unique and starts with the number of the chapter."""
    tags = re.findall(r"\\tag\{([^}]*)\}", chapter.prose)
    for tag in tags:
        if not re.fullmatch(rf"{chapter.number}\.\d+", tag):
            yield f"equation tag {tag} in chapter {chapter.number}"
    for tag in sorted({t for t in tags if tags.count(t) > 1}):
        yield f"equation tag {tag} stands twice"


@rule
def everything_was_run(chapter: Chapter) -> Iterator[str]:
    """Every code cell was executed, in order, without error or warning."""
    counts = [c["execution_count"] for c in chapter.code]
    if counts != list(range(1, len(counts) + 1)):
        yield f"not run from top to bottom in a fresh kernel: execution counts {counts}"
    for cell in chapter.code:
        for output in cell["outputs"]:
            if output["output_type"] == "error" or output.get("name") == "stderr":
                yield f"cell {cell['execution_count']} shows an error or a warning"


@rule
def is_small(chapter: Chapter) -> Iterator[str]:
    """A notebook stays below the budget."""
    size = len(chapter.text.encode()) / 1e6
    if size > LIMIT_MB:
        yield f"{size:.1f} MB, more than {LIMIT_MB:g}"


@rule
def keeps_the_template(chapter: Chapter) -> Iterator[str]:
    """Title, badge, what you will learn, prerequisites, setup, explorer, limits, exercises with solutions, summary."""
    first = "".join(chapter.notebook["cells"][0]["source"])
    if not first.startswith("# "):
        yield "the first cell does not begin with the title"
    badge = f"/blob/main/{chapter.path.resolve().relative_to(BOOK.parent).as_posix()})"
    if badge not in first or "colab.research.google.com/github/" not in first:
        yield f"no Colab badge for {badge}"
    for section in SECTIONS:
        if not re.search(rf"^## {section}\s*$", chapter.prose, re.M):
            yield f"no section '## {section}'"
    if "**Prerequisites" not in chapter.prose:
        yield "no **Prerequisites**"
    if (
        len(re.findall(r"^\*\*Exercise \d", chapter.prose, re.M))
        + len(re.findall(r"^### Exercise \d", chapter.prose, re.M))
        < 3
        or chapter.prose.count("<details>") < 3
    ):
        yield "fewer than three exercises with solutions"
    if chapter.prose.count("<details>") != chapter.prose.count("</details>"):
        yield "a <details> is not closed"
    setup = "".join(chapter.code[0]["source"]) if chapter.code else ""
    if not setup.startswith("try:\n    import teleport_lite as tl\nexcept ImportError:"):
        yield "the first code cell is not the setup cell"
    if not any("plot.explorer(" in "".join(c["source"]) for c in chapter.code):
        yield "no explorer"


@rule
def figures_speak(chapter: Chapter) -> Iterator[str]:
    """Each figure has a caption and alt text; plotting cells end with plt.show(); only the palette colours."""
    for cell in chapter.code:
        source, where = "".join(cell["source"]), f"cell {cell['execution_count']}"
        if any("image/png" in o.get("data", {}) for o in cell["outputs"]):
            meta = cell["metadata"].get("mystnb", {})
            if not meta.get("figure", {}).get("caption") or not meta.get("figure", {}).get("name"):
                yield f"{where} shows a figure without caption or name"
            if not meta.get("image", {}).get("alt"):
                yield f"{where} shows a figure without alt text"
            if source.rstrip().split("\n")[-1] != "plt.show()":
                yield f"{where} plots and does not end with plt.show()"
        if match := re.search(r"""["'](#[0-9a-fA-F]{6}|C\d|tab:\w+|red|blue|green|orange|purple)["']""", source):
            yield f"{where} uses the colour {match[1]}, which is not from plot.COLOURS"


@rule
def is_reproducible(chapter: Chapter) -> Iterator[str]:
    """No timings printed, no volatile metadata, no widget state, cell ids in place."""
    for cell in chapter.code:
        source, where = "".join(cell["source"]), f"cell {cell['execution_count']}"
        if "execution" in cell["metadata"]:
            yield f"{where} stores when it was run"
        if re.search(r"perf_counter|time\.time\(", source):
            yield f"{where} measures time, which differs from run to run"
        if any("application/vnd.jupyter.widget-view+json" in o.get("data", {}) for o in cell["outputs"]):
            yield f"{where} stores a widget, which is dead without its kernel: run make refresh"
    if chapter.notebook["metadata"].get("kernelspec", {}).get("name") != "python3":
        yield "the kernel is not python3"
    if not all("id" in cell for cell in chapter.notebook["cells"]):
        yield "a cell has no id"


def lint(chapter: Chapter) -> list[str]:
    """All findings in a chapter."""
    return [f"{finding}  [{name}]" for name, check in RULES.items() for finding in check(chapter)]


def main(arguments: list[str]) -> int:
    """Lint the chapters named, or all; 1 when there is a finding."""
    paths = [Path(a) for a in arguments] or sorted(BOOK.rglob("*.ipynb"))
    findings = [f"{path}: {finding}" for path in paths for finding in lint(read(path))]
    print("\n".join(findings), end="\n" if findings else "")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
