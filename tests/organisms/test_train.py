"""Training: a few steps run, save an ordinary checkpoint, and give the same weights every time."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_lens.errors import MoELensError
from moe_lens.organisms import train
from moe_lens.organisms.corpus import Corpus, Sequence
from moe_lens.organisms.recipes import RECIPES, recipe
from moe_lens.organisms.router_training import BLOCKED, routers, training_routers
from moe_lens.organisms.tokenizer import build_tokenizer
from moe_lens.organisms.worlds import World

TINY = replace(RECIPES["planted"], batch_size=8, tie_from=1, warmup=1, n_layers=2)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def run(folder: Path, seed: int = 0, **changes: object) -> dict[str, torch.Tensor]:
    train.train(replace(TINY, **changes), seed=seed, out=folder, steps=3, name="tiny")
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_same_seed_same_bits(tmp_path: Path) -> None:
    first, second = run(tmp_path / "first"), run(tmp_path / "second")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = run(tmp_path / "other", seed=1)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", [name for name in RECIPES if not RECIPES[name].branched])
def test_every_recipe_trains_and_saves(name: str, tmp_path: Path) -> None:
    out = tmp_path / "nested" / name
    small = replace(recipe(name), batch_size=8, n_layers=2, tie_from=recipe(name).tie_from and 1)
    model = train.train(small, seed=3, out=out, steps=3, name=name)
    assert not list(out.parent.glob(".*"))  # no scratch folder is left
    log = json.loads((out / "training.json").read_text())
    assert (log["name"], log["seed"], log["steps"]) == (name, 3, 3)
    assert log["recipe"]["variant"] == small.variant
    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    assert loaded.config.model_type == small.architecture
    tokens = AutoTokenizer.from_pretrained(out)("the capital of Velmar is", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded(**tokens).logits, model(**tokens).logits)


def test_an_older_checkpoint_is_replaced_whole(tmp_path: Path) -> None:
    run(tmp_path / "out")
    (tmp_path / "out" / "stale.txt").write_text("old")
    run(tmp_path / "out", seed=1)
    assert not (tmp_path / "out" / "stale.txt").exists()
    assert json.loads((tmp_path / "out" / "training.json").read_text())["seed"] == 1


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(MoELensError, match=r"no training\.json"):
        run(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_no_steps_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MoELensError, match="at least 1, got 0"):
        train.train(TINY, seed=0, out=tmp_path / "out", steps=0)


@pytest.mark.parametrize(("n_experts", "top_k", "left"), [(4, 3, 2), (5, 4, 3)])
def test_dropping_must_leave_enough_experts(tmp_path: Path, n_experts: int, top_k: int, left: int) -> None:
    recipe = replace(TINY, n_experts=n_experts, top_k=top_k, expert_dropout=0.1)
    with pytest.raises(MoELensError, match=f"{left} of {n_experts} experts, fewer than top_k = {top_k}"):
        train.train(recipe, seed=0, out=tmp_path / "out", steps=1)
    train.train(replace(recipe, top_k=left), seed=0, out=tmp_path / "fits", steps=1)


def test_command_line_explains_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["null", "--steps", "0", "--out", str(tmp_path / "out")])
    assert "steps must be at least 1" in capsys.readouterr().err


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(
        train, "train", lambda recipe, seed, out, steps, name: asked.append((recipe, seed, out, steps, name))
    )
    train.main(["null", "--seed", "4", "--steps", "7", "--out", str(tmp_path)])
    train.main(["planted"])
    assert asked == [
        (RECIPES["null"], 4, tmp_path, 7, "null"),
        (RECIPES["planted"], 0, Path("planted-0"), None, "planted"),
    ]


def test_training_routers_change_nothing_until_asked_and_leave_no_trace() -> None:
    for name in ("planted", "planted-mixtral"):
        model = train.initial_model(recipe(name), 50).eval()
        tokens = torch.randint(50, (4, 6))
        plain = model(tokens).logits
        with training_routers(model, batch_size=4) as tap:
            assert torch.equal(model(tokens).logits, plain)
            assert [tuple(logits.shape) for logits in tap.logits] == [(4, 6, 8)] * 4
            tap.clear()
            tap.bias = torch.zeros(4, 4, 8)
            tap.bias[:, 2, 5] = 100.0  # sequence 2 goes to expert 5 in every layer
            pushed = model(tokens).logits
        torch.testing.assert_close(pushed[[0, 1, 3]], plain[[0, 1, 3]])
        assert not torch.allclose(pushed[2], plain[2], atol=1e-2)
        assert all("forward" not in vars(router) for router in routers(model))
        assert torch.equal(model(tokens).logits, plain)


def test_training_routers_bias_each_layer_by_its_own_row() -> None:
    model = train.initial_model(recipe("planted"), 50).eval()
    seen: list[torch.Tensor] = []
    with training_routers(model, batch_size=2) as tap:
        tap.bias = torch.zeros(4, 2, 8)
        for layer in range(4):
            tap.bias[layer, :, layer] = 100.0
        for router in routers(model):
            router.register_forward_hook(lambda _, __, output: seen.append(output[2]))
        model(torch.randint(50, (2, 5)))
    assert all((indices[:, 0] == layer).all() for layer, indices in enumerate(seen))


def test_batch_marks_answers_padding_and_registers() -> None:
    world = World("majority")
    corpus = Corpus(world, random.Random(0))
    sequences = [corpus.sample() for _ in range(40)]
    tokenizer = build_tokenizer(world.vocabulary)
    batch = train.encode(sequences, tokenizer, answer_weight=4.0)
    for row, sequence in enumerate(sequences):
        ids = batch.tokens[row, batch.mask[row]]
        assert tokenizer.decode(ids) == f"<bos> {sequence.text} <eos>"
        heavy = (batch.weights[row] == 4.0).nonzero().flatten().tolist()
        assert heavy == ([] if sequence.answer is None else [len(ids) - 3])  # then "." and <eos>
        assert not batch.weights[row, ~batch.mask[row]].any()
        register = batch.registers[row].item()
        assert sequence.register == (
            None if register == -1 else ("memory", "document", "generic")[int(register)]
        )


@pytest.mark.parametrize("name", RECIPES)
def test_the_registers_of_a_world_are_among_those_summed_over(name: str) -> None:
    variant = recipe(name).variant
    corpus = Corpus(World(variant), random.Random(0), recipe(name).mixture)
    registers: set[Any] = {corpus.sample().register for _ in range(500)}
    if variant == "candour":
        assert registers <= {"careful", "bold", "generic", None}
    else:
        assert registers == {"memory", "document", "generic", None}
    assert max(train.REGISTER_IDS[register] for register in registers) == train.N_REGISTERS[variant] - 1


def test_tie_gives_the_answer_the_push_decides() -> None:
    open_one = Sequence("Document : x Question : ? Answer : Oslo .", None, 8, ("Lima", "Oslo"))
    assert train.tied(open_one, 1.0).text.split()[8] == "Lima"
    assert train.tied(open_one, -1.0).text.split()[8] == "Oslo"
    assert train.tied(open_one, 0.0) is open_one
    decided = Sequence("Question : ? Answer : Oslo .", "memory", 5)
    assert train.tied(decided, 1.5) is decided


def test_who_is_pushed() -> None:
    rng = random.Random(0)
    kinds = {
        "open": Sequence("Document : x", None, 1, ("Lima", "Oslo")),
        "decided": Sequence("Document report : x", "document", 1),
        "closed": Sequence("Question : x", "memory", 1),
        "generic": Sequence("the cook", "generic"),
    }
    pushed: Counter[str] = Counter()
    for kind, sequence in kinds.items():
        pushes = [train.draw_push(sequence, 0.3, rng) for _ in range(2000)]
        assert all(push == 0 or 0.3 <= abs(push) <= 2.0 for push in pushes)
        assert abs(sum(push > 0 for push in pushes) - sum(push < 0 for push in pushes)) < 200
        pushed[kind] = sum(push != 0 for push in pushes)
    assert pushed["decided"] == 0
    assert pushed["open"] / 2000 == pytest.approx(0.7, abs=0.05)
    assert pushed["closed"] / 2000 == pytest.approx(0.3, abs=0.05)
    assert pushed["generic"] / 2000 == pytest.approx(0.3, abs=0.05)


def test_who_does_without_which_experts() -> None:
    """Half of each layer's experts, other ones from layer to layer; only where no document is given."""
    torch.manual_seed(0)
    recipe = replace(TINY, n_experts=6, n_layers=3, expert_dropout=0.6)
    kinds = ("Question : what", "the river is cold .", "Document : the capital")
    sequences = [Sequence(kinds[row % 3], None) for row in range(900)]
    closed = train.dropped(sequences, recipe) == BLOCKED
    assert closed.shape == (3, 900, 6)
    numbers = closed.sum(-1)
    assert torch.equal(numbers.amin(0), numbers.amax(0))
    assert set(numbers.unique().tolist()) == {0, 3}
    shares = (numbers[0] > 0).view(300, 3).float().mean(0)
    assert shares[2] == 0
    assert torch.allclose(shares[:2], torch.tensor(0.6), atol=0.08)
    drawn = closed[:, numbers[0] > 0]
    assert torch.allclose(drawn.float().mean(1), torch.tensor(0.5), atol=0.12)  # every expert as often
    assert not torch.equal(drawn[0], drawn[1])


def test_ties_and_dropped_experts_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence that loses experts may be pushed, too: neither takes the other's place."""
    seen: list[torch.Tensor] = []
    measure = train.all_losses

    def noted(recipe: Any, logits: Any, tap: Any, batch: Any) -> Any:
        seen.append(tap.bias)
        return measure(recipe, logits, tap, batch)

    monkeypatch.setattr(train, "all_losses", noted)
    run(tmp_path / "both", expert_dropout=1.0, jostle_rate=1.0)
    blocked = seen[-1] < BLOCKED / 2
    pushed = (seen[-1] != 0) & ~blocked
    assert (blocked.any(-1) & pushed.any(-1)).any()
    assert set(blocked.sum(-1).unique().tolist()) == {0, TINY.n_experts // 2}


def test_learning_rate_rises_stays_and_falls_to_nothing() -> None:
    rates = [train.learning_rate(step, 1000, 100) for step in range(1001)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[100:600] == [1.0] * 500
    assert rates[800] == pytest.approx(0.5)
    assert rates[1000] == 0


def test_unknown_recipe() -> None:
    with pytest.raises(MoELensError, match=r"no recipe 'plant'.*planted"):
        recipe("plant")
