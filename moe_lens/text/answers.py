"""Answers of one token: from a word, or a token id, to the id.

    single_token(model, " Paris")                        # 6342
    single_tokens(model, [" Paris", " Rome"], n_prompts=2)

Texts of several tokens and words outside the vocabulary are refused.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from moe_lens.checks import as_index
from moe_lens.encoding import without_special
from moe_lens.errors import DataError, warn
from moe_lens.text.batching import TextModel


def single_token(model: TextModel, answer: Any, name: str = "answer", remedy: str = "give token ids") -> int:
    """The token id of an answer, which is a word of one token or already an id.

    >>> from moe_lens import organisms
    >>> model = organisms.load("specialised")
    >>> single_token(model, "the") == model.to_single_token("the")
    True

    Args:
        answer: a string (mind the space before a word: where " Paris" and "Paris" are different tokens, the
            second gives a warning), or a token id.
        name: of the argument, for errors.
        remedy: what to do about an answer that is no single token, for errors.

    Raises:
        DataError: a text of several tokens or of none, a word or an id outside the vocabulary, text without a
            tokenizer.
    """
    if isinstance(answer, str):
        return _token_of_text(model, answer, name, remedy)
    token = as_index(answer)
    if token is None or token >= model.cfg.d_vocab:
        raise DataError(
            f"{name}: {answer!r} is neither a string nor a token id (0 to {model.cfg.d_vocab - 1})."
        )
    return token


def single_tokens(
    model: TextModel, answers: Any, n_prompts: int, name: str = "answers"
) -> Int[Tensor, "prompt"]:
    """The token ids of the answers to some prompts; one answer stands for all prompts.

    Args:
        answers: one string or token id, or one a prompt (a list, a tuple, a tensor).
        name: of the argument, for errors.

    Raises:
        DataError: another number of answers than prompts, or as in `single_token`.
    """
    if isinstance(answers, Tensor) or hasattr(answers, "tolist"):
        answers = answers.tolist()
    is_list = isinstance(answers, Sequence) and not isinstance(answers, str)
    by_prompt = list(answers) if is_list else [answers] * n_prompts
    if len(by_prompt) != n_prompts:
        raise DataError(f"{name}: give one, or one a prompt; got {len(by_prompt)} for {n_prompts} prompts.")
    return torch.tensor([single_token(model, answer, name) for answer in by_prompt])


def _token_of_text(model: TextModel, answer: str, name: str, remedy: str) -> int:
    if model.tokenizer is None:
        raise DataError(f"{name}: {answer!r} is text and the model has no tokenizer; give token ids.")
    tokens = without_special(model.tokenizer, answer) if answer else []
    if len(tokens) != 1:
        pieces = [model.tokenizer.decode([token]) for token in tokens]
        raise DataError(
            f"{name}: {answer!r} is {len(tokens)} tokens, {pieces}, and must be a single one. Mind the space "
            f"before a word, or {remedy}."
        )
    if tokens[0] == getattr(model.tokenizer, "unk_token_id", None):
        raise DataError(f"{name}: {answer!r} is not in the model's vocabulary; {remedy}.")
    _hint_at_space(model, answer, name, tokens[0])
    return int(tokens[0])


def _hint_at_space(model: TextModel, answer: str, name: str, token: int) -> None:
    """Warn where the same word after a space is another single token, which is what follows most prompts."""
    if not answer[0].isalnum():
        return
    spaced = without_special(model.tokenizer, f" {answer}")
    if len(spaced) == 1 and spaced[0] != token:
        warn(
            f"{name}: {answer!r} and {' ' + answer!r} are different tokens, and after a prompt that ends in "
            f"a word or a colon the model writes the second. Give {' ' + answer!r}, or the token id if "
            f"{answer!r} is meant."
        )
