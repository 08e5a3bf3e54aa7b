# `make test` and `make demo` need only python3 (>= 3.10) and make; they create .venv on first use.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find yolo_qc_plugin -type f -not -path '*/__pycache__/*')

.PHONY: venv test demo lint clean

venv: .venv/.installed

test: venv
	$(BIN)/python -m pytest

demo: venv
	$(BIN)/python examples/demo.py

lint: venv
	$(BIN)/python -m ruff check .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# All dependencies; redone only when pyproject.toml changes.
.venv/.dependencies: pyproject.toml
	@$(PYTHON) -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "make: $(PYTHON) must be Python 3.10 or later with the venv module (Debian, Ubuntu: apt install" \
	    "python3-venv); another interpreter: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) install '.[dev]'
	@touch $@

# A fresh copy of the package whenever a source changes. build/ goes first: setuptools would ship stale files from it.
.venv/.installed: .venv/.dependencies $(SOURCES)
	@rm -rf build
	$(PIP) install --quiet --no-deps --force-reinstall --no-build-isolation .
	@touch $@
