# The two commands of the README. Each makes .venv on its first use.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test clean

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "torch>=2.14" "torchvision>=0.29" ".[digits]"
	touch $@

test: .venv/installed
	$(BIN)/python -m pytest tests
