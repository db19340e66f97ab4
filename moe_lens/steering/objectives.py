"""What a router bias is learned for: losses with gradients, made of prompts.

    objective = answer_objective(model, prompts, answers, alternatives)
    objective = text_objective(model, texts)
    objective = my_loss                         # any function (model, hooks) -> a scalar tensor

A loss runs the model under the hooks that it is given and returns one number, smaller where it is better.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from moe_lens.encoding import without_special
from moe_lens.errors import DataError
from moe_lens.hook_names import Hooks, hook_list
from moe_lens.model.registration import running_of
from moe_lens.model.state import Generation
from moe_lens.model.wrapper import Model
from moe_lens.text.batching import Prompts, chunks_to_pad, pad_sequences, padding, token_sequences

Loss = Callable[[Any, Hooks], Tensor]
"""From a model and forward hooks to a scalar tensor with gradients, the smaller the better."""


@dataclass(frozen=True, eq=False)
class Objective:
    """A mean loss over prompts, in parts that fit a forward each.

    Attributes:
        parts: losses, each the sum over some prompts or tokens.
        n_units: of how many prompts or tokens; the loss is the sum of the parts divided by it.
    """

    parts: tuple[Loss, ...]
    n_units: int = 1

    def __call__(self, model: Any, hooks: Hooks) -> Tensor:
        """The whole, in one graph."""
        found = [checked_loss(part(model, hooks), "A loss").double().reshape(()) for part in self.parts]
        return torch.stack(found).sum() / self.n_units


@dataclass(frozen=True, eq=False)
class _Written:
    """Some prompts, each followed by a text of equally many tokens."""

    rows: list[int]
    n_prompts: int
    sequences: list[Tensor]
    n_written: int

    def log_probs(self, model: Any, hooks: Hooks) -> Float[Tensor, "prompt"]:
        """Of each text after its prompt, nats; for hooks, the texts are what the model has written."""
        tokens, mask = pad_sequences(model, self.sequences)
        n_prompt, state = tokens.shape[1] - self.n_written, running_of(model)
        whole = Generation(n_prompt=n_prompt) if self.n_written > 1 else None
        inputs, real = tokens[:, :-1], mask[:, :-1]  # nothing is asked after the last token
        with model.hooks(hook_list(hooks)), state.of_prompts(self.rows, self.n_prompts):
            if whole is None:
                logits = model(inputs, **padding(real))
            else:
                with state.generation(whole):
                    logits = model(inputs, **padding(real), use_cache=False)
        read = logits[:, -self.n_written :].float().log_softmax(dim=-1)
        expected = tokens[:, -self.n_written :, None]
        return read.gather(-1, expected.to(read.device))[..., 0].sum(dim=1)


def answer_objective(
    model: Model,
    prompts: Prompts,
    answers: Sequence[str],
    alternatives: Sequence[str] | None = None,
    *,
    batch_size: int = 8,
) -> Objective:
    """Mean over prompts of −log p(answer), or of −log σ(log p(answer) − log p(alternative)), in nats.

    >>> from moe_lens import answer_objective, organisms
    >>> model, facts = organisms.load("null"), organisms.world("null").facts("test")[:4]
    >>> objective = answer_objective(model, [f.question for f in facts], [f.answer for f in facts])
    >>> objective(model, ()).ndim
    0

    Args:
        model: a HookedMoE or RoutedModel, whose tokenizer reads the texts.
        prompts: strings, chats or tokens; see `moe_lens.text.Prompts`.
        answers: one text a prompt, of one token or more, put after it.
        alternatives: of the opposite behaviour, one a prompt. The loss is then that of telling both apart.
        batch_size: prompts a forward.

    Raises:
        DataError: no prompts, another number of answers, or one without tokens.
    """
    sequences = list(token_sequences(model, prompts))
    written = [_tokens_of(model, answers, "answers", len(sequences))]
    if alternatives is not None:
        written.append(_tokens_of(model, alternatives, "alternatives", len(sequences)))
    groups: dict[tuple[int, ...], list[int]] = {}
    for row in range(len(sequences)):
        groups.setdefault(tuple(len(texts[row]) for texts in written), []).append(row)
    parts: list[Loss] = []
    for lengths, of_lengths in groups.items():
        for rows in chunks_to_pad(model, iter(of_lengths), batch_size, lambda row: len(sequences[row])):
            both = [
                _Written(
                    rows,
                    len(sequences),
                    [torch.cat([sequences[row], texts[row]]) for row in rows],
                    n_written,
                )
                for texts, n_written in zip(written, lengths, strict=True)
            ]
            parts.append(_answer_loss(both))
    return Objective(tuple(parts), len(sequences))


def text_objective(model: Model, texts: Prompts, *, batch_size: int = 8) -> Objective:
    """Mean cross-entropy of every token after a text's first, in nats a token: the language-model loss.

    >>> from moe_lens import organisms, text_objective
    >>> model, texts = organisms.load("null"), organisms.world("null").generic("test", n=4)
    >>> bool(text_objective(model, texts)(model, ()) > 0)
    True

    What the rewiring of experts minimises on the context itself (arXiv 2510.14853).

    Raises:
        DataError: no texts, or not one of two tokens.
    """
    sequences = list(token_sequences(model, texts))
    asked = [row for row, tokens in enumerate(sequences) if len(tokens) > 1]
    if not asked:
        raise DataError("text_objective needs texts of at least two tokens.")
    parts = tuple(
        _text_loss(rows, len(sequences), [sequences[row] for row in rows])
        for rows in chunks_to_pad(model, iter(asked), batch_size, lambda row: len(sequences[row]))
    )
    return Objective(parts, sum(len(sequences[row]) - 1 for row in asked))


def as_objective(given: Any, name: str) -> Objective:
    """An Objective, or a user's function as one of a single part. Raises DataError for anything else."""
    if isinstance(given, Objective):
        return given
    if not callable(given):
        raise DataError(f"{name} must be a function (model, hooks) -> loss; got {type(given).__name__}.")
    return Objective((cast(Loss, given),))


def checked_loss(loss: Any, name: str) -> Tensor:
    """The loss itself. Raises DataError unless it is a tensor of one finite number."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not bool(torch.isfinite(loss.detach()).all()):
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) and loss.numel() != 1 else repr(loss)
        raise DataError(f"{name} must give one finite number as a tensor; got {got}.")
    return loss


def _answer_loss(both: list[_Written]) -> Loss:
    def loss(model: Any, hooks: Hooks) -> Tensor:
        found = [each.log_probs(model, hooks) for each in both]
        if len(found) == 1:
            return -found[0].sum()
        return -F.logsigmoid(found[0] - found[1]).sum()

    return loss


def _text_loss(rows: list[int], n_prompts: int, sequences: list[Tensor]) -> Loss:
    def loss(model: Any, hooks: Hooks) -> Tensor:
        tokens, mask = pad_sequences(model, sequences)
        with model.hooks(hook_list(hooks)), running_of(model).of_prompts(rows, n_prompts):
            logits = model(tokens, **padding(mask))
        read = logits[:, :-1].float().log_softmax(dim=-1)
        nats = -read.gather(-1, tokens[:, 1:, None].to(read.device))[..., 0]
        return nats[(mask[:, 1:] & mask[:, :-1]).to(nats.device)].sum()

    return loss


def _tokens_of(model: Any, texts: Any, name: str, n: int) -> list[Tensor]:
    given = [] if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
    if len(given) != n or not all(isinstance(text, str) for text in given):
        raise DataError(f"{n} prompts need as many {name}, a text each; got {len(given)}.")
    found = [torch.tensor(without_special(model.tokenizer, text), dtype=torch.int64) for text in given]
    if empty := [index for index, tokens in enumerate(found) if not len(tokens)]:
        raise DataError(f"{name}[{empty[0]}] = {given[empty[0]]!r} has no tokens.")
    return found
