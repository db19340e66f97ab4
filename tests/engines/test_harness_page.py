"""The code of docs/harness.md runs, and its table of benchmarks is the one in the code."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from datasets import config as datasets_config

from moe_lens.engines import BENCHMARKS
from tests.notebooks import ROOT

PAGE = (ROOT / "docs" / "harness.md").read_text(encoding="utf-8")


@pytest.mark.broad
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(compile(block, "harness.md", "exec"), names)
    assert names["report"].unsteered.values.shape == (2,)


def test_the_table_names_each_benchmark_with_its_columns_and_first_score() -> None:
    rows = re.findall(r"^\| (`.*) \| (.*) \| (.*) \|$", PAGE, re.MULTILINE)
    said = {
        name: (columns, score) for names, columns, score in rows for name in re.findall(r"`(\w+)`", names)
    }
    assert set(said) == set(BENCHMARKS)
    for name, (columns, score) in said.items():
        assert set(re.findall(r"`(\w+)`", columns)) - {"aliases"} == set(BENCHMARKS[name].columns)
        assert re.findall(r"^`(\w+)`", score) == list(BENCHMARKS[name].scores[:1])
        assert ("fewer are better" in score) is BENCHMARKS[name].lower_is_better


def test_names_in_the_page_exist() -> None:
    for path in set(re.findall(r"(moe_lens\.engines(?:\.\w+)+)", PAGE)):
        module, _, name = path.rpartition(".")
        try:
            import_module(path)
        except ModuleNotFoundError:
            assert hasattr(import_module(module), name), path
