# make demo   set up and train the default experiment on the embedded digits
# make test   set up and run lint, format check, type check and tests
# make long   as test, and then the thorough tests: more cases of a kind, more kills and faults
# make clean  remove the environment and what the others made
# make help   these lines
.DEFAULT_GOAL := demo
PYTHON ?= python3
BIN := .venv/bin
VENV = $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("softmoe needs Python 3.11 or newer; say make PYTHON=python3.11")' && $(PYTHON) -m venv .venv
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint .ci/constraints.txt
# pip would compile all of it, for most of a minute; Python compiles what is imported, when it is, and keeps that
export PYTHONDONTWRITEBYTECODE =

help:
	@sed -n 's/^# \(make [a-z]*  *\)/\1/p' Makefile

demo: .venv/demo
	$(BIN)/softmoe train

# mypy takes one core while Python compiles on the other what the tests import, and ends beside the tests.
test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy >.venv/types 2>&1 & mypy=$$!; \
	$(BIN)/python -m pytest --collect-only -qq -n 0 >.venv/collected; \
	$(BIN)/python -m pytest; tests=$$?; \
	wait $$mypy; types=$$?; cat .venv/types; exit $$((tests | types))

long: test
	$(BIN)/python -m pytest -m thorough

.venv/demo: pyproject.toml .ci/constraints.txt
	$(VENV)
	$(PIP) --editable .
	touch $@

.venv/test: pyproject.toml .ci/constraints.txt
	$(VENV)
	.ci/install
	touch .venv/demo $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache outputs
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: help demo test long clean
