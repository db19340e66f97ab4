PYTHON ?= python3
BIN := .venv/bin

# By file, so that models which a file's tests share are built once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

.PHONY: env env-vllm demo test test-all bench bench-real lint tutorials

env: .venv/installed  ## create .venv with the tested versions

.venv/installed: pyproject.toml constraints.txt
	@echo "installing into .venv; the first time this takes a few minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

env-vllm:  ## vLLM's own environment, .venv-vllm (2.5 GB), for the tests of the plugin; says why where it cannot be had
	@$(MAKE) --no-print-directory .venv-vllm/installed >.venv-vllm.log 2>&1 \
		|| { mkdir -p .venv-vllm && tail -n 3 .venv-vllm.log | tee .venv-vllm/failed; \
		echo "so there is no .venv-vllm, and tests in vLLM are skipped (.venv-vllm.log)"; }

.venv-vllm/installed: constraints-vllm.txt pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-deps --requirement constraints-vllm.txt
	.venv-vllm/bin/python -m pip install --quiet --no-deps --editable .
	rm -f .venv-vllm/failed
	touch $@

demo: env  ## the main job on the shipped models: prints the table, writes moe-lens-demo/
	$(BIN)/moe-lens demo

test: env  ## the first tier, in less than 8 minutes on 2 cores
	$(PYTEST) -m "not broad"

test-all: env env-vllm  ## every family, dtype and promise, and ten times the examples of each property; within 40 minutes
	$(PYTEST) --examples=10

bench: env  ## what counting, steering and patching cost: one table, in about a quarter of an hour
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench.py

bench-real: env  ## the same at the size of OLMoE-1B-7B; needs 16 GB of memory
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/real_size.py

tutorials: env  ## run the tutorials again, from clean, and write their outputs
	$(BIN)/python -m tests.notebooks

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
