# Each target does all of its own set-up, in a local virtual environment. Needs Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV ?= .venv
READY := $(VENV)/.ready

.PHONY: demo test bench lint docs

demo: $(READY)  ## a model learns, forgets and refuses; results in demo-output
	$(VENV)/bin/eua demo --output demo-output --cache .cache --overwrite

test: $(READY)  ## three processes: Triton either compiles kernels or interprets them
	$(VENV)/bin/python -m pytest --ignore tests/fused_energy/test_triton_compiled.py
ifeq ($(shell uname),Linux)
	$(VENV)/bin/python -m pytest tests/fused_energy/test_triton_compiled.py
	TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest tests/fused_energy/test_triton.py
endif

bench: $(READY)
	$(VENV)/bin/python -m pytest benches --benchmark-only

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV)/.ready-docs  ## the documentation site, in build/docs
	$(VENV)/bin/python -m sphinx --fail-on-warning --keep-going --quiet --builder html docs build/docs
	@echo "The site is build/docs/index.html"

$(VENV)/.ready-docs: $(READY)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,docs]'
	touch $(VENV)/.ready-docs

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)
