# `make test` and `make test-full` work on a fresh machine: they make .venv, install, and run.
# Variables: PYTHON (3.11 or newer), TORCH_INDEX (where torch comes from), PYTEST_ARGS,
# JOBS (test processes).

PYTHON ?= python3
# PyPI's torch for Linux brings 3 GB of CUDA; the index that pytorch.org names for CPU does not.
TORCH_INDEX ?=
PYTEST_ARGS ?=
# Tests compile more than they compute: two at a time, but for those that fill the memory.
JOBS ?= 2

# The one quick test of the released size: alone, and compiled with all optimisations.
FULL_SIZE := tests/test_parity_full.py::test_features_and_text_prompt

# Slow tests that fill a process with gigabytes: one after the other, and without the others.
LARGE := $(addprefix tests/test_,convert_full.py parity_full.py parity_memory.py \
	parity_tracking_full.py)

# Slow tests that take longest: first, so that none is left to run alone at the end.
LONG := $(addprefix tests/test_,tutorial.py aot_train.py aot_tpu.py tracker_training.py \
	train_learns.py video_long.py)
OTHERS := $(filter-out $(LARGE) $(LONG),$(wildcard tests/test_*.py))

BIN := .venv/bin
# Tests compile the same programs again and again: what one run compiled, others find here.
test test-full: export JAX_COMPILATION_CACHE_DIR := $(CURDIR)/.venv/programs
PIP := $(BIN)/python -m pip install --quiet --quiet --no-compile --disable-pip-version-check

CHECK_PYTHON = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "$(PYTHON) is older than 3.11: set PYTHON=/path/to/python3.11"; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help demo venv test test-full lint format clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: .venv/demo.stamp  ## find things in pictures, with the weights that the package brings
	$(BIN)/python -m sam3_jax.demo --output demo

venv: .venv/test.stamp  ## make .venv with everything `make test` needs

test: .venv/test.stamp  ## run the quick tests (at most 15 minutes on 2 cores)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --deselect $(FULL_SIZE) $(PYTEST_ARGS)
	$(BIN)/python -m pytest $(FULL_SIZE)

test-full: .venv/test-full.stamp  ## run the slow tests alone (about 45 minutes more)
	$(BIN)/python -m pytest -m slow $(LARGE) $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m slow -n $(JOBS) --dist loadfile --no-loadscope-reorder \
		$(LONG) $(OTHERS) $(PYTEST_ARGS)

lint: .venv/test.stamp  ## check style: ruff's rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/test.stamp  ## rewrite the code in ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment, caches and build outputs
	rm -rf .venv .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Nothing but the package: no torch.
.venv/demo.stamp: pyproject.toml Makefile
	@$(CHECK_PYTHON)
	@echo "Installing into .venv (a few minutes; again only when pyproject.toml changes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) --editable '.[demo]'
	@touch $@

# torch first, so that nothing installed later chooses another build of it; torchvision without
# its dependencies for the same reason.
.venv/test.stamp: pyproject.toml Makefile
	@$(CHECK_PYTHON)
	@echo "Installing into .venv (a few minutes; again only when pyproject.toml changes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) torch==2.13.0 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@$(PIP) torchvision==0.28.0 --no-deps $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@$(PIP) --editable '.[convert,test]'
	@touch $@

# libtpu compiles for TPUs ahead of time on any machine.
.venv/test-full.stamp: .venv/test.stamp
	@echo "Installing libtpu into .venv ..."
	@$(PIP) --editable '.[convert,test,tpu]'
	@touch $@
