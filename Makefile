# `make demo` and `make test` set up .venv by themselves. PYTHON names the interpreter that .venv is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Test processes, and torch threads in each: together no more than there are processors. Numba keeps at least two threads, so that its
# parallel loops really are parallel in tests; waiting threads sleep.
WORKERS ?= 2
PROCESSORS := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
THREADS := $(shell echo $$(($(PROCESSORS) > $(WORKERS) ? $(PROCESSORS) / $(WORKERS) : 1)))
TEST_ENV := OMP_NUM_THREADS=$(THREADS) NUMBA_NUM_THREADS=$(shell echo $$(($(THREADS) > 2 ? $(THREADS) : 2))) OMP_WAIT_POLICY=passive

# What `make bench` measures.
SUITE ?= cpu

.PHONY: help demo test lint typecheck imports unit bench gpu clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 18

demo: $(STAMP) ## train, freeze and run a quantized GCN on the embedded digits graph
	$(BIN)/python examples/demo.py

test: lint typecheck imports unit ## everything that continuous integration checks

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(STAMP) ## mypy --strict on the package
	$(BIN)/mypy

imports: $(STAMP) ## import-linter: imports go downward only
	$(BIN)/lint-imports

unit: $(STAMP) ## pytest alone; ARGS="-k name" selects
	$(TEST_ENV) $(BIN)/pytest -n $(WORKERS) $(ARGS)

# A number is printed only where the tests of what it measures pass.
bench: $(STAMP) ## benchmarks of SUITE (cpu), after their tests; ARGS="--graphs Cora" chooses graphs
	$(TEST_ENV) $(BIN)/pytest -n $(WORKERS) $$($(BIN)/python -m qgnn.perf --suite $(SUITE) --tests)
	$(BIN)/qgnn bench --suite $(SUITE) $(ARGS)

# From the plain source tree, with the torch and Triton that PYTHON has. Its versions are not ours to pin, so a warning is no error here. The tests are
# given 140 s; then nothing runs beside what is measured, 380 s. Wrong tests do not keep the suite, which checks every result itself, from running,
# but make fails.
gpu: ## GPU tests and benchmarks, nothing installed, 9 minutes; PYTHON=... names the interpreter
	@$(PYTHON) tests/plain; tests=$$?; PYTHONPATH=. $(PYTHON) -m qgnn.perf --suite gpu $(ARGS) && [ $$tests -eq 0 ]

clean: ## remove .venv, builds and caches
	rm -rf $(VENV) build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Made last, so an interrupted installation is taken up again by the next call.
$(STAMP): pyproject.toml constraints.txt
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "qgnn needs Python 3.10 or newer; name one with: make PYTHON=python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 \
	  || $(PYTHON) -m venv --clear $(VENV) >/dev/null 2>&1 \
	  || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; } >/dev/null 2>&1 \
	  || { rm -rf $(VENV); echo "$(PYTHON) can make no virtual environment; install what it lacks with: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --editable '.[dev]' --constraint constraints.txt
	@touch $@
