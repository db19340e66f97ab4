"""Detection with its uncertainty: which experts follow a contrast, how sure that is, how stable the choice.

scores = detect(model, pairs)                          # ExpertScores with intervals, p- and q-values
scores = detect(model, groups)                         # two groups of different prompts: unpaired
scores = compare_routing(stats_1, stats_2)             # the same from counts that somebody already has
plan = SteeringPlan.from_scores(scores, n_deactivate="all", q=0.05)
selection_stability(scores, n=10)                      # would other prompts have selected the same experts?
template_agreement(scores)                             # would other templates have?

Tokens of one prompt are not independent, so prompts are the units: whole pairs are resampled, and whole
pairs swap their conditions (scores.py and paired_statistics.py have the formulas). Of groups of different
prompts each is resampled, and prompts change their groups (unpaired_statistics.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.checks import whole_number
from moe_lens.detection import paired_statistics
from moe_lens.detection.expert_scores import Evidence, ExpertScores, check_comparable
from moe_lens.detection.floors import warn_of_floor
from moe_lens.detection.paired_counts import PairedCounts
from moe_lens.detection.paired_statistics import check_settings
from moe_lens.detection.scores import Score
from moe_lens.detection.token_alignment import token_alignment, warn_of_differences
from moe_lens.detection.unpaired_counts import UnpairedCounts
from moe_lens.detection.unpaired_statistics import permutation_p
from moe_lens.errors import DataError
from moe_lens.hook_names import Hooks
from moe_lens.results import Result
from moe_lens.statistics.counts import PromptCounts
from moe_lens.statistics.routing_stats import RoutingStats
from moe_lens.text.batching import TextModel
from moe_lens.text.groups import ContrastiveGroups
from moe_lens.text.pairs import ContrastivePairs
from moe_lens.text.spans import Span

if TYPE_CHECKING:
    import pandas


def detect(
    model: TextModel,
    pairs: ContrastivePairs | ContrastiveGroups,
    *,
    score: str | Score = "risk_difference",
    span: Span = "pairs",
    special_tokens: bool = False,
    hooks: Hooks = (),
    level: float = 0.95,
    n_resamples: int = 1000,
    n_permutations: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    outputs: bool = False,
    progress: bool = True,
) -> ExpertScores:
    """Score every expert on contrastive pairs, with an interval, a p-value and a q-value each.

    >>> from moe_lens import ContrastivePairs, Prompt, detect, organisms
    >>> conflicts = organisms.world("specialised").conflicts("detection")
    >>> pairs = ContrastivePairs.from_lists(
    ...     [Prompt(c.open_book, {"question": c.closed_book}) for c in conflicts],
    ...     [Prompt(c.closed_book, {"question": c.closed_book}) for c in conflicts],
    ...     span="question", clusters=[c.entity for c in conflicts],
    ... )
    >>> scores = detect(organisms.load("specialised"), pairs, progress=False)
    >>> scores.q.shape, bool((scores.low <= scores.delta).all())
    (torch.Size([4, 8]), True)

    Args:
        model: a HookedMoE or RoutedModel.
        pairs: the prompts of both conditions; positive scores go with `pairs.first`. `ContrastiveGroups` of
            different prompts (two corpora, right against wrong answers) are compared unpaired.
        score: "risk_difference" (SteerMoE's), "log_odds_ratio", "probability_difference" or "paired_t", or a
            `moe_lens.detection.Score` of your own.
        span: which tokens count; by default what the pairs say (`pairs.span`).
        special_tokens: count special tokens in spans too.
        hooks: forward hooks to run under, `steer_hooks(plan)` for example.
        level: confidence level of the intervals, in (0, 1).
        n_resamples: bootstrap resamples of the clusters, for the intervals.
        n_permutations: sign flips of the clusters, or permutations of their groups, for the p-values.
        seed: of both; the same seed gives the same numbers.
        batch_size: prompts per forward pass, at most; see `collect_routing`.
        batch_tokens: tokens per forward pass, at most.
        outputs: also sum up how large the experts' outputs are, for `scores.super_experts`.
        progress: show a progress bar.

    Warns before the model runs if the clusters are too few for any expert to be significant by itself, and if
    pairs count different tokens under both conditions though the span names a part (`scores.alignment` has
    all of them).

    Raises:
        DataError: an unknown score, fewer than two clusters, a span that a prompt lacks, or bad settings.
    """

    def count(prompts: Any, counted: Span) -> RoutingStats:
        from moe_lens.statistics.collection import collect_routing  # needs TransformerLens; scores do not

        return collect_routing(
            cast(Any, model),
            prompts,
            span=counted,
            special_tokens=special_tokens,
            hooks=hooks,
            per_prompt=True,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            outputs=outputs,
            progress=progress,
        )

    return detected_by(
        count,
        model,
        pairs,
        score=score,
        span=span,
        special_tokens=special_tokens,
        level=level,
        n_resamples=n_resamples,
        n_permutations=n_permutations,
        seed=seed,
    )


def detected_by(
    count: Callable[[Any, Span], RoutingStats],
    model: TextModel,
    pairs: ContrastivePairs | ContrastiveGroups,
    *,
    score: str | Score,
    span: Span,
    special_tokens: bool,
    level: float,
    n_resamples: int,
    n_permutations: int,
    seed: int,
) -> ExpertScores:
    """`detect`, with the statistics of each condition's prompts counted by a function, prompt by prompt."""
    if not isinstance(pairs, ContrastivePairs | ContrastiveGroups):
        raise DataError(f"detect needs ContrastivePairs or ContrastiveGroups; got {type(pairs).__name__}.")
    formula = check_settings(score, level, n_resamples, n_permutations, seed)
    counted = pairs.span if isinstance(span, str) and span == "pairs" else span
    alignment, settings = None, _Settings.of(formula, level, n_resamples, n_permutations, seed)
    units = _units_of(pairs)
    if isinstance(pairs, ContrastivePairs):
        alignment = token_alignment(model, pairs, counted, special_tokens)
        warn_of_differences(alignment)
    if (shape := getattr(model, "moe_shape", None)) is not None:
        warn_of_floor(units.clusters, units.clusters_2, n_permutations, len(shape.layers) * shape.n_experts)
    stats_1, stats_2 = (count(prompts, counted) for prompts in (pairs.first, pairs.second))
    return replace(_compared(stats_1, stats_2, units, settings), alignment=alignment)


def compare_routing(
    stats_1: RoutingStats,
    stats_2: RoutingStats,
    *,
    score: str | Score = "risk_difference",
    paired: bool | None = None,
    clusters: Sequence[Any] | None = None,
    templates: Sequence[Any] | None = None,
    level: float = 0.95,
    n_resamples: int = 1000,
    n_permutations: int = 1000,
    seed: int = 0,
) -> ExpertScores:
    """`detect` from statistics with per-prompt counts: of pairs of prompts, or of two different collections.

    >>> from moe_lens import collect_routing, compare_routing, organisms
    >>> model, conflicts = organisms.load("null"), organisms.world("null").conflicts("detection")
    >>> one = collect_routing(model, [c.open_book for c in conflicts], per_prompt=True, progress=False)
    >>> two = collect_routing(model, [c.closed_book for c in conflicts], per_prompt=True, progress=False)
    >>> compare_routing(one, two, score="log_odds_ratio").q.shape
    torch.Size([4, 8])
    >>> compare_routing(one, two, paired=False).evidence.is_paired
    False

    Args:
        stats_1: from `collect_routing(..., per_prompt=True)`, under the first condition.
        stats_2: the same under the second condition.
        score: as in `detect`; so are `level`, `n_resamples`, `n_permutations` and `seed`.
        paired: True: prompt i of one is paired with prompt i of the other. False: they are different prompts,
            and as many or not. None: paired if there are as many, which `scores.evidence.is_paired` says.
        clusters: one label per pair; pairs of one label are one unit. By default every pair is its own. If
            not paired: two lists, one label per prompt of each; a label that both have is one unit. If all
            are such, units are compared with themselves; if only some are, p-values and intervals are
            conservative: pair the prompts where you can.
        templates: one label per pair, for `template_agreement`.

    Unpaired p-values and intervals are conservative for rare experts (rates below 0.1 with 20 prompts a
    group, p ≤ 0.05 in less than 3 % where nothing differs). They are liberal in one corner: a small group
    whose prompts vary much more than those of a large one (20 against 80 prompts, tokens correlated by 0.3
    against 0.05, have p ≤ 0.05 in 9–11 %, and 95 % intervals that hold 89–92 %). unpaired_statistics.py has
    the table.

    Raises:
        DataError: different models, no per-prompt counts, unequal numbers of prompts that are to be pairs,
            fewer than two clusters, or `paired_t` of what is not paired.
    """
    check_comparable(stats_1, stats_2)
    formula = check_settings(score, level, n_resamples, n_permutations, seed)
    n_1, n_2 = (len(_per_prompt(stats).n_tokens) for stats in (stats_1, stats_2))
    if paired and n_1 != n_2:
        raise DataError(
            f"Pairs need as many prompts under both conditions; got {n_1} and {n_2}. Two collections of "
            "different prompts are compared with paired=False."
        )
    if paired or (paired is None and n_1 == n_2):
        labels = _labels("clusters", clusters, [str(pair) for pair in range(n_1)])
        units = _Units(labels, _labels("templates", templates, ["default"] * n_1))
    else:
        units = _unpaired_units(clusters, templates, n_1, n_2)
    warn_of_floor(units.clusters, units.clusters_2, n_permutations, stats_1.counts.numel())
    return _compared(stats_1, stats_2, units, _Settings.of(formula, level, n_resamples, n_permutations, seed))


class _Settings(NamedTuple):
    formula: Score
    level: float
    n_resamples: int
    n_permutations: int
    seed: int

    @classmethod
    def of(cls, formula: Score, level: Any, n_resamples: Any, n_permutations: Any, seed: Any) -> "_Settings":
        return cls(formula, float(level), int(n_resamples), int(n_permutations), int(seed))


class _Units(NamedTuple):
    """Labels of pairs; or, with `clusters_2`, of the prompts of two groups."""

    clusters: tuple[str, ...]
    templates: tuple[str, ...]
    clusters_2: tuple[str, ...] | None = None


def _compared(
    stats_1: RoutingStats, stats_2: RoutingStats, units: _Units, settings: _Settings
) -> ExpertScores:
    formula, level, n_resamples, n_permutations, seed = settings
    counts = unit_counts(formula, stats_1, stats_2, units.clusters, units.clusters_2)
    low, high = paired_statistics.interval(formula, counts, level=level, n_resamples=n_resamples, seed=seed)
    if isinstance(counts, UnpairedCounts):
        p = permutation_p(formula, counts, n_permutations=n_permutations, seed=seed)
    else:
        p = paired_statistics.sign_flip_p(formula, counts, n_permutations=n_permutations, seed=seed)
    shape = stats_1.counts.shape

    def by_layer(values: Float[np.ndarray, "expert"]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64)).reshape(shape)

    evidence = Evidence(
        by_layer(low),
        by_layer(high),
        by_layer(p),
        by_layer(paired_statistics.q_values(p)),
        level,
        n_resamples,
        n_permutations,
        seed,
        *units,
    )
    delta = by_layer(paired_statistics.score(formula, counts))
    return ExpertScores(delta, stats_1, stats_2, formula.name, evidence, formula)


@dataclass(frozen=True, eq=False, repr=False)
class SelectionStability(Result):
    """How well the selection of the n experts with the largest |score| survives other prompts.

    Attributes:
        jaccard: [resample], |A ∩ B| / |A ∪ B| of the selection on all pairs and on each resample.
        frequency: [layer expert], share of the resamples that select the expert (stability selection,
            Meinshausen & Bühlmann 2010).
        n: number of experts selected.
    """

    jaccard: Float[np.ndarray, "resample"]
    frequency: Float[Tensor, "layer expert"]
    n: int

    @property
    def mean(self) -> float:
        """Mean Jaccard index, in [0, 1]; choosing n of N experts at random gives about n / (2N − n)."""
        return float(self.jaccard.mean())

    def summary(self) -> str:
        """The mean Jaccard index, and where 95 % of the resamples are."""
        low, high = np.quantile(self.jaccard, [0.025, 0.975])
        return f"top {self.n}: Jaccard {self.mean:.2f}, 95 % of resamples in [{low:.2f}, {high:.2f}]"


def selection_stability(
    scores: ExpertScores, *, n: int, n_resamples: int = 1000, seed: int = 0
) -> SelectionStability:
    """Select the n experts with the largest |score| again on bootstrap resamples of the clusters.

    >>> from moe_lens import compare_routing, collect_routing, organisms, selection_stability
    >>> model, conflicts = organisms.load("null"), organisms.world("null").conflicts("detection")
    >>> stats = [
    ...     collect_routing(model, prompts, per_prompt=True, progress=False)
    ...     for prompts in ([c.open_book for c in conflicts], [c.closed_book for c in conflicts])
    ... ]
    >>> selection_stability(compare_routing(*stats), n=6).frequency.shape
    torch.Size([4, 8])

    Raises:
        DataError: scores without evidence (use `detect`) or whose formula is not known, or n not between 1
            and the number of experts.
    """
    evidence, formula = evidence_of(scores)
    number = whole_number(n, "n", least=1, most=scores.delta.numel(), remedy="It is a number of experts.")
    counts = unit_counts(formula, scores.stats_1, scores.stats_2, evidence.clusters, evidence.clusters_2)
    resampled = paired_statistics.bootstrap_scores(formula, counts, n_resamples, seed)
    chosen = _top(np.abs(resampled), number)
    original = _top(np.abs(scores.delta.numpy().reshape(1, -1)), number)
    shared = (chosen & original).sum(-1)
    frequency = torch.from_numpy(chosen.mean(0)).reshape(scores.delta.shape)
    return SelectionStability(shared / (2 * number - shared), frequency, number)


def template_agreement(scores: ExpertScores) -> "pandas.DataFrame":
    """Spearman rank correlation, over all experts, between the scores under each pair of templates.

    Experts that follow the behaviour rank alike under every template; experts that follow a template's words
    do not. Values in [-1, 1], NaN where all experts score the same.

    >>> from moe_lens import contrasts, detect, organisms, template_agreement
    >>> rows = [
    ...     {"context": c.open_book, "question": c.closed_book}
    ...     for c in organisms.world("specialised").conflicts("detection")
    ... ]
    >>> pairs = contrasts.document_against_question(rows)
    >>> scores = detect(organisms.load("specialised"), pairs, n_resamples=20, progress=False)
    >>> template_agreement(scores).shape
    (3, 3)

    Raises:
        DataError: scores without evidence or whose formula is not known, pairs of a single template, or a
            template with one cluster only.
    """
    import pandas
    from scipy.stats import rankdata

    evidence, formula = evidence_of(scores)
    if not evidence.is_paired:
        raise DataError("Two groups of different prompts have no templates, so nothing can agree.")
    names = list(dict.fromkeys(evidence.templates))
    if len(names) < 2:
        raise DataError(f"Agreement needs pairs of at least two templates; there is {names[0]!r} only.")
    ranks = []
    for name in names:
        rows = [row for row, template in enumerate(evidence.templates) if template == name]
        clusters = tuple(evidence.clusters[row] for row in rows)
        if len(set(clusters)) < 2:
            raise DataError(f"Template {name!r} has pairs of one cluster only; agreement needs at least two.")
        counts = unit_counts(formula, scores.stats_1, scores.stats_2, clusters, None, rows)
        ranks.append(rankdata(paired_statistics.score(formula, counts)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return pandas.DataFrame(np.corrcoef(np.stack(ranks)), index=names, columns=names)


def _top(values: Float[np.ndarray, "row expert"], n: int) -> np.ndarray:
    """True at the n largest of each row; ties in the order of the experts."""
    chosen = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(chosen, np.argsort(-values, axis=-1, kind="stable")[:, :n], True, axis=-1)
    return chosen


def unit_counts(
    score: Score,
    stats_1: RoutingStats,
    stats_2: RoutingStats,
    clusters: Sequence[str],
    clusters_2: Sequence[str] | None,
    rows: Sequence[int] | None = None,
) -> PairedCounts | UnpairedCounts:
    """What `paired_statistics` works on: counts (or sums of probabilities) of each cluster."""
    sums, tokens = [], []
    for stats in (stats_1, stats_2):
        prompts = _per_prompt(stats)
        table = getattr(prompts, score.sums)
        chosen = slice(None) if rows is None else list(rows)
        sums.append(table.flatten(1).double().numpy()[chosen])
        tokens.append(prompts.n_tokens.double().numpy()[chosen])
    if clusters_2 is None:
        return PairedCounts.of_pairs(sums[0], tokens[0], sums[1], tokens[1], clusters)
    if score.needs_pairs:
        raise DataError(f"{score!r} needs pairs of prompts, and these are none; choose risk_difference.")
    return UnpairedCounts.of_prompts(sums[0], tokens[0], sums[1], tokens[1], clusters, clusters_2)


def _per_prompt(stats: RoutingStats) -> PromptCounts:
    if stats.per_prompt is None:
        raise DataError(
            "These statistics hold no counts per prompt, without which tokens would pass for independent; "
            "collect them with per_prompt=True."
        )
    return stats.per_prompt


def evidence_of(scores: ExpertScores) -> tuple[Evidence, Score]:
    """The evidence, and the score that can be computed anew."""
    if not isinstance(scores, ExpertScores) or scores.evidence is None:
        raise DataError(
            "These scores carry no evidence; use scores from detect(...) or compare_routing(...)."
        )
    if scores.formula is None:
        raise DataError(
            f"These scores are {scores.score!r}, and a file does not keep the formula of a user's own score; "
            "give it with dataclasses.replace(scores, formula=MyScore())."
        )
    return scores.evidence, scores.formula


def _units_of(pairs: ContrastivePairs | ContrastiveGroups) -> _Units:
    if isinstance(pairs, ContrastivePairs):
        return _Units(pairs.clusters, pairs.templates)
    return _Units(pairs.clusters_1, (), pairs.clusters_2)


def _unpaired_units(clusters: Any, templates: Any, n_1: int, n_2: int) -> _Units:
    """Labels of two groups; by default all differ."""
    if templates is not None:
        raise DataError("templates are labels of pairs; what is not paired has none.")
    if clusters is None:
        return _Units(tuple(f"1: {row}" for row in range(n_1)), (), tuple(f"2: {row}" for row in range(n_2)))
    groups = [] if isinstance(clusters, str) else list(clusters)
    if [len(labels) if hasattr(labels, "__len__") else None for labels in groups] != [n_1, n_2]:
        raise DataError(
            f"Unpaired prompts need two lists of clusters, one label per prompt: {n_1} and {n_2} labels."
        )
    first, second = (tuple(str(label) for label in labels) for labels in groups)
    return _Units(first, (), second)


def _labels(name: str, labels: Sequence[Any] | None, default: list[str]) -> tuple[str, ...]:
    labels = default if labels is None else list(labels)
    if len(labels) != len(default):
        raise DataError(f"{name} must hold one label per pair: {len(default)} pairs, {len(labels)} labels.")
    return tuple(str(label) for label in labels)
