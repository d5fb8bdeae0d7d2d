"""Re-run chapters in place: each in a fresh kernel, from its own folder, with nothing stored that changes by itself.

    python book/refresh.py [CHAPTER.ipynb ...]      (all chapters without an argument)

Running a chapter twice gives the same file, so that a difference means that a result changed. A chapter that fails
keeps its old outputs.
"""

import json
import re
import sys
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
LANGUAGE = {"name": "python", "pygments_lexer": "ipython3"}
WIDGET = "application/vnd.jupyter.widget-view+json"
RANDOM_ID = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")


def joined(outputs: list) -> Iterator[nbformat.NotebookNode]:
    """The outputs, with what was printed in one piece: a busy kernel sends it in several."""
    for is_stream, group in groupby(
        outputs, lambda o: o.output_type == "stream" and o.name
    ):
        first, *rest = group
        if is_stream:
            first.text += "".join(o.text for o in rest)
            rest = []
        yield from [first, *rest]


def stable(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Keep what a reader sees without a kernel; drop times and versions, and number random ids as they appear."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    views = 0
    for output in outputs:
        data = output.get("data", {})
        if (
            "text/html" in data
        ):  # an explorer's player moves by itself; its widget would wait for a kernel
            data.pop(WIDGET, None)
        views += WIDGET in data
    widgets = notebook.metadata.get("widgets") if views else None
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": KERNEL, "language_info": LANGUAGE}
    )
    if widgets:
        notebook.metadata["widgets"] = widgets
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = list(joined(cell.outputs))
        for key in (
            "execution",
            "collapsed",
            "scrolled",
            "id",
            "outputId",
            "colab",
            "ExecuteTime",
        ):
            cell.metadata.pop(key, None)
    found = dict.fromkeys(RANDOM_ID.findall(json.dumps([outputs, widgets])))
    numbered = {old: f"{number:032x}" for number, old in enumerate(found, 1)}
    text = RANDOM_ID.sub(
        lambda match: numbered.get(match[0], match[0]), nbformat.writes(notebook)
    )
    return nbformat.reads(text, as_version=4)


def refresh(path: Path) -> None:
    """Run one chapter and write it back."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=600,
        record_timing=False,
        resources={"metadata": {"path": path.parent}},
        extra_arguments=["--log-level=ERROR"],
    ).execute()
    nbformat.write(stable(notebook), path)


def main(arguments: list[str]) -> int:
    """Run the chapters named, or all; the number of those that failed."""
    here = Path(__file__).resolve().parent
    chapters = [Path(a) for a in arguments] or [
        p for p in sorted(here.rglob("*.ipynb")) if "checkpoint" not in p.name
    ]
    failed = 0
    for path in chapters:
        start = time.perf_counter()
        try:
            refresh(path)
            print(f"{path}: {time.perf_counter() - start:.0f} s", flush=True)
        except (CellExecutionError, DeadKernelError, TimeoutError) as error:
            failed += 1
            print(f"{path}: FAILED, left as it was\n{error}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
