# make demo   set up and train the default experiment on the embedded digits
# make test   set up and run lint, format check, type check and tests
# make long   as test, and then the thorough tests: more cases of a kind, more kills and faults
# make clean  remove the environment and what the two above made
PYTHON ?= python3
BIN := .venv/bin
VENV = $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("softmoe needs Python 3.11 or newer; say make PYTHON=python3.11")' && $(PYTHON) -m venv .venv
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint .ci/constraints.txt
# pip would compile all of it, for most of a minute; Python compiles what is imported, when it is, and keeps that
export PYTHONDONTWRITEBYTECODE =

demo: .venv/demo
	$(BIN)/softmoe train

# mypy takes one core while Python compiles on the other what the tests import, and ends beside the tests.
test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy >.venv/types 2>&1 & mypy=$$!; \
	$(BIN)/python -m pytest --collect-only -qq -n 0 >.venv/collected; \
	$(BIN)/python -m pytest; tests=$$?; \
	wait $$mypy; types=$$?; cat .venv/types; exit $$((tests + types))

long: test
	$(BIN)/python -m pytest -m thorough

.venv/demo: pyproject.toml .ci/constraints.txt
	$(VENV)
	$(PIP) --editable .
	touch $@

# A pip uses one core, so two of them unpack one half each: torch with what it needs of a GPU, and all else. Where one
# cannot (no such GPUs here), nothing is lost: the third alone decides what belongs here.
.venv/test: pyproject.toml .ci/constraints.txt
	$(VENV)
	for lines in '' v; do \
	    grep -$${lines}E '^(torch==|triton|nvidia|cuda)' .ci/constraints.txt >".venv/half$$lines.txt"; \
	    $(PIP) --no-deps --requirement ".venv/half$$lines.txt" & \
	done; wait
	$(PIP) --editable '.[dev]'
	touch .venv/demo $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache outputs
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: demo test long clean
