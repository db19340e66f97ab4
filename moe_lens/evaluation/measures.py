"""What a model answers, and how well it predicts text.

says = answers_with(model, prompts, answers, hooks=steer_hooks(plan))     # bool [prompt]
loss = text_loss(model, sentences, hooks=steer_hooks(plan))               # nats a token
low, high = clustered_interval(says.double().numpy(), clusters=entities)  # 95 % interval of the mean

Prompts of like length share a forward, and of the logits those that are read are computed.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.encoding import without_special
from moe_lens.errors import DataError
from moe_lens.evaluation.reading import (
    Asked,
    Continuations,
    MeasuredModel,
    is_most_probable,
    limits_of,
    log_probs,
    next_tokens,
)
from moe_lens.hook_names import Hooks
from moe_lens.text.answers import single_token
from moe_lens.text.batching import token_sequences

Reduction = Literal["mean", "sum"]


def answers_with(
    model: MeasuredModel,
    prompts: Sequence[Any],
    answers: Sequence[str | int],
    *,
    hooks: Hooks = (),
    batch_size: int | None = None,
    batch_tokens: int | None = None,
) -> Bool[Tensor, "prompt"]:
    """Whether the model's most probable next token is the answer, for each prompt.

    >>> from moe_lens import organisms
    >>> model, facts = organisms.load("specialised"), organisms.world("specialised").facts("test")[:4]
    >>> answers_with(model, [f.question for f in facts], [f.answer for f in facts]).shape
    torch.Size([4])

    Args:
        prompts: strings, chats or tokens. Those of like length share a forward; the results are in the order
            given.
        answers: one a prompt, each a single token of the model's vocabulary, as text or by its number.
        hooks: forward hooks to run under. On the unembedding (of a HookedMoE) they see the logits of all
            columns, which otherwise are not computed.
        batch_size: prompts in one forward, at most; None for as many as batch_tokens allows.
        batch_tokens: tokens in one forward, padding included, at most; a longer prompt runs alone. If both
            are None: 1,024 on a CPU, 16,384 on a GPU.

    Raises:
        DataError: no prompts, another number of answers than prompts, or an answer of several tokens.
    """
    sequences, given = _paired(model, prompts, answers, "answers", (str, int, np.integer))
    remedy = 'give alternatives or measure="whole_answer" to answer_task, which takes longer answers'
    token_of = {answer: single_token(model, answer, "answers", remedy) for answer in dict.fromkeys(given)}
    asked = after_each(sequences, [token_of[answer] for answer in given])
    limits = limits_of(model, batch_size, batch_tokens)
    return torch.cat(next_tokens(model, asked, len(sequences), hooks, limits, is_most_probable))[:, 0]


def continuation_log_probs(
    model: MeasuredModel,
    prompts: Sequence[Any],
    continuations: Sequence[str],
    *,
    reduction: Reduction = "mean",
    hooks: Hooks = (),
    batch_size: int | None = None,
    batch_tokens: int | None = None,
) -> Float[np.ndarray, "prompt"]:
    """Log-probability, in nats, of each continuation after its prompt: a token's mean, or the sum.

    >>> from moe_lens import organisms
    >>> model, facts = organisms.load("specialised"), organisms.world("specialised").facts("test")[:4]
    >>> texts = [f"{fact.answer} ." for fact in facts]
    >>> bool((continuation_log_probs(model, [f.question for f in facts], texts) < 0).all())
    True

    Under hooks, a continuation counts as written by the model after its prompt (see `positions=` of the
    interventions), as in `generate`; its last token, after which nothing is asked, is not run.

    Args:
        prompts: strings, chats or tokens; a continuation's tokens are put after its prompt's.
        continuations: one text a prompt, of one token at least.
        reduction: "mean" a token, or the "sum", which is the log-probability of the whole. Only sums compare
            continuations of different lengths: a word of two tokens whose second follows from the first has
            the better mean, however improbable it is.
        hooks: forward hooks to run under; see `answers_with`.
        batch_size: prompts in one forward, at most; see `answers_with`.
        batch_tokens: tokens in one forward, at most.

    Raises:
        DataError: no prompts, unequal numbers, a continuation that is no text or has no tokens, a prompt and
            its continuation that are longer than the model's context, or another reduction.
    """
    if reduction not in get_args(Reduction):
        raise DataError(f"reduction must be one of {get_args(Reduction)}; got {reduction!r}.")
    sequences, given = _paired(model, prompts, continuations, "continuations", (str,))
    added = [[continuation_tokens(model, text)] for text in given]
    after = Continuations.of(sequences, added)
    found = after.values(model, hooks, limits_of(model, batch_size, batch_tokens), log_probs)
    return np.array([float(each.mean() if reduction == "mean" else each.sum()) for (each,) in found])


def text_loss(
    model: MeasuredModel,
    texts: Sequence[Any],
    *,
    hooks: Hooks = (),
    batch_size: int | None = None,
    batch_tokens: int | None = None,
) -> float:
    """Mean cross-entropy of every token after a text's first, in nats a token, over all texts together.

    >>> from moe_lens import organisms
    >>> from moe_lens.evaluation import text_loss
    >>> text_loss(organisms.load("specialised"), organisms.world("specialised").generic("test", n=4)) > 0
    True

    Args:
        texts: strings, chats or tokens.
        hooks: forward hooks to run under.
        batch_size: texts in one forward, at most; see `answers_with`.
        batch_tokens: tokens in one forward, at most. If both are None also so few that a batch has no more
            than 2^27 logits (2^30 on a GPU); a longer text runs alone.

    Raises:
        DataError: no texts, or not one with two tokens.
    """
    sequences = list(token_sequences(model, texts))
    asked = every_token(sequences)
    limits = limits_of(model, batch_size, batch_tokens, all_read=True)
    return mean_loss(next_tokens(model, asked, len(sequences), hooks, limits, log_probs))


def after_each(sequences: Sequence[Int[Tensor, "_"]], tokens: Sequence[int]) -> list[Asked]:
    """One token after each of the sequences."""
    return [
        Asked(row, sequence, len(sequence), len(sequence) - 1, len(sequence), torch.tensor([[token]]))
        for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True))
    ]


def every_token(sequences: Iterable[Int[Tensor, "_"]]) -> list[Asked]:
    """Each sequence's own tokens after its first. Raises DataError where there are none."""
    asked = [
        Asked(row, tokens, len(tokens), 0, len(tokens) - 1, tokens[1:, None])
        for row, tokens in enumerate(sequences)
    ]
    asked = [each for each in asked if len(each.expected)]
    if not asked:
        raise DataError("text_loss needs texts of at least two tokens.")
    return asked


def mean_loss(found: Sequence[Float[Tensor, "_ 1"]]) -> float:
    """Mean cross-entropy from the log-probabilities of the tokens."""
    log_p = torch.cat(list(found))
    return -float(log_p.sum()) / len(log_p)


def _paired(
    model: MeasuredModel, prompts: Any, given: Any, name: str, kinds: tuple[type, ...]
) -> tuple[list[Tensor], list[Any]]:
    """The tokens of prompts, which may be a generator or a single one, and what was given for each."""
    sequences = list(token_sequences(model, prompts))
    things = given.tolist() if isinstance(given, Tensor | np.ndarray) else given
    if isinstance(things, str) or not isinstance(things, Sequence):
        raise DataError(f"{name} must be a list, one a prompt; got {given!r}.")
    for index, thing in enumerate(things):
        if not isinstance(thing, kinds) or isinstance(thing, bool):
            token = "" if kinds == (str,) else " or the number of a token"
            raise DataError(f"{name}[{index}] must be one text{token}; got {thing!r}.")
    if len(things) != len(sequences):
        raise DataError(f"{len(sequences)} prompts need as many {name}; got {len(things)}.")
    return sequences, list(things)


def continuation_tokens(model: MeasuredModel, text: str) -> list[int]:
    """The tokens of a text that stands after a prompt, at least one.

    Raises:
        DataError: no tokens, words outside the vocabulary, no tokenizer.
    """
    if model.tokenizer is None:
        raise DataError("A continuation needs a model with a tokenizer.")
    tokens = without_special(model.tokenizer, text) if text else []
    if not tokens:
        raise DataError(f"The continuation {text!r} has no tokens.")
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    if unknown in tokens and str(model.tokenizer.unk_token) not in text:
        raise DataError(f"The continuation {text!r} has words outside the model's vocabulary.")
    return tokens
