"""Sphinx extension: captions that stand in the text, and diagrams drawn into the page.

A chapter has to read well in Colab and on GitHub too, so its captions are ordinary paragraphs, below the figure:

    **Figure.** What the figure says, with $mathematics$.

Where the cell above plots, the paragraph becomes the caption of its plot. Where the line above is one of the book's
diagrams, `![alt](https://.../_static/diagrams/name.svg)`, it becomes the caption of that, and the drawing a part of the
page, so that it has the colours of its theme.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

from docutils import nodes
from sphinx.transforms import SphinxTransform

CAPTION = re.compile(r"\s*\*\*Figure\.\*\* (?P<text>.+?)\s*(?:\n[ \t]*\n|\Z)", re.S)
DIAGRAM = re.compile(
    r"^!\[(?P<alt>[^\]]*)\]\((?:https://[^()\s]+/)?_static/diagrams/(?P<name>[\w-]+)\.svg\)[ \t]*$"
    rf"(?:\n{CAPTION.pattern})?",
    re.M | re.S,
)
BADGE = re.compile(r"\[!\[Open in Colab\]\([^()]*\)\]\(([^()]*)\)")


def one_line(text: str) -> str:
    """A paragraph without its line breaks."""
    return " ".join(text.split())


def place(match: re.Match) -> str:
    """The directive of one diagram."""
    caption = ["", one_line(match["text"])] if match["text"] else []
    lines = [
        f"```{{figure}} /book/_static/diagrams/{match['name']}.svg",
        f":alt: {one_line(match['alt'])}",
        f":name: diagram-{match['name']}",
        *caption,
        "```",
    ]
    return "\n".join([*lines, "", ""])


def diagrams(markdown: str) -> str:
    """A page whose diagrams are directives; the badge of Colab becomes a plain link, which needs no picture from afar.

    >>> print(diagrams("![two boxes](_static/diagrams/a.svg)\\n\\n**Figure.** It\\nmoves.\\n\\nText"))
    ```{figure} /book/_static/diagrams/a.svg
    :alt: two boxes
    :name: diagram-a
    <BLANKLINE>
    It moves.
    ```
    <BLANKLINE>
    Text
    """
    return DIAGRAM.sub(place, BADGE.sub(r"[Open in Colab](\1)", markdown))


def captions(cells: list[dict]) -> None:
    """Give each plot the caption below it, and take that out of the text."""
    for cell, below in pairwise(cells):
        figure = cell["metadata"].get("mystnb", {}).get("figure")
        if figure is None or below["cell_type"] != "markdown":
            continue
        text = "".join(below["source"])
        if match := CAPTION.match(text):
            figure["caption"] = one_line(match["text"])
            below["source"] = text[match.end() :]


def on_source_read(app, docname: str, source: list[str]) -> None:
    """Transform a page: a Markdown file, or a notebook."""
    if not app.env.doc2path(docname).endswith(".ipynb"):
        source[0] = diagrams(source[0])
        return
    notebook = json.loads(source[0])
    captions(notebook["cells"])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = diagrams("".join(cell["source"]))
    source[0] = json.dumps(notebook)


class Drawings(SphinxTransform):
    """Diagrams as part of the page."""

    default_priority = 870  # before images are collected

    def apply(self, **kwargs) -> None:
        """Replace pictures from the folder of diagrams by what the files hold."""
        if self.app.builder.format != "html":
            return
        for node in list(self.document.findall(nodes.image)):
            if "/_static/diagrams/" in node["uri"]:
                path = Path(self.app.srcdir) / node["uri"].lstrip("/")
                self.env.note_dependency(str(path))
                node.replace_self(nodes.raw("", path.read_text("utf8"), format="html"))


def setup(app) -> dict:
    """Connect to Sphinx."""
    app.connect("source-read", on_source_read, priority=300)
    app.add_transform(Drawings)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
