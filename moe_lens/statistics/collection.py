"""Running a model over prompts: counts streamed batch by batch, or into a file; the route of one prompt.

    stats = collect_routing(model, prompts)                # one batch in memory at a time
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
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from moe_lens import hook_names
from moe_lens.errors import DataError
from moe_lens.files import check_writable
from moe_lens.hook_names import Hooks
from moe_lens.model.registration import moe_shape, routing_layers
from moe_lens.model.wrapper import Model
from moe_lens.statistics.routes import PromptRouting
from moe_lens.statistics.routing_stats import RoutingStats, is_routing_point
from moe_lens.statistics.sums import TABLES
from moe_lens.text.batching import Prompts, how_many, padding, token_sequences
from moe_lens.text.spans import Span, counted_batches


def collect_routing(
    model: Model,
    prompts_or_tokens: Prompts,
    *,
    batch_size: int = 8,
    span: Span = None,
    special_tokens: bool = False,
    hooks: Hooks = (),
    progress: bool = True,
    per_prompt: bool = False,
    positions: bool = False,
    vocabulary: bool = False,
) -> RoutingStats:
    """Routing statistics over many prompts, one batch in memory at a time.

    >>> from moe_lens import collect_routing, organisms
    >>> model = organisms.load("specialised")
    >>> stats = collect_routing(model, ["Question : what is", "Document : the"], progress=False)
    >>> stats.n_tokens                                       # 5 + 4, with BOS; padding is never counted
    9

    Args:
        model: a HookedMoE or RoutedModel.
        prompts_or_tokens: a string, strings, chats, a token tensor [batch pos], or token sequences of any
            lengths; a generator is read batch by batch, so that memory does not grow with the number of
            prompts (but with per_prompt=True).
        batch_size: prompts per forward pass.
        span: which tokens of each prompt count: see `moe_lens.text.Span`; None for all.
        special_tokens: also count special tokens in spans that are strings.
        hooks: forward hooks to run under, `steer_hooks(plan)` for example; the changed routing is counted.
        progress: show a progress bar.
        per_prompt: also count each prompt by itself.
        positions: also count each position by itself.
        vocabulary: also count by token of the vocabulary.

    Raises:
        DataError: no prompts, an empty prompt, or a span that selects no token of some prompt.
    """
    total = RunningTotal()
    for stats in iterate_routing(
        model,
        prompts_or_tokens,
        batch_size=batch_size,
        span=span,
        special_tokens=special_tokens,
        hooks=hooks,
        progress=progress,
        per_prompt=per_prompt,
        positions=positions,
        vocabulary=vocabulary,
    ):
        total.add(stats)
    return total.stats()


def iterate_routing(
    model: Model,
    prompts_or_tokens: Prompts,
    *,
    batch_size: int = 8,
    span: Span = None,
    special_tokens: bool = False,
    hooks: Hooks = (),
    progress: bool = True,
    per_prompt: bool = False,
    positions: bool = False,
    vocabulary: bool = False,
    skip: int = 0,
) -> Iterator[RoutingStats]:
    """The statistics of each batch, in order: what `collect_routing` sums, with the same arguments.

    Added one after the other they give its result bit for bit, so a sum that was saved after some batches can
    be continued with the rest: the first `skip` batches are not run. Between batches the model has no hooks.

    >>> from moe_lens import organisms
    >>> model = organisms.load("specialised")
    >>> prompts = ["Question : what is", "Document : the"]
    >>> parts = iterate_routing(model, prompts, batch_size=1, progress=False)
    >>> [stats.n_tokens for stats in parts]
    [5, 4]
    """
    rules = {layer: moe.rule for layer, moe in routing_layers(model).items()}
    with tqdm(total=how_many(prompts_or_tokens), desc="routing", unit="prompt", disable=not progress) as bar:
        batches = counted_batches(model, prompts_or_tokens, span, batch_size, special_tokens=special_tokens)
        for number, (tokens, mask, counted) in enumerate(batches):
            bar.update(len(tokens))
            if number < skip:
                continue
            cache = _routing_cache(model, tokens, mask, hooks)
            stats = RoutingStats.from_cache(
                cache,
                counted,
                rules=rules,
                tokens=tokens,
                attention_mask=mask,
                per_prompt=per_prompt,
                positions=positions,
                vocabulary=vocabulary,
            )
            del cache  # one batch of routing at a time, also while the caller works on the counts
            yield stats


class RunningTotal:
    """A sum of batches: floats one after the other; tables, which are exact, merged in pairs of like size.

    Adding each batch's tables to the whole would copy the whole for every batch. `add` takes effect in one
    assignment, so that an interrupt finds the batch counted or not, never half.
    """

    def __init__(self) -> None:
        # number of batches; their sums; (batches in it, tables), in order, of falling size
        self._state: tuple[int, RoutingStats | None, list[tuple[int, dict[str, Any]]]] = (0, None, [])

    @property
    def n_batches(self) -> int:
        """How many batches were added."""
        return self._state[0]

    def add(self, stats: RoutingStats) -> None:
        n, sums, tables = self._state
        batch = stats.without(*TABLES)
        tables = [*tables, (1, stats.tables())]
        while len(tables) > 1 and tables[-1][0] == tables[-2][0]:
            tables = _last_merged(tables)
        self._state = (n + 1, batch if sums is None else sums + batch, tables)

    def stats(self) -> RoutingStats:
        """The statistics of all batches together."""
        _, sums, tables = self._state
        assert sums is not None  # counted_batches refuses an empty list
        while len(tables) > 1:
            tables = _last_merged(tables)
        return replace(sums, **tables[0][1])


def _last_merged(tables: list[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
    (size, first), (other, second) = tables[-2:]
    merged = {name: table + second[name] for name, table in first.items()}
    return [*tables[:-2], (size + other, merged)]


def _routing_cache(model: Model, tokens: Tensor, mask: Tensor, hooks: Hooks) -> Any:
    options: dict[str, Any] = {"names_filter": is_routing_point, "return_type": None, **padding(mask)}
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        return model.run_with_cache(tokens, **options)[1]


SAVING_SHARE: Final = 0.05
"""Largest share of the time that is spent on writing partial files."""


def collect_to_file(
    model: Model,
    prompts: Iterable[Any],
    path: str | Path,
    *,
    about: str,
    batch_size: int = 8,
    span: Span = None,
    special_tokens: bool = False,
    hooks: Hooks = (),
    progress: bool = True,
    per_prompt: bool = False,
    positions: bool = False,
    vocabulary: bool = False,
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
        batch_size: prompts per forward pass; the other settings are also those of `collect_routing`.

    Raises:
        DataError: as `collect_routing`; what was counted before the error stays in the partial file.
    """
    path = Path(path)
    check_writable(path)
    settings: dict[str, Any] = {
        "span": span,
        "special_tokens": special_tokens,
        "per_prompt": per_prompt,
        "positions": positions,
        "vocabulary": vocabulary,
    }
    described = f"{about} {batch_size} {sorted(settings.items())} {_described(hooks)}"
    digest = hashlib.sha256(described.encode()).hexdigest()[:16]
    counted, before = _newest_partial(path, digest)
    total = RunningTotal()
    if counted is not None:
        total.add(counted)
        before -= 1  # what was counted before is one batch of the total below
    saved, cost = time.monotonic(), 0.0
    try:
        for stats in iterate_routing(
            model,
            prompts,
            batch_size=batch_size,
            hooks=hooks,
            progress=progress,
            skip=before + total.n_batches,
            **settings,
        ):
            total.add(stats)
            if cost <= SAVING_SHARE * (time.monotonic() - saved):
                cost = _save_partial(path, digest, total, before)
                saved = time.monotonic()
    except BaseException:  # also KeyboardInterrupt: what was counted is kept
        if total.n_batches:
            _save_partial(path, digest, total, before)
        raise
    result = total.stats()
    result.save(path)
    for _, old in _partials(path):
        old.unlink(missing_ok=True)
    return result


def _described(hooks: Hooks) -> list[str]:
    """What hooks do, where they say so (`hook.digest`, as a plan does); otherwise something new each time."""
    return [f"{point} {getattr(hook, 'digest', None) or uuid4().hex}" for point, hook in hooks]


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


def _save_partial(path: Path, digest: str, total: RunningTotal, before: int) -> float:
    """Write the counts, drop the older ones; the seconds that it took."""
    start = time.monotonic()
    new = path.parent / f".{path.name}.{digest}.{before + total.n_batches}.partial"
    total.stats().save(new)
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

    Args:
        model: a HookedMoE or RoutedModel.
        prompt: a string, a chat (a list of messages), or token numbers [pos].
        hooks: forward hooks to run under, `steer_hooks(plan)` for example.

    Raises:
        DataError: an empty prompt, more than one prompt, or tokens that the model does not have.
    """
    sequences = list(token_sequences(model, prompt))
    if len(sequences) != 1:
        raise DataError(f"route_prompt takes one prompt; got {len(sequences)}.")
    tokens, shape = sequences[0], moe_shape(model)
    points = (hook_names.TOPK_INDICES, hook_names.TOPK_WEIGHTS)
    wanted = {hook_names.name(layer, point) for point in points for layer in shape.layers}
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        _, cache = model.run_with_cache(
            tokens[None].to(model.cfg.device), names_filter=lambda name: name in wanted, return_type=None
        )
    indices, weights = (
        torch.stack([cache[hook_names.name(layer, point)][0].cpu() for layer in shape.layers])
        for point in points
    )
    return PromptRouting(shape, tuple(_texts(model, tokens)), indices, weights.float())


def _texts(model: Model, tokens: Int[Tensor, "pos"]) -> list[str]:
    if model.tokenizer is None:
        return [str(token) for token in tokens.tolist()]
    return [model.tokenizer.decode([token]) for token in tokens.tolist()]
