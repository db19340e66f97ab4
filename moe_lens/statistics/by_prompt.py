"""Statistics of each prompt by itself, for scores whose tables have no row a prompt: outputs, vocabulary.

units = collect_by_prompt(model, prompts, outputs=True, vocabulary=True)
saliency(units, "reap"), npmi(units, tokens=[...]), route_probe(units, labels)
"""

from collections.abc import Iterable
from typing import Any

from moe_lens.errors import DataError
from moe_lens.hook_names import Hooks
from moe_lens.model.wrapper import Model
from moe_lens.statistics.collection import Counting
from moe_lens.statistics.counting import Wanted
from moe_lens.statistics.routing_stats import RoutingStats
from moe_lens.text.batching import Prompts
from moe_lens.text.spans import Span


def collect_by_prompt(
    model: Model,
    prompts: Prompts,
    *,
    clusters: Iterable[Any] | None = None,
    span: Span = None,
    special_tokens: bool = False,
    hooks: Hooks = (),
    vocabulary: bool = False,
    outputs: bool = False,
    progress: bool = True,
) -> tuple[RoutingStats, ...]:
    """Routing statistics of each prompt by itself, in the order given; `sum` of them is `collect_routing`'s.

    >>> from moe_lens import collect_by_prompt, organisms
    >>> model = organisms.load("specialised")
    >>> units = collect_by_prompt(model, ["Question : what is", "the"], outputs=True, progress=False)
    >>> [unit.n_tokens for unit in units], units[0].outputs.norm_sums.shape
    ([5, 2], torch.Size([4, 8]))

    Each prompt runs by itself, so it takes longer than `collect_routing`, whose per_prompt=True is enough for
    counts and probabilities. Here vocabulary and outputs, too, are known by prompt. Tables of experts that
    run together are left out, which would be large.

    Args:
        model: a HookedMoE or RoutedModel.
        prompts: as in `collect_routing`.
        clusters: one label a prompt; prompts of one label are added up to one unit, in the order of their
            first prompts. None: each by itself.
        span: which tokens count, and the other settings, as in `collect_routing`.

    Raises:
        DataError: as in `collect_routing`; another number of labels than of prompts.
    """
    counting = Counting(
        model, hooks, Wanted(False, False, vocabulary, outputs), span, special_tokens, 1, None
    )
    found: dict[int, RoutingStats] = {}
    for counter in counting.run(prompts, counting.counter, progress):
        if counter is not None:
            (row,) = counter.rows
            found[row] = RoutingStats(counting.shape, **counter.values()).without("co_routing")
    units = [found[row] for row in sorted(found)]
    labels = list(range(len(units))) if clusters is None else list(clusters)
    if len(labels) != len(units):
        raise DataError(f"{len(units)} prompts need as many cluster labels; got {len(labels)}.")
    by_label: dict[Any, RoutingStats] = {}
    for label, unit in zip(labels, units, strict=True):
        by_label[label] = by_label[label] + unit if label in by_label else unit
    return tuple(by_label.values())
