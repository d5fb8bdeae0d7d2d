"""Move the project to another public address: rewrite every place that names it.

The constant is `Repository` in pyproject.toml. Everything else (chapters' Colab badges and install lines, the site's
buttons, the README) spells the same address out, so that it works when it is read outside of this checkout.

    make repo-url URL=https://github.com/OWNER/NAME
"""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HIDDEN = {".ci", ".github"}
MADE = {"__pycache__", "_build", "build", "dist", "data", "teleport_lite.egg-info"}
BINARY = {".png", ".ico", ".gif", ".jpg", ".pt", ".npz", ".gz", ".pyc"}


def repository(root: Path = ROOT) -> str:
    """The public address, as pyproject.toml states it."""
    return re.search(r'^Repository = "(.+)"$', (root / "pyproject.toml").read_text("utf8"), re.MULTILINE)[1]


def spellings(url: str) -> list[str]:
    """The forms in which an address occurs: the repository, as Colab names it, raw files, the published book."""
    match = re.fullmatch(r"https://github\.com/([A-Za-z0-9-]+)/([A-Za-z0-9._-]+?)(?:\.git)?/?", url)
    if not match:
        raise ValueError(f"expected https://github.com/OWNER/NAME, got {url!r}; Colab opens chapters from GitHub only")
    owner, name = match.groups()
    forms = ["github.com/{}/{}", "colab.research.google.com/github/{}/{}", "raw.githubusercontent.com/{}/{}"]
    return [form.format(owner, name) for form in forms] + [f"{owner}.github.io/{name}"]


def texts(root: Path = ROOT) -> Iterator[Path]:
    """The text files of the project, without what tools and builds make."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in MADE and (f[0] != "." or f in HIDDEN))
        yield from (Path(folder, f) for f in sorted(files) if Path(f).suffix not in BINARY)


def rewrite(url: str, root: Path = ROOT) -> list[Path]:
    """Replace the present address by `url` in all text files; return those that changed."""
    pairs = list(zip(spellings(repository(root)), spellings(url), strict=True))
    changed = []
    for path in texts(root):
        before = path.read_bytes()
        after = before
        for old, new in pairs:
            after = re.sub(re.escape(old.encode()) + rb"(?![\w-])", new.encode(), after)
        if after != before:
            path.write_bytes(after)
            changed.append(path)
    return changed


if __name__ == "__main__":
    try:
        for changed in rewrite(*sys.argv[1:2] or [""]):
            print(changed.relative_to(ROOT))
    except ValueError as error:
        sys.exit(f"make repo-url URL=...: {error}")
