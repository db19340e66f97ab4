"""`benchmarks/organism_seeds.py`: recipes on several seeds, resumable, and what selections of seeds share."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.families import broad

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    import organism_seeds  # pyright: ignore[reportMissingImports]

    return organism_seeds


def seed(selected: list[list[int]], profiles: np.ndarray, **fields: Any) -> dict[str, Any]:
    return {"selected": {"+": selected, "-": []}, "profiles": profiles.tolist(), **fields}


def test_experts_of_other_seeds_are_matched_by_what_they_do(script: Any) -> None:
    """A seed whose experts are the same in another order shares the whole selection."""
    generator = np.random.default_rng(0)
    profiles = generator.random((2, 5, 30))  # layer expert prompt
    orders = [generator.permutation(5) for _ in range(2)]
    other = np.stack([layer[order] for layer, order in zip(profiles, orders, strict=True)])
    selected = [[0, 1], [0, 3], [1, 4]]
    renamed = [[layer, int(np.flatnonzero(orders[layer] == expert)[0])] for layer, expert in selected]
    overlap, by_chance = script.matched_overlap(seed(selected, profiles), seed(renamed, other))
    assert overlap == 1.0
    assert by_chance == pytest.approx((2 * 2 / 5 + 1 * 1 / 5) / 3)
    apart = [[layer, (expert + 1) % 5] for layer, expert in [[0, 1], [1, 4]]]
    overlap, _ = script.matched_overlap(seed([[0, 1], [1, 4]], profiles), seed(apart, profiles))
    assert overlap == 0.0


def test_seeds_are_read_as_written(script: Any) -> None:
    assert script.seeds_of("20-22,30") == [20, 21, 22, 30]


@broad
def test_trains_measures_and_goes_on(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["null", "--out", str(tmp_path), "--steps", "12", "--n-random", "4"]
    script.main([*arguments, "--seeds", "1-2"])
    printed = capsys.readouterr().out
    assert (tmp_path / "tables.md").read_text(encoding="utf-8") in printed
    assert printed.count("| null | ") == 3  # two seeds, one recipe
    about = json.loads((tmp_path / "null-1.json").read_text())
    low, high = about["gap_interval"]
    assert low <= about["gap"] <= high
    assert np.shape(about["profiles"])[:2] == (4, 8)

    trained: list[int] = []
    monkeypatch.setattr(script, "train", lambda recipe, seed, **_: trained.append(seed))
    monkeypatch.setattr(script, "measured", lambda folder, n_random: {**about, "seed": 1})
    script.main([*arguments, "--seeds", "1-2"])
    assert trained == []
    (tmp_path / "null-1.json").unlink()
    script.main([*arguments, "--seeds", "1-2"])
    assert trained == []  # the checkpoint is there; only what it shows is measured again
    assert (tmp_path / "null-1.json").exists()
