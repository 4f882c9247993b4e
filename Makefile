# Uses the activated virtual environment, else .venv; any other: make test VENV=/path/to/venv

PYTHON ?= python3
VENV ?= $(or $(VIRTUAL_ENV),.venv)
export PATH := $(abspath $(VENV))/bin:$(PATH)

# nvml.h comes with a package from PyPI, somewhere below site-packages.
FIND_NVML := from importlib.metadata import files; \
	print(next(f.locate().parent for f in files("nvidia-nvml-dev") if f.name == "nvml.h"))
WITH_NVML = export PEPR_NVML_INCLUDE="$$(python -c '$(FIND_NVML)')" &&

.DEFAULT_GOAL := help
.PHONY: help setup build test lint sanitize fuzz docs linkcheck study wheel compare clean

help:  ## List what can be made
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup:  ## Make the virtual environment, build, install with all tools for development
	PYTHON=$(PYTHON) tools/setup.sh -e dev

build:  ## Build the native core again, in place
	python -m pip install --no-deps -e .

test:  ## Run the tests: make test ARGS='-k sampler -x'
	python -m pytest $(ARGS)

lint: style types warnings  ## Check style, spelling and types, and build the core with every warning an error

.PHONY: style types warnings
style:
	ruff check .
	ruff format --check .
	git ls-files '*.py' '*.md' '*.h' '*.cpp' '*.toml' '*.yaml' '*.sh' Makefile | xargs codespell
	clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h')

types:
	mypy
	python -m mypy.stubtest pepr_profiler._core

warnings:
	$(WITH_NVML) cmake --preset werror && cmake --build --preset werror

sanitize: asan tsan  ## Run the core's own tests under the sanitizers

.PHONY: asan tsan
asan tsan:
	$(WITH_NVML) cmake --preset $@ && cmake --build --preset $@ && ctest --preset $@

SECONDS ?= 60
SEED ?= 1
fuzz:  ## Feed damaged files to all that reads files: make fuzz SECONDS=600 SEED=0, or INPUTS=400
	python tests/fuzz.py $(if $(INPUTS),--inputs $(INPUTS),--seconds $(SECONDS)) --seed $(SEED)

docs:  ## Build the documentation site: docs/_build/html; a broken reference fails
	sphinx-build -W --keep-going -n -q -b html docs docs/_build/html

linkcheck:  ## Ask every page that ours link to whether it is there; needs a network
	sphinx-build -q -b linkcheck docs docs/_build/linkcheck

study:  ## Train 13 models on 2 data sets with 3 seeds each (6 min), open study.html afterwards
	sh examples/seeds.sh $(PAGE)

wheel:  ## Make sdist and wheel in dist/, try both: make wheel ARGS='--all --tests all'
	python tools/wheel.py $(ARGS)

compare:  ## Measure beside other tools (25 min, root, a network the first time): build/compare/report.md
	$(VENV)/bin/python -c 'import pepr_profiler._core, pytest, sklearn, torch' || \
		PYTHON=$(PYTHON) tools/setup.sh -e test examples
	python -m benchmarks.peers $(ARGS)

clean:  ## Remove everything that was built; the virtual environment stays
	rm -rf build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache pepr_profiler/*.so
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
