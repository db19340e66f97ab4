"""What methods that choose nobody read of an organism: numbers with intervals for methods_table.py.

Each takes the model and conflicts, and gives words, and whether the method says that there is something: an
interval on the one side of what there is without any effect, or a p-value of at most 0.05 for all layers
together. None where a number is no such statement.
"""

from collections.abc import Callable, Sequence

import numpy as np

from moe_lens import (
    Prompt,
    RoutedModel,
    answer_task,
    audit,
    cache_hits,
    collect_by_prompt,
    collect_routing,
    predict_errors,
    route_agreement,
    route_divergence,
    route_probe,
    route_prompt,
    route_uncertainty,
    segment_consistency,
    super_experts,
)
from moe_lens.evaluation import GreedySearch, answers_with
from moe_lens.organisms import Conflict

BATCH = 96
Reading = tuple[str, bool | None]


def divergence(model: RoutedModel, conflicts: Sequence[Conflict]) -> Reading:
    """Of the question's tokens with and without a document; p by Bonferroni over layers."""
    one, two = (
        collect_routing(model, given, span="question", per_prompt=True, batch_size=BATCH, progress=False)
        for given in _both(conflicts)
    )
    found = route_divergence(one, two)
    assert found.p is not None
    p = min(1.0, float(found.p.min()) * len(found.p))
    return f"{100 * float(found.divergence.mean()):.1f} % of the entropy, p {p:.3f}", p <= 0.05


def agreement(model: RoutedModel, conflicts: Sequence[Conflict]) -> Reading:
    """Of the question's tokens with and without a document, beside tokens that do not belong together."""
    one, two = _both(conflicts)
    found = route_agreement(model, model, one, two, span="question", progress=False)
    return f"Jaccard {_ranged(found.jaccard)}, by chance {_ranged(found.chance)}", None


def probe(model: RoutedModel, conflicts: Sequence[Conflict]) -> Reading:
    """Is the coming answer, document's or not, read better from the route than from the words?"""
    texts = [c.open_book for c in conflicts]
    says = answers_with(model, texts, [c.document_answer for c in conflicts], batch_size=BATCH)
    units = collect_by_prompt(model, texts, vocabulary=True, progress=False)
    found = route_probe(units, says.tolist(), groups=[c.entity for c in conflicts])
    auroc, words, more = found.auroc, found.bag_auroc, found.difference
    return (
        f"AUROC {auroc.value:.2f} of routes, {words.value:.2f} of words: {more.value:+.2f} "
        f"[{more.low:+.2f}, {more.high:+.2f}]",
        more.low > 0,
    )


def segments(model: RoutedModel, conflicts: Sequence[Conflict]) -> Reading:
    """Of 8 tokens."""
    routes = [route_prompt(model, c.open_book) for c in conflicts[::4]]
    return f"SRP {_ranged(segment_consistency(routes, 8).performance)}", None


def caches(model: RoutedModel, conflicts: Sequence[Conflict]) -> Reading:
    """Least recently used, 4 of 8 experts."""
    routes = [route_prompt(model, c.open_book) for c in conflicts[::4]]
    return f"hits {_ranged(cache_hits(routes, 4).rate)}", None


def loud(model: RoutedModel, conflicts: Sequence[Conflict]) -> Reading:
    """Experts with outputs far above all others'."""
    texts = [c.open_book for c in conflicts]
    stats = collect_routing(model, texts, outputs=True, batch_size=BATCH, progress=False)
    found, sizes = super_experts(stats), super_experts(stats).max_abs
    names = " ".join(f"L{layer}E{expert}" for layer, expert in found.experts)
    return f"{names}; its output {float(sizes.max() / sizes.median()):.1f} × the median expert's", None


def uncertainty(model: RoutedModel, conflicts: Sequence[Conflict]) -> Reading:
    """Is an answer other than the document's told by 4 noisy routes better than by the softmax entropy?"""
    texts = [c.open_book for c in conflicts]
    found = route_uncertainty(model, texts, n=4, batch_size=BATCH, progress=False)
    tokenizer = model.tokenizer
    meant = [tokenizer.convert_tokens_to_ids(c.document_answer) for c in conflicts]
    wrong = found.plain != np.array(meant)
    report = predict_errors(found, wrong, clusters=[c.entity for c in conflicts])
    name = "route disagreement"
    low, high = report.gain_interval(name)
    gain = report.auroc(name) - report.auroc(report.baseline or name)
    tells = low > 0 and report.auroc_interval(name)[0] > 0.5
    return f"AUROC {report.auroc(name):.2f}, gain {gain:+.2f} [{low:+.2f}, {high:+.2f}]", tells


def audited(model: RoutedModel, conflicts: Sequence[Conflict]) -> Reading:
    """The worst case for answering with the document, of k ± 1, noise and a searched plan of 2 experts."""
    task = answer_task(
        [c.open_book for c in conflicts],
        [c.document_answer for c in conflicts],
        clusters=[c.entity for c in conflicts],
        batch_size=BATCH,
    )
    search = GreedySearch(n_candidates=16)
    report = audit(model, task, n_noisy=2, n_random=2, max_size=2, search=search, progress=False)
    (low, high), (_, more) = report.worst_interval, report.change_interval
    return (
        f"{report.worst_rate:.2f} [{low:.2f}, {high:.2f}], {report.worst.kind}; as trained "
        f"{report.as_trained.rate:.2f}",
        more < 0,
    )


def _both(conflicts: Sequence[Conflict]) -> tuple[list[Prompt], list[Prompt]]:
    ones = [Prompt(c.open_book, {"question": c.closed_book}) for c in conflicts]
    others = [Prompt(c.closed_book, {"question": c.closed_book}) for c in conflicts]
    return ones, others


def _ranged(values: object) -> str:
    numbers = np.asarray(values)
    return f"{numbers.min():.2f} to {numbers.max():.2f}"


READINGS: dict[str, Callable[[RoutedModel, Sequence[Conflict]], Reading]] = {
    "route divergence": divergence,
    "route agreement": agreement,
    "route probe": probe,
    "segment consistency": segments,
    "cache hits": caches,
    "super experts": loud,
    "route uncertainty": uncertainty,
    "audit": audited,
}
