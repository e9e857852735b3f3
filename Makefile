# make demo   set up and train the default experiment on the embedded digits
# make test   set up and run lint, format check, type check and tests
# make clean  remove the environment and what the two above made
PYTHON ?= python3
BIN := .venv/bin
VENV = $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("softmoe needs Python 3.11 or newer; say make PYTHON=python3.11")' && $(PYTHON) -m venv .venv
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint .ci/constraints.txt
# pip compiles on one core; some packages hold files that are no Python of this version, which it passes over too
COMPILE := $(BIN)/python -m compileall -qq -j 0 .venv/lib || true

demo: .venv/demo
	$(BIN)/softmoe train

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

.venv/demo: pyproject.toml .ci/constraints.txt
	$(VENV)
	$(PIP) --editable .
	$(COMPILE)
	touch $@

.venv/test: pyproject.toml .ci/constraints.txt
	$(VENV)
	$(PIP) --editable '.[dev]'
	$(COMPILE)
	touch .venv/demo $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache outputs

.PHONY: demo test clean
