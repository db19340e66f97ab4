"""Running a model over prompts: counts as they run, or into a file; the route of one prompt.

    stats = collect_routing(model, prompts)                # nothing but sums in memory
    stats = collect_to_file(model, prompts, "stats.safetensors", about="...")      # after an interrupt,
    stats = collect_to_file(model, prompts, "stats.safetensors", about="...")      # this counts the rest
    routing = route_prompt(model, "Document : the capital of Eldria is Bergen .")

Beside the result of `collect_to_file` lies a partial file, `.stats.safetensors.<digest>.<batches>.partial`,
replaced whole after each batch (less often where writing it would cost more than a twentieth of the time).
The digest is of everything that the counts depend on, so a run with other settings never continues this one.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from moe_lens.errors import DataError
from moe_lens.files import check_writable
from moe_lens.hook_names import Hooks, hook_list
from moe_lens.model.observing import Run, observing
from moe_lens.model.registration import moe_shape, routing_layers, running_of, with_expert_out
from moe_lens.model.resuming import is_bare
from moe_lens.model.state import Pass
from moe_lens.model.wrapper import Model, check_hooked
from moe_lens.routers.layouts import RouterOutput
from moe_lens.statistics.counting import RoutingCounter, Wanted, margins_of, moved
from moe_lens.statistics.counts import router_entropy
from moe_lens.statistics.routes import PromptRouting
from moe_lens.statistics.routing_stats import RoutingStats
from moe_lens.text.batching import Limits, Prompts, how_many, token_sequences
from moe_lens.text.pieces import token_texts
from moe_lens.text.spans import CountedPrompts, Span, batches_by_length


def collect_routing(
    model: Model,
    prompts_or_tokens: Prompts,
    *,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    span: Span = None,
    special_tokens: bool = False,
    hooks: Hooks = (),
    progress: bool = True,
    per_prompt: bool = False,
    positions: bool = False,
    vocabulary: bool = False,
    outputs: bool = False,
) -> RoutingStats:
    """Routing statistics over many prompts, counted while the model runs.

    >>> from moe_lens import collect_routing, organisms
    >>> model = organisms.load("specialised")
    >>> stats = collect_routing(model, ["Question : what is", "Document : the"], progress=False)
    >>> stats.n_tokens                                       # 5 + 4, with BOS; padding is never counted
    9

    Each forward ends at the last router (with `outputs`, at the last experts), unless a hook waits behind it,
    and keeps of each layer nothing but sums. Prompts of like length share a batch: they are read 32 batches'
    worth at a time, and the shortest of these run first. Which prompts share a batch changes the model's
    activations by rounding.

    Args:
        model: a HookedMoE or RoutedModel.
        prompts_or_tokens: a string, strings, chats, a token tensor [batch pos], or token sequences of any
            lengths; a generator is read as it is needed, so that memory does not grow with the number of
            prompts (but with per_prompt=True).
        batch_size: prompts per forward pass, at most; None for as many as batch_tokens allows.
        batch_tokens: tokens per forward pass, padding included, at most; a longer prompt runs alone. If both
            are None: 1,024 on a CPU, 16,384 on a GPU.
        span: which tokens of each prompt count: see `moe_lens.text.Span`; None for all.
        special_tokens: also count special tokens in spans that are strings.
        hooks: forward hooks to run under, `steer_hooks(plan)` for example; the changed routing is counted.
        progress: show a progress bar.
        per_prompt: also count each prompt by itself, in the order given.
        positions: also count each position by itself.
        vocabulary: also count by token of the vocabulary.
        outputs: also sum up how large what each expert gives is; see `ExpertOutputs`.

    Raises:
        DataError: no prompts, an empty prompt, or a span that selects no token of some prompt.
        DataError: NaN router logits; what was counted before that batch is kept by `collect_to_file`.
        HookError: from hooks, or the model is in training mode.
    """
    wanted = Wanted(per_prompt, positions, vocabulary, outputs)
    counting = Counting(model, hooks, wanted, span, special_tokens, batch_size, batch_tokens)
    counter = counting.counter()
    for _ in counting.run(prompts_or_tokens, lambda: counter, progress):
        pass
    return RoutingStats(counting.shape, **counter.ordered())


def iterate_routing(
    model: Model,
    prompts_or_tokens: Prompts,
    *,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    span: Span = None,
    special_tokens: bool = False,
    hooks: Hooks = (),
    progress: bool = True,
    per_prompt: bool = False,
    positions: bool = False,
    vocabulary: bool = False,
    outputs: bool = False,
    skip: int = 0,
) -> Iterator[RoutingStats]:
    """The statistics of each batch, as they run: what `collect_routing` sums, with the same arguments.

    Added one after the other they give its result bit for bit (but for the order of prompts in `per_prompt`:
    shortest first, within 32 batches' worth of prompts). So a sum that was saved after some batches can be
    continued with the rest: the first `skip` batches are not run. Between batches the model has no hooks.

    >>> from moe_lens import organisms
    >>> model = organisms.load("specialised")
    >>> prompts = ["Question : what is", "Document : the"]
    >>> parts = iterate_routing(model, prompts, batch_size=1, progress=False)
    >>> [stats.n_tokens for stats in parts]
    [4, 5]
    """
    wanted = Wanted(per_prompt, positions, vocabulary, outputs)
    counting = Counting(model, hooks, wanted, span, special_tokens, batch_size, batch_tokens)
    for counter in counting.run(prompts_or_tokens, counting.counter, progress, skip, between=True):
        if counter is not None:
            yield RoutingStats(counting.shape, **counter.values())


@dataclass(eq=False)
class Counting:
    """A model, and what is counted of which tokens."""

    model: Model
    hooks: Hooks
    wanted: Wanted
    span: Span
    special_tokens: bool
    batch_size: int | None
    batch_tokens: int | None
    hooked: bool = False
    """Whether other hooks than ours act on the batch."""

    def __post_init__(self) -> None:
        check_hooked(self.model)
        self.device = self.model.cfg.device
        self.limits = Limits.of(self.batch_size, self.batch_tokens, self.model)
        self.hooks = hook_list(self.hooks)
        self.shape = moe_shape(self.model)
        self.now = self.counter()  # counts the batch that runs

    def counter(self, before: RoutingStats | None = None, n_batches: int = 0) -> RoutingCounter:
        """One that has counted nothing, or what is in `before`."""
        rules = {layer: moe.rule for layer, moe in routing_layers(self.model).items()}
        return RoutingCounter(rules, self.wanted, self.model.cfg.d_vocab, before, n_batches)

    def run(
        self,
        prompts: Prompts,
        counter: Callable[[], RoutingCounter],
        progress: bool,
        skip: int = 0,
        between: bool = False,
    ) -> Iterator[RoutingCounter | None]:
        """Batch by batch, the counter that counted it; None for a batch that was skipped.

        Between batches, the model has no hooks; with `between` it is not watched either.
        """
        once = not self.hooks and not between
        among, n_prompts = Pass(how_many(prompts)), 0
        with (
            tqdm(total=among.n_prompts, desc="routing", unit="prompt", disable=not progress) as bar,
            with_expert_out(self.model) if self.wanted.outputs else nullcontext(),
            self._watched() if once else nullcontext() as run,
        ):
            for number, batch in enumerate(self.batches(prompts)):
                self.now = counter()
                if number < skip:
                    self.now.rows.extend(batch.rows)
                    yield None
                else:
                    with nullcontext(run) if run is not None else self._watched() as run_batch:
                        self.count(run_batch, batch, among)
                    yield self.now
                n_prompts += len(batch.rows)
                bar.update(len(batch.rows))
        among.end(n_prompts)

    def batches(self, prompts: Prompts) -> Iterator[CountedPrompts]:
        """The batches that are to run, in order; prompts are read as they are needed."""
        return batches_by_length(
            self.model, prompts, self.span, self.limits, special_tokens=self.special_tokens
        )

    def of_each(self, batches: Iterable[CountedPrompts], among: Pass) -> list[RoutingStats]:
        """The statistics of each of some batches of these prompts, as `run` counts it."""
        parts = []
        with with_expert_out(self.model) if self.wanted.outputs else nullcontext(), self._watched() as run:
            for batch in batches:
                self.now = self.counter()
                self.count(run, batch, among)
                parts.append(RoutingStats(self.shape, **self.now.values()))
        return parts

    def _watched(self) -> AbstractContextManager[Run]:
        self.hooked = bool(self.hooks) or not is_bare(self.model)
        see_outputs = (lambda *seen: self.now.see_outputs(*seen)) if self.wanted.outputs else None
        return observing(self.model, lambda *seen: self.now.see(*seen), self.hooks, see_outputs)

    def count(self, run: Run, batch: CountedPrompts, among: Pass) -> None:
        """Count one batch of these prompts.

        Under hooks, who may name columns of a batch, padding is on the left, as everywhere. Otherwise on the
        right, where nothing that counts sees it, so that every family computes what it does for one prompt.
        """
        tokens, mask, counted = batch.padded(self.model, "left" if self.hooked else "right")
        position = (mask.long().cumsum(1) - 1)[counted] if self.wanted.positions else None
        self.now.begin(counted, position, tokens[counted] if self.wanted.vocabulary else None)
        tell = self.hooked and not bool(mask.all())
        with running_of(self.model).of_prompts(torch.tensor(batch.rows), among):  # one plan a prompt, say
            run(moved(tokens, self.device), moved(mask.long(), self.device) if tell else None)
        self.now.end(batch.rows)


SAVING_SHARE: Final = 0.05
"""Largest share of the time that is spent on writing partial files."""


def collect_to_file(
    model: Model,
    prompts: Iterable[Any],
    path: str | Path,
    *,
    about: str,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    span: Span = None,
    special_tokens: bool = False,
    hooks: Hooks = (),
    progress: bool = True,
    per_prompt: bool = False,
    positions: bool = False,
    vocabulary: bool = False,
    outputs: bool = False,
) -> RoutingStats:
    """`collect_routing`, saved to `path`; continues from the partial file of an interrupted run.

    The result is bit for bit that of an uninterrupted run: batches are the same, sums are added in the same
    order.

    >>> from moe_lens import organisms
    >>> from moe_lens.statistics import collect_to_file
    >>> model = organisms.load("specialised")
    >>> prompts = ["Question : what is", "Document : the"]
    >>> collect_to_file(model, prompts, "stats.safetensors", about="two prompts", progress=False).n_tokens
    9

    Args:
        model: a HookedMoE or RoutedModel.
        prompts: a list, or a generator that gives the same prompts again.
        path: of the result, a safetensors file.
        about: everything else that the counts depend on (which model, which prompts). If
            it changes, or any setting but `progress`, counting starts afresh.
        hooks: forward hooks to run under. Plans (`steer_hooks`) say what they do; under other hooks an
            interrupted run is not continued.
        span: as in `collect_routing`. A function says what it does by an attribute `digest`, a string;
            without one an interrupted run is not continued.
        batch_size: and the other settings, as in `collect_routing`.

    Raises:
        DataError: as `collect_routing`; what was counted before the error stays in the partial file.
    """
    path = Path(path)
    check_writable(path)
    wanted = Wanted(per_prompt, positions, vocabulary, outputs)
    counting = Counting(model, hooks, wanted, span, special_tokens, batch_size, batch_tokens)
    described = f"{about} {counting.limits} {wanted} {_said_of(span)} {special_tokens} {_described(hooks)}"
    digest = hashlib.sha256(described.encode()).hexdigest()[:16]
    counted, done = _newest_partial(path, digest)
    counter = counting.counter(counted, done)
    saved, cost = time.monotonic(), 0.0

    def save_partial() -> float:
        return _save_partial(
            path, digest, RoutingStats(counting.shape, **counter.values()), counter.n_batches
        )

    try:
        for counts in counting.run(prompts, lambda: counter, progress, skip=done):
            if counts is not None and cost <= SAVING_SHARE * (time.monotonic() - saved):
                cost = save_partial()
                saved = time.monotonic()
    except BaseException:  # also KeyboardInterrupt: what was counted is kept
        if counter.n_batches > done:
            save_partial()
        raise
    result = RoutingStats(counting.shape, **counter.ordered())
    result.save(path)
    for _, old in _partials(path):
        old.unlink(missing_ok=True)
    return result


def _described(hooks: Hooks) -> list[str]:
    """What hooks do, where they say so, as a plan does."""
    return [f"{point} {_digest_of(hook)}" for point, hook in hook_list(hooks)]


def _said_of(span: Span) -> str:
    """What a span, or each of a list of them, selects; a function's name and address do not tell."""
    if isinstance(span, Sequence) and not isinstance(span, str):
        return f"{[_said_of(each) for each in span]}"
    return _digest_of(span) if callable(span) else repr(span)


def _digest_of(function: Any) -> str:
    """What a function says that it does (`function.digest`); otherwise something new each time."""
    return str(getattr(function, "digest", None) or uuid4().hex)


def _partials(path: Path, digest: str = "[0-9a-f]{16}") -> list[tuple[int, Path]]:
    """(number of batches, file) of the partial files of a result."""
    name = re.compile(rf"\.{re.escape(path.name)}\.{digest}\.(\d+)\.partial")
    files = path.parent.iterdir() if path.parent.is_dir() else ()
    return [(int(match.group(1)), file) for file in files if (match := name.fullmatch(file.name))]


def _newest_partial(path: Path, digest: str) -> tuple[RoutingStats | None, int]:
    """The counts so far and the number of batches in them; files that cannot be read are passed over."""
    for done, file in sorted(_partials(path, digest), reverse=True):
        try:
            return RoutingStats.load(file), done
        except DataError:
            continue
    return None, 0


def _save_partial(path: Path, digest: str, stats: RoutingStats, n_batches: int) -> float:
    """Write the counts, drop the older ones; the seconds that it took."""
    start = time.monotonic()
    new = path.parent / f".{path.name}.{digest}.{n_batches}.partial"
    stats.save(new)
    for _, old in _partials(path, digest):
        if old != new:
            old.unlink(missing_ok=True)
    return time.monotonic() - start


def route_prompt(model: Model, prompt: Any, *, hooks: Hooks = ()) -> PromptRouting:
    """The route of one prompt.

    >>> from moe_lens import organisms, route_prompt
    >>> routing = route_prompt(organisms.load("specialised"), "Question : what is")
    >>> routing.tokens[1:], routing.indices.shape
    (('Question', ':', 'what', 'is'), torch.Size([4, 5, 2]))
    >>> routing.entropy.shape, bool((routing.margin > 0).all())
    (torch.Size([4, 5]), True)

    Args:
        model: a HookedMoE or RoutedModel.
        prompt: a string, a chat (a list of messages), or token numbers [pos].
        hooks: forward hooks to run under, `steer_hooks(plan)` for example.

    Raises:
        DataError: an empty prompt, more than one prompt, or tokens that the model does not have.
    """
    check_hooked(model)
    sequences = list(token_sequences(model, prompt))
    if len(sequences) != 1:
        raise DataError(f"route_prompt takes one prompt; got {len(sequences)}.")
    tokens, shape = sequences[0], moe_shape(model)
    rules = {layer: moe.rule for layer, moe in routing_layers(model).items()}
    seen: dict[int, tuple[Tensor, ...]] = {}

    def see(layer: int, decision: RouterOutput, is_own: bool) -> None:
        logits, weights, indices = decision
        margins = margins_of(rules[layer], logits, indices if is_own else None)
        seen[layer] = (
            indices.cpu(),
            *(part.float().cpu() for part in (weights, router_entropy(logits), margins)),
        )

    with observing(model, see, hooks) as run:
        run(tokens[None].to(model.cfg.device), None)
    parts = (torch.stack(part) for part in zip(*(seen[layer] for layer in shape.layers), strict=True))
    return PromptRouting(shape, tuple(_texts(model, tokens)), *parts)


def _texts(model: Model, tokens: Int[Tensor, "pos"]) -> list[str]:
    if model.tokenizer is None:
        return [str(token) for token in tokens.tolist()]
    return token_texts(model.tokenizer, tokens.tolist())
