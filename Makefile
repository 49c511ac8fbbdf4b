# `make test` runs all checks, `make bench` the main benchmark. Each makes .venv on its first run. `make help` lists all targets.

# The interpreter that makes .venv.
PYTHON ?= python3
VENV ?= .venv

# The torch that pip installs if there is none yet. The version is fixed to one that this package was tested with, so that later
# clones run the same. For another version: `make clean`, then `make test TORCH=torch==2.11.0`. pip's own settings choose the build.
# For the small CPU-only build: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test
TORCH ?= torch==2.13.0

# The number of test processes; `auto` is one for each core.
WORKERS ?= auto

PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install test test-fast test-compiled test-builds matrix pretend-gpu lint types format bench examples docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## make .venv with torch (an installed torch is kept), the package (editable) and what its tests need

test: lint types  ## run ruff, pyright, then the tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS)  # one torch thread for each process: the processes already use all cores

test-fast: $(INSTALLED)  ## run the fast unit tests, which compile nothing
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) -m 'not compiler and not slow' tests/unit

# Up to eight environments in build/matrix, of about 6 GB each where pip's torch brings CUDA. For some only: make matrix PYTHONS=3.12 TORCHES='2.6 newest'
PYTHONS ?= 3.10 3.11 3.12 3.13
TORCHES ?= 2.6 newest
matrix:  ## run the fast unit tests on each Python and torch that this machine has or can install
	$(PYTHON) tools/matrix.py --pythons $(PYTHONS) --torches $(TORCHES) --workers $(WORKERS)

pretend-gpu: $(INSTALLED)  ## run the tests that need a GPU on the CPU, to find errors in the tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) -m gpu --pretend-gpu

test-compiled: $(INSTALLED)  ## compile more solves for real (options compile=True)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --compiled -m compiled

test-builds: $(INSTALLED)  ## compile all of csrc/ for real: by nvcc, if there is one, and with the thread sanitizer
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --builds -m builds

lint: $(INSTALLED)  ## run ruff: errors and layout
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(INSTALLED)  ## run pyright
	$(PY) -m pyright --pythonpath $(PY)

format: $(INSTALLED)  ## let ruff fix what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(INSTALLED)  ## train on handwritten digits, then measure memory and time for several numbers of steps: about four minutes
	$(PY) bench/memory_vs_steps.py

examples: $(INSTALLED)  ## run the examples in full, with torchdiffeq beside: pictures and figures for the pages, a quarter of an hour
	$(PY) bench/examples.py --publish

docs: $(VENV)/.docs  ## build the documentation site in build/site/ (a warning is an error), and run every example of the pages
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/project/test_docs.py tests/project/test_readme.py
	@echo "open build/site/index.html; for the search: $(PY) -m http.server -d build/site"

clean:  ## remove .venv, builds and caches
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	rm -f node_cuda/_C.*.so node_cuda/_build.json
	find node_cuda tests bench -name __pycache__ -prune -exec rm -rf {} +

# If $(PYTHON) can import torch (in a container, conda or an active virtual environment), .venv uses that torch: it then searches
# those folders for packages that it does not have. `venv --system-site-packages` would ignore an active virtual environment.
$(PY):
	$(PYTHON) -m venv $(VENV)
	@if folders=$$($(PYTHON) -c 'import sys, torch; print(*[p for p in sys.path if p.endswith("-packages")], sep="\n")' 2>/dev/null); then \
		echo "$$folders" > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/environment_with_torch.pth"; \
		echo "using the torch of $(PYTHON)"; \
	fi

$(VENV)/.docs: $(INSTALLED)
	@$(PY) -m pip install --quiet --no-build-isolation --editable '.[docs]'
	@touch $@

# A second run starts at once: make repeats this only after a change of one of these files.
$(INSTALLED): pyproject.toml setup.py node_cuda/_version.py node_cuda/extension/build.py $(shell find csrc) | $(PY)
	@$(PY) -c 'import torch' 2>/dev/null || { echo 'installing $(TORCH)'; $(PY) -m pip install '$(TORCH)'; }
	@echo "installing node_cuda and the packages for its tests and benchmarks"
	@$(PY) -m pip install --quiet 'setuptools>=77' ninja
	@$(PY) -m pip install --quiet --no-build-isolation --editable '.[test,bench]'
	@touch $@
	@$(PY) -m node_cuda  # pip hides the output of the build
