"""The setup cell of the chapters works where only torch is: it installs the package, and leaves torch alone.

The public address leads to a clone of this repository by git's `insteadOf`, and records are read from here. The
environment is a fresh one without the system's packages; what a notebook service has installed is lent to it by one
path file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("repo_url", ROOT / ".ci" / "repo_url.py")
repo_url = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(repo_url)
URL = repo_url.repository(ROOT)
CHAPTERS = sorted(p for p in (ROOT / "book").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
LENT = Path(metadata.distribution("torch").locate_file("")).resolve()

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="no git here to install the package with")

RUN = """
import sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.colors = "NoColor"
for cell in open(sys.argv[1], encoding="utf8").read().split("\\0"):
    shell.run_cell(cell, store_history=False).raise_error()
"""
RECORDS = f"""
import pathlib, urllib.request
def urlopen(url):
    owner, name, branch, *path = url.removeprefix("https://raw.githubusercontent.com/").split("/")
    return open(pathlib.Path({str(ROOT)!r}, *path), "rb")
urllib.request.urlopen = urlopen
"""
AFTER = "import sys; print(tl.__file__); print(torch.__file__, torch.__version__)"


def setup_cell() -> str:
    """The first code cell, the same in all chapters."""
    cells = set()
    for path in CHAPTERS:
        notebook = json.loads(path.read_text("utf8"))
        cells.add("".join(next(c for c in notebook["cells"] if c["cell_type"] == "code")["source"]))
    (cell,) = cells
    return cell


def without_the_package(folder: Path) -> Path:
    """A view of the installed packages that lacks this one: a link for each of them."""
    folder.mkdir()
    for item in LENT.iterdir():
        if "teleport_lite" not in item.name and item.suffix not in (".pth", ".egg-link"):
            (folder / item.name).symlink_to(item)
    return folder


def clone(folder: Path) -> Path:
    """A repository with the files of this one as they are now."""
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "teleport_lite", folder / "teleport_lite", ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(folder), "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "--no-gpg-sign", "-m", "test"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Run cells in a fresh environment and an empty folder."""
    home = tmp_path_factory.mktemp("colab")
    subprocess.run([sys.executable, "-m", "venv", home / "env"], check=True, capture_output=True)
    python = home / "env" / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    library = Path(subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip())
    (library / "lent.pth").write_text(f"{without_the_package(home / 'lent')}\n")
    redirect = home / "gitconfig"
    redirect.write_text(f'[url "file://{clone(home / "clone")}"]\n\tinsteadOf = {URL}\n')
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "GIT_", "VIRTUAL_ENV", "MPL"))}
    environment |= {
        "GIT_CONFIG_GLOBAL": str(redirect),
        "MPLBACKEND": "agg",
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "IPYTHONDIR": str(home / "ipython"),
    }

    def run(cells: list[str], folder: Path, seconds: float = 240) -> subprocess.CompletedProcess:
        (home / "cells.py").write_text("\0".join(cells), "utf8")
        command = [python, "-c", RUN, home / "cells.py"]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds)

    run.python, run.environment = python, environment
    return run


def test_the_setup_cell_installs_the_package_and_leaves_torch_alone(bare, tmp_path):
    absent = subprocess.run(
        [bare.python, "-c", "import torch; import teleport_lite"],
        cwd=tmp_path,
        env=bare.environment,
        capture_output=True,
        text=True,
    )
    assert "No module named 'teleport_lite'" in absent.stderr, "the environment is not bare"

    first = bare([setup_cell(), AFTER], tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    where, torch = first.stdout.splitlines()[-2:]
    assert Path(where).is_relative_to(bare.python.parent.parent), "installed into the fresh environment"
    assert torch.endswith(metadata.version("torch")) and "lent" in torch, "torch is the one that was there"
    listing = subprocess.run(
        [bare.python, "-m", "pip", "list", "--format=json", "--path", bare.python.parent.parent / "lib"],
        env=bare.environment,
        capture_output=True,
        text=True,
    )
    assert '"torch"' not in listing.stdout

    start = time.perf_counter()
    again = bare([setup_cell()], tmp_path)
    seconds = time.perf_counter() - start
    assert again.returncode == 0 and again.stderr == ""
    assert len(again.stdout.splitlines()) == 1 and again.stdout.startswith("teleport_lite "), "silent where installed"
    assert seconds < 60, "and fast"
    assert list(tmp_path.iterdir()) == [], "nothing is left in the folder"


@pytest.mark.skipif("TELEPORT_LITE_COLAB" not in os.environ, reason="slow: set TELEPORT_LITE_COLAB=1 to run it")
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_the_whole_chapter_runs_there(bare, tmp_path, path):
    """Records, which cells take from the public address, come from here."""
    notebook = json.loads(path.read_text("utf8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    done = bare([RECORDS, *cells], tmp_path, seconds=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
