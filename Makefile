# Each target sets up what it needs in .venv and nothing outside this folder.
# TORCH_INDEX: another package index for torch alone, e.g. the one with CPU builds.
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

.PHONY: help setup demo test lint bench prove clean

help:
	@echo "make demo   set up, then train, talk to, merge and export an adapter (about 3 minutes)"
	@echo "make test   set up, then run the test suite"
	@echo "make lint   ruff and mypy"
	@echo "make bench  speed, measured against PEFT and TRL, and its plots"
	@echo "make prove  the long proofs; results go to benchmarks/results/"

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; choose one with: make PYTHON=/path/to/python3"; exit 1; }
	@if [ "$$(uname)" = Linux ] && [ -z "$(TORCH_INDEX)" ] && ! command -v nvidia-smi >/dev/null 2>&1; then \
	  echo "No NVIDIA GPU seen. The package index may give torch's CUDA build: several GB with what it"; \
	  echo "needs, against about 200 MB for the CPU build. To get the CPU build, stop and see README.md,"; \
	  echo "\"The CPU build of torch\"."; fi
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q "torch==2.13.0" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@touch $@

$(VENV)/.core: $(VENV)/.torch pyproject.toml
	$(PIP) install -q -c constraints.txt -e .
	@touch $@

# Prebuilt: no compiler. Without it the demo says what it leaves unproven.
$(VENV)/.gguf: $(VENV)/.core
	@$(PIP) install -q -c constraints.txt -e ".[gguf]" || \
	  echo "llama.cpp's wheel could not be installed; the demo goes on without it."
	@touch $@

$(VENV)/.test: $(VENV)/.core
	$(PIP) install -q -c constraints.txt -e ".[test]"
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	$(PIP) install -q -c constraints.txt -e ".[test,bench]"
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) install -q -c constraints.txt -e ".[test,dev]"
	@touch $@

setup: $(VENV)/.core

demo: $(VENV)/.gguf
	$(VENV)/bin/tsugiki demo

test: $(VENV)/.test
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/.bench
	$(PY) -m benchmarks.step --record step
	$(PY) -m benchmarks.rows --record rows
	$(PY) -m benchmarks.plots

prove: $(VENV)/.test
	$(PY) -m benchmarks.prove

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
