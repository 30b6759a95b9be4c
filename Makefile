# Everything runs in a virtual environment of its own, in .venv.
#
#     make demo     install, then measure medusa on the shipped model and write report.html
#     make test     install, then run all tests but the thorough ones
#     make thorough install, then run the tests that draw pictures for many minutes
#     make lint     ruff
#     make types    mypy
#     make docs     write the generated pages anew
#     make clean    remove the environment and what was built
#
# On Linux without a GPU, torch's CPU build saves gigabytes. PyTorch's "Get started" page names the
# package index that holds it; hand that on with
#     make demo PIP_ARGS="--extra-index-url ..."

SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
PIP_ARGS ?=
# Tests are spread over the processors in runs, since neighbours share what they make.
PYTEST_ARGS ?= -n auto --dist worksteal
DEMO_PLAN ?= --with medusa

# python3.11 where it runs, else any python3 of at least that version.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

.PHONY: demo test thorough lint types docs clean

demo: $(VENV)/.report
	$(BIN)/hasten bench code-lm $(DEMO_PLAN) --report report.html

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

thorough: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m thorough

lint: $(VENV)/.dev
	$(BIN)/ruff check hasten tests

types: $(VENV)/.dev
	$(BIN)/mypy

docs: $(VENV)/.dev
	$(BIN)/python -m hasten.docs cards

clean:
	rm -rf $(VENV) build dist hasten.egg-info .pytest_cache .mypy_cache .ruff_cache report.html
	find hasten tests -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each set of extras; an installation that failed leaves none.
$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[$*]'
	@touch $@

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "hasten needs Python 3.11 or newer (with venv); none was found" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
