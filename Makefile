# `make test` proves it, `make bench` shows it; each makes .venv on its first run. `make help` lists the rest.

# The interpreter that makes .venv.
PYTHON ?= python3
VENV ?= .venv

# What pip installs where there is no torch yet: a version that this package was tested with, so that a clone of today and one of
# next year run the same. Another one: `make clean`, then `make test TORCH=torch==2.11.0`. pip's own settings choose the build; the
# small CPU-only one: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test
TORCH ?= torch==2.13.0

# Test processes; `auto` is one a core.
WORKERS ?= auto

PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install test test-fast pretend-gpu lint types format bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## .venv with torch (kept where there is one already), the package (editable) and all it needs here

test: lint types  ## ruff, pyright, then the tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS)  # one torch thread a process: the processes already fill the cores

test-fast: $(INSTALLED)  ## the unit tests that are quick and compile nothing
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) -m 'not compiler and not slow' tests/unit

pretend-gpu: $(INSTALLED)  ## tests of the tests: those that need a GPU, on the CPU
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) -m gpu --pretend-gpu

lint: $(INSTALLED)  ## ruff: mistakes and layout
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(INSTALLED)  ## pyright
	$(PY) -m pyright --pythonpath $(PY)

format: $(INSTALLED)  ## let ruff mend what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(INSTALLED)  ## train on handwritten digits, then measure memory and time against the number of steps: some four minutes
	$(PY) bench/memory_vs_steps.py

clean:  ## remove .venv, builds and caches
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	rm -f node_cuda/_C.*.so node_cuda/_build.json
	find node_cuda tests bench -name __pycache__ -prune -exec rm -rf {} +

# A torch that $(PYTHON) can import (a container's, conda's, an active virtual environment's) is used as it is: .venv then looks
# there for what it does not have itself. `venv --system-site-packages` would pass over an active virtual environment.
$(PY):
	$(PYTHON) -m venv $(VENV)
	@if folders=$$($(PYTHON) -c 'import sys, torch; print(*[p for p in sys.path if p.endswith("-packages")], sep="\n")' 2>/dev/null); then \
		echo "$$folders" > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/environment_with_torch.pth"; \
		echo "using the torch of $(PYTHON)"; \
	fi

# A second run starts at once: the stamp is older only if what it was made from has changed.
$(INSTALLED): pyproject.toml setup.py node_cuda/_version.py node_cuda/extension/build.py $(shell find csrc) | $(PY)
	@$(PY) -c 'import torch' 2>/dev/null || { echo 'installing $(TORCH)'; $(PY) -m pip install '$(TORCH)'; }
	@echo "installing node_cuda and what its tests and benchmarks need"
	@$(PY) -m pip install --quiet 'setuptools>=77' ninja
	@$(PY) -m pip install --quiet --no-build-isolation --editable '.[test,bench]'
	@touch $@
	@$(PY) -m node_cuda  # pip hides what the build said
