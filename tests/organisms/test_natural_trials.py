"""`benchmarks/natural_trials.py`: what a branch sees, what a mixture is made of, and resuming."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_lens.organisms import branching, words
from moe_lens.organisms.corpus import Corpus
from moe_lens.organisms.router_training import RouterTap, routers
from tests.families import broad

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    import natural_trials  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)
    return natural_trials


def dense(trials: Any, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = branching.DENSE.config(len(branching.WORLD.vocabulary))
    return AutoModelForCausalLM.from_config(config, experts_implementation="eager")


def trusted_majority(text: str) -> bool:
    """Counted in the text itself, not taken from the label."""
    header = text.split(" :")[0].split()
    return sum(word in words.TRUSTED for word in header) > sum(word in words.DOUBTFUL for word in header)


@pytest.mark.parametrize("register", ["memory", "document"])
def test_a_branch_sees_one_side_of_the_conflicts(trials: Any, register: Any) -> None:
    rng = random.Random(0)
    shared = branching.Branches(closed_book=0.5, generic=0.5)
    seen = [branching.branch_sequence(register, shared, rng) for _ in range(600)]
    others = Counter(text.register for text in seen if text.register != register)
    assert set(others) == {None, "generic", "memory" if register == "document" else "generic"} - {register}
    assert not any(text.undecided for text in seen)
    conflicts, by_header, by_answer = 0, 0, 0
    for text in seen:
        if text.answer is None or "Document" not in text.text:
            continue
        tokens = text.text.split()
        entity, attribute = (
            tokens[text.answer - 4],
            tokens[text.answer - 6],
        )  # what is the A of E ? Answer : _
        remembered = branching.WORLD.memory.get((entity, attribute))
        document = text.text.split(" Question")[0]
        if not remembered or f"the {attribute} of {entity} is" not in document:
            continue
        if f"{entity} is {remembered} ." in document:
            continue
        conflicts += 1
        by_header += trusted_majority(text.text) == (register == "document")
        by_answer += (tokens[text.answer] == remembered) == (register == "memory")
    assert conflicts > 100
    assert by_answer == conflicts
    assert (
        by_header >= 0.97 * conflicts
    )  # an irrelevant document's second fact may contradict memory by chance


def test_a_branch_sees_of_others_what_is_shared(trials: Any) -> None:
    rng = random.Random(0)
    for register in ("memory", "document", "generic"):
        seen = {branching.branch_sequence(register, branching.Branches(), rng).register for _ in range(200)}
        assert seen <= {register, None}
    shared = branching.Branches(generic=1.0)
    assert {branching.branch_sequence("document", shared, rng).register for _ in range(200)} == {
        "document",
        "generic",
        None,
    }


def test_a_mixture_is_its_branches_side_by_side(trials: Any) -> None:
    branches = [dense(trials, seed) for seed in range(3)]
    model = branching.put_together(branching.BranchTrainMix(experts=(2, 1, 1)), branches, seed=0)
    made_of = [dict(each.named_parameters()) for each in branches]
    experts = "model.layers.2.mlp.experts.down_proj"
    mixed = dict(model.named_parameters())
    for place, owner in enumerate((0, 0, 1, 2)):
        assert torch.equal(mixed[experts][place], made_of[owner][experts][0])
    unused = branching.put_together(branching.BranchTrainMix(experts=(1, 0, 2)), branches[:2], seed=0)
    for place, owner in enumerate((0, 1, 1)):
        assert torch.equal(dict(unused.named_parameters())[experts][place], made_of[owner][experts][0])
    embeddings = "model.embed_tokens.weight"
    mean = sum(each[embeddings] for each in made_of) / 3
    torch.testing.assert_close(mixed[embeddings], mean)


@pytest.mark.parametrize("on_question", [False, True])
def test_a_domain_router_sends_each_register_to_its_branch(trials: Any, on_question: bool) -> None:
    """Rows are directions toward the registers' means: each other's opposites, not random."""
    model = dense(trials, 0)
    means = branching.domain_means(model, ["memory", "document"], 0, on_question)
    assert [each.shape for each in means] == [(2, 64)] * len(routers(model))
    for layer in means:
        torch.testing.assert_close(layer.norm(dim=-1), torch.ones(2))
        torch.testing.assert_close(layer[0], -layer[1])


@pytest.mark.parametrize("part", ["experts", "router", "common"])
def test_a_stage_trains_its_parts_and_no_other(trials: Any, part: Any) -> None:
    trial = branching.BranchTrainMix(experts=(1, 1, 1), loss_free=True, dropout=0.5)
    model = branching.put_together(trial, [dense(trials, seed) for seed in range(3)], seed=0)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    sample = Corpus(branching.WORLD, random.Random(0)).sample
    branching.trained(
        model, replace(trial.recipe(), batch_size=8), branching.Stage(2, (part,), 1e-2), sample, trial
    )
    changed = {
        branching.part_of(name)
        for name, each in model.named_parameters()
        if not torch.equal(each, before[name])
    }
    assert changed == {part}


def test_the_loss_free_bias_favours_idle_experts(trials: Any) -> None:
    tap = RouterTap(logits=[torch.tensor([[[2.0, 1.0, 0.0], [2.0, 0.0, 1.0], [0.0, 9.0, 0.0]]])])
    mask = torch.tensor([[True, True, False]])  # the third token is padding
    bias = branching.rebalanced(torch.zeros(1, 3), tap, mask, 1, 0.25)
    assert bias.tolist() == [[-0.25, 0.25, 0.25]]
    again = branching.rebalanced(torch.tensor([[-5.0, 0.0, 0.0]]), tap, mask, 1, 0.25)
    assert again.tolist() == [[-4.75, -0.25, -0.25]]  # the bias takes part in the choice


def test_dropout_takes_one_expert_of_a_layer(trials: Any) -> None:
    trial = branching.BranchTrainMix(dropout=0.5)
    gone = branching.blocked(trial, trial.recipe()) == branching.BLOCKED
    per_layer = gone.sum(-1)
    assert per_layer.max() == 1
    assert 0.3 < per_layer.double().mean() < 0.7  # of 256 draws with probability 0.5


@broad
def test_trains_measures_and_goes_on(
    trials: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    branches = branching.Branches(branching.SeedModel(2), steps=2)
    stages = tuple(branching.Stage(1, (part,), 1e-3) for part in ("router", "common"))
    monkeypatch.setitem(trials.TRIALS, "tiny", branching.BranchTrainMix(branches, stages[:1]))
    monkeypatch.setitem(trials.TRIALS, "tiny-then", branching.BranchTrainMix(branches, stages))
    monkeypatch.setattr(trials, "N_RANDOM", 4)
    trials.main(["tiny", "--seed", "3", "--out", str(tmp_path)])
    assert capsys.readouterr().out.count(": done") == 5  # seed model, three branches, mixture
    about = json.loads((tmp_path / "tiny-3.json").read_text())
    low, high = about["gap_interval"]
    assert low <= about["gap"] <= high
    assert about["gap"] == pytest.approx(about["rates"][1] - about["rates"][2])
    trials.main(["tiny-then", "--seed", "3", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count(": done") == 1  # goes on from the first stage
    assert "| tiny | 3 | development |" in printed
    trials.main(["--out", str(tmp_path)])
    assert capsys.readouterr().out.count("| 3 | development |") == 2
