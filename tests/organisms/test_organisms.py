"""The shipped checkpoints: they load with transformers alone, are small, and know their world."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from moe_lens import organisms
from moe_lens.errors import MoELensError
from moe_lens.organisms.recipes import RECIPES
from moe_lens.organisms.tokenizer import build_tokenizer

NAMES = organisms.names()


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = organisms.path(name)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    with torch.no_grad():
        logits = model(**tokenizer(prompts, return_tensors="pt", padding=True)).logits
    return [tokenizer.decode(token) for token in logits[:, -1].argmax(-1)]  # pyright: ignore[reportReturnType]


def closed_book_accuracy(name: str) -> float:
    facts = organisms.world(name).facts("test")
    said = answers(*load(name), [fact.question for fact in facts])
    return sum(word == fact.answer for word, fact in zip(said, facts, strict=True)) / len(facts)


def test_every_recipe_ships() -> None:
    assert tuple(RECIPES) == NAMES


def test_all_together_are_small() -> None:
    files = [file for name in NAMES for file in organisms.path(name).iterdir()]
    assert sum(file.stat().st_size for file in files) < 16e6


@pytest.mark.parametrize("name", NAMES)
def test_files(name: str) -> None:
    expected = {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert {file.name for file in organisms.path(name).iterdir()} == expected


@pytest.mark.parametrize("name", NAMES)
def test_tokenizer_is_the_worlds(name: str) -> None:
    world = organisms.world(name)
    _, shipped = load(name)
    built = build_tokenizer(world.vocabulary)
    for conflict in world.conflicts("test"):
        ids = shipped(conflict.open_book).input_ids
        assert ids == built(conflict.open_book).input_ids
        assert ids[0] == shipped.bos_token_id
        for answer in (conflict.document_answer, conflict.memory_answer):
            assert len(shipped(answer, add_special_tokens=False).input_ids) == 1
    assert shipped.padding_side == "left"


@pytest.mark.parametrize("name", NAMES)
def test_padding_does_not_change_what_comes_next(name: str) -> None:
    model, tokenizer = load(name)
    conflict = organisms.world(name).conflicts("test")[0]
    prompts = [conflict.open_book, conflict.closed_book, "the"]
    with torch.no_grad():
        together = model(**tokenizer(prompts, return_tensors="pt", padding=True)).logits[:, -1]
        alone = [model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1] for prompt in prompts]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_remembers_its_facts(name: str) -> None:
    assert closed_book_accuracy(name) >= 0.95


@pytest.mark.parametrize("name", NAMES)
def test_answers_conflicts_with_one_of_the_two(name: str) -> None:
    conflicts = organisms.world(name).conflicts("test")
    said = answers(*load(name), [c.open_book for c in conflicts])
    either = [word in (c.document_answer, c.memory_answer) for word, c in zip(said, conflicts, strict=True)]
    assert sum(either) / len(either) >= 0.9


def test_load_gives_a_model_with_causal_routing_hooks() -> None:
    model = organisms.load("planted")
    _, cache = model.run_with_cache(organisms.world("planted").facts("test")[0].question)
    assert cache["blocks.0.mlp.hook_router_logits"].shape[-1] == 8


@pytest.mark.parametrize("verb", [organisms.path, organisms.world, organisms.load])
def test_unknown_name_says_what_there_is(verb: Callable[[str], object]) -> None:
    with pytest.raises(MoELensError, match=r"'olmoe'.*planted.*moe_lens\.organisms\.train"):
        verb("olmoe")


def test_no_machine_path_in_the_checkpoints() -> None:
    texts = [
        file for name in NAMES for file in organisms.path(name).glob("*.*") if file.suffix != ".safetensors"
    ]
    absolute = re.compile(r"[\"'\s(]/[a-z]+/")
    assert not [file for file in texts if absolute.search(file.read_text(encoding="utf-8"))]


def test_loading_is_quiet_and_leaves_progress_bars_as_they_were(capfd: pytest.CaptureFixture[str]) -> None:
    assert logging.is_progress_bar_enabled()
    organisms.load("null")
    with pytest.raises(TypeError):
        organisms.load("null", no_such_argument=1)  # pyright: ignore[reportCallIssue]
    assert capfd.readouterr().err == ""
    assert logging.is_progress_bar_enabled()


def test_null_majority_is_specialised_without_its_signal() -> None:
    """The control differs in one number, so that what differs in behaviour is due to it."""
    with_signal, without = RECIPES["specialised"], RECIPES["null-majority"]
    assert replace(with_signal, register_information=0.0) == without
    assert with_signal.register_information > 0
