"""Sphinx extension: behind each reference the chapters that cite it, found by its address.

The list itself names no chapter, so that it cannot name a wrong one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import unquote

import yaml

ENTRY = re.compile(r"^- .*(?:\n  .*)*", re.M)
ADDRESS = re.compile(r"\]\((https://\S+)\)[.,]")


def texts(root: Path) -> list[dict[str, str]]:
    """Of each chapter in its order, by page, all that its cells say: its own page first, then those below it."""
    toc = yaml.safe_load((root / "_toc.yml").read_text("utf8"))
    chapters = [chapter for part in toc["parts"] if part.get("numbered", True) for chapter in part["chapters"]]
    found = []
    for chapter in chapters:
        files = [page["file"] for page in (chapter, *chapter.get("sections", ()))]
        cells = {file: json.loads((root / f"{file}.ipynb").read_text("utf8"))["cells"] for file in files}
        found.append({f: unquote("\n".join("".join(cell["source"]) for cell in cells[f])) for f in files})
    return found


def cite(markdown: str, chapters: list[dict[str, str]]) -> str:
    """A list of references, each with the numbers of the chapters that hold its address.

    >>> cite("- A, [B](https://doi.org/1). C.", [{}, {"book/x": "see https://doi.org/1"}])
    '- A, [B](https://doi.org/1). C. *Chapter [2](x.ipynb)*'
    """

    def add_chapters(entry: re.Match) -> str:
        address = unquote(ADDRESS.search(entry[0])[1])
        pages = {i: [page for page in c if address in c[page]] for i, c in enumerate(chapters, 1)}
        links = [f"[{i}]({Path(p[0]).relative_to('book')}.ipynb)" for i, p in pages.items() if p]
        if not links:
            raise ValueError(f"no chapter cites {address}")
        return f"{entry[0]} *Chapter{'s' * (len(links) > 1)} {', '.join(links)}*"

    return ENTRY.sub(add_chapters, markdown)


def on_source_read(app, docname: str, source: list[str]) -> None:
    """Fill in the page, and read it again when a chapter changes."""
    if docname == "book/references":
        chapters = texts(Path(app.srcdir))
        source[0] = cite(source[0], chapters)
        for page in (page for chapter in chapters for page in chapter):
            app.env.note_dependency(str(Path(app.srcdir) / f"{page}.ipynb"))


def setup(app) -> dict:
    """Connect to Sphinx."""
    app.connect("source-read", on_source_read)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
