"""What a model says next, at the tokens where that is asked: forwards of like lengths, few logits.

    asked = [Asked(0, tokens, n_prompt, start, stop, expected), ...]
    values = next_tokens(model, asked, n_prompts, hooks, limits, log_probs)    # [read candidate] of each
    after = Continuations.of(prompts, [[[8, 9], [5]], ...])           # two of each prompt, by their tokens
    values = after.values(model, hooks, limits, log_probs)            # [read] of each of each
    reading = Reading(model, asked, n_prompts, limits, log_probs, finish)   # all of it, a measure of a task

Measures (measures.py) and tasks ask; how they are batched and which logits are computed is decided here.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from moe_lens.errors import DataError
from moe_lens.hook_names import Hooks
from moe_lens.text.batching import Limits, TextModel, default_tokens, pad_sequences

if TYPE_CHECKING:
    from moe_lens.model.kept_logits import LogitReader

CHUNK: Final = 2**22
"""How many logits are widened to float64 at a time."""

MOST_LOGITS: Final = {"cpu": 2**27, "cuda": 2**30}
"""How many logits a batch may have where all are read and the user sets no limit."""


@runtime_checkable
class MeasuredModel(TextModel, Protocol):
    """What measuring asks of a model: `HookedMoE` and `RoutedModel` have it, as any TransformerBridge."""

    @property
    def hooks(self) -> Callable[..., Any]:
        """TransformerLens' `hooks`: a context in which hooks wait."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A forward; gives logits [batch pos vocab]."""
        ...


class Asked(NamedTuple):
    """A sequence, and what is to be known of the tokens after some of its tokens.

    `row` is the number of its prompt, of which the first `n_prompt` tokens are; the rest stands for what the
    model has written. `expected` are tokens after tokens[start:stop], one or more candidates each.
    """

    row: int
    tokens: Int[Tensor, "pos"]
    n_prompt: int
    start: int
    stop: int
    expected: Int[Tensor, "read candidate"]


Judge = Callable[
    [Float[Tensor, "read vocab"], Int[Tensor, "read candidate"]], Shaped[Tensor, "read candidate"]
]
"""From logits and candidates to a value of each candidate."""


@dataclass(frozen=True, eq=False)
class Continuations:
    """What may follow prompts, several texts each; those that differ in their last token share a sequence.

    Attributes:
        asked: the sequences.
        places: prompt -> continuation -> (which of `asked`, which candidate).
    """

    asked: list[Asked]
    places: list[list[tuple[int, int]]]

    @classmethod
    def of(
        cls, prompts: Sequence[Int[Tensor, "_"]], added: Sequence[Sequence[Sequence[int]]]
    ) -> "Continuations":
        """Of tokenised prompts, and of the tokens of each one's continuations.

        A continuation's last token is not run: nothing is asked after it.
        """
        sequences: list[tuple[int, tuple[int, ...]]] = []
        candidates: list[list[int]] = []  # the last tokens, sequence by sequence
        places = []
        for row, several in enumerate(added):
            places.append([])
            known = {}
            for tokens in several:
                before = tuple(tokens[:-1])
                if before not in known:
                    known[before] = len(sequences)
                    sequences.append((row, before))
                    candidates.append([])
                number = known[before]
                places[-1].append((number, len(candidates[number])))
                candidates[number].append(tokens[-1])
        most = max(map(len, candidates), default=0)
        asked = []
        for (row, before), last in zip(sequences, candidates, strict=True):
            last = last + last[-1:] * (most - len(last))
            expected = torch.tensor([*([token] * most for token in before), last])
            prompt = prompts[row]
            whole = torch.cat([prompt, torch.tensor(before, dtype=prompt.dtype)])
            asked.append(Asked(row, whole, len(prompt), len(prompt) - 1, len(whole), expected))
        return cls(asked, places)

    def values(
        self, model: MeasuredModel, hooks: Hooks, limits: Limits, judge: "Judge"
    ) -> list[list[Shaped[Tensor, "_"]]]:
        """Prompt by prompt, for each continuation what `judge` finds for each of its tokens."""
        return self.by_prompt(next_tokens(model, self.asked, len(self.places), hooks, limits, judge))

    def by_prompt(self, found: Sequence[Shaped[Tensor, "_ _"]]) -> list[list[Shaped[Tensor, "_"]]]:
        """What `next_tokens` found for `asked`, as `values` gives it."""
        return [[found[number][:, candidate] for number, candidate in row] for row in self.places]


def log_probs(
    logits: Float[Tensor, "read vocab"], expected: Int[Tensor, "read candidate"]
) -> Float[Tensor, "read candidate"]:
    """Log-probability of each candidate in nats, float64."""
    return logits.double().log_softmax(-1).gather(-1, expected)


def is_most_probable(
    logits: Float[Tensor, "read vocab"], expected: Int[Tensor, "read candidate"]
) -> Shaped[Tensor, "read candidate"]:
    """Whether each candidate has the largest logit."""
    return logits.argmax(-1, keepdim=True) == expected


def limits_of(model: MeasuredModel, batch_size: Any, batch_tokens: Any, *, all_read: bool = False) -> Limits:
    """How large batches may be; smaller where all logits are read and nothing is given."""
    limits = Limits.of(batch_size, batch_tokens, model)
    if not all_read or batch_size is not None or batch_tokens is not None:
        return limits
    kind = torch.device(model.cfg.device).type
    fit = max(1, MOST_LOGITS.get(kind, MOST_LOGITS["cuda"]) // model.cfg.d_vocab)
    return replace(limits, tokens=min(fit, default_tokens(model)))


@dataclass(frozen=True, eq=False)
class Reading:
    """A measure of a task that asks for next tokens, with its texts read, for many runs and in parts.

    Attributes:
        model: that it is for.
        asked: what it asks.
        n_prompts: how many prompts there are in all, of which some may ask nothing.
        limits: of a batch.
        judge: from logits to what is found, a pure function.
        finish: from what was found, in the order asked, to the measure.
    """

    model: MeasuredModel
    asked: Sequence[Asked]
    n_prompts: int
    limits: Limits
    judge: Judge
    finish: Callable[[list[Shaped[Tensor, "read candidate"]]], Any]

    def __call__(self, model: MeasuredModel, hooks: Hooks) -> Any:
        """The measure under hooks; it runs the model that it is for."""
        return self.finish(
            next_tokens(self.model, self.asked, self.n_prompts, hooks, self.limits, self.judge)
        )

    def batches(self, hooks: Hooks) -> list[list[int]]:
        """Which of `asked` share a forward under these hooks."""
        from moe_lens.model.kept_logits import reading_logits  # needs TransformerLens, which tasks do not

        with reading_logits(self.model, hooks) as read:
            return list(_batches(self.asked, self.limits, read.is_bare))

    def found(
        self, hooks: Hooks, batches: Iterable[list[int]]
    ) -> dict[int, Shaped[Tensor, "read candidate"]]:
        """What is found in some of these batches: number in `asked` -> of each read and candidate."""
        return _found(self.model, self.asked, self.n_prompts, hooks, self.judge, lambda is_bare: batches)


def next_tokens(
    model: MeasuredModel,
    asked: Sequence[Asked],
    n_prompts: int,
    hooks: Hooks,
    limits: Limits,
    judge: Judge,
) -> list[Shaped[Tensor, "read candidate"]]:
    """What `judge` finds, in the order asked, on the CPU.

    Hooks see prompts padded on the left, in the order given where one batch holds all, and know what the
    model has written.

    Raises:
        DataError: NaN or infinite logits; a prompt with what follows it is longer than the model's context.
    """
    found = _found(model, asked, n_prompts, hooks, judge, lambda is_bare: _batches(asked, limits, is_bare))
    return [found[number] for number in range(len(asked))]


def _found(
    model: MeasuredModel,
    asked: Sequence[Asked],
    n_prompts: int,
    hooks: Hooks,
    judge: Judge,
    batches: Callable[[bool], Iterable[list[int]]],
) -> dict[int, Tensor]:
    from moe_lens.model.kept_logits import reading_logits  # needs TransformerLens, which tasks do not

    _check_lengths(model, asked)
    found: dict[int, Tensor] = {}
    with reading_logits(model, hooks) as read:
        for numbers in batches(read.is_bare):
            some = [asked[number] for number in numbers]
            found.update(zip(numbers, _judged(model, read, some, n_prompts, judge), strict=True))
    return found


def _check_lengths(model: MeasuredModel, asked: Sequence[Asked]) -> None:
    for each in asked:
        if len(each.tokens) > model.cfg.n_ctx:  # prompts by themselves fit
            raise DataError(
                f"Prompt {each.row} has {each.n_prompt} tokens and {len(each.tokens) - each.n_prompt + 1} "
                f"follow it, the last of which is not run; the model's context is {model.cfg.n_ctx}. Shorten "
                "one of them."
            )


def _batches(asked: Sequence[Asked], limits: Limits, is_bare: bool) -> Iterator[list[int]]:
    """Sequences of like length; under hooks, with equally many written tokens, so that these are columns."""
    groups: dict[int, list[int]] = {}
    for number, each in enumerate(asked):
        groups.setdefault(0 if is_bare else len(each.tokens) - each.n_prompt, []).append(number)
    for group in groups.values():
        for batch in limits.batches([len(asked[number].tokens) for number in group]):
            yield sorted(group[place] for place in batch)


def _judged(
    model: MeasuredModel, read: "LogitReader", some: Sequence[Asked], n_prompts: int, judge: Judge
) -> list[Tensor]:
    side = read.padding_side
    tokens, mask = pad_sequences(model, [each.tokens for each in some], side)
    n_pos = tokens.shape[1]
    places = []  # the columns after which something is asked, row by row
    for each in some:
        before = n_pos - len(each.tokens) if side == "left" else 0
        places.append(torch.arange(each.start, each.stop) + before)
    columns = torch.cat(places).unique()
    n_prompt = n_pos - (len(some[0].tokens) - some[0].n_prompt)
    logits = read(tokens, columns, mask, [each.row for each in some], n_prompts, n_prompt)
    rows = torch.arange(len(some)).repeat_interleave(torch.tensor([len(part) for part in places]))
    kept = torch.searchsorted(columns, torch.cat(places))
    expected = torch.cat([each.expected for each in some])
    values, largest = [], []
    for part in torch.arange(len(rows)).split(max(1, CHUNK // logits.shape[-1])):
        asked_of = logits[rows[part].to(logits.device), kept[part].to(logits.device)]
        largest.append(asked_of.amax(-1))
        values.append(judge(asked_of, expected[part].to(logits.device)))
    if not bool(torch.isfinite(torch.cat(largest)).all()):  # -inf for some of the vocabulary is a mask
        raise DataError("The model's logits are NaN or infinite under these hooks; nothing can be measured.")
    return list(torch.cat(values).cpu().split([len(part) for part in places]))
