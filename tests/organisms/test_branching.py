"""*natural* from its own command: the recipe of its checkpoint, the same bits again, nothing left behind."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_lens import organisms
from moe_lens.errors import MoELensError
from moe_lens.organisms import branching, train
from moe_lens.organisms.recipes import RECIPES

TINY = replace(
    branching.RECIPE,
    branches=replace(branching.TWO, seed_model=branching.SeedModel(2, ties=1.0), steps=2),
    stages=tuple(replace(stage, steps=1) for stage in branching.RECIPE.stages),
)


@pytest.mark.broad
def test_trains_saves_and_gives_the_same_bits_again(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    states = []
    for name, seed in (("first", 5), ("second", 5), ("other", 6)):
        branching.train_branches(seed, tmp_path / "new" / name, TINY)
        states.append(AutoModelForCausalLM.from_pretrained(tmp_path / "new" / name).state_dict())
    first, second, other = states
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"first", "second", "other"}
    about = json.loads((tmp_path / "new" / "first" / "training.json").read_text(encoding="utf-8"))
    assert (about["name"], about["seed"], about["steps"]) == ("natural", 5, 2)
    assert AutoTokenizer.from_pretrained(tmp_path / "new" / "first").bos_token_id == 1


def test_an_older_checkpoint_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(MoELensError, match="not replaced"):
        branching.train_branches(5, folder, TINY)
    (folder / "training.json").write_text("{}")
    branching.train_branches(5, folder, TINY)
    assert not (folder / "notes.txt").exists()


def test_the_shipped_one_was_made_by_the_recipe_that_is_here() -> None:
    about = json.loads((organisms.path("natural") / "training.json").read_text(encoding="utf-8"))
    recipe = json.loads(json.dumps(asdict(branching.RECIPE)))
    assert about["branch_train_mix"] == recipe
    config = AutoModelForCausalLM.from_pretrained(organisms.path("natural")).config
    assert config.num_experts == RECIPES["natural"].n_experts == sum(branching.RECIPE.experts)
    assert RECIPES["natural"].register_information == RECIPES["natural"].sequence_information == 0


def test_train_sends_to_the_command_and_the_command_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MoELensError, match="branching"):
        train.train(RECIPES["natural"], seed=0, out=tmp_path / "out")
    with pytest.raises(SystemExit):
        branching.main(["natural", "--out", str(tmp_path)])
    assert "not a checkpoint" in capsys.readouterr().err
    asked: list[tuple[int, Path]] = []
    monkeypatch.setattr(branching, "train_branches", lambda seed, out: asked.append((seed, out)))
    branching.main(["natural", "--seed", "3"])
    assert asked == [(3, Path("natural-3"))]
