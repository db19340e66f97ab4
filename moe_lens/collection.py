"""Routing statistics streamed over many prompts: one batch in memory at a time.

stats = collect_routing(model, prompts)
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from moe_lens.batching import Prompts, how_many
from moe_lens.bridge_layers import routing_layers
from moe_lens.routing_stats import TABLES, RoutingStats, is_routing_point
from moe_lens.spans import Span, counted_batches


def collect_routing(
    model: TransformerBridge,
    prompts_or_tokens: Prompts,
    *,
    batch_size: int = 8,
    span: Span = None,
    special_tokens: bool = False,
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
        model: a HookedMoE, or a bridge after `attach`.
        prompts_or_tokens: a string, strings, chats, a token tensor [batch pos], or token sequences of any
            lengths; a generator is read batch by batch, so that memory does not grow with the number of
            prompts (but with per_prompt=True).
        batch_size: prompts a forward.
        span: which tokens of each prompt count: see `moe_lens.spans.Span`; None for all.
        special_tokens: let spans that are strings count special tokens too.
        progress: show a progress bar.
        per_prompt, positions, vocabulary: keep counts of each prompt, at each position, by token, too.

    Raises:
        DataError: no prompts, an empty prompt, or a span that selects no token of some prompt.
    """
    total = RunningTotal()
    for stats in iterate_routing(
        model, prompts_or_tokens, batch_size=batch_size, span=span, special_tokens=special_tokens,
        progress=progress, per_prompt=per_prompt, positions=positions, vocabulary=vocabulary,
    ):  # fmt: skip
        total.add(stats)
    return total.stats()


def iterate_routing(
    model: TransformerBridge,
    prompts_or_tokens: Prompts,
    *,
    batch_size: int = 8,
    span: Span = None,
    special_tokens: bool = False,
    progress: bool = False,
    per_prompt: bool = False,
    positions: bool = False,
    vocabulary: bool = False,
    skip: int = 0,
) -> Iterator[RoutingStats]:
    """The statistics of each batch, in order: what `collect_routing` sums, with the same arguments.

    Added one after the other they give its result bit for bit, so a sum that was saved after some batches
    can be continued with the rest: with `skip`, so many batches are not run.

    >>> from moe_lens import organisms
    >>> model = organisms.load("specialised")
    >>> parts = iterate_routing(model, ["Question : what is", "Document : the"], batch_size=1)
    >>> [stats.n_tokens for stats in parts]
    [5, 4]
    """
    rules = {layer: moe.rule for layer, moe in routing_layers(model).items()}
    known = how_many(prompts_or_tokens)
    with tqdm(total=known, desc="routing", unit="prompt", disable=not progress) as bar:
        batches = counted_batches(model, prompts_or_tokens, span, batch_size, special_tokens=special_tokens)
        for number, (tokens, mask, counted) in enumerate(batches):
            bar.update(len(tokens))
            if number < skip:
                continue
            yield RoutingStats.from_cache(
                _routing_cache(model, tokens, mask), counted, rules=rules, tokens=tokens, attention_mask=mask,
                per_prompt=per_prompt, positions=positions, vocabulary=vocabulary,
            )  # fmt: skip


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
        own = stats.without(*TABLES)
        tables = [*tables, (1, stats.tables())]
        while len(tables) > 1 and tables[-1][0] == tables[-2][0]:
            tables = _last_merged(tables)
        self._state = (n + 1, own if sums is None else sums + own, tables)

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


def _routing_cache(model: TransformerBridge, tokens: Tensor, mask: Tensor) -> Any:
    # Without padding no mask is passed: the run is then the very one that `model(tokens)` makes.
    padding: dict[str, Any] = {} if bool(mask.all()) else {"attention_mask": mask.long()}
    with torch.no_grad():
        return model.run_with_cache(tokens, names_filter=is_routing_point, return_type=None, **padding)[1]
