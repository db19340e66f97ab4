"""What a model answers, and how well it predicts text.

says = answers_with(model, prompts, answers, hooks=steer_hooks(plan))     # bool [prompt]
loss = text_loss(model, sentences, hooks=steer_hooks(plan))               # nats a token
low, high = clustered_interval(says.double().numpy(), clusters=entities)  # 95 % interval of the mean
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.errors import DataError
from moe_lens.hook_names import Hooks
from moe_lens.text.answers import single_token
from moe_lens.text.batching import TextModel, padded_batches, token_sequences


@runtime_checkable
class MeasuredModel(TextModel, Protocol):
    """What measuring asks of a model: `HookedMoE` and `RoutedModel` have it, as any TransformerBridge."""

    @property
    def run_with_hooks(self) -> Callable[..., Any]:
        """TransformerLens' `run_with_hooks`; gives logits [batch pos vocab]."""
        ...


def answers_with(
    model: MeasuredModel,
    prompts: Sequence[Any],
    answers: Sequence[str],
    *,
    hooks: Hooks = (),
    batch_size: int = 8,
) -> Bool[Tensor, "prompt"]:
    """Whether the model's most probable next token is the answer, for each prompt.

    >>> from moe_lens import organisms
    >>> model, facts = organisms.load("specialised"), organisms.world("specialised").facts("test")[:4]
    >>> answers_with(model, [f.question for f in facts], [f.answer for f in facts]).shape
    torch.Size([4])

    Args:
        prompts: strings, chats or tokens.
        answers: one a prompt, each a single token of the model's vocabulary.
        hooks: forward hooks to run under.
        batch_size: prompts in one forward.

    Raises:
        DataError: no prompts, another number of answers than prompts, or an answer of several tokens.
    """
    if len(answers) != len(prompts):
        raise DataError(f"{len(prompts)} prompts need as many answers; got {len(answers)}.")
    remedy = "give alternatives to answer_task, which compares longer continuations"
    token_of = {answer: single_token(model, answer, "answers", remedy) for answer in dict.fromkeys(answers)}
    expected = torch.tensor([token_of[answer] for answer in answers])
    predicted = [
        logits[:, -1].argmax(-1).cpu() for _, _, logits in _batch_logits(model, prompts, hooks, batch_size)
    ]
    return torch.cat(predicted) == expected


def continuation_log_probs(
    model: MeasuredModel,
    prompts: Sequence[Any],
    continuations: Sequence[str],
    *,
    hooks: Hooks = (),
    batch_size: int = 8,
) -> Float[np.ndarray, "prompt"]:
    """Mean log-probability a token, in nats, of each continuation after its prompt.

    >>> from moe_lens import organisms
    >>> model, facts = organisms.load("specialised"), organisms.world("specialised").facts("test")[:4]
    >>> texts = [f"{fact.answer} ." for fact in facts]
    >>> bool((continuation_log_probs(model, [f.question for f in facts], texts) < 0).all())
    True

    Args:
        prompts: strings, chats or tokens; a continuation's tokens are put after its prompt's.
        continuations: one text a prompt, of one token at least.
        hooks: forward hooks to run under.
        batch_size: prompts in one forward.

    Raises:
        DataError: no prompts, unequal numbers, or a continuation without tokens.
    """
    if len(continuations) != len(prompts):
        raise DataError(f"{len(prompts)} prompts need as many continuations; got {len(continuations)}.")
    added = [_continuation_tokens(model, text) for text in continuations]
    sequences = [torch.cat(pair) for pair in zip(token_sequences(model, prompts), added, strict=True)]
    means: list[float] = []
    for tokens, _, logits in _batch_logits(model, sequences, hooks, batch_size):
        for row in range(len(tokens)):
            start = -len(added[len(means)]) - 1  # padding is on the left
            means.append(float(_next_log_probs(logits[row, start:], tokens[row, start:]).mean()))
    return np.array(means)


def text_loss(model: MeasuredModel, texts: Sequence[str], *, hooks: Hooks = (), batch_size: int = 8) -> float:
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


def _batch_logits(
    model: MeasuredModel, prompts: Sequence[Any], hooks: Hooks, batch_size: int
) -> Iterator[tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"], Float[Tensor, "batch pos vocab"]]]:
    """Tokens, mask and logits of one batch after the other, padded on the left."""
    for tokens, mask in padded_batches(model, prompts, batch_size):
        with torch.no_grad():
            logits = model.run_with_hooks(tokens, fwd_hooks=list(hooks), attention_mask=mask.long())
        largest = logits.amax(-1)[mask.to(logits.device)]
        if not bool(torch.isfinite(largest).all()):  # -inf for some of the vocabulary is a mask, not a fault
            raise DataError(
                "The model's logits are NaN or infinite under these hooks; nothing can be measured."
            )
        yield tokens.to(logits.device), mask.to(logits.device), logits


def _next_log_probs(logits: Float[Tensor, "pos vocab"], tokens: Int[Tensor, "pos"]) -> Float[Tensor, "next"]:
    """Log-probability, in nats, of every token after the first; one text at a time, to save memory."""
    return logits[:-1].double().log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]


def _continuation_tokens(model: MeasuredModel, text: str) -> Int[Tensor, "pos"]:
    if model.tokenizer is None:
        raise DataError("continuation_log_probs needs a model with a tokenizer.")
    tokens = model.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    if not tokens:
        raise DataError(f"The continuation {text!r} has no tokens.")
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    if unknown in tokens and str(model.tokenizer.unk_token) not in text:
        raise DataError(f"The continuation {text!r} has words outside the model's vocabulary.")
    return torch.tensor(tokens)
