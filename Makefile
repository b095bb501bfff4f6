# Set-up and the usual jobs. Needs Python 3.11 (any from 3.10 on), git and, for compiled runs, a C++ compiler.
#
#   make demo    the main job: fine-tunes a small model dense and sparse, writes out/demo/
#   make test    the fast tests            make test-all   all tests but those for a GPU
#   make bench   measurements, out/bench/  make lint       ruff and mypy
#   make clean   removes .venv and everything generated

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test test-all bench lint clean setup

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.spt_setup
PYTEST_ARGS ?=

demo: $(STAMP)
	$(BIN)/python -m spt_compiler demo

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-all: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu" $(PYTEST_ARGS)

bench: $(STAMP)
	$(BIN)/python -m spt_compiler bench

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

setup: $(STAMP)

# torch first and alone: the extras would else be free to pull another build of it.
# --no-build-isolation: torch has brought setuptools, so the build needs no second download of it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[hf,cli,bench,test]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis torch_compile_debug
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
