"""The project agrees with itself: one address, one version, one set of requirements, a README that runs."""

import importlib.util
import inspect
import json
import pkgutil
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import tomllib
import yaml
from packaging.requirements import Requirement
from setuptools import find_packages

import teleport_lite

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted(p for p in (ROOT / "book").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)

_spec = importlib.util.spec_from_file_location("repo_url", ROOT / ".ci" / "repo_url.py")
repo_url = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(repo_url)


def read(name):
    return (ROOT / name).read_text("utf8")


def project():
    return tomllib.loads(read("pyproject.toml"))


def pins():
    lines = [line.split("#")[0].strip() for line in read("requirements.txt").splitlines()]
    return {r.name.lower(): r for r in map(Requirement, filter(None, lines))}


# --- the address ------------------------------------------------------------------------------------------------------


def places(url):
    """Where the address must stand, each with what must stand there."""
    slug = url.removeprefix("https://github.com/")
    owner, name = slug.split("/")
    site = f"https://{owner}.github.io/{name}/"
    yield "pyproject.toml", f'Documentation = "{site}"'
    yield "pyproject.toml", f'Issues = "{url}/issues"'
    yield "README.md", url
    yield "README.md", site
    yield "_config.yml", f"url: {url}\n"
    yield "_config.yml", f"baseurl: {site}\n"
    yield "_config.yml", f"ogp_site_url: {site}\n"
    for chapter in CHAPTERS:
        path = chapter.relative_to(ROOT).as_posix()
        yield path, f"https://colab.research.google.com/github/{slug}/blob/main/{path}"
        yield path, f"git+{url}"


def disagreements(root):
    url = repo_url.repository(root)
    return [(name, text) for name, text in places(url) if text not in (root / name).read_text("utf8")]


def test_all_places_name_the_same_address():
    assert disagreements(ROOT) == []


def test_the_address_moves_everywhere(tmp_path):
    for path in repo_url.texts(ROOT):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    old = repo_url.spellings(repo_url.repository(ROOT))
    changed = repo_url.rewrite("https://github.com/some-one/other.name", tmp_path)
    assert {tmp_path / name for name, _ in places(repo_url.repository(ROOT))} <= set(changed)
    assert repo_url.repository(tmp_path) == "https://github.com/some-one/other.name"
    assert disagreements(tmp_path) == []
    left = [p for p in repo_url.texts(tmp_path) if any(form in p.read_text("utf8") for form in old)]
    assert left == []


@pytest.mark.parametrize("url", ["", "https://example.org/a/b", "https://github.com/only-owner", "github.com/a/b"])
def test_an_address_that_colab_cannot_open_is_refused(url):
    with pytest.raises(ValueError, match=r"expected https://github\.com/OWNER/NAME"):
        repo_url.spellings(url)


# --- the version and what is installed --------------------------------------------------------------------------------


def test_the_version_is_stated_once():
    (stated,) = re.findall(r'^__version__ = "(\d+\.\d+\.\d+)"$', read("teleport_lite/__init__.py"), re.MULTILINE)
    assert metadata.version("teleport-lite") == stated
    assert re.search(r"^## (\d+\.\d+\.\d+)", read("CHANGELOG.md"), re.MULTILINE)[1] == stated
    assert "version" in project()["project"]["dynamic"]


def test_every_loose_requirement_has_a_pin_that_satisfies_it():
    stated = project()["project"]
    extras = stated["optional-dependencies"]
    loose = [Requirement(r) for r in stated["dependencies"] + extras["book"] + extras["dev"]]
    assert {"torch", "matplotlib", "ipywidgets", "pytest"} <= {r.name for r in loose}
    unmet = [str(r) for r in loose if not r.specifier.contains(next(iter(pins()[r.name].specifier)).version)]
    assert unmet == []


def test_requirements_are_exact_and_ordinary():
    listed = pins()
    assert {"torch", "jupyter-book", "matplotlib", "ipywidgets", "nbval", "sphinx-proof"} <= set(listed)
    assert [str(r) for r in listed.values() if [s.operator for s in r.specifier] != ["=="] or r.url] == []
    assert not re.search(r"^\s*-|://", read("requirements.txt"), re.MULTILINE)


def test_the_distribution_holds_every_module_and_nothing_else():
    packages = {p.parent.relative_to(ROOT).as_posix().replace("/", ".") for p in ROOT.glob("teleport_lite/**/*.py")}
    found = project()["tool"]["setuptools"]["packages"]["find"]
    assert set(find_packages(ROOT, include=found["include"])) == packages
    assert (ROOT / "teleport_lite" / "py.typed").is_file()


def test_the_package_imports_nothing_but_torch():
    code = """
import sys
import torch
already = set(sys.modules)
import teleport_lite
roots = {name.partition(".")[0] for name in set(sys.modules) - already} - set(sys.stdlib_module_names)
print(*sorted(roots - {"torch", "numpy"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "teleport_lite\n", "")


def test_files_are_short():
    lines = sorted(len(p.read_text("utf8").splitlines()) for p in (ROOT / "teleport_lite").rglob("*.py"))
    assert lines[-1] <= 300
    assert lines[len(lines) // 2] <= 150


def test_everything_public_is_documented():
    modules = [teleport_lite] + [
        importlib.import_module(m.name) for m in pkgutil.walk_packages(teleport_lite.__path__, "teleport_lite.")
    ]
    silent = []
    for module in modules:
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__ or not callable(value):
                continue
            methods = [m for m, f in vars(value).items() if inspect.isfunction(f)] if inspect.isclass(value) else []
            documented = [(name, value)] + [(f"{name}.{m}", getattr(value, m)) for m in methods if m[0] != "_"]
            # getdoc follows inheritance: a method that implements a documented one needs no words of its own
            silent += [f"{module.__name__}.{label}" for label, thing in documented if not inspect.getdoc(thing)]
    assert silent == []


# --- the book and the README ------------------------------------------------------------------------------------------


def test_the_table_of_contents_lists_every_chapter_once():
    toc = yaml.safe_load(read("_toc.yml"))
    chapters = [chapter for part in toc["parts"] for chapter in part["chapters"]]
    listed = [toc["root"], *(page["file"] for c in chapters for page in (c, *c.get("sections", [])))]
    assert len(listed) == len(set(listed))
    missing = [f for f in listed if not any((ROOT / f"{f}{ext}").is_file() for ext in (".md", ".ipynb"))]
    assert missing == []
    assert {p.relative_to(ROOT).with_suffix("").as_posix() for p in CHAPTERS} <= set(listed)


def test_what_the_site_is_made_of_exists():
    config = yaml.safe_load(read("_config.yml"))
    (static,) = config["sphinx"]["config"]["html_static_path"]
    files = [config["logo"], config["html"]["favicon"]]
    files += [f"{static}/{css}" for css in config["sphinx"]["config"]["html_css_files"]]
    files += [f"{folder}/{name}.py" for name, folder in config["sphinx"]["local_extensions"].items()]
    assert [f for f in files if not (ROOT / f).is_file()] == []


def test_the_readme_links_to_what_exists():
    links = re.findall(r"(?:\]\(|src=\"|href=\")([^)#\"]+)", read("README.md"))
    local = [link for link in links if "://" not in link]
    assert local
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_the_readme_example_runs(tmp_path):
    (block,) = re.findall(r"^```python\n(.*?)^```$", read("README.md"), re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_readme_names_targets_that_the_makefile_has():
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", read("README.md") + read("CONTRIBUTING.md")))
    assert {"book", "test"} <= named
    assert named <= targets


# --- nothing of the machine that wrote it -----------------------------------------------------------------------------

MACHINE = re.compile(r"(?<![\w./+<=-])/(?:home|Users|root|work|tmp|opt|var|private|mnt)/[\w.]")
ENCODED = re.compile(r"base64,[A-Za-z0-9+/=\\n\s]+")


def visible(path):
    """The text of a file, without encoded pictures, in which anything may occur."""
    text = path.read_text("utf8")
    if path.suffix == ".ipynb":
        notebook = json.loads(text)
        for cell in notebook["cells"]:
            for output in cell.get("outputs", []):
                output.get("data", {}).pop("image/png", None)
        text = json.dumps(notebook, ensure_ascii=False)
    return ENCODED.sub("", text)


def test_no_file_names_a_path_of_some_machine():
    assert MACHINE.search("see " + "/ho" + "me/someone/x.py")
    assert MACHINE.search('"' + "/tm" + 'p/x"')
    assert [str(p.relative_to(ROOT)) for p in repo_url.texts(ROOT) if MACHINE.search(visible(p))] == []
