"""`benchmarks/calibration.py` with few samples: its process is what it says, and the page has its tables."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.families import broad

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "calibration.py"))


def test_the_page_has_every_table_with_its_header(script: dict[str, Any]) -> None:
    text = (ROOT / "docs" / "calibration.md").read_text(encoding="utf-8")
    for one in script["TABLES"].values():
        assert f"## {one.title}\n" in text
        assert f"| {' | '.join(one.header)} |" in text
    for design in script["DESIGNS"]:
        assert sum(line.startswith(f"| {design.name} |") for line in text.splitlines()) >= 9


@pytest.mark.parametrize("number", range(6))
def test_prompts_are_as_the_design_says(script: dict[str, Any], number: int) -> None:
    """Counts add up; what is together is alike, and what is not is not."""
    design = script["DESIGNS"][number]
    one, two = script["drawn"](design, 400, np.random.default_rng(0))
    for side in (one, two):
        assert side.events.shape == (400, design.together, script["N_EXPERTS"])
        np.testing.assert_array_equal(side.events.sum(-1), script["TOP_K"] * side.tokens)
    assert np.median(one.tokens) / np.median(two.tokens) == pytest.approx(design.longer, rel=0.15)
    rates = [(side.events[:, 0] / side.tokens[:, :1])[:, 20:] for side in (one, two)]
    alike = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(rates[0].T, rates[1].T, strict=True)])
    assert alike > 0.3 if design.paired else abs(alike) < 0.1
    if design.together > 1:
        first, second = ((one.events[:, n] / one.tokens[:, [n]])[:, 20:] for n in (0, 1))
        assert np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(first.T, second.T, strict=True)]) > 0.15


def test_answers_have_their_rates_and_clusters_are_alike(script: dict[str, Any]) -> None:
    values = script["answers"](np.random.default_rng(0), (0.5, 0.7), 4000, 2, 0.3)
    np.testing.assert_allclose(values.mean(1), [0.5, 0.7], atol=0.03)
    pairs = values.reshape(2, -1, 2)
    for condition in pairs:
        assert np.corrcoef(condition.T)[0, 1] == pytest.approx(0.3, abs=0.06)
    assert np.corrcoef(pairs[0, :, 0], pairs[1, :, 0])[0, 1] > 0.15  # a cluster is high under both


@broad
def test_what_the_tables_say_of_few_samples_is_possible(script: dict[str, Any]) -> None:
    """Gross faults only: of few samples a share is known to some tenths."""

    def shares(name: str, samples: int, first: int) -> np.ndarray:
        rows = script["TABLES"][name].make(samples)
        return np.array(
            [[float(cell.split()[0]) if "%" in cell else np.nan for cell in row[first:]] for row in rows]
        )

    assert np.nanmin(shares("effects", 20, 3)) >= 60
    assert np.nanmean(shares("detection-p", 4, 2)[:, :2]) <= 12
    named = shares("discoveries", 3, 3)
    assert np.nanmean(named[:, 0]) <= 30
    assert np.nanmax(named[:, 2]) > 50  # a test that finds nothing would pass the line before
    verdict = script["TABLES"]["verdicts"].make(6)
    wrong = [float(row[-1].split()[0]) for row in verdict if row[2] == "0"]
    right = [float(row[-1].split()[0]) for row in verdict if row[1] == "0" and row[2] == "0.25"]
    assert np.mean(wrong) <= 40
    assert right == [100.0]
