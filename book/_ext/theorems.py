"""Sphinx extension: statements written as plain block quotes become boxes on the site.

A chapter opens in Colab as it is, so its statements are ordinary Markdown,

    > **Theorem 2.1 (Positive scaling).** Let ...

and links to them ordinary links, `[Theorem 2.1](orbits.ipynb#theorem-2-1)`. When Sphinx reads a page, each statement
becomes a sphinx-proof box with the author's number; its anchor is made known to MyST, which then resolves the links as
it resolves links to headings, and warns of those that lead nowhere.
"""

from __future__ import annotations

import json
import re

from docutils import nodes
from sphinx.transforms import SphinxTransform
from sphinx_proof.nodes import proof_node, unenumerable_node

KINDS = (
    "Definition",
    "Theorem",
    "Proposition",
    "Lemma",
    "Corollary",
    "Example",
    "Remark",
    "Algorithm",
)
HEAD = re.compile(
    rf"> \*\*(?P<name>(?P<kind>{'|'.join(KINDS)}) (?P<number>\d+\.\d+)(?: \(.+?\))?|Proof(?: .+?)?)\.\*\*(?P<rest>.*)"
)
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


def anchor(kind: str, number: str) -> str:
    """Where a statement is.

    >>> anchor("Theorem", "2.1")
    'theorem-2-1'
    """
    return f"{kind.lower()}-{number.replace('.', '-')}"


def outside_code(lines: list[str]) -> list[bool]:
    """Which lines are neither in a fenced code block nor one of its fences.

    >>> outside_code(["text", "```", "code", "```", "text"])
    [True, False, False, False, True]
    """
    outside, fence = [], ""
    for line in lines:
        mark = FENCE.match(line)
        outside.append(not fence and not mark)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence) and line.strip() == mark[1]:
            fence = ""
    return outside


def box(head: re.Match, body: list[str]) -> list[str]:
    """The sphinx-proof directive of one statement or proof, its fence longer than any inside."""
    fence = "~" * max([3, *(1 + len(run) for line in body for run in re.findall("~+", line))])
    if not head["kind"]:
        return [
            fence + "{prf:proof}",
            f"**{head['name']}.**{head['rest']}",
            *body,
            fence,
        ]
    options = [f":label: {anchor(head['kind'], head['number'])}", ":nonumber:", ""]
    return [
        f"{fence}{{prf:{head['kind'].lower()}}} {head['name']}",
        *options,
        head["rest"].strip(),
        *body,
        fence,
    ]


def transform(markdown: str) -> str:
    """Markdown with statements and proofs as directives; all else, code blocks included, stays as it is.

    >>> print(transform("> **Theorem 2.1 (A name).** It holds.\\n>\\n> $$ a = b $$"))
    ~~~{prf:theorem} Theorem 2.1 (A name)
    :label: theorem-2-1
    :nonumber:
    <BLANKLINE>
    It holds.
    <BLANKLINE>
    $$ a = b $$
    ~~~
    """
    lines = markdown.split("\n")
    heads = [
        HEAD.fullmatch(line) if outside else None for line, outside in zip(lines, outside_code(lines), strict=True)
    ]
    result, i = [], 0
    while i < len(lines):
        start, i = i, i + 1
        if not (head := heads[start]):
            result.append(lines[start])
            continue
        while i < len(lines) and lines[i].startswith(">") and not heads[i]:
            i += 1
        body = [line.removeprefix(">").removeprefix(" ") for line in lines[start + 1 : i]]
        while body and not body[-1]:
            body.pop()
        result += box(head, body)
    return "\n".join(result)


def on_source_read(app, docname: str, source: list[str]) -> None:
    """Transform a page: a Markdown file, or the Markdown cells of a notebook."""
    if not app.env.doc2path(docname).endswith(".ipynb"):
        source[0] = transform(source[0])
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = transform("".join(cell["source"]))
    source[0] = json.dumps(notebook)


class Statements(SphinxTransform):
    """Boxes with the author's title and one anchor each, where sphinx-proof gives several elements the same one."""

    default_priority = 870  # before MyST looks for the targets of links

    def apply(self, **kwargs) -> None:
        """Rewrite the page."""
        anchors = self.document.myst_slugs = getattr(self.document, "myst_slugs", {})
        for node in list(self.document.findall(unenumerable_node)):
            title, content = node.children
            title["ids"] = []
            classes = [*node["classes"], "statement"]
            node.replace_self(nodes.admonition("", title, *content.children, ids=node["ids"], classes=classes))
            anchors[node["label"]] = (node.line or 0, node["label"], title.astext())
        for node in list(self.document.findall(proof_node)):
            (inner,) = node.children
            inner[0].pop(0)  # its word "Proof.", before the author's own
            node.replace_self(nodes.admonition("", *inner.children, classes=inner["classes"]))
        self.env.metadata[self.env.docname]["myst_slugs"] = anchors


class Equations(SphinxTransform):
    r"""Display mathematics as it was written: Sphinx would wrap what has a \\ in an environment that forbids \tag."""

    default_priority = 870

    def apply(self, **kwargs) -> None:
        r"""Take the \[ and \] upon ourselves."""
        for node in self.document.findall(nodes.math_block):
            if not node.get("nowrap") and not node.get("label") and r"\\" in node.astext():
                node[0] = nodes.Text(rf"\[{node.astext()}\]")
                node["nowrap"] = True


def use_titles(app, config) -> None:
    """A title is all that stands in the head of a box: the statement's name is part of it."""
    config.proof_title_format = "%t"


def setup(app) -> dict:
    """Connect to Sphinx."""
    app.setup_extension("sphinx_proof")
    app.connect("config-inited", use_titles)
    app.connect("source-read", on_source_read)
    app.add_transform(Statements)
    app.add_transform(Equations)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
