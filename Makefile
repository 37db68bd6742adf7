# Every target makes what it needs: `make test` works on a fresh clone with Python 3.11+, make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two cores are the smallest machine we support; xdist splits the tests over what there is.
PYTEST := $(BIN)/python -m pytest -q

.PHONY: help install install-trl quickstart test test-unit test-gpu lint fmt type check bench clean

help:
	@echo "make quickstart  align a tiny model in two minutes"
	@echo "make test        the tests          make check  format, lint, types, tests (what CI runs)"
	@echo "make bench       against TRL        make fmt    rewrite the code in the house's format"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,trl]'
	touch $@

install: $(VENV)/.installed

quickstart: $(VENV)/.installed
	$(BIN)/fiducial train examples/quickstart/dpo.yaml

test: $(VENV)/.installed-dev
	$(PYTEST) tests

test-unit: $(VENV)/.installed-dev
	$(PYTEST) tests/unit tests/contract

test-gpu: $(VENV)/.installed-dev
	$(PYTEST) tests/gpu

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

clean:
	rm -rf $(VENV) outputs build dist .pytest_cache .mypy_cache .ruff_cache
