# Two targets do everything on a fresh machine: `make book` and `make test`. `make` alone lists the rest.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready
PIP    := $(PY) -m pip install -qq --disable-pip-version-check

CHAPTERS ?= $(sort $(wildcard book/*.ipynb book/*/*.ipynb))
BOOK     := $(VENV)/bin/jupyter-book build . -q -W -n --keep-going

# One thread per process: two test workers fill two cores, and numbers do not depend on the number of cores.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
# Notebooks draw with the inline backend, whatever the shell says.
unexport MPLBACKEND

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help book test lint format types refresh links bench experiments repo-url clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12")'
	@echo "==> Installing what the book and the tests need into $(VENV) (the first time: a few minutes, mostly PyTorch)"
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) -r requirements.txt
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

# A page is built again when it changed; all of them when what shapes every page did.
_build/.begun: $(READY) _config.yml _toc.yml $(wildcard book/_ext/*.py book/_static/* book/reference/*.md)
	@rm -rf _build
	@mkdir _build
	@touch $@

book: $(READY) _build/.begun ## build the book from its stored outputs: _build/html
	@echo "==> Building the book, warnings are errors"
	@$(BOOK) >/dev/null || { rm -rf _build; exit 1; }
	@echo "==> Open $(CURDIR)/_build/html/index.html"

test: lint types book ## run every check: style, types, the book, the package and all chapters
	@echo "==> Running the tests of the package and re-running all chapters, whose outputs must be those stored"
	@$(PY) -m pytest -n 2 --dist loadscope --durations 5 tests teleport_lite --doctest-modules \
		--nbval --nbval-current-env --nbval-cell-timeout 120 --nbval-sanitize-with tests/nbval.cfg $(CHAPTERS)

lint: $(READY) ## check style and docstrings (ruff)
	@echo "==> Checking style"
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --quiet --diff .

format: $(READY) ## rewrite the code in the project's style
	@$(PY) -m ruff check --quiet --fix .
	@$(PY) -m ruff format .

types: $(READY) ## check the package's types (mypy)
	@echo "==> Checking types"
	@$(PY) -m mypy --no-error-summary teleport_lite

refresh: $(READY) ## re-run chapters in place and store their outputs (CHAPTERS=... for some)
	@echo "==> Re-running the chapters"
	@$(PY) book/refresh.py $(CHAPTERS)

links: $(READY) ## check that every address in the book answers
	@echo "==> Checking links"
	@$(VENV)/bin/jupyter-book build . -q --builder linkcheck

bench: $(READY) ## time teleports against gradients, side by side
	@echo "==> Timing"
	@$(PY) benchmarks/run.py

experiments: $(READY) ## re-run the paper-scale experiments into book/results (hours)
	@for script in $(sort $(wildcard experiments/*.py)); do echo "==> $$script"; $(PY) $$script || exit 1; done

repo-url: ## move the project to another public address, everywhere: make repo-url URL=https://github.com/OWNER/NAME
	@$(PYTHON) .ci/repo_url.py "$(URL)"

clean: ## remove what the targets made, the environment too
	@rm -rf $(VENV) _build .mypy_cache .pytest_cache .ruff_cache *.egg-info
