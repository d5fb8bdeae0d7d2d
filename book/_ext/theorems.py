"""Sphinx extension: theorems written as plain block quotes become numbered boxes on the site.

A chapter opens in Colab as it is, so its statements are ordinary Markdown,

    > **Theorem 2.1 (Positive scaling).** Let ...

and links to them ordinary links, `[Theorem 2.1](orbits.ipynb#theorem-2-1)`. When Sphinx reads a page, this extension
turns the first into sphinx-proof directives with the author's number and an anchor, and the second into links to it.
"""

from __future__ import annotations

import json
import re

from docutils import nodes

KINDS = ("Definition", "Theorem", "Proposition", "Lemma", "Corollary", "Example", "Remark", "Algorithm")
STATEMENT = rf"(?P<kind>{'|'.join(KINDS)}) (?P<number>\d+\.\d+)(?: \((?P<title>.+)\))?"
HEAD = re.compile(rf"> \*\*(?:{STATEMENT}|Proof(?P<of> .+?)?)\.\*\* ?(?P<rest>.*)")
LINK = re.compile(rf"\[([^\]]+)\]\(([^()\s#]*)#((?:{'|'.join(k.lower() for k in KINDS)})-\d+-\d+)\)")
FENCE = re.compile(r"\s*(`{3,}|~{3,})")


def anchor(kind: str, number: str) -> str:
    """The anchor of a statement: Theorem 2.1 is at #theorem-2-1."""
    return f"{kind.lower()}-{number.replace('.', '-')}"


def box(head: re.Match, body: list[str]) -> list[str]:
    """The sphinx-proof directive for a statement; its fence is longer than any inside."""
    ticks = "`" * (1 + max([3, *(len(m[1]) for line in body if (m := FENCE.match(line)))]))
    content = [head["rest"], *body]
    if head["kind"] is None:
        first = f"({head['of'].strip()}) {head['rest']}" if head["of"] else head["rest"]
        return [f"{ticks}{{prf:proof}}", first, *body, ticks]
    title = f"{head['number']} ({head['title']})" if head["title"] else head["number"]
    options = [f":label: {anchor(head['kind'], head['number'])}", ":nonumber:"]
    return [f"{ticks}{{prf:{head['kind'].lower()}}} {title}", *options, "", *content, ticks]


def link(match: re.Match) -> str:
    """A link to a statement, as the HTML page will have it."""
    text, page, target = match.groups()
    return f'<a class="reference internal" href="{re.sub(r"[.](ipynb|md)$", ".html", page)}#{target}">{text}</a>'


def transform(markdown: str) -> str:
    """Markdown with statements as directives and links to them as HTML; code blocks stay as they are.

    >>> print(transform("> **Theorem 2.1 (A name).** It holds."))
    ````{prf:theorem} 2.1 (A name)
    :label: theorem-2-1
    :nonumber:
    <BLANKLINE>
    It holds.
    ````
    """
    lines, out, i, fence = markdown.split("\n"), [], 0, ""
    while i < len(lines):
        mark = FENCE.match(lines[i])
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence) and lines[i].strip() == mark[1]:
            fence = ""
        head = None if fence else HEAD.match(lines[i])
        if head:
            i += 1
            body = []
            while i < len(lines) and lines[i].startswith(">") and not HEAD.match(lines[i]):
                body.append(lines[i].removeprefix(">").removeprefix(" "))
                i += 1
            out += [*(LINK.sub(link, line) for line in box(head, body)), ""]
        else:
            out.append(lines[i] if fence else LINK.sub(link, lines[i]))
            i += 1
    return "\n".join(out).rstrip("\n") + ("\n" if markdown.endswith("\n") else "")


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


def on_doctree_read(app, doctree: nodes.document) -> None:
    """Take away the ids that sphinx-proof gives to several elements of one page."""
    for node in doctree.findall(nodes.Element):
        if node.get("ids") in (["proof-content"], ["proof"]):
            node["ids"] = []


def setup(app) -> dict:
    """Connect to Sphinx."""
    app.connect("source-read", on_source_read)
    app.connect("doctree-read", on_doctree_read)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
