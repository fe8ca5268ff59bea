# `make help` lists the targets. Everything runs from .venv, which is built once and again when the pins change.
PYTEST_ARGS ?= -n 2 --dist loadgroup
DEMO_ARGS ?=
NOTEBOOKS ?= tutorials

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=offline
# Two worker processes with one thread each; more threads than cores only slow the suite down.
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-fast families lint format types docs notebooks clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F '\t' '{printf "  make %-10s %s\n", $$1, $$2}'

venv: $(READY)  ## build .venv with the tested versions

$(READY): pyproject.toml constraints.txt
	@ok='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'; \
	for python in $(PYTHON) python3.11 python3; do \
		if $$python -c "$$ok" >/dev/null 2>&1; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "steer-plugin needs Python 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1; fi; \
	if [ ! -x $(BIN)/pip ]; then echo "building $(VENV) with $$($$found --version)"; $$found -m venv $(VENV); fi
	@echo "installing the tested versions (minutes the first time)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@

demo: $(READY)  ## steer the pocket model and write a report to demo-out/
	$(OFFLINE) $(BIN)/steer-plugin demo --out demo-out $(DEMO_ARGS)

test: $(READY)  ## every test, the slow ones last
	$(OFFLINE) $(THREADS) $(BIN)/python -m pytest $(PYTEST_ARGS)

test-fast: $(READY)  ## every test that is not slow
	$(OFFLINE) $(THREADS) $(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

families: $(READY)  ## test every family on every framework and write the table into docs/families.md
	$(OFFLINE) $(THREADS) $(BIN)/python -m pytest -q tests/core/test_families.py --junitxml=.families.xml $(PYTEST_ARGS)
	$(BIN)/python tests/families_table.py .families.xml

lint: $(READY)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)  ## pyright, strict
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(READY)  ## build the documentation into site/
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebooks: $(READY)  ## run every tutorial from top to bottom, leaving the files as they are
	$(OFFLINE) $(THREADS) $(BIN)/python -m pytest $(NOTEBOOKS) $(PYTEST_ARGS)

clean:  ## remove .venv and everything that was built
	rm -rf $(VENV) build dist site demo-out .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
