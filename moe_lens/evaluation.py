"""What a model answers, how well it predicts text, and how sure a difference is.

says = answers_with(model, prompts, answers, hooks=steer_hooks(plan))     # bool [prompt]
loss = text_loss(model, sentences, hooks=steer_hooks(plan))               # nats a token
low, high = clustered_interval(says.numpy(), clusters=entities, seed=0)   # 95 % interval of the mean
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from moe_lens.batching import padded_batches, token_sequences
from moe_lens.errors import DataError

Hooks = Sequence[tuple[str | Callable[..., Any], Callable[..., Any]]]


def answers_with(
    model: TransformerBridge,
    prompts: Sequence[Any],
    answers: Sequence[str],
    *,
    hooks: Hooks = (),
    batch_size: int = 64,
) -> Bool[Tensor, "prompt"]:
    """Whether the model's most probable next token is the answer, for each prompt.

    >>> from moe_lens import organisms
    >>> model, facts = organisms.load("specialised"), organisms.world("specialised").facts("test")[:4]
    >>> answers_with(model, [f.question for f in facts], [f.answer for f in facts]).shape
    torch.Size([4])

    Args:
        answers: one a prompt, each a single token of the model's vocabulary.
        hooks: forward hooks to run under.

    Raises:
        DataError: no prompts, another number of answers than prompts, or an answer that is no single token.
    """
    if len(answers) != len(prompts):
        raise DataError(f"{len(prompts)} prompts need as many answers; got {len(answers)}.")
    token_of = {answer: _single_token(model, answer) for answer in dict.fromkeys(answers)}
    expected = torch.tensor([token_of[answer] for answer in answers])
    predicted = [
        logits[:, -1].argmax(-1).cpu() for _, _, logits in _batch_logits(model, prompts, hooks, batch_size)
    ]
    return torch.cat(predicted) == expected


def continuation_log_probs(
    model: TransformerBridge,
    prompts: Sequence[Any],
    continuations: Sequence[str],
    *,
    hooks: Hooks = (),
    batch_size: int = 64,
) -> Float[np.ndarray, "prompt"]:
    """Mean log-probability a token, in nats, of each continuation after its prompt.

    >>> from moe_lens import organisms
    >>> model, facts = organisms.load("specialised"), organisms.world("specialised").facts("test")[:4]
    >>> texts = [f"{fact.answer} ." for fact in facts]
    >>> bool((continuation_log_probs(model, [f.question for f in facts], texts) < 0).all())
    True

    Args:
        prompts: strings, chats or tokens; a continuation's tokens are put after its prompt's.

    Raises:
        DataError: no prompts, unequal numbers, or a continuation without tokens.
    """
    if len(continuations) != len(prompts):
        raise DataError(f"{len(prompts)} prompts need as many continuations; got {len(continuations)}.")
    added = [_continuation_tokens(model, text) for text in continuations]
    sequences = [torch.cat(pair) for pair in zip(token_sequences(model, prompts), added, strict=True)]
    found: list[float] = []
    for tokens, _, logits in _batch_logits(model, sequences, hooks, batch_size):
        for row in range(len(tokens)):
            n_added = len(added[len(found)])  # padding stands left
            found.append(
                float(_next_log_probs(logits[row, -n_added - 1 :], tokens[row, -n_added - 1 :]).mean())
            )
    return np.array(found)


def text_loss(
    model: TransformerBridge, texts: Sequence[str], *, hooks: Hooks = (), batch_size: int = 64
) -> float:
    """Mean cross-entropy of every token after a text's first, in nats a token, over all texts together.

    Raises:
        DataError: no texts, or not one with two tokens.
    """
    total, n_tokens = 0.0, 0
    for tokens, mask, logits in _batch_logits(model, texts, hooks, batch_size):
        for row in range(len(tokens)):
            real = mask[row]
            total -= float(_next_log_probs(logits[row, real], tokens[row, real]).sum())
            n_tokens += int(real.sum()) - 1
    if n_tokens == 0:
        raise DataError("text_loss needs texts of at least two tokens.")
    return total / n_tokens


def clustered_interval(
    values: Shaped[np.ndarray, "unit"],
    clusters: Sequence[str],
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, resampling whole clusters.

    Prompts about the same entity are not independent, so entities are drawn with replacement, each with all
    its prompts (Davison & Hinkley 1997, section 3.8). The resampled mean is sum of values / number of units.

    Args:
        values: one a unit (prompt), for example an effect in [-1, 1].
        clusters: one label a unit; units of the same label stay together.

    Raises:
        DataError: no values, not one label a value, a level outside (0, 1).
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or len(clusters) != len(values):
        raise DataError(
            f"{len(clusters)} cluster labels for values of shape {values.shape}; need one a value."
        )
    if not 0 < level < 1 or n_resamples < 1:
        raise DataError(f"level must lie in (0, 1) and n_resamples be positive; got {level}, {n_resamples}.")
    _, member_of = np.unique(np.asarray(clusters), return_inverse=True)
    sums, sizes = np.bincount(member_of, weights=values), np.bincount(member_of)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(n_resamples, len(sums)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def cluster_weights(
    clusters: Sequence[str], n_resamples: int, seed: int
) -> Float[np.ndarray, "resample unit"]:
    """How often each unit is drawn when whole clusters are resampled with replacement.

    >>> weights = cluster_weights(["a", "a", "b"], 100, seed=0)
    >>> bool((weights[:, 0] == weights[:, 1]).all()), weights[:, 1:].sum(1).tolist() == [2.0] * 100
    (True, True)
    """
    _, member_of = np.unique(np.asarray(clusters), return_inverse=True)
    n_clusters = int(member_of.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(
        n_clusters, np.full(n_clusters, 1 / n_clusters), n_resamples
    )
    return drawn[:, member_of].astype(np.float64)


def _batch_logits(model: TransformerBridge, prompts: Sequence[Any], hooks: Hooks, batch_size: int) -> Any:
    """Yields (tokens [batch pos], mask [batch pos], logits [batch pos vocab]), padding on the left."""
    for tokens, mask in padded_batches(model, prompts, batch_size):
        with torch.no_grad():
            logits = model.run_with_hooks(tokens, fwd_hooks=list(hooks), attention_mask=mask.long())
        largest = logits.amax(-1)[
            mask.to(logits.device)
        ]  # −inf for some of the vocabulary is a mask, not a fault
        if not bool(torch.isfinite(largest).all()):
            raise DataError(
                "The model's logits are NaN or infinite under these hooks; nothing can be measured."
            )
        yield tokens.to(logits.device), mask.to(logits.device), logits


def _next_log_probs(logits: Float[Tensor, "pos vocab"], tokens: Int[Tensor, "pos"]) -> Float[Tensor, "next"]:
    """Log-probability, in nats, of every token after the first; one text at a time, to save memory."""
    return logits[:-1].double().log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]


def _continuation_tokens(model: TransformerBridge, text: str) -> Int[Tensor, "pos"]:
    if model.tokenizer is None:
        raise DataError("continuation_log_probs needs a model with a tokenizer.")
    tokens = model.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    if not tokens:
        raise DataError(f"The continuation {text!r} has no tokens.")
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    if unknown in tokens and str(model.tokenizer.unk_token) not in text:
        raise DataError(f"The continuation {text!r} has words outside the model's vocabulary.")
    return torch.tensor(tokens)


def _single_token(model: TransformerBridge, answer: str) -> int:
    if model.tokenizer is None:
        raise DataError("answers_with needs a model with a tokenizer.")
    tokens = model.to_tokens(answer, prepend_bos=False)[0]
    if len(tokens) != 1:
        raise DataError(
            f"The answer {answer!r} is {len(tokens)} tokens; answers_with needs a single one. Mind the space "
            "before a word, or give alternatives to answer_task, which compares longer continuations."
        )
    token = int(tokens[0])
    if token == getattr(model.tokenizer, "unk_token_id", None):
        raise DataError(f"The answer {answer!r} is not in the model's vocabulary.")
    return token
