"""Whether a model gives the answer: the measures of `answer_task`.

    measure = answer_measure(prompts, [["Paris"], ...], [" Rome", ...], "sum", {})
    measure(model, hooks)                                  # [prompt], zeros and ones
    on_model = measure.on(model)                           # a Reading: texts read once, for many runs
    on_model(model, hooks)

Which of two texts a model prefers depends on how their tokens are counted. Let a be the answer, b its
alternative, and log p(a) the sum of the log-probabilities of a's tokens after the prompt:

    sum                 log p(a) > log p(b): which of the two whole texts is more probable
    mean                log p(a) / tokens of a > log p(b) / tokens of b
    first_difference    after the prompt and what both texts begin with, the next token of a is more probable
                        than that of b: what is decided there, and nothing of how each goes on
    whole_answer        the most probable token, one after the other, spells a; there is no alternative

The mean misleads where the numbers of tokens differ: digits of which a tokenizer makes " " and "8" beat any
word " eight", since the improbable first token is averaged with a second one that follows from it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, cast, get_args

import numpy as np
import torch
from jaxtyping import Float

from moe_lens.errors import DataError, warn
from moe_lens.evaluation.measures import after_each, continuation_tokens, every_token, mean_loss
from moe_lens.evaluation.reading import (
    Continuations,
    MeasuredModel,
    Reading,
    is_most_probable,
    limits_of,
    log_probs,
)
from moe_lens.hook_names import Hooks
from moe_lens.text.answers import single_token
from moe_lens.text.batching import token_sequences

Comparison = Literal["sum", "mean", "first_difference", "whole_answer"]

NOTES: Final = {
    None: "1 where the most probable next token is the answer",
    "sum": "1 where the answer is more probable than its alternative, by the sums of log-probabilities",
    "mean": "1 where the answer has the higher mean log-probability a token than its alternative",
    "first_difference": "1 where the first token in which both differ is more probable in the answer",
    "whole_answer": "1 where greedy decoding gives the whole answer",
}
"""What a value of each measure means."""

Batches = Mapping[str, int | None]
"""The arguments batch_size and batch_tokens."""


@dataclass(frozen=True, eq=False)
class OnModel:
    """A measure of a model under hooks, whose texts are read once for many runs.

    Attributes:
        on: from a model to the measure for it; a `Reading`, where its parts can be shared by processes.
    """

    on: Callable[[MeasuredModel], Callable[[MeasuredModel, Hooks], Any]]

    def __call__(self, model: MeasuredModel, hooks: Hooks) -> Any:
        return self.on(model)(model, hooks)


def on_model(measure: Callable[..., Any], model: MeasuredModel) -> Callable[..., Any]:
    """A measure with its texts read, where it can do so."""
    return measure.on(model) if isinstance(measure, OnModel) else measure


def answer_measure(
    prompts: Sequence[Any],
    answers: Sequence[Sequence[str]],
    alternatives: Sequence[str] | None,
    measure: Comparison | None,
    batches: Batches,
) -> OnModel:
    """What `answer_task` measures; for each prompt, several answers of which one will do.

    Its arguments are checked already. What it gives raises DataError for answers that cannot be measured so.
    """
    if measure is None and alternatives is None:
        return accuracy(prompts, [texts[0] for texts in answers], batches)

    def read(model: MeasuredModel) -> Reading:
        sequences = list(token_sequences(model, prompts))
        first = [[continuation_tokens(model, text) for text in texts] for texts in answers]
        limits = limits_of(model, batches.get("batch_size"), batches.get("batch_tokens"))
        if alternatives is None:
            after = Continuations.of(sequences, first)
            return Reading(
                model,
                after.asked,
                len(sequences),
                limits,
                is_most_probable,
                lambda found: _spelled(after.by_prompt(found)),
            )
        second = [continuation_tokens(model, text) for text in alternatives]
        pairs = [(own[0], other) for own, other in zip(first, second, strict=True)]
        texts = [(own[0], other) for own, other in zip(answers, alternatives, strict=True)]
        _check_lengths(measure, pairs, texts)
        if measure == "first_difference":
            pairs = [_to_first_difference(*pair) for pair in pairs]
        after = Continuations.of(sequences, pairs)
        return Reading(
            model,
            after.asked,
            len(sequences),
            limits,
            log_probs,
            lambda found: _preferred(after.by_prompt(found), measure),
        )

    return OnModel(read)


def accuracy(prompts: Sequence[Any], answers: Sequence[str], batches: Batches) -> OnModel:
    """1 where the most probable next token is the answer."""

    def read(model: MeasuredModel) -> Reading:
        remedy = 'give alternatives, or measure="whole_answer", for longer answers'
        tokens = {answer: single_token(model, answer, "answers", remedy) for answer in dict.fromkeys(answers)}
        sequences = list(token_sequences(model, prompts))
        asked = after_each(sequences, [tokens[answer] for answer in answers])
        limits = limits_of(model, batches.get("batch_size"), batches.get("batch_tokens"))
        return Reading(
            model,
            asked,
            len(sequences),
            limits,
            is_most_probable,
            lambda found: torch.cat(found)[:, 0].double().numpy(),
        )

    return OnModel(read)


def share_answered(questions: Sequence[str], answers: Sequence[str], batches: Batches) -> OnModel:
    """The share of questions after which the most probable next token is the answer."""

    def read(model: MeasuredModel) -> Reading:
        each = cast(Reading, accuracy(questions, answers, batches).on(model))
        return replace(each, finish=lambda found: float(each.finish(found).mean()))

    return OnModel(read)


def loss(texts: Sequence[str], batches: Batches) -> OnModel:
    """`text_loss` of texts."""

    def read(model: MeasuredModel) -> Reading:
        size, tokens = batches.get("batch_size"), batches.get("batch_tokens")
        limits = limits_of(model, size, tokens, all_read=True)
        sequences = list(token_sequences(model, texts))
        return Reading(model, every_token(sequences), len(sequences), limits, log_probs, mean_loss)

    return OnModel(read)


def checked_comparison(measure: Any, alternatives: Any, several: bool) -> Comparison | None:
    """The measure that is meant; None for the next token alone.

    Args:
        several: whether some prompt has several answers that will do.

    Raises:
        DataError: an unknown one, or one that does not go with alternatives, without them, or with several
            answers.
    """
    if measure is not None and measure not in get_args(Comparison):
        raise DataError(f"measure must be one of {get_args(Comparison)}; got {measure!r}.")
    if alternatives is not None:
        measure = measure or "sum"
        if measure == "whole_answer":
            raise DataError('measure="whole_answer" compares with no alternatives; leave them out.')
    elif measure not in (None, "whole_answer"):
        raise DataError(f'measure="{measure}" compares answers with alternatives; give alternatives.')
    if several and measure != "whole_answer":
        raise DataError('Several answers to a prompt need measure="whole_answer", of which one will do.')
    return measure


def _spelled(found: list[list[Any]]) -> Float[np.ndarray, "prompt"]:
    return np.array([float(any(bool(each.all()) for each in row)) for row in found])


def _preferred(found: list[list[Any]], measure: Comparison | None) -> Float[np.ndarray, "prompt"]:
    one = {
        "sum": lambda each: float(each.sum()),
        "mean": lambda each: float(each.mean()),
        "first_difference": lambda each: float(each[-1]),
    }[str(measure)]
    return np.array([float(one(answer) > one(alternative)) for answer, alternative in found])


def _to_first_difference(one: list[int], other: list[int]) -> tuple[list[int], list[int]]:
    """Both up to the first token in which they differ."""
    n_common = _n_common(one, other)
    return one[: n_common + 1], other[: n_common + 1]


def _n_common(one: Sequence[int], other: Sequence[int]) -> int:
    """With how many equal tokens both begin."""
    different = [first != second for first, second in zip(one, other, strict=False)]
    return different.index(True) if True in different else len(different)


def _check_lengths(
    measure: Comparison | None, pairs: list[tuple[list[int], list[int]]], texts: list[tuple[str, str]]
) -> None:
    """Warn of comparisons that lengths decide; refuse those that cannot be made."""
    inside = [number for number, pair in enumerate(pairs) if _n_common(*pair) == min(map(len, pair))]
    if inside and measure == "first_difference":
        raise DataError(
            f"Answer and alternative of prompt {inside[0]}, {texts[inside[0]]}, differ in no token: one "
            "begins with the other. Give an alternative that begins otherwise."
        )
    unequal = [number for number, (one, other) in enumerate(pairs) if len(one) != len(other)]
    begin = [number for number in inside if number in unequal]
    if begin and measure == "sum":
        warn(
            f"{_of_prompts(begin, pairs, texts)} and one begins with the other, so that it is never the less "
            "probable one. Give an alternative that begins otherwise."
        )
    if unequal and measure == "mean":
        warn(
            f"{_of_prompts(unequal, pairs, texts)}. A mean a token favours a text whose later tokens follow "
            'from its first, whatever the prompt says: take measure="sum" or "first_difference", or texts of '
            "equally many tokens."
        )


def _of_prompts(numbers: list[int], pairs: list[tuple[list[int], list[int]]], texts: list[Any]) -> str:
    first = numbers[0]
    (one, other), (n_one, n_other) = texts[first], map(len, pairs[first])
    return (
        f"In {len(numbers)} of {len(pairs)} prompts answer and alternative differ in length (prompt {first}: "
        f"{one!r} is {n_one} tokens, {other!r} {n_other})"
    )
