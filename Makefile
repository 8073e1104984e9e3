# Two commands do everything on a fresh machine: `make demo` and `make test`. The rest is for developers.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A test never needs more threads than it has processes.
export OMP_NUM_THREADS ?= 1
SOAK ?= --schedules 500
WORKERS ?= $(shell $(PYTHON) -c "import os; print(max(2, min(4, os.cpu_count() or 2)))")

.PHONY: help setup demo test test-fast soak check format generate bench clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  %-10s %s\n", $$1, $$2}'

setup: $(READY)  ## Make .venv with the locked dependencies and fedml itself

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "fedml needs Python 3.11 to 3.13, this is " + sys.version.split()[0] + "; set PYTHON=python3.12, say")'
	@echo "setting up $(VENV) (once; some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $(READY)

demo: $(READY)  ## Four hospitals: train, release, serve; report in build/demo/
	$(BIN)/fedml demo

test: $(READY)  ## All tests
	$(BIN)/pytest -n $(WORKERS) --dist worksteal

test-fast: $(READY)  ## All tests but the whole-system ones
	$(BIN)/pytest -n $(WORKERS) --dist worksteal -m "not slow"

soak: $(READY)  ## 500 seeded schedules of faults, and the tally; SOAK="--minutes 30 --runs 2" for two runs at once
	$(BIN)/python -m tests.faults.soak $(SOAK)

check: $(READY)  ## Style, types, floors, configs, generated code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/pytest -q -p no:cacheprovider tests/cli/test_compose.py
	$(BIN)/python -m fedml.protocol.generate --check
	$(BIN)/python -m fedml.serving.generate --check

format: $(READY)  ## Format the code and mend what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

generate: $(READY)  ## Regenerate the protobuf code
	$(BIN)/python -m fedml.protocol.generate
	$(BIN)/python -m fedml.serving.generate

bench: $(READY)  ## All benchmarks; see python -m benchmarks --help
	$(BIN)/python -m benchmarks

clean:  ## Remove what was built, the environment included
	rm -rf build dist $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
