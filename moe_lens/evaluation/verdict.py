"""The words and tables of an evaluation of steering: what `SteeringReport` says of its numbers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from moe_lens.evaluation.outcomes import DIRECTIONS, ROUNDING, SATURATED, Outcome, SteeringOutcomes
from moe_lens.resampling import in_words

if TYPE_CHECKING:
    import pandas

    from moe_lens.steering.plan import SteeringPlan

SIGNS: Final = {"+": "+", "-": "−"}
"""Direction -> how words and tables write it."""


def explanation(outcomes: SteeringOutcomes) -> str:
    """The verdict in words: which criteria hold, which directions move, what suffers."""
    gap = f"The two-way gap of {outcomes.gap:+.2f} {in_words(*outcomes.gap_interval)}"
    against_any = f"{outcomes.p_any:.3f} against any-layer random sets"
    ps = f"p = {outcomes.p_matched:.3f} against layer-matched, {against_any}"
    if outcomes.verdict:
        first = f"{gap} exceeds its controls ({ps})."
        if outcomes.saturation is not None:
            first += f" But {saturation(outcomes)}; effects are cut there."
    elif outcomes.saturation is not None:
        first = (
            f"The measure has no room to move: {saturation(outcomes)}. So {gap[0].lower()}{gap[1:]} ({ps}) "
            "is no evidence that the plan does nothing. Take prompts or alternatives less one-sided, or "
            "a task of log-probabilities instead of zeros and ones."
        )
    else:
        why = ", and ".join(_failed_criteria(outcomes))
        first = f"No effect beyond the controls: {gap[0].lower()}{gap[1:]} ({ps}); {why}."
    return " ".join([first, _excesses(outcomes), _directions(outcomes), *_collateral(outcomes)])


def saturation(outcomes: SteeringOutcomes) -> str:
    """Where the measure sits, in words."""
    if outcomes.saturation == "constant":
        return "no condition changes the value of any prompt"
    extreme = (
        outcomes.unsteered.values.min() if outcomes.saturation == "floor" else outcomes.unsteered.values.max()
    )
    return (
        f"at least {SATURATED:.0%} of the prompts sit at its {outcomes.saturation} ({extreme:g}) under every "
        "condition"
    )


def table(outcomes: SteeringOutcomes) -> "pandas.DataFrame":
    """One row a condition: unsteered, both directions, bottom set, and the random sets (mean, sd)."""
    import pandas as pd

    rows = [_row(outcomes, "unsteered", [outcomes.unsteered], 0)]
    rows[0]["low"], rows[0]["high"] = outcomes.interval(outcomes.unsteered.values)
    for direction in DIRECTIONS:
        steered = outcomes.steered[direction]
        row = _row(outcomes, f"steered {SIGNS[direction]}", [steered], len(outcomes.plans[direction]))
        row["low"], row["high"] = outcomes.interval(steered.values)
        rows.append(row)
    if outcomes.bottom is not None:
        rows.append(_row(outcomes, "least-scoring experts", [outcomes.bottom], len(outcomes.plans["+"])))
    for kind, sides in outcomes.controls.items():
        for direction, random in sides.items():
            name = f"{len(random)} random sets, {kind}, as {SIGNS[direction]}"
            rows.append(_row(outcomes, name, random, len(outcomes.plans[direction])))
    return pd.DataFrame(rows)


def markdown(outcomes: SteeringOutcomes) -> str:
    """The table and the verdict as Markdown."""
    frame = table(outcomes)
    lines = [list(frame.columns), ["---"] * len(frame.columns)]
    lines += [[shown(value) for value in row] for row in frame.itertuples(index=False)]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{rows}\n\n{explanation(outcomes)}\n"


def shown(value: Any) -> str:
    """A cell of the table: three decimals, and nothing for NaN."""
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.3f}"
    return str(value)


def _failed_criteria(outcomes: SteeringOutcomes) -> list[str]:
    failed = []
    if np.isnan(low := outcomes.gap_interval[0]):
        failed.append("one cluster of prompts tells nothing of others")
    elif not low > ROUNDING:
        failed.append("its interval reaches 0 or lies below")
    for words, p, excess in (
        ("layer-matched random sets", outcomes.p_matched, outcomes.excess_matched),
        ("random sets in any layers", outcomes.p_any, outcomes.excess_any),
    ):
        if p > outcomes.alpha:
            failed.append(f"{words} do as much")
        elif not excess.low > ROUNDING:
            failed.append(f"on other prompts {words} may do as much")
    return failed


def _excesses(outcomes: SteeringOutcomes) -> str:
    parts = [
        f"{excess.value:+.2f} {in_words(excess.low, excess.high)} ({kind})"
        for kind, excess in outcomes.excesses.items()
    ]
    share = f"{100 * (1 - outcomes.alpha):g} %"
    return f"Beyond {share} of the random sets' gaps it lies by {' and '.join(parts)}."


def _directions(outcomes: SteeringOutcomes) -> str:
    words = []
    for direction in DIRECTIONS:
        low, high = outcomes.effect_interval(direction)
        change = outcomes.steered[direction].rate - outcomes.unsteered.rate
        meant = low > 0 if direction == "+" else high < 0
        moved = "moves as meant" if meant else "does not move as meant"
        words.append(
            f"{SIGNS[direction]}{_how(outcomes.plans[direction])} {moved} ({change:+.2f} "
            f"{in_words(low, high)} against unsteered)"
        )
    return f"Direction {'; direction '.join(words)}."


def _how(plan: "SteeringPlan") -> str:
    """What is done to how many experts, where any is activated; a plan that only deactivates is the usual."""
    off = set(plan.deactivate)
    n_on, n_off = len(set(plan.activate) - off), len(off)
    if not n_on:
        return ""
    both = f" and deactivating {n_off}" if off else ""
    return f", by activating {n_on}{both} expert{'s' * ((n_off or n_on) > 1)},"


def _collateral(outcomes: SteeringOutcomes) -> list[str]:
    words = []
    for name, harms in outcomes.harms().items():
        limit = outcomes.limits[name].limit
        worst = max(harms, key=lambda direction: harms[direction])
        within = harms[worst] <= limit + 1e-12
        words.append(
            f"Collateral: {name} gets worse by at most {max(0.0, harms[worst]):.2f} (direction "
            f"{SIGNS[worst]}), {'within' if within else 'MORE than'} the limit of {limit:g}."
        )
    return words


def _row(
    outcomes: SteeringOutcomes, name: str, measured: Sequence[Outcome], n_experts: int
) -> dict[str, Any]:
    rates = np.array([outcome.rate for outcome in measured])
    row: dict[str, Any] = {"condition": name, "experts": n_experts, "mean": rates.mean()}
    row |= {"low": np.nan, "high": np.nan, "sd": rates.std(ddof=1) if len(rates) > 1 else np.nan}
    for measure in outcomes.limits:
        row[measure] = float(np.mean([outcome.collateral[measure] for outcome in measured]))
    return row
