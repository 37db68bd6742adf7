# Every target makes what it needs: `make test` works on a fresh clone with Python 3.11+, make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests are many small models: a process a core with one thread each is fastest, and steady on a busy machine.
# They compare bits and memory on the CPU, also where there is a GPU; those in tests/gpu run by `make test-gpu`.
# Long tests stand together: a process that has run out of its own takes over some of another's.
PYTEST := CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal

.PHONY: help install quickstart test test-unit test-gpu lint fmt type check bench docs clean

help:
	@echo "make quickstart  align a tiny model in two minutes"
	@echo "make test        the tests          make check  format, lint, types, tests (what CI runs)"
	@echo "make test-unit   the quick ones     make fmt    rewrite the code in the house's format"
	@echo "make bench       what it costs      make docs   rewrite what is made: README's tree, docs/losses.md"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing pinned dependencies into $(VENV) (once, a few minutes) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,trl]'
	touch $@

install: $(VENV)/.installed

# PYTHONUTF8: the plan and the tables have lines that an ASCII terminal's encoding has no letters for.
quickstart: export PYTHONUTF8 := 1
quickstart: $(VENV)/.installed
	$(BIN)/python examples/quickstart/make.py outputs/quickstart
	$(BIN)/fiducial train examples/quickstart/dpo.yaml
	$(BIN)/python examples/quickstart/ask.py

test: $(VENV)/.installed-dev
	$(PYTEST) tests

test-unit: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow" tests/unit tests/contract

test-gpu: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q tests/gpu

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

fmt: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(VENV)/.installed-dev
	$(BIN)/mypy

check: lint type test

bench: $(VENV)/.installed-dev
	$(BIN)/python bench/against_trl.py
	$(BIN)/python bench/cache.py
	$(BIN)/python bench/one_pass.py

docs: $(VENV)/.installed
	$(BIN)/python docs/readme.py
	$(BIN)/python docs/losses.py

clean:
	rm -rf $(VENV) outputs build dist .pytest_cache .mypy_cache .ruff_cache
