# make demo | demo-full | test | bench | lint | mutants | selftest: each first makes a virtual environment in .venv, installs the
# pinned dependencies and builds the extension, if that is not done already.
#
#   VENV=       no environment and no download: run on the packages $(PYTHON) already has (torch must be among them);
#               the extension is built in the source tree.      make test VENV=
#   PYTHON=...  the interpreter to start from (python3)
#   SEEDS=...   seeds of `make demo` (5) and `make demo-full` (10), REPEATS=... training runs of each (1)
PYTHON ?= python3
VENV ?= .venv
SEEDS ?= $(if $(filter demo-full,$(MAKECMDGOALS)),10,5)
REPEATS ?= 1
TESTS ?= tests

# As many processes as there are cores, where pytest-xdist is installed.
WORKERS = $(shell $(PY) -c "from importlib.util import find_spec; \
  print('-n logical --dist worksteal -p no:benchmark' if find_spec('xdist') else '')")

SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*)

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
READY := build/built-$(shell $(PYTHON) -c "import sys; print(sys.implementation.cache_tag)")
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(VENV)/bin/python
READY := $(VENV)/installed
endif

.PHONY: demo demo-full test bench lint mutants selftest setup clean

demo: setup
	SEEDS=$(SEEDS) REPEATS=$(REPEATS) $(PY) examples/compare_on_digits.py

demo-full: setup
	SEEDS=$(SEEDS) REPEATS=$(REPEATS) $(PY) examples/compare_on_digits.py --full

test: setup
	$(PY) -m pytest $(WORKERS) $(TESTS)

bench: setup
	$(PY) benchmarks/run.py

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

mutants: setup
	$(PY) tests/mutants.py

selftest: setup
	$(PY) -m clora_kernels selftest

setup: $(READY)

# torch comes first, by itself: the extension is built against it
$(VENV)/installed: $(SOURCES)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -c constraints.txt setuptools torch numpy
# compat: a path, not an import hook, which a folder of the package's name beside a script would go before
	$(PY) -m pip install --quiet -c constraints.txt --no-build-isolation --config-settings editable_mode=compat \
	  -e ".[triton,test,demo,bench,lint]"
	touch $@

build/built-%: $(SOURCES)
	$(PY) setup.py --quiet build_ext --inplace
	mkdir -p build && touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	rm -f clora_kernels/*.so clora_kernels/_build.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
