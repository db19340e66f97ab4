"""`benchmarks/claims.py`, in its quick form: its tables are what public functions say."""

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_lens import RoutedModel, answer_task, organisms, scale_experts
from tests.families import broad
from tests.steering.test_published import pickled, result_table

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield runpy.run_path(str(ROOT / "benchmarks" / "claims.py"))
    for name in ("published_methods", "methods_table"):
        sys.modules.pop(name, None)


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("| ").split(" | ")]


def experts(names: str) -> list[tuple[int, int]]:
    return [(int(layer), int(expert)) for layer, expert in re.findall(r"L(\d+)E(\d+)", names)]


@broad
def test_reinforcing_is_measured_on_held_out_prompts(script: dict[str, Any]) -> None:
    row = dict(zip(*script["rice"](["planted"], 4), strict=True))
    model, world = organisms.load("planted", wrapper=RoutedModel), organisms.world("planted")
    asked = {(c.entity, c.attribute): c for c in world.conflicts("test")}.values()
    task = answer_task([c.open_book for c in asked], [c.document_answer for c in asked])
    factor = float(row["factor"].removeprefix("× "))
    rates = [
        task.values(model, scale_experts(experts(row[side]), factor)).mean()
        for side in ("reinforced toward the document", "toward memory")
    ]
    assert float(row["gap [95 %]"].split()[0]) == pytest.approx(rates[0] - rates[1], abs=0.005)


@broad
def test_a_route_tells_of_a_document_what_alike_words_cannot(script: dict[str, Any]) -> None:
    _, topic, document, _ = script["routescan"](["null"])
    assert topic[4] == "1.00"  # of words
    assert (document[3], document[4]) == ("1.00", "0.50")


def test_files_of_the_authors_are_read_and_their_selection_drawn_anew(
    script: dict[str, Any], tmp_path: Path
) -> None:
    pickled(result_table(seed=1, n_layers=4, tokens=30), tmp_path / "one.pkl")
    result_table(seed=2, n_layers=4, tokens=3000).to_csv(tmp_path / "two.csv")
    _, one, two = script["steermoe"](tmp_path, n_draws=200)
    assert (one[0], one[1], one[2]) == ("one", "24", "2 + 2")
    shares = np.array([[float(cell.split(";")[0]) for cell in row[3:7]] for row in (one, two)])
    assert (np.diff(shares.mean(0)) < 0).all()  # the more tokens are worth one, the less comes again


def test_the_pages_tables_name_every_organism(script: dict[str, Any]) -> None:
    text = (ROOT / "docs" / "explanation" / "claims.md").read_text(encoding="utf-8")
    rows = [cells(line) for line in text.splitlines() if line.startswith("| ")]
    for name, n_tables in (("specialised", 5), ("null-majority", 5)):
        assert sum(row[0] == name for row in rows) == n_tables
