PYTHON ?= python3
BIN := .venv/bin

# By file, so that models which a file's tests share are built once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

.PHONY: env env-vllm chromium demo test test-all test-vllm test-lowest bench bench-real methods calibration seeds lint docs docs-serve \
	tutorials

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
	rm -f $@
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-deps --no-compile --requirement constraints-vllm.txt
	.venv-vllm/bin/python -m pip install --quiet --no-deps --no-compile --editable .
	VLLM_PLUGINS= .venv-vllm/bin/python -c "import vllm.entrypoints.openai.api_server"
	rm -f .venv-vllm/failed
	touch $@

APT := DEBIAN_FRONTEND=noninteractive apt-get --quiet --yes -o Dpkg::Options::=--force-unsafe-io -o Acquire::Retries=1 -o Acquire::http::Timeout=20

chromium:  ## Debian's Chromium and its driver, for the tests of the explorer's page; goes on, and says why, where root cannot have them
	@command -v chromedriver >/dev/null || { \
		timeout 300 sh -c '$(APT) update && $(APT) install --no-install-recommends --download-only chromium-driver' \
		&& $(APT) install --no-install-recommends chromium-driver; } >.chromium.log 2>&1 </dev/null \
		|| { tail -n 2 .chromium.log; echo "so there is no Chromium, and tests of the explorer's page are skipped (.chromium.log)"; }

demo: env  ## the main job on the shipped models: prints the table, writes moe-lens-demo/
	$(BIN)/moe-lens demo

test: env  ## the first tier, in less than 8 minutes on 2 cores
	$(PYTEST) -m "not broad"

test-all: env env-vllm  ## every family, dtype and promise, vLLM too where it can be had, ten times the examples; within 40 minutes
	$(PYTEST) --examples=10

test-vllm: env env-vllm  ## the tests of the plugin alone; those that run vLLM itself are skipped where .venv-vllm is missing
	$(PYTEST) tests/engines/vllm

# What the oldest versions could break: arithmetic, files, figures, light imports, and every example.
LOWEST_TESTS := tests/ground tests/routers tests/statistics/test_stats_files.py tests/detection/test_scores.py \
	tests/detection/test_paired_statistics.py tests/steering/test_plan.py tests/plots tests/documents/test_docstrings.py
LOWEST := .venv-lowest/bin

test-lowest:  ## part of the first tier with the oldest versions that pyproject.toml admits; TORCH=2.13.0 takes another torch
	$(PYTHON) -m venv .venv-lowest
	$(LOWEST)/python -m pip install --quiet uv
	$(LOWEST)/uv pip compile --quiet --no-deps --no-annotate --no-header --resolution=lowest-direct \
		--python-version=3.11 pyproject.toml --output-file=.venv-lowest/lowest.txt
	$(if $(TORCH),sed -i 's/^torch==.*/torch==$(TORCH)/' .venv-lowest/lowest.txt)
	$(LOWEST)/uv pip install --quiet --python $(LOWEST)/python --constraint .venv-lowest/lowest.txt --editable ".[harness]" \
		$(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS)) \
		pytest pytest-xdist hypothesis beartype pyyaml nbformat nbclient parameterized
	OMP_NUM_THREADS=1 $(LOWEST)/python -m pytest --numprocesses=auto --dist=loadfile -m "not broad" $(LOWEST_TESTS)

bench: env  ## what counting, steering and patching cost: one table, in about a quarter of an hour
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench.py

bench-real: env  ## the same at the size of OLMoE-1B-7B; needs 16 GB of memory
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/real_size.py

methods: env  ## every published method on the shipped models, in one table: writes docs/methods-table.md; resumes
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/methods_table.py

calibration: env  ## do intervals, p, q, verdicts and power keep their word? writes docs/calibration.md; a quarter of an hour
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/calibration.py

seeds: env  ## ten seeds of every recipe that ships, judged one by one, into seeds/; some hours; resumes
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/organism_seeds.py

tutorials: env  ## run the tutorials again, from clean, and write their outputs
	$(BIN)/python -m tests.notebooks

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: env  ## build the site into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

docs-serve: env  ## show the site while you write
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve
