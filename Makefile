# Each target works as the first command after a clone; ARGS="..." goes to the program that runs.

# Where `make setup` finds the CPU build of torch on a machine without a GPU, unless pip knows a
# `torch==...+cpu` already (PIP_FIND_LINKS, a mirror).
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
export TORCH_INDEX PYTHON BUPO_CUDA

.PHONY: help setup demo test test-verl test-wheel test-transformers bench docs gpu-check format clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

setup: ## make .venv, install what is needed and build the extension; quick when nothing changed
	@tools/setup.sh

demo: setup ## train the built-in arithmetic recipe: no download, no GPU
	@.venv/bin/python -m bupo.run $(ARGS)

test: setup ## every check of .ci/run: formats, lint, types, CUDA compile, tests
	@tools/test.sh $(ARGS)

test-verl: ## bupo in verl, in an environment of its own (.venv-verl), without a GPU
	@tools/test_verl.sh $(ARGS)

test-wheel: setup ## a wheel, with the oldest and the newest torch; ARGS="2.12.0 ..." for others
	@tools/test_wheel.sh $(ARGS)

test-transformers: setup ## the oldest and the newest transformers; ARGS="5.11.0 ..." for others
	@tools/test_transformers.sh $(ARGS)

bench: setup ## time and peak memory of the LM-head ops against their peers
	@.venv/bin/python bench/bench_lm_head.py $(ARGS)

docs: setup ## the documentation site, in build/site
	@tools/docs.sh $(ARGS)

gpu-check: ## what only a machine with an NVIDIA GPU can check; needs no network
	@tools/gpu_check.sh $(ARGS)

format: setup ## rewrite the sources in the house format
	@.venv/bin/python -m ruff check --fix-only --quiet
	@.venv/bin/python -m ruff format
	@find csrc -regex '.*\.\(h\|cpp\|cuh\|cu\)' -exec .venv/bin/clang-format -i {} +

clean: ## remove build products and caches; keeps .venv
	@rm -rf build dist *.egg-info bupo/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +
