r"""Sphinx extension: the reference, made from the docstrings, and links between it and the chapters, both ways.

A page of the reference names what it documents, in a fence that this extension fills in:

    ```{api} teleport_lite.groups
    PositiveScaling, GeneralLinear
    ```

It becomes a table, then the full description of each name, each with the sections of the book that use it: found by
reading the code cells of the notebooks, and the inline code of their text. In a chapter, the first inline code
`tl.name` leads to the description. The chapters stay plain: nothing in them knows of the reference.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.domains.python import PyObject
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxRole

PACKAGE = "teleport_lite"
SHORT = {
    "tl": PACKAGE,
    **{path.rpartition(".")[2]: f"{PACKAGE}.{path}" for path in ("book.data", "book.plot", "geometry", "objectives")},
}
FENCE = re.compile(r"^```\{(api|modules)\} (\S+)\n(.*?)^```$", re.M | re.S)
MENTION = re.compile(rf"((?:{PACKAGE}|{'|'.join(SHORT)})(?:\.\w+)+)(?:\(.*\))?")
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.M)


# --- names ------------------------------------------------------------------------------------------------------------


def resolve(path: str) -> Any:
    """What a dotted path leads to; None when it leads nowhere.

    >>> resolve("teleport_lite.groups.Signs").__name__
    'Signs'
    """
    parts = path.split(".")
    found: Any = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(parts[:i]))
            except ImportError:
                return None
        found = getattr(found, part)
    return found


@cache
def documented(folder: Path) -> dict[str, str]:
    """By full name, the page of the reference on which it is described."""
    return {
        f"{match[2]}.{name}": page.stem
        for page in sorted(folder.glob("*.md"))
        for match in FENCE.finditer(page.read_text("utf8"))
        for name in re.findall(r"\w+", match[3])
    }


def summary(thing: Any) -> str:
    """The first sentence of a docstring, in one line.

    >>> summary(resolve("teleport_lite.groups.Group"))
    'A group acting on vectors of length `n`.'
    """
    first = (inspect.getdoc(thing) or "").split("\n\n")[0]
    return " ".join(first.split()).replace("|", r"\|")


def modules(package: str) -> list[str]:
    """A table of the modules of a package, each with its first sentence."""
    found = pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
    names = sorted(m.name for m in found if not m.ispkg)
    rows = [f"| `{n}` | {summary(importlib.import_module(n))} |" for n in names]
    return ["| Module | What it is |", "|---|---|", *rows]


# --- what the chapters use --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A section of a chapter."""

    page: str  # without its suffix, from the root of the project
    number: int
    title: str
    section: str


def chapters(root: Path) -> dict[str, int]:
    """The notebooks of the book in their order, each with its number."""
    toc = yaml.safe_load((root / "_toc.yml").read_text("utf8"))
    files = [c["file"] for part in toc["parts"] if part.get("numbered", True) for c in part["chapters"]]
    return {name: i for i, name in enumerate(files, 1)}


def names_in_code(code: str, known: dict[str, str]) -> Iterator[str]:
    """Dotted paths into the package in some code; `known` maps local names to paths, and learns from its imports.

    >>> known = {}
    >>> list(names_in_code("import teleport_lite as tl; tl.teleport(model).accepted", known))
    ['teleport_lite.teleport']
    >>> list(names_in_code("from teleport_lite.groups import Signs as S\\nS(3)", known))
    ['teleport_lite.groups.Signs']
    """
    tree = ast.parse(re.sub(r"^(\s*)[%!].*", r"\1pass", code, flags=re.M))
    inner: set[int] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                known |= {a.asname or a.name: a.name for a in names if a.name.split(".")[0] == PACKAGE}
            case ast.ImportFrom(module=str(module), names=names) if module.split(".")[0] == PACKAGE:
                known |= {a.asname or a.name: f"{module}.{a.name}" for a in names}
    for node in ast.walk(tree):
        if id(node) in inner or not isinstance(node, ast.Attribute | ast.Name):
            continue
        chain: list[str] = []
        while isinstance(node, ast.Attribute):
            chain.append(node.attr)
            node = node.value
            inner.add(id(node))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in known:
            yield ".".join([known[node.id], *reversed(chain)])


def names_in_text(text: str) -> Iterator[str]:
    """Dotted paths into the package in the inline code of some text.

    >>> list(names_in_text("With `tl.teleport(model, loss_fn)` and `x.T`, as `plot.path` shows."))
    ['teleport_lite.teleport', 'teleport_lite.book.plot.path']
    """
    for code in INLINE.findall(text):
        if match := MENTION.fullmatch(code):
            first, _, rest = match[1].partition(".")
            yield f"{SHORT.get(first, first)}.{rest}"


def described(path: str, index: dict[int, str]) -> str | None:
    """The documented name that a path uses: itself, or the longest beginning of it."""
    parts = path.split(".")
    for length in range(len(parts), 1, -1):
        if (name := index.get(id(resolve(".".join(parts[:length]))))) is not None:
            return name
    return None


def uses(root: Path, folder: Path) -> dict[str, list[Place]]:
    """By documented name, the places that use it: of each chapter the first section that does."""
    index = {id(thing): name for name in documented(folder) if (thing := resolve(name)) is not None}
    found: dict[str, list[Place]] = {name: [] for name in index.values()}
    for page, number in chapters(root).items():
        if not (path := root / f"{page}.ipynb").is_file():
            continue
        title = section = ""
        known: dict[str, str] = {}
        for cell in json.loads(path.read_text("utf8"))["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "code":
                is_setup = not known  # it only imports, and sets the style
                in_code = list(names_in_code(text, known))
                mentions = [] if is_setup else [(section, p) for p in in_code]
            else:
                mentions = []
                for part in re.split(r"^(?=#)", text, flags=re.M):
                    if heading := HEADING.match(part):
                        title, section = (
                            title or heading[1],
                            heading[1] if title else "",
                        )
                    mentions += [(section, p) for p in names_in_text(part)]
            for where, used in mentions:
                name = described(used, index)
                if name and all(place.page != page for place in found[name]):
                    found[name].append(Place(page, number, title, where))
    return found


# --- the pages --------------------------------------------------------------------------------------------------------


def to_rst(lines: list[str], links: dict[str, str]) -> list[str]:
    r"""A docstring with Markdown's mathematics and inline code, as reStructuredText; doctests stay as they are.

    >>> to_rst(["$a^b$ of `Signs` and `x`.", "", ">>> `x`"], {"Signs": "teleport_lite.groups.Signs"})
    [':math:`a^b` of :py:obj:`Signs <teleport_lite.groups.Signs>` and ``x``.', '', '>>> `x`']
    >>> to_rst(["So", "", "$$ a = b,", "   c $$"], {})
    ['So', '', '', '.. math::', '', '    a = b,', '    c', '']
    """
    text, tests = "\n".join(lines), ""
    if start := re.search(r"^\s*>>> ", text, re.M):
        text, tests = text[: start.start()], text[start.start() :]

    def display(match: re.Match) -> str:
        indent = match[1]
        body = [f"{indent}    {line.strip()}" for line in match[2].strip().split("\n")]
        return "\n".join(["", f"{indent}.. math::", "", *body, ""])

    def inline(match: re.Match) -> str:
        if match[1] is not None:
            math = " ".join(match[1].split())
            return f":math:`{math}`"
        if (name := match[2]) is None:
            return r"\|"
        return f":py:obj:`{name} <{links[name]}>`" if name in links else f"``{name}``"

    text = re.sub(r"^([ \t]*)\$\$(.+?)\$\$[ \t]*$", display, text, flags=re.M | re.S)
    parts = re.split(r"(^[ \t]*\.\. math::\n\n(?:[ \t]+.*\n)+)", text, flags=re.M)
    pattern = re.compile(r"(?<![\\$\w])\$([^$]+?)\$|(?<![`:\w])`([^`\n]+)`(?!`)|\|")
    text = "".join(part if i % 2 else pattern.sub(inline, part) for i, part in enumerate(parts))
    return (text + tests).split("\n")


def link_names(folder: Path) -> dict[str, str]:
    """What a docstring may call each documented name: its full path, or a shorter one that is not ambiguous."""
    links: dict[str, str] = {}
    for full in documented(folder):
        parts = full.split(".")
        for i in range(len(parts)):
            short = ".".join(parts[i:])
            if short not in links or links[short].count(".") > full.count("."):
                links[short] = full  # of two with the same name, the one nearer to the top
    return links


def block(name: str, thing: Any) -> list[str]:
    """The description of one name, by autodoc."""
    if inspect.isclass(thing):
        options = ["   :members:"] if not issubclass(thing, Exception) else []
        return [f".. autoclass:: {name}", *options, ""]
    return [f".. auto{'function' if callable(thing) else 'data'}:: {name}", ""]


def expand(markdown: str, places: dict[str, list[Place]]) -> str:
    """A page of the reference, its fences filled in."""

    def fill(match: re.Match) -> str:
        kind, module, names = match[1], match[2], re.findall(r"\w+", match[3])
        if kind == "modules":
            return "\n".join(modules(module))
        rows, body = ["| Name | What it is | Chapters |", "|---|---|---|"], []
        for name in (f"{module}.{name}" for name in names):
            if (thing := resolve(name)) is None:
                raise ValueError(f"the reference names {name}, which does not exist")
            where = ", ".join(f"{{tl-section}}`{p.page}¦{p.number}¦{p.section}`" for p in places.get(name, []))
            label = f"{{py:obj}}`{name.removeprefix(PACKAGE + '.')} <{name}>`"
            rows.append(f"| {label} | {summary(thing)} | {where} |")
            body += block(name, thing)
        return "\n".join([*rows, "", "```{eval-rst}", *body, "```"])

    return FENCE.sub(fill, markdown)


class SectionOfTheBook(SphinxRole):
    """A place in a chapter: `page¦text¦section`."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """A link whose address is filled in when all pages are known."""
        page, text, section = self.text.split("¦")
        return [nodes.reference("", text, internal=True, tl_page=page, tl_section=section)], []


class LinksToTheReference(SphinxTransform):
    """In a chapter the first inline code that names something documented leads to its description."""

    default_priority = 880

    def apply(self, **kwargs) -> None:
        """Wrap these literals in references."""
        if not self.env.docname.startswith("book/") or self.env.docname.startswith("book/reference/"):
            return
        index = {id(resolve(name)): name for name in documented(reference_folder(self.app))}
        seen: set[str] = set()
        for node in list(self.document.findall(nodes.literal)):
            if any(isinstance(p, nodes.title | nodes.reference | pending_xref) for p in ancestors(node)):
                continue
            for path in names_in_text(f"`{node.astext()}`"):
                if (name := described(path, index)) and name not in seen:
                    seen.add(name)
                    facts = {
                        "refdomain": "py",
                        "reftype": "obj",
                        "reftarget": name,
                        "refdoc": self.env.docname,
                    }
                    node.replace_self(pending_xref("", node.deepcopy(), refexplicit=True, refwarn=True, **facts))


def ancestors(node: nodes.Node) -> Iterator[nodes.Node]:
    """What a node is in, from the inside out."""
    while (node := node.parent) is not None:
        yield node


def reference_folder(app) -> Path:
    """Where the pages of the reference are."""
    return Path(app.srcdir) / "book" / "reference"


def start(app, config) -> None:
    """Read the chapters once for each build."""
    documented.cache_clear()
    folder = reference_folder(app)
    app.tl_links = link_names(folder)
    app.tl_uses = uses(Path(app.srcdir), folder)
    config.nitpick_ignore_regex = [
        *config.nitpick_ignore_regex,
        (r"py:.*", r".*"),
    ]  # types of other libraries


def on_source_read(app, docname: str, source: list[str]) -> None:
    """Fill in the fences of a page of the reference."""
    if docname.startswith("book/reference/"):
        source[0] = expand(source[0], app.tl_uses)
        for page in chapters(Path(app.srcdir)):
            app.env.note_dependency(str(Path(app.srcdir) / f"{page}.ipynb"))


def on_docstring(app, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Markdown in docstrings, before napoleon; where the book uses it, after."""
    lines[:] = to_rst(lines, app.tl_links)


def after_docstring(app, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """A field that names the sections of the book."""
    if places := app.tl_uses.get(name):
        links = [f":tl-section:`{p.page}¦{p.number} {p.title}¦{p.section}`" for p in places]
        lines += ["", f":In the book: {' · '.join(links)}", ""]


def on_resolved(app, tree: nodes.document, docname: str) -> None:
    """Addresses of the sections of the book."""
    for node in tree.findall(nodes.reference):
        if page := node.attributes.pop("tl_page", None):
            section = node.attributes.pop("tl_section")
            slugs = app.env.metadata.get(page, {}).get("myst_slugs", {})
            anchors = [anchor for _, anchor, text in slugs.values() if text == section]
            uri = app.builder.get_relative_uri(docname, page)
            node["refuri"] = f"{uri}#{anchors[0]}" if anchors else uri


def setup(app) -> dict:
    """Connect to Sphinx."""
    app.setup_extension("sphinx.ext.autodoc")
    app.setup_extension("sphinx.ext.napoleon")
    app.add_role("tl-section", SectionOfTheBook())
    app.add_transform(LinksToTheReference)
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.connect("config-inited", start)
    app.connect("source-read", on_source_read)
    app.connect("autodoc-process-docstring", on_docstring, priority=100)
    app.connect("autodoc-process-docstring", after_docstring, priority=900)
    app.connect("doctree-resolved", on_resolved)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
