PYTHON ?= python3
BIN := .venv/bin

.PHONY: env demo test lint tutorials

env: .venv/installed  ## create .venv with the tested versions

.venv/installed: pyproject.toml constraints.txt
	@echo "installing into .venv; the first time this takes a few minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: env  ## the main job on the shipped models: prints the table, writes moe-lens-demo/
	$(BIN)/moe-lens demo

test: env  ## by file, so that models which a file's tests share are built once
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

tutorials: env  ## run the tutorials again, from clean, and write their outputs
	$(BIN)/python -m tests.notebooks

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
