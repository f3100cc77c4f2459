# `make help` lists what there is. Everything runs in .venv, which is made on first use and kept up to date.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# A Python of at least 3.11 that can make virtual environments; give another with PYTHON=...
PYTHON ?= $(shell for name in python3 python3.12 python3.11 python3.13 python3.14 python; do \
	"$$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { command -v "$$name"; break; }; done)

# Where to take torch from, when not from pip's default: the address of an index, such as one that has CPU builds only.
TORCH_INDEX ?=

# More arguments: make demo ARGS="--minutes 3", make test ARGS="-k schedules"
ARGS ?=

# Test files run side by side in this many processes.
WORKERS ?= 2

# Threads that wait sleep instead of spinning, so that two jobs can share a machine. Read when torch is loaded.
export OMP_WAIT_POLICY := PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check format clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(STAMP) ## Make the virtual environment .venv and install Perennial in it

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer that can make virtual environments was found." \
		"Install one (on Debian and Ubuntu: python3 and python3-venv), or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv $(VENV)
	@echo "Installing into $(VENV) (the first time: a few minutes)"
	@# torch first and by itself: the rest then finds it there and does not pull another build of it
	@$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[fast,hf,dev]'
	@touch $@

demo: $(STAMP) ## The main job on text every machine has, about 6 minutes: ends with a table and report.html
	@$(BIN)/perennial demo $(ARGS)

test: $(STAMP) ## The test suite: two CPU cores, no network
	@$(BIN)/python -m pytest -q -m "not slow" -n $(WORKERS) --dist loadfile $(ARGS)

test-slow: $(STAMP) ## The tests that `make test` leaves out
	@$(BIN)/python -m pytest -q -m slow $(ARGS)

check: $(STAMP) ## Style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/architecture/test_imports.py

format: $(STAMP) ## Put the code into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the virtual environment and all caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
