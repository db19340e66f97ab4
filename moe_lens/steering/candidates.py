"""Which experts a plan may choose from: of some layers, significant ones, those that resampling keeps.

    ranked = candidates(scores, q=0.05, layers="middle")
    kept = stable_candidates(scores, ranked, 10, 0, share=0.8)
    warn_of_super_experts(deactivate, scores.super_experts)

`SteeringPlan.from_scores` takes them as arguments.
"""

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import numpy as np

from moe_lens.checks import chosen_layers
from moe_lens.detection.expert_scores import ExpertScore, ExpertScores
from moe_lens.errors import DataError, PlanError, warn
from moe_lens.steering.choosing import Expert, HowMany


def candidates(scores: ExpertScores, q: float | None = None, layers: Any = None) -> list[ExpertScore]:
    """All experts, ranked; with `q` those with a q-value up to it, with `layers` those of these layers.

    Raises:
        PlanError: a q outside (0, 1], scores without q-values, layers that are not there.
    """
    try:
        among = chosen_layers(layers, scores.shape.layers)
    except DataError as error:
        raise PlanError(str(error)) from error
    ranked = [score for score in scores.ranked() if score.layer in among]
    if q is None:
        return ranked
    if isinstance(q, bool) or not isinstance(q, Real) or not 0 < q <= 1:
        raise PlanError(f"q must be a number above 0, at most 1; got {q!r}.")
    if scores.q is None:
        raise PlanError("These scores carry no q-values to choose by; use scores from detect(...), or no q.")
    rows = {layer: row for row, layer in enumerate(scores.shape.layers)}
    return [score for score in ranked if float(scores.q[rows[score.layer], score.expert]) <= q]


def check_asks_for_some(n_activate: HowMany, n_deactivate: HowMany, remedy: str) -> None:
    """Raise PlanError where both numbers are 0: such a plan steers nothing, without a word."""
    if not any(n == "all" or n for n in (n_activate, n_deactivate)):
        raise PlanError(f"The plan names no expert; ask for some with {remedy}.")


def stable_candidates(
    scores: ExpertScores,
    ranked: Sequence[ExpertScore],
    n_activate: HowMany,
    n_deactivate: HowMany,
    *,
    share: float,
    n_resamples: int = 1000,
    seed: int = 0,
) -> list[ExpertScore]:
    """Of the ranked experts those that are among the first of their sign on most bootstrap resamples.

    Prompts (clusters of pairs) are drawn with replacement and the experts scored again; on each draw the
    `n_activate` most positive and the `n_deactivate` most negative of `ranked` are selected, and an expert is
    kept if at least `share` of the draws select it with the sign that it has (stability selection,
    Meinshausen & Bühlmann 2010; experts by agreement of resampled selections: SAFEx, arXiv 2506.17368).

    Args:
        ranked: what can be chosen at all, from `candidates`.
        n_activate: how many are selected on a draw; "all": every one of that sign.
        n_deactivate: the same for negative scores.
        share: of the draws, in (0, 1].
        n_resamples: draws.
        seed: the same seed gives the same experts.

    Raises:
        PlanError: a share outside (0, 1], scores without evidence, or no expert that is stable.
    """
    from moe_lens.detection.detecting import evidence_of, unit_counts
    from moe_lens.detection.paired_statistics import bootstrap_scores

    if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share <= 1:
        raise PlanError(f"stable must be a share of the resamples, above 0, at most 1; got {share!r}.")
    try:
        evidence, formula = evidence_of(scores)
    except DataError as error:
        raise PlanError(f"Stability needs prompts to resample: {error}") from error
    counts = unit_counts(formula, scores.stats_1, scores.stats_2, evidence.clusters, evidence.clusters_2)
    rows = {layer: row for row, layer in enumerate(scores.shape.layers)}
    columns = [rows[score.layer] * scores.shape.n_experts + score.expert for score in ranked]
    drawn = bootstrap_scores(formula, counts, n_resamples, seed)[:, columns]
    frequency = np.zeros(len(columns))
    wanted: tuple[tuple[int, HowMany], ...] = ((1, n_activate), (-1, n_deactivate))
    for sign, number in wanted:
        own = np.array([score.delta * sign > 0 for score in ranked], dtype=bool)
        frequency[own] = _selected(sign * drawn, number)[:, own].mean(0)
    kept = [score for score, often in zip(ranked, frequency, strict=True) if often >= share - 1e-12]
    if not kept:
        raise PlanError(
            f"No expert is selected on {100 * share:g}% of the resamples (the most stable one on "
            f"{frequency.max(initial=0):.0%}); ask for a smaller share, or give more prompts."
        )
    return kept


def _selected(values: np.ndarray, number: HowMany) -> np.ndarray:
    """[draw expert], whether it is among the `number` largest positive values of the draw."""
    positive = values > 0
    if number == "all":
        return positive
    wanted = min(number, values.shape[1])
    first = np.argsort(-values, axis=1, kind="stable")[:, :wanted]
    selected = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(selected, first, True, axis=1)
    return selected & positive


def at_most(number: HowMany, ranked: Iterable[ExpertScore], sign: int) -> HowMany:
    """The number, or as many experts of that sign as there are."""
    return number if number == "all" else min(number, sum(score.delta * sign > 0 for score in ranked))


def warn_of_super_experts(deactivate: Sequence[Expert], super_experts: Any, what: str = "The plan") -> None:
    """Warn if experts that are switched off have outputs far above all others'.

    Args:
        super_experts: from `moe_lens.super_experts`; None: nothing is known, so nothing is said.
    """
    if super_experts is not None and (off := super_experts.among(deactivate)):
        warn(
            f"{what} switches off super experts, {off} (layer, expert): their outputs are far larger than "
            "all others', and the model may break without them whatever the behaviour. Look at the "
            "collateral measures, or spare them."
        )
