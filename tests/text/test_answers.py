"""Answers of one token: the model's own numbers, and every other answer named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_lens.errors import DataError
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.text.answers import single_token, single_tokens
from tests.tiny_models import tiny_model

Hooked = Callable[..., HookedMoE]


def test_words_and_ids_become_the_tokenizers_ids(hooked: Hooked) -> None:
    model = hooked("olmoe")
    vocabulary = model.tokenizer.get_vocab()
    for word in ("w1", "w9"):
        assert single_token(model, word) == vocabulary[word]
    for number in (0, 7, torch.tensor(7), model.cfg.d_vocab - 1):
        assert single_token(model, number) == int(number)
    expected = [vocabulary["w1"], 3, vocabulary["w2"]]
    assert single_tokens(model, ["w1", 3, "w2"], 3).tolist() == expected
    assert single_tokens(model, torch.tensor(expected), 3).tolist() == expected
    assert single_tokens(model, "w2", 2).tolist() == [vocabulary["w2"]] * 2


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("w1 w2", r"'w1 w2' is 2 tokens, \['w1', 'w2'\].*ask me"),
        ("", "0 tokens"),
        ("nonsense", "'nonsense' is not in the model's vocabulary; ask me"),
        (-1, "neither a string nor a token id"),
        (10**6, "neither a string nor a token id"),
        (True, "neither"),
        (None, "neither"),
    ],
)
def test_other_answers_are_refused(hooked: Hooked, answer: Any, words: str) -> None:
    with pytest.raises(DataError, match=f"the answer: .*{words}"):
        single_token(hooked("olmoe"), answer, "the answer", "ask me")


def test_as_many_answers_as_prompts(hooked: Hooked) -> None:
    with pytest.raises(DataError, match="mine: give one, or one a prompt; got 2 for 3"):
        single_tokens(hooked("olmoe"), ["w1", "w2"], 3, "mine")


def test_without_a_tokenizer_ids_are_needed() -> None:
    model = HookedMoE.from_hf(tiny_model("olmoe"))
    assert single_token(model, 5) == 5
    with pytest.raises(DataError, match="no tokenizer; give token ids"):
        single_token(model, "w1")
