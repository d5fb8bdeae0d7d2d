"""Statements become boxes on the site: the rewriting of Markdown, and a small book built as the real one is."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from nbformat import v4

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "book" / "_ext"))
theorems = importlib.import_module("theorems")


# --- the rewriting ----------------------------------------------------------------------------------------------------


def lines(*texts):
    return "\n".join(texts)


@pytest.mark.parametrize("kind", theorems.KINDS)
def test_each_kind_becomes_its_directive(kind):
    rewritten = theorems.transform(f"before\n\n> **{kind} 12.10 (A $x$ (or `y`)).** It holds.\n> So.\n\nafter")
    assert rewritten == lines(
        "before",
        "",
        f"~~~{{prf:{kind.lower()}}} {kind} 12.10 (A $x$ (or `y`))",
        f":label: {kind.lower()}-12-10",
        ":nonumber:",
        "",
        "It holds.",
        "So.",
        "~~~",
        "",
        "after",
    )


@pytest.mark.parametrize("name", ["Proof", "Proof of [Theorem 2.1](a.ipynb#theorem-2-1)", "Proof (again)"])
def test_a_proof_keeps_its_heading(name):
    assert theorems.transform(f"> **{name}.** Clear.") == lines("~~~{prf:proof}", f"**{name}.** Clear.", "~~~")


def test_a_title_ends_where_its_bold_type_does():
    first = theorems.transform("> **Lemma 1.2 (A).** See **this (b).** Yes.").split("\n")
    assert (first[0], first[4]) == ("~~~{prf:lemma} Lemma 1.2 (A)", "See **this (b).** Yes.")


def test_the_content_of_a_statement_survives():
    content = [
        "$$",
        r"\begin{pmatrix} a \\ b \end{pmatrix} \tag{2.1}",
        "$$",
        "",
        "1. one,",
        "   - nested",
        "",
        "```python",
        "if x > 1:",
        "    pass",
        "```",
        "",
        "> a quote",
    ]
    quoted = ["> **Theorem 2.1.**", ">", *(f"> {line}".rstrip() for line in content)]
    assert theorems.transform(lines(*quoted)).split("\n")[4:-1] == ["", "", *content]


def test_a_fence_inside_a_statement_does_not_end_its_box():
    rewritten = theorems.transform("> **Remark 1.1.** Code:\n>\n> ~~~~\n> x\n> ~~~~").split("\n")
    assert rewritten[0].startswith("~~~~~{prf:remark}")
    assert rewritten[-1] == "~~~~~"
    assert rewritten[-4:-1] == ["~~~~", "x", "~~~~"]


def test_a_statement_ends_where_the_next_one_begins():
    rewritten = theorems.transform("> **Lemma 1.1.** L.\n>\n> **Proof.** P.\n> **Lemma 1.2.** M.\ntext")
    assert [line for line in rewritten.split("\n") if "prf:" in line] == [
        "~~~{prf:lemma} Lemma 1.1",
        "~~~{prf:proof}",
        "~~~{prf:lemma} Lemma 1.2",
    ]
    assert rewritten.endswith("M.\n~~~\ntext")


@pytest.mark.parametrize(
    "text",
    [
        "> an ordinary quote",
        "> **Bold.** And no statement.",
        "> **Theorem.** Without a number.",
        "**Theorem 2.1.** Outside of a quote.",
        "```md\n> **Theorem 2.1.** Shown as code.\n```",
        "````md\n```\n> **Theorem 2.1.** Shown as code.\n````",
        "~~~\n```\n> **Theorem 2.1.** Shown as code.\n~~~\n",
        "",
        "\n\ntext  \n",
    ],
)
def test_everything_else_stays_as_it_is(text):
    assert theorems.transform(text) == text


# --- a small book -----------------------------------------------------------------------------------------------------

TOC = """
format: jb-book
root: intro
defaults: {numbered: 1}
parts:
  - caption: One
    chapters: [{file: part/deep/orbits}, {file: part/next}]
"""
ORBITS = r"""# Orbits

[Theorem 1.2](#theorem-1-2), [the $x$-lemma](../next.md#lemma-2-1) and [a section](#a-section).

> **Definition 1.1 (Acting on $\mathbb{R}_{>0}$ by `act`).** A *group* acts when
>
> $$
> \begin{pmatrix} a & b \\ c & d \end{pmatrix} w = w \tag{1.1}
> $$
>
> 1. first,
> 2. second.

> **Theorem 1.2 (SGD with teleportation).** As in [Definition 1.1](#definition-1-1).
>
> ```python
> if x > 1: pass
> ```

> **Proof of [Theorem 1.2](#theorem-1-2).** Clear. $\square$

## A section

<details>
<summary>Solution</summary>

It is *easy*: $x = 1$.

$$ x \tag{1.2} $$

```python
x = 1
```

> **Proof.** By [Lemma 2.1](../next.md#lemma-2-1).

</details>
"""
NEXT = """# Next

> **Lemma 2.1.** It follows from [Theorem 1.2](deep/orbits.ipynb#theorem-1-2).
> **Proof.** At once.

```md
> **Theorem 9.9.** Shown as code.
```
"""


KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}


def build(root, pages):
    """Build a book of some pages with the settings and the extension of the real one."""
    (root / "_toc.yml").write_text(TOC)
    shutil.copyfile(ROOT / "_config.yml", root / "_config.yml")
    for folder in ("_ext", "_static"):
        shutil.copytree(ROOT / "book" / folder, root / "book" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in pages.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".ipynb":
            cells = [v4.new_markdown_cell(part) for part in text.partition("## A section")[::2]]
            cells[1]["source"] = "## A section" + cells[1]["source"]
            text = json.dumps(v4.new_notebook(cells=cells, metadata=KERNEL))
        path.write_text(text)
    command = [Path(sys.executable).with_name("jupyter-book"), "build", ".", "-q", "-W", "-n", "--keep-going"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)


def page(root, name):
    html = (root / "_build" / "html" / f"{name}.html").read_text("utf8")
    return BeautifulSoup(html, "html.parser").find("article")


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    root = tmp_path_factory.mktemp("book")
    intro = "# Intro\n\n[Lemma 2.1](part/next.md#lemma-2-1), [Theorem 1.2](part/deep/orbits.ipynb#theorem-1-2)"
    done = build(root, {"intro.md": intro, "part/deep/orbits.ipynb": ORBITS, "part/next.md": NEXT})
    assert (done.returncode, "WARNING" in done.stderr) == (0, False), done.stderr
    return {name: page(root, name) for name in ("intro", "part/deep/orbits", "part/next")}


def test_boxes_carry_the_numbers_and_titles_of_the_author(book):
    found = {box["id"]: " ".join(box.p.get_text().split()) for name in book for box in book[name].select(".statement")}
    assert found == {
        "definition-1-1": r"Definition 1.1 (Acting on \(\mathbb{R}_{>0}\) by act)",
        "theorem-1-2": "Theorem 1.2 (SGD with teleportation)",
        "lemma-2-1": "Lemma 2.1",
    }
    assert {"admonition", "proof", "theorem"} <= set(book["part/deep/orbits"].find(id="theorem-1-2")["class"])


def test_boxes_hold_what_was_written(book):
    definition = book["part/deep/orbits"].find(id="definition-1-1")
    assert [item.get_text() for item in definition.select("ol > li")] == ["first,", "second."]
    assert definition.em.get_text() == "group"
    assert "if x > 1: pass" in book["part/deep/orbits"].select_one("#theorem-1-2 pre").get_text()


def test_proofs_are_boxes_without_a_title(book):
    proofs = book["part/deep/orbits"].select(".proof:not(.statement)")
    assert [proof.p.get_text() for proof in proofs] == [
        r"Proof of Theorem 1.2. Clear. \(\square\)",
        "Proof. By Lemma 2.1.",
    ]
    assert book["part/next"].select_one(".proof:not(.statement)").p.get_text() == "Proof. At once."


def test_no_statement_is_left_in_a_quote_and_code_is_left_alone(book):
    assert [quote for name in book for quote in book[name].select("blockquote")] == []
    assert "> **Theorem 9.9.** Shown as code." in book["part/next"].select_one("pre").get_text()


@pytest.mark.parametrize("name", ["intro", "part/deep/orbits", "part/next"])
def test_an_anchor_occurs_once(book, name):
    ids = [tag["id"] for tag in book[name].select("[id]")]
    assert len(ids) == len(set(ids))


def test_links_lead_to_the_boxes_and_keep_their_words(book):
    found = {
        (name, a.get_text(), a["href"])
        for name in book
        for a in book[name].select("a.reference.internal")
        if "header" not in str(a.get("class"))
    }
    assert found == {
        ("intro", "Lemma 2.1", "part/next.html#lemma-2-1"),
        ("intro", "Theorem 1.2", "part/deep/orbits.html#theorem-1-2"),
        ("part/deep/orbits", "Theorem 1.2", "#theorem-1-2"),
        ("part/deep/orbits", "Definition 1.1", "#definition-1-1"),
        ("part/deep/orbits", "a section", "#a-section"),
        ("part/deep/orbits", r"the \(x\)-lemma", "../next.html#lemma-2-1"),
        ("part/deep/orbits", "Lemma 2.1", "../next.html#lemma-2-1"),
        ("part/next", "Theorem 1.2", "deep/orbits.html#theorem-1-2"),
    }


def test_solutions_are_rendered(book):
    solution = book["part/deep/orbits"].find("details")
    assert solution.summary.get_text() == "Solution"
    assert solution.em.get_text() == "easy"
    assert solution.select_one("span.math").get_text() == r"\(x = 1\)"
    assert r"x \tag{1.2}" in solution.select_one("div.math").get_text()
    assert solution.select_one(".highlight-python")
    assert solution.select_one(".proof a")["href"] == "../next.html#lemma-2-1"


def test_numbered_equations_are_not_wrapped_in_an_environment_that_forbids_tags(book):
    (equation,) = [m.get_text() for m in book["part/deep/orbits"].select("div.math") if "pmatrix" in m.get_text()]
    assert " ".join(equation.split()) == r"\[ \begin{pmatrix} a & b \\ c & d \end{pmatrix} w = w \tag{1.1} \]"


def test_dead_links_and_double_labels_stop_the_build(tmp_path):
    pages = {
        "intro.md": "# Intro\n\n[Lemma 2.7](part/next.md#lemma-2-7)",
        "part/deep/orbits.ipynb": "# Orbits\n\n[Theorem 1.3](#theorem-1-3)\n\n> **Lemma 2.1.** Once.\n\n## A section",
        "part/next.md": "# Next\n\n> **Lemma 2.1.** Twice.",
    }
    done = build(tmp_path, pages)
    assert done.returncode != 0
    warnings = [line for line in done.stderr.splitlines() if "WARNING" in line]
    assert len(warnings) == 3
    for words in ("'part/next': 'lemma-2-7'", "target not found: 'theorem-1-3'", "duplicate lemma label 'lemma-2-1'"):
        assert sum(words in warning for warning in warnings) == 1, warnings
