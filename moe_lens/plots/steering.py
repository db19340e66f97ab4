"""Figures of plans and of what they do: experts by layer, sweeps over plan sizes, rates beside controls."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes

from moe_lens.errors import DataError
from moe_lens.evaluation.outcomes import ANY_LAYER, DIRECTIONS, LAYER_MATCHED
from moe_lens.evaluation.plan_sizes import SweepResult
from moe_lens.evaluation.report import SteeringReport
from moe_lens.evaluation.verdict import SIGNS
from moe_lens.plots.style import COLORS, layers_below, legend_below, new_axes
from moe_lens.resampling import in_words
from moe_lens.steering.plan import SteeringPlan

_WIDE: Final = 16
"""Sizes of plans that differ by a larger factor stand on a logarithmic axis."""


def selected_by_layer(plan: SteeringPlan, *, ax: Axes | None = None) -> Axes:
    """Share of each MoE layer's experts that a plan activates (upward) and deactivates (downward).

    Args:
        plan: with a shape, which says how many experts a layer has.
        ax: where to draw; a new figure if None.

    Raises:
        DataError: a plan without shape.
    """
    if plan.shape is None:
        raise DataError("The plan has no shape; use plan.made_for(model.moe_shape).")
    layers = plan.shape.layers
    ax = ax or new_axes(max(6.0, 2.0 + 0.3 * len(layers)), rows=5)
    off = set(plan.deactivate)
    groups = (
        ("activated", [e for e in plan.activate if e not in off], COLORS["+"], 1),
        ("deactivated", list(plan.deactivate), COLORS["-"], -1),
    )
    for label, experts, color, sign in groups:
        counts = np.array([sum(layer == other for other, _ in experts) for layer in layers])
        heights = sign * 100 * counts / plan.shape.n_experts
        ax.bar(range(len(layers)), heights, color=color, label=f"{label}: {len(experts)} experts")
    ax.axhline(0, color="black", linewidth=0.8)
    layers_below(ax, layers)
    ax.margins(x=0.01)
    ax.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    ax.set_ylabel(f"share of the layer's {plan.shape.n_experts} experts (%)")
    ax.set_title(f"{plan.shape.model}: experts that the plan selects, by layer")
    legend_below(ax, down=0.2, ncols=2)
    return ax


def sweep_curves(found: SweepResult, *, ax: Axes | None = None) -> Axes:
    """Behaviour against plan size, both directions, with intervals, beside random sets of the same size.

    Args:
        found: from `sweep`.
        ax: where to draw; a new figure if None.
    """
    ax = ax or new_axes(7.5, rows=6)
    for side, name, marker in (("+", "toward condition 1", "^"), ("-", "toward condition 2", "v")):
        points = [point for point in found.points if point.direction == side]
        if points:
            sizes, means = [point.size for point in points], np.array([point.mean for point in points])
            errors = np.array([[p.mean - p.low for p in points], [p.high - p.mean for p in points]])
            style: dict[str, Any] = {
                "color": COLORS[side],
                "marker": marker,
                "label": f"{SIGNS[side]} {name}",
            }
            ax.errorbar(sizes, means, yerr=np.maximum(errors, 0), capsize=3, **style)
    _band_of_random_sets(ax, found)
    ax.axhline(found.unsteered, color=COLORS["unsteered"], linestyle="--", linewidth=1, label="unsteered")
    verb = {"deactivate": "deactivated", "activate": "activated"}.get(found.mode, "activated and deactivated")
    if max(found.sizes) > _WIDE * min(found.sizes):
        ax.set_xscale("log", base=2)
    ax.set_xticks(found.sizes, [str(size) for size in found.sizes])
    ax.set_xticks([], minor=True)
    ax.set(xlabel=f"experts {verb}", ylabel=f"{found.task}\n(mean over prompts)")
    ax.set_title(f"{found.model}: the effect by size of the plan")
    legend_below(ax, ncols=2)
    return ax


def _band_of_random_sets(ax: Axes, found: SweepResult) -> None:
    """Where the middle 90 % of the random sets of each size lie, both directions together."""
    rates = [
        [rate for point in found.points if point.size == size for rate in point.control_means]
        for size in found.sizes
    ]
    if all(rates):
        low, high = (np.array([np.quantile(of_size, level) for of_size in rates]) for level in (0.05, 0.95))
        label = "random sets of as many experts, middle 90 %"
        style: dict[str, Any] = {"facecolor": (COLORS["random"], 0.25), "edgecolor": COLORS["random"]}
        ax.fill_between(found.sizes, low, high, **style, linewidth=1, label=label)  # an edge, if all agree


def steering_rates(reports: Mapping[str, SteeringReport], *, ax: Axes | None = None) -> Axes:
    """Each report's behaviour: unsteered, steered both ways, and under as many random experts.

    Args:
        reports: label -> report of `evaluate_steering`; all of the same task.
        ax: where to draw; a new figure if None.

    Raises:
        DataError: no reports.
    """
    if not reports:
        raise DataError("There are no reports to draw; give at least one, {label: report}.")
    ax = ax or new_axes(width=2.2 + 1.6 * max(len(reports), 3), rows=7)
    places, in_order = np.arange(len(reports)), list(reports.values())
    _random_dots(ax, in_order)
    plus, minus = ([report.steered[side].rate for report in in_order] for side in DIRECTIONS)
    ax.vlines(places, minus, plus, color="#555555", linewidth=1, zorder=1)
    ax.scatter(places, plus, s=110, marker="^", color=COLORS["+"], label="+ the plan", zorder=3)
    ax.scatter(places, minus, s=110, marker="v", color=COLORS["-"], label="− its reverse", zorder=3)
    unsteered, color = [report.unsteered.rate for report in in_order], COLORS["unsteered"]
    ax.hlines(unsteered, places - 0.1, places + 0.1, linewidth=2.5, color=color, label="unsteered")
    captions = [_caption(label, report) for label, report in reports.items()]
    ax.set_xticks(places, captions)
    spare = (max(len(in_order), 3) - len(in_order)) / 2  # so that dots keep near their line, however few
    ax.set_xlim(-0.6 - spare, len(in_order) - 0.4 + spare)
    are_shares = all(low >= 0 and high <= 1 for low, high in map(_extremes, in_order))
    if are_shares:
        ax.set_ylim(-0.04, 1.04)
    of = "share of" if are_shares else "mean over"
    ax.set_ylabel(f"{in_order[0].task}\n({of} held-out prompts)")
    ax.set_title("Unsteered, steered both ways,\nand under random sets of as many experts")
    n_lines = 1 + max(caption.count("\n") for caption in captions)  # three, with a label of one line
    legend_below(ax, down=0.05 + 0.05 * n_lines, ncols=2 if len(in_order) <= 3 else 3)
    return ax


def _extremes(report: SteeringReport) -> tuple[float, float]:
    """The smallest and the largest value of any prompt under any condition."""
    random = [outcome for sides in report.controls.values() for sets in sides.values() for outcome in sets]
    values = [outcome.values for outcome in (report.unsteered, *report.steered.values(), *random)]
    return min(map(np.min, values)), max(map(np.max, values))


def _random_dots(ax: Axes, reports: Sequence[SteeringReport]) -> None:
    """Random sets in any layers to the right of each report's line, layer-matched ones to the left."""
    jitter = np.random.default_rng(0)
    for kind, offset in ((LAYER_MATCHED, -0.24), (ANY_LAYER, 0.24)):
        for side, marker in zip(DIRECTIONS, ("^", "v"), strict=True):
            sets = [report.controls[kind][side] for report in reports]
            rates = [outcome.rate for outcomes in sets for outcome in outcomes]
            places = np.repeat(np.arange(len(sets)), [len(outcomes) for outcomes in sets])
            across = places + offset + jitter.uniform(-0.12, 0.12, len(rates))
            face = COLORS["random"] if kind == ANY_LAYER else "none"
            label = f"{len(sets[0])} random sets, {kind}, as {SIGNS[side]}"
            colors: dict[str, Any] = {"edgecolors": COLORS["random"], "facecolors": face}
            ax.scatter(across, rates, s=18, marker=marker, label=label, **colors)


def _caption(label: str, report: SteeringReport) -> str:
    size = len(report.plans["+"])
    return f"{label}\n{size} experts\ngap {report.gap:.2f} {in_words(*report.gap_interval, '.2f')}"
