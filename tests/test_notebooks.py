"""The chapters keep the rules of the book, and each rule finds what it is there to find."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from nbformat import v4

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "book"))
lint = importlib.import_module("lint")

TOC = """
root: book/intro
parts:
  - chapters: [{file: book/01-one/first, sections: [{file: book/01-one/more}]}, {file: book/01-one/second}]
  - numbered: false
    chapters: [{file: book/notation}, {file: book/page}]
"""
NAME = "book/01-one/second.ipynb"
FIGURE = {"mystnb": {"figure": {"name": "fig-rise"}, "image": {"alt": "a line that rises"}}}
DIAGRAM = "https://teleport-lite.github.io/teleport-lite/_static/diagrams/two-layers.svg"
STUB = """def answer():
    return None  # your turn


if (found := answer()) is not None:
    assert found == 2"""
SOLVED = """# Solution
def answer():
    return 2


found = answer()
assert found == 2
print(found)"""
SOLUTION = "<details>\n<summary>Solution</summary>\n\n```python\n# code\n## more\n```\n\nBecause $1 = 1$.\n\n</details>"
STATEMENTS = r"""
By `{a}` and `b`, $\lbrace x \rbrace$, \$5, as in [Theorem 1.1](first.ipynb#theorem-1-1):

> **Definition 2.1 (A `name` with $x$).** Let
>
> $$
> \begin{pmatrix} a \\ b \end{pmatrix} \tag{2.1}
> $$
>
> ```python
> "$"
> ```

> **Lemma 2.2.** By [2.1](#definition-2-1) and [Theorems](first.ipynb#theorem-1-1).

> **Proof of [Lemma 2.2](#lemma-2-2).** Clear. $\square$

```md
> **Theorem 9.9.** Not one. $ {ref}`x` [a](nowhere.md)
```

$$ x \tag{2.2} $$
"""
PLOT = """
fig, ax = plt.subplots()
ax.plot([1, 2], "o-", color=plot.COLOURS["plain"], mfc="none", label="red")
plt.show()
"""


def markdown(text):
    return v4.new_markdown_cell(text)


def code(text, *outputs, **metadata):
    return v4.new_code_cell(text, outputs=list(outputs), metadata=metadata)


def show(mime, content=""):
    return v4.new_output("display_data", {mime: content})


def good():
    """A short chapter without a fault."""
    cells = [
        markdown(f"# Second\n\n{lint.BADGE}({lint.ADDRESS}{NAME})"),
        markdown("## What you will learn\n\nA thing.\n\n**Prerequisites.** [Notation](../notation.md#groups)."),
        code(lint.SETUP.strip(), v4.new_output("stream", name="stdout", text="0.1"), tags=["nbval-ignore-output"]),
        markdown(STATEMENTS),
        markdown("*Before you look: does it\nrise?*"),
        code(PLOT, show("image/png", "iVBORw=="), **FIGURE),
        markdown(f"**Figure.** It\nrises.\n\nThen:\n\n![two boxes]({DIAGRAM})\n\n**Figure.** Two boxes."),
        code("plot.explorer(draw, alt='x', t=[1, 2])", show("text/html", '<div class="tl-player">')),
        markdown("## When it does not help"),
        code("print(round(0.123, 2))", v4.new_output("stream", name="stdout", text="0.12\n")),
        markdown(
            f"## Exercises\n\n**Exercise 1.** Why?\n\n{SOLUTION}\n\n**Exercise 2.** How?\n\n{SOLUTION}\n\n"
            f"**Exercise 3.** Who knows?\n\n{SOLUTION}"
        ),
        code(STUB),
        code(SOLVED, v4.new_output("stream", name="stdout", text="2\n"), tags=["hide-cell"]),
        markdown("## Summary\n\nSo it is.\n\n## What to read next\n\n[A paper](https://arxiv.org/abs/2305.13404)."),
    ]
    notebook = v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    for i, cell in enumerate(cells):
        cell.id = f"cell-{i}"
    for count, cell in enumerate((c for c in cells if c.cell_type == "code"), 1):
        cell.execution_count = count
    return notebook


@pytest.fixture
def findings(tmp_path):
    """Lint a notebook as the second chapter of a book, or under another name."""
    (tmp_path / "_toc.yml").write_text(TOC)
    (tmp_path / "book/01-one").mkdir(parents=True)
    (tmp_path / "book/notation.md").write_text("# Notation\n")
    first = v4.new_notebook(cells=[markdown("> **Theorem 1.1.** It holds.")])
    (tmp_path / "book/01-one/first.ipynb").write_text(json.dumps(first))

    def run(notebook, name=NAME):
        path = tmp_path / name
        path.write_text(notebook if isinstance(notebook, str) else json.dumps(notebook))
        return lint.lint(path)

    return run


def test_a_good_chapter_has_no_finding(findings):
    assert findings(good()) == []


# --- faults: the rule that finds one, words of the finding, and how to make it ----------------------------------------


def says(text):
    """A paragraph more, before the summary."""

    def change(notebook):
        notebook.cells.insert(-1, v4.new_markdown_cell(text, id="more"))

    return change


def runs(text, *outputs, **metadata):
    """A code cell more, at the end."""

    def change(notebook):
        count = 1 + sum(c.cell_type == "code" for c in notebook.cells)
        notebook.cells.append(
            v4.new_code_cell(text, id="more", execution_count=count, outputs=list(outputs), metadata=metadata)
        )

    return change


def replaced(old, new):
    """Other words in the cell that has them."""

    def change(notebook):
        (cell,) = [c for c in notebook.cells if old in c.source]
        cell.source = cell.source.replace(old, new)

    return change


def both(first, second, end):
    """Two exercises that ask for code."""

    def change(notebook):
        for old in (first, second):
            replaced(old, old.removesuffix(".**") + end)(notebook)

    return change


def without(words):
    """No cell that has these words."""

    def change(notebook):
        kept = [c for c in notebook.cells if words not in c.source]
        assert len(kept) == len(notebook.cells) - 1
        notebook.cells = kept
        for count, cell in enumerate((c for c in kept if c.cell_type == "code"), 1):
            cell.execution_count = count

    return change


def cell_with(words, **attributes):
    """Other attributes of the cell with these words."""

    def change(notebook):
        (cell,) = [c for c in notebook.cells if words in c.source]
        cell.update(attributes)

    return change


def meta(**metadata):
    return lambda notebook: notebook.metadata.update(metadata)


def draws(text, *outputs, caption="**Figure.** It falls.", **metadata):
    """A code cell more, and what stands below it."""

    def change(notebook):
        runs(text, *outputs, **metadata)(notebook)
        notebook.cells.append(v4.new_markdown_cell(caption, id="below"))

    return change


def plots(argument):
    return runs(f"ax.plot([1, 2], {argument})")


WARNING = v4.new_output("stream", name="stderr", text="UserWarning")
ERROR = v4.new_output("error", ename="ValueError", evalue="", traceback=[])
PICTURE = show("image/png", "iVBORw==")
OTHER = {"mystnb": {"figure": {"name": "fig-fall"}, "image": {"alt": "a line that falls"}}}


def figure(**changes):
    """The metadata of a figure, with changes."""
    return {"mystnb": {part: facts | changes.get(part, {}) for part, facts in OTHER["mystnb"].items()}}


FAULTS = [
    ("renders_everywhere", "a directive", says("```{note}\nlook\n```")),
    ("renders_everywhere", "a directive", says("> ~~~ {note}\n> look\n> ~~~")),
    ("renders_everywhere", "a directive", says(":::{note}\nlook\n:::")),
    ("renders_everywhere", "a role", says("see {prf:ref}`theorem-1-1`")),
    ("renders_everywhere", "a label", says("(here)=\nlook")),
    ("renders_everywhere", "a comment", says("text\n\n% not shown")),
    ("renders_everywhere", "a footnote", says("text[^1]")),
    ("renders_everywhere", "a link without text", says("[](../notation.md)")),
    ("renders_everywhere", "a picture beside", says("![a logo](logo.svg)")),
    ("renders_everywhere", "newcommand", says(r"$\newcommand{\R}{\mathbb{R}} \R$")),
    ("renders_everywhere", "eqref", says(r"$\eqref{eq}$")),
    ("mathematics_is_whole", "without its partner", says("$x and\n\n$y")),
    ("mathematics_is_whole", "without its partner", says("> so $x$ costs $5")),
    ("mathematics_is_whole", "outside of", says("$$ a = b \\\\ c = d $$")),
    ("statements_are_boxes", "neither", says("**Theorem 2.3.** Not in a quote.")),
    ("statements_are_boxes", "neither", says("> **Theorem 2.3** Without a full stop.")),
    ("statements_are_boxes", "neither", says("> **Theorem (A name).** Without a number.")),
    ("statements_are_boxes", "neither", says("> **Conjecture 2.3.** Not one of the kinds.")),
    ("statements_are_boxes", "neither", says("> **Proof**. Beside the point.")),
    ("statements_are_boxes", "no blank line", says("> **Lemma 2.3.** It goes on\nwithout a mark.")),
    ("statements_are_numbered", "2.4 where 2.3", says("> **Lemma 2.4.** One too far.")),
    ("statements_are_numbered", "3.3 where 2.3", says("> **Lemma 3.3.** Another chapter.")),
    ("statements_are_numbered", "2.2 where 2.3", says("> **Theorem 2.2.** Kinds share one counter.")),
    ("equations_are_numbered", r"\tag{3.1} in chapter 2", says(r"$$ x \tag{3.1} $$")),
    ("equations_are_numbered", r"\tag{*} in chapter 2", says(r"$$ x \tag{*} $$")),
    ("equations_are_numbered", r"\tag{2.2} stands 2 times", says(r"$$ x \tag{2.2} $$")),
    ("links_lead_somewhere", "no file nowhere.md", says("[here](nowhere.md)")),
    ("links_lead_somewhere", "no file third.ipynb", says("[Theorem 3.1](third.ipynb#theorem-3-1)")),
    ("links_lead_somewhere", "no statement lemma-2-9 in this", says("[Lemma 2.9](#lemma-2-9)")),
    ("links_lead_somewhere", "no statement theorem-1-2 in first.ipynb", says("[$x$](first.ipynb#theorem-1-2)")),
    ("links_lead_somewhere", "leads to Lemma 2.2", says("[Lemma 2.1](#lemma-2-2)")),
    ("links_lead_somewhere", "leads to Lemma 2.2", says("[Theorem 2.2](#lemma-2-2)")),
    ("links_lead_somewhere", "leads to no statement", says("[Theorem 1.1](first.ipynb)")),
    ("starts_alike", "one title", replaced("# Second", "Second")),
    ("starts_alike", "one title", says("# Another")),
    ("starts_alike", "no badge", replaced("second.ipynb", "first.ipynb")),
    ("starts_alike", "no badge", replaced("/blob/main/", "/blob/dev/")),
    ("starts_alike", "Prerequisites", replaced("**Prerequisites.**", "Before:")),
    ("starts_alike", "not the setup cell", replaced("manual_seed(0)", "manual_seed(1)")),
    ("starts_alike", "nbval-ignore-output", cell_with("%pip", metadata={})),
    ("keeps_the_template", "sections", replaced("## Summary", "## The end")),
    ("keeps_the_template", "sections", replaced("## Summary\n", "## What to read next\n\n## Summary\n")),
    ("keeps_the_template", "no explorer", without("plot.explorer")),
    ("keeps_the_template", "measures nothing", without("round(0.123")),
    ("keeps_the_template", "2 exercises", replaced("**Exercise 3.**", "And:")),
    ("keeps_the_template", "4 exercises", replaced("**Exercise 3.**", "**Exercise 3.** What?\n\n**Exercise 4.**")),
    ("keeps_the_template", "no stub", without("# your turn")),
    ("keeps_the_template", "neither a stub", replaced("return None  # your turn", "return 2")),
    ("keeps_the_template", "shows the solution", cell_with("# Solution", metadata={})),
    ("keeps_the_template", "2 exercises ask for code", both("Exercise 1.**", "Exercise 2.**", " (code).**")),
    ("solutions_pass_their_stubs", "that no '# Solution'", without("# Solution")),
    ("solutions_pass_their_stubs", "not define answer", replaced("def answer():\n    return 2", "answer = lambda: 2")),
    ("solutions_pass_their_stubs", "assert found == 2", replaced("assert found == 2\nprint", "print")),
    (
        "solutions_pass_their_stubs",
        "assert found == 2",
        replaced("assert found == 2\nprint", "assert found > 1\nprint"),
    ),
    (
        "solutions_pass_their_stubs",
        "assert found == 2",
        replaced("assert found == 2\nprint", "if 0:\n    assert found == 2\nprint"),
    ),
    ("solutions_pass_their_stubs", "found = answer()", replaced("found = answer()", "found = 2")),
    ("solutions_open", "not closed", says("<details>\n<summary>Hint</summary>\n\nLook.")),
    ("solutions_open", "no blank line", says("<details>\n<summary>Hint</summary>\nLook.\n\n</details>")),
    ("solutions_open", "no blank line", says("<details>\n<summary>Hint</summary>\n\nLook.\n</details>")),
    ("solutions_open", "a heading", says("<details>\n<summary>Hint</summary>\n\n### Look\n\n</details>")),
    ("was_run", "top to bottom", cell_with("round(0.123", execution_count=None)),
    ("was_run", "top to bottom", cell_with("round(0.123", execution_count=9)),
    ("was_run", "an error or a warning", runs("warn()", WARNING)),
    ("was_run", "an error or a warning", runs("fail()", ERROR)),
    ("figures_speak", "hides nothing", runs("ax.grid();")),
    ("figures_speak", "plt.show()", draws("fig", PICTURE, **OTHER)),
    ("figures_speak", "2 figures", draws("plt.show()", PICTURE, PICTURE, **OTHER)),
    ("figures_speak", "in its metadata", draws("plt.show()", PICTURE, **figure(figure={"caption": "Low."}))),
    ("figures_speak", "stands below", runs("plt.show()", PICTURE, **OTHER)),
    ("figures_speak", "stands below", draws("plt.show()", PICTURE, caption="It falls.", **OTHER)),
    ("figures_speak", "alt text", draws("plt.show()", PICTURE, **figure(image={"alt": ""}))),
    ("figures_speak", "name of its own", draws("plt.show()", PICTURE, **figure(figure={"name": "fall"}))),
    ("figures_speak", "name of its own", draws("plt.show()", PICTURE, **figure(figure={"name": "fig-rise"}))),
    ("diagrams_are_there", "no diagram nowhere", replaced("/two-layers.svg", "/nowhere.svg")),
    ("diagrams_are_there", "in words", replaced("![two boxes]", "![]")),
    ("diagrams_are_there", "below the diagram", replaced("**Figure.** Two boxes.", "Two boxes.")),
    ("code_is_narrow", "89 columns", runs("x = " + "1" * 85)),
    ("code_is_narrow", "hide-input", draws("x = 1\n" * 14 + "plt.show()", PICTURE, **OTHER)),
    ("code_is_narrow", "101 lines", runs("x = 1\n" * 100)),
    ("questions_come_first", "asks nothing", replaced("*Before you look: does it\nrise?*", "**Look**: does it rise?")),
    ("errors_are_printed", "verdict", runs("f()", v4.new_output("stream", name="stdout", text="both agree: True"))),
    ("colours_are_the_palette", "'#0072B2'", runs("blue = '#0072B2'")),
    ("colours_are_the_palette", "'red'", plots("color='red'")),
    ("colours_are_the_palette", "'C1'", plots("mfc=plot.COLOURS['plain'] if x else 'C1'")),
    ("colours_are_the_palette", "'k--'", plots("'k--'")),
    ("colours_are_the_palette", "'0.5'", runs("bars(edgecolor=['0.5', 'none'])")),
    ("colours_are_the_palette", "'tab:blue'", runs("ax.set_facecolor('tab:blue')")),
    ("colours_are_the_palette", "'g'", runs("style = {'color': 'g', 'ls': '-'}")),
    ("colours_are_the_palette", "not Python", runs("if:")),
    ("runs_alike", "measures time", runs("start = time.perf_counter()")),
    ("runs_alike", "measures time", runs("%%time\nf()")),
    ("runs_alike", "how long", runs("print(report.seconds)")),
    ("runs_alike", "moves", runs("for i in tqdm(range(3)): pass")),
    ("runs_alike", "in memory", runs("f", show("text/plain", "<function f at 0x7f51aa00>"))),
    ("is_clean", "kernel", meta(kernelspec={"name": "my-env", "display_name": "Mine"})),
    ("is_clean", "'colab'", meta(colab={"provenance": []})),
    ("is_clean", "'language_info.version'", meta(language_info={"name": "python", "version": "3.11.7"})),
    ("is_clean", "'execution'", cell_with("round(0.123", metadata={"execution": {"iopub.execute_input": "12:00"}})),
    ("is_clean", "widget", runs("w", show(lint.WIDGET, {"model_id": "1", "version_major": 2, "version_minor": 0}))),
    ("is_clean", "2 cells with the id cell-3", cell_with("## Summary", id="cell-3")),
    ("is_clean", "MB", runs("x", show("text/html", "x" * 2_000_001))),
    ("is_clean", "(4, 4)", lambda notebook: (notebook.update(nbformat_minor=4), [c.pop("id") for c in notebook.cells])),
]


@pytest.mark.parametrize(("rule", "words", "change"), FAULTS, ids=[f"{rule}-{words}" for rule, words, _ in FAULTS])
def test_a_fault_is_found_by_its_rule_alone(findings, rule, words, change):
    notebook = good()
    change(notebook)
    found = findings(notebook)
    assert any(words in finding for finding in found), found
    assert {finding.rpartition(" [")[2] for finding in found} == {f"{rule}]"}


def test_every_rule_is_seen_to_fire():
    unlisted = {"is_listed"}  # which needs another file name: see below
    assert {rule for rule, _, _ in FAULTS} | unlisted == set(lint.RULES)


def test_a_notebook_that_the_book_does_not_name_is_found(findings):
    found = findings(v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": ""}}), "book/x.ipynb")
    assert found == ["not in _toc.yml [is_listed]"]


def test_a_page_that_belongs_to_a_chapter_starts_as_one(findings):
    notebook = good()
    del notebook.cells[3]  # statements, which a page without a number has none of
    for count, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), 1):
        cell.execution_count = count
    assert [finding[:8] for finding in findings(notebook, "book/01-one/more.ipynb")] == ["no badge"]


def test_a_page_outside_the_chapters_needs_neither_template_nor_numbers(findings):
    notebook = v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    says(r"> **Theorem 7.3.** $$ x \tag{7.1} $$")(notebook)
    assert findings(notebook, "book/page.ipynb") == []


def test_what_is_no_notebook_is_said_to_be_none(findings, tmp_path):
    assert findings("{")[0].startswith("not a notebook")
    without_ids = good()
    del without_ids.cells[3]["id"]
    assert "'id' is a required property" in findings(without_ids)[0]
    (tmp_path / "_toc.yml").unlink()
    assert "no folder above it has a _toc.yml" in findings(good())[0]


def test_the_command_names_file_and_fault(findings, tmp_path, capsys):
    findings(good())
    assert lint.main([str(tmp_path / NAME)]) == 0
    assert capsys.readouterr().out == ""
    findings("{")
    assert lint.main([str(tmp_path / NAME)]) == 1
    assert capsys.readouterr().out.startswith(f"{tmp_path / NAME}: not a notebook")


# --- the book ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", lint.notebooks(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_chapter_keeps_the_rules(path):
    assert lint.lint(path) == []


def test_the_diagrams_are_those_that_the_script_draws():
    diagrams = importlib.import_module("diagrams")
    drawn = {f"{name}.svg": diagrams.picture(name) for name in diagrams.DIAGRAMS}
    stored = {path.name: path.read_text("utf8") for path in diagrams.FOLDER.iterdir()}
    assert stored == drawn, "python book/diagrams.py draws them again"


def test_the_readme_says_what_the_first_page_says():
    recorded = importlib.import_module("recorded")
    readme = (ROOT / "README.md").read_text("utf8")
    assert recorded.FOUND.search(readme)[0] == recorded.findings(), "python book/_ext/recorded.py copies it"
    assert not recorded.ROLE.search(readme)
