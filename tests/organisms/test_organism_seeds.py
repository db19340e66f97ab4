"""`benchmarks/organism_seeds.py`: recipes on several seeds, resumable, and what selections of seeds share."""

import json
import re
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


def test_what_was_measured_is_kept_and_not_made_again(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (about, *_) = script.by_recipe(script.kept())["planted"]
    monkeypatch.setattr(script, "KEPT", tmp_path / "kept.jsonl.xz")
    script.keep({("planted", 20): about})
    monkeypatch.setattr(script, "train", lambda *_, **__: pytest.fail("trained again"))
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "planted-21.json").write_text(json.dumps({**about, "seed": 21}))
    script.main(["planted", "--seeds", "20-21", "--out", str(tmp_path / "new"), "--keep"])
    assert capsys.readouterr().out.count("| planted | ") == 3
    assert sorted(script.kept()) == [("planted", 20), ("planted", 21)]


@pytest.mark.parametrize("other", [{"steps": 12}, {"n_random": 4}])
def test_a_trial_is_not_kept(
    script: Any, other: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (about, *_) = script.by_recipe(script.kept())["natural"]
    monkeypatch.setattr(script, "KEPT", tmp_path / "kept.jsonl.xz")
    (tmp_path / "natural-91.json").write_text(json.dumps({**about, "seed": 91}))
    (tmp_path / "natural-90.json").write_text(json.dumps({**about, "seed": 90, **other}))
    with pytest.raises(SystemExit):
        script.main(["natural", "--seeds", "90-91", "--out", str(tmp_path), "--keep"])
    assert not script.KEPT.exists()
    (tmp_path / "natural-90.json").unlink()
    script.main(["natural", "--seeds", "91", "--out", str(tmp_path), "--keep"])
    assert sorted(script.kept()) == [("natural", 91)]


def test_the_page_shows_what_was_kept(script: Any) -> None:
    page = (FOLDER.parent / "docs" / "explanation" / "seeds.md").read_text(encoding="utf-8")
    for table in script.tables(script.by_recipe(script.kept())).split("\n\n"):
        for row in table.splitlines()[2:]:
            assert row in page, row


def test_the_readme_says_how_many_seeds_exceeded(script: Any) -> None:
    text = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    row = r"^\| ([\w, -]+) \| [^|]+ \| [^|]+ controls \| ([^|]+) \|$"
    said = {
        name.strip(): rate.strip()
        for names, rates in re.findall(row, text, re.MULTILINE)
        for name, rate in zip(names.split(","), rates.split(","), strict=True)
    }
    assert {"specialised", "planted", "natural", "null-majority"} <= set(said)
    for name, seeds in script.by_recipe(script.kept()).items():
        assert said[name] == f"{sum(about['verdict'] for about in seeds)} of {len(seeds)}"


@broad
def test_trains_measures_and_goes_on(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["null", "--out", str(tmp_path), "--steps", "12", "--n-random", "4", "--fresh"]
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
