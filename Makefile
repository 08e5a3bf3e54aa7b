# `make test` and `make demo` need only python3 (>= 3.10) and make; they create .venv on first use.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Test files side by side: the tests of one share what they have trained.
WORKERS ?= 2
PYTEST := -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
SOURCES := $(shell find yolo_qc_plugin -type f -not -path '*/__pycache__/*')

# What touches the host and torch most, for the matrix.
QUICK := tests/test_structure.py tests/host/test_compat.py tests/quant tests/qat/test_scale_steps.py tests/startup tests/run/test_train.py tests/run/test_faults.py
OLDEST_PYTHON ?= python3.10
OLDEST := 'ultralytics==8.4.150' 'torch==2.4.0' 'torchvision==0.19.0'
NEWEST := --upgrade 'ultralytics<8.5' torch torchvision

.PHONY: venv test test-matrix demo lint clean

venv: .venv/.installed

test: venv
	$(BIN)/python $(PYTEST)

# The oldest supported Ultralytics, torch and Python, then the newest to be had: quick tests in each.
test-matrix: .venv-matrix/oldest/.installed .venv-matrix/newest/.installed
	.venv-matrix/oldest/bin/python $(PYTEST) $(QUICK)
	.venv-matrix/newest/bin/python $(PYTEST) $(QUICK)

demo: venv
	$(BIN)/python examples/demo.py

lint: venv
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

clean:
	rm -rf .venv .venv-matrix build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# All dependencies; redone only when pyproject.toml changes.
.venv/.dependencies: pyproject.toml
	@$(PYTHON) -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "make: $(PYTHON) must be Python 3.10 or later with the venv module (Debian, Ubuntu: apt install" \
	    "python3-venv); another interpreter: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) install '.[dev,nvidia]'
	@touch $@

.venv-matrix/oldest/.dependencies: pyproject.toml
	$(OLDEST_PYTHON) -m venv .venv-matrix/oldest
	.venv-matrix/oldest/bin/python -m pip --disable-pip-version-check install '.[dev]' $(OLDEST)
	@touch $@

.venv-matrix/newest/.dependencies: pyproject.toml
	$(PYTHON) -m venv .venv-matrix/newest
	.venv-matrix/newest/bin/python -m pip --disable-pip-version-check install '.[dev]' $(NEWEST)
	@touch $@

# A fresh copy of the package whenever a source changes. build/ goes first: setuptools would ship stale files from it.
%/.installed: %/.dependencies $(SOURCES)
	@rm -rf build
	$*/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --force-reinstall --no-build-isolation .
	@touch $@
