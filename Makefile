# Everything happens in .venv, made by the first target that needs it. Nothing is installed twice:
# a stamp in .venv carries the checksum of pyproject.toml.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
KEY := $(shell cksum < pyproject.toml | cut -d ' ' -f 1)
USER_STAMP := $(VENV)/.installed-$(KEY)
DEV_STAMP := $(VENV)/.installed-dev-$(KEY)
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test soak check lint types arch fmt bench cluster docs audit clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(USER_STAMP) ## run a real ensemble on this machine, from nothing (seconds, after installing)
	@$(BIN)/python examples/demo.py

# JOBS=2 runs two at a time, in two thirds of the time; a busy machine may then be slower than a test allows.
JOBS ?= 0
# TRIES=2 gives a failed test a second try, at most five tests of a run, and prints what the first one said.
TRIES ?= 1

test: $(DEV_STAMP) ## run the whole test suite
	$(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=loadgroup $(if $(filter-out 1,$(TRIES)),\
	  --reruns=$$(($(TRIES) - 1)) --max-suite-reruns=5 --rerun-show-tracebacks)

soak: $(DEV_STAMP) ## break everything at random for twenty minutes, and check that nothing was lost (SEED=N)
	$(BIN)/python -m tests.faults.soak $(if $(SEED),--seed $(SEED)) $(if $(MINUTES),--minutes $(MINUTES))

check: test lint types arch ## everything that CI runs

lint: $(DEV_STAMP) ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV_STAMP) ## check types
	$(BIN)/mypy

arch: $(DEV_STAMP) ## check that imports run one way
	$(BIN)/lint-imports

fmt: $(DEV_STAMP) ## format the code, fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEV_STAMP) ## measure speed on this machine (minutes)
	$(BIN)/python -m bench

cluster: $(DEV_STAMP) ## open a shell with a private Slurm of four nodes to play with
	@$(BIN)/python tests/slurm/cluster.py

docs: $(DEV_STAMP) ## write the generated parts of docs/ again
	$(BIN)/python tests/unit/test_docs.py

audit: $(DEV_STAMP) ## look for known holes in the dependencies (needs the network)
	@$(PIP) install --quiet pip-audit
	$(BIN)/pip-audit --skip-editable

clean: ## remove .venv and everything else that was made here
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---------------------------------------------------------------------------- set-up

$(USER_STAMP): | $(BIN)/python
	@echo "Installing Ensemble, PostgreSQL and MPI into $(VENV); this takes a minute …"
	@$(PIP) install --quiet --editable '.[postgres,mpi]'
	@touch $@

$(DEV_STAMP): | $(BIN)/python
	@echo "Installing Ensemble and what its tests need into $(VENV); this takes a minute …"
	@$(PIP) install --quiet --editable '.[postgres,mpi,dev]'
	@touch $@ $(USER_STAMP)

# $PYTHON, else the newest that is there, works, and can make environments.
$(BIN)/python:
	@for candidate in $${PYTHON:-python3.13 python3.12 python3.11 python3}; do \
	  "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  found="$$candidate"; \
	  "$$candidate" -c 'import ensurepip, venv' 2>/dev/null || continue; \
	  "$$candidate" -m venv --clear $(VENV) && exit 0; \
	  rm -rf $(VENV); exit 1; \
	done; \
	if [ -n "$$found" ]; then \
	  echo "error: $$found cannot make virtual environments: install its venv package (Debian: apt-get install python3-venv)" >&2; \
	else \
	  echo "error: no Python 3.11 or later was found ($${PYTHON:-python3.13, python3.12, python3.11, python3}): install one, or name it: make PYTHON=/path/to/python3.11 ..." >&2; \
	fi; \
	exit 1
