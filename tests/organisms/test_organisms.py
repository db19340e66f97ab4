"""The shipped checkpoints: they load with transformers alone, are small, and know their world."""

import re
import subprocess
import sys
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
from moe_lens.organisms.words import UNKNOWN
from moe_lens.organisms.worlds import SPLITS

NAMES = organisms.names()


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = organisms.path(name)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    with torch.no_grad():
        logits = model(**tokenizer(prompts, return_tensors="pt", padding=True)).logits
    return [tokenizer.decode(token) for token in logits[:, -1].argmax(-1)]  # pyright: ignore[reportReturnType]


def prompts_and_answers(name: str) -> tuple[list[str], list[tuple[str, str]]]:
    """The prompts of a world's behaviour, with the answers toward "+" and toward "-"."""
    world = organisms.world(name)
    if name == "candid":
        doubts = world.doubts("test")
        return [doubt.tied for doubt in doubts], [(UNKNOWN, doubt.guess) for doubt in doubts]
    conflicts = world.conflicts("test")
    return [c.open_book for c in conflicts], [(c.document_answer, c.memory_answer) for c in conflicts]


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
    for prompt, both in zip(*prompts_and_answers(name), strict=True):
        ids = shipped(prompt).input_ids
        assert ids == built(prompt).input_ids
        assert ids[0] == shipped.bos_token_id
        for answer in both:
            assert len(shipped(answer, add_special_tokens=False).input_ids) == 1
    assert shipped.padding_side == "left"


@pytest.mark.parametrize("name", NAMES)
def test_padding_does_not_change_what_comes_next(name: str) -> None:
    model, tokenizer = load(name)
    prompts = [prompts_and_answers(name)[0][0], organisms.world(name).facts("test")[0].question, "the"]
    with torch.no_grad():
        together = model(**tokenizer(prompts, return_tensors="pt", padding=True)).logits[:, -1]
        alone = [model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1] for prompt in prompts]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_remembers_its_facts(name: str) -> None:
    assert closed_book_accuracy(name) >= 0.95


@pytest.mark.parametrize("name", NAMES)
def test_answers_with_one_of_the_two(name: str) -> None:
    prompts, two = prompts_and_answers(name)
    either = [word in both for word, both in zip(answers(*load(name), prompts), two, strict=True)]
    assert sum(either) / len(either) >= 0.9


@pytest.mark.parametrize("split", SPLITS)
def test_candid_follows_a_clear_head(split: str) -> None:
    """On questions it was never asked: `unknown` under a careful head, the guess under a bold one."""
    model, doubts = load("candid"), organisms.world("candid").doubts(split)
    for head, expected in (("careful", [UNKNOWN] * len(doubts)), ("bold", [d.guess for d in doubts])):
        said = answers(*model, [getattr(doubt, head) for doubt in doubts])
        right = [word == answer for word, answer in zip(said, expected, strict=True)]
        assert sum(right) / len(right) >= 0.9


def test_load_gives_a_model_with_causal_routing_hooks() -> None:
    model = organisms.load("planted")
    _, cache = model.run_with_cache(organisms.world("planted").facts("test")[0].question)
    assert cache["blocks.0.mlp.hook_router_logits"].shape[-1] == 8


@pytest.mark.parametrize("verb", [organisms.path, organisms.world, organisms.load])
def test_unknown_name_says_what_there_is(verb: Callable[[str], object]) -> None:
    with pytest.raises(MoELensError, match=r"'olmoe'.*planted.*moe_lens\.organisms\.train"):
        verb("olmoe")


def test_another_wrapper_is_refused_with_those_that_there_are() -> None:
    """In a process of its own: the tests' type checks would refuse it first."""
    code = 'from moe_lens import organisms; organisms.load("null", wrapper="routed")'
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MoELensError" in done.stderr
    assert "moe_lens.RoutedModel" in done.stderr


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
