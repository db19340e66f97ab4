"""Figures: a function takes a result and returns a matplotlib Axes; it computes nothing of its own.

ax = expert_heat_map(scores, {"toward the document": plan})
ax.figure.savefig("experts.png")
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Final

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, hsv_to_rgb
from matplotlib.patheffects import withStroke

from moe_lens.contrast import ExpertScores
from moe_lens.errors import DataError
from moe_lens.files import check_writable
from moe_lens.load_balance import LoadBalance
from moe_lens.prompt_routing import PromptRouting
from moe_lens.routing_stats import RoutingStats
from moe_lens.steering_plan import SteeringPlan
from moe_lens.steering_report import ANY_LAYER, DIRECTIONS, LAYER_MATCHED, SteeringReport
from moe_lens.steering_sweep import SweepResult

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS: Final = {"+": "#0072B2", "−": "#D55E00", "unsteered": "#000000", "random": "#999999"}
_MARKERS: Final = ("x", "o", "s", "^")
_SCORE_LABELS: Final = {
    "risk_difference": "risk difference of activation",
    "log_odds_ratio": "log odds ratio of activation",
    "probability_difference": "difference of mean router probability",
    "paired_t": "paired t statistic",
}


def expert_heat_map(
    scores: ExpertScores, plans: Mapping[str, SteeringPlan] | None = None, *, ax: Axes | None = None
) -> Axes:
    """Score of every expert, layers upward and experts to the right, with the experts of some plans marked.

    Args:
        scores: the colours, on a diverging scale centred on zero.
        plans: label -> plan; the experts that a plan names get its marker, explained below the map.
        ax: where to draw; a new figure if None.
    """
    width = max(6.0, 2.0 + 0.5 * min(scores.shape.n_experts, 32))
    ax = ax or new_axes(width, rows=len(scores.shape.layers))
    limit = max(float(scores.delta.abs().max()), 1e-9)
    image = ax.imshow(
        scores.delta.numpy(), cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto", origin="lower"
    )
    for (label, plan), marker in zip((plans or {}).items(), cycle(_MARKERS), strict=False):
        plan.check_fits(scores.shape)
        experts = sorted({*plan.activate, *plan.deactivate})
        rows = [scores.shape.layers.index(layer) for layer, _ in experts]
        ax.plot(
            [expert for _, expert in experts], rows, linestyle="none", marker=marker, markersize=9,
            markeredgecolor="black", markerfacecolor="none", markeredgewidth=1.8, label=label,
            path_effects=[withStroke(linewidth=4, foreground="white")],
        )  # fmt: skip
    count_axis(ax, scores.shape.n_experts)
    ax.set_yticks(range(len(scores.shape.layers)), [str(layer) for layer in scores.shape.layers])
    ax.set(xlabel="expert", ylabel="layer", title=f"{scores.shape.model}: experts that follow the contrast")
    label = _SCORE_LABELS.get(scores.score, scores.score)
    ax.figure.colorbar(image, ax=ax, label=f"{label}\n(> 0: more under condition 1)")
    if plans:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    return ax


def volcano(scores: ExpertScores, *, q: float = 0.05, n_labels: int = 8, ax: Axes | None = None) -> Axes:
    """Every expert's score against −log10 of its q-value; those with q at most `q` in colour.

    Args:
        scores: with q-values, from `detect`.
        q: where the dashed line stands.
        n_labels: how many of the experts with the largest |score| among the coloured ones are named.

    Raises:
        DataError: the scores carry no q-values.
    """
    if scores.q is None:
        raise DataError("A volcano plot needs q-values; use scores from detect(...).")
    ax = ax or new_axes(7.5, rows=6)
    delta, values = scores.delta.numpy(), scores.q.numpy()
    height = -np.log10(np.maximum(values, 1e-300))
    for chosen, color, label in (
        (values > q, COLORS["random"], f"q > {q:g}"),
        ((values <= q) & (delta >= 0), COLORS["+"], f"q ≤ {q:g}, more under condition 1"),
        ((values <= q) & (delta < 0), COLORS["−"], f"q ≤ {q:g}, more under condition 2"),
    ):
        label = f"{label}: {int(chosen.sum())} experts"
        ax.scatter(
            delta[chosen], height[chosen], s=26, color=color, edgecolors="none", alpha=0.8, label=label
        )
    ax.axhline(-np.log10(q), color="black", linestyle="--", linewidth=1)
    ax.axvline(0, color="black", linewidth=0.6)
    rows = {layer: row for row, layer in enumerate(scores.shape.layers)}
    named = [s for s in scores.ranked() if values[rows[s.layer], s.expert] <= q][:n_labels]
    for number, score in enumerate(sorted(named, key=lambda s: s.delta)):
        ax.annotate(
            f"L{score.layer} E{score.expert}", (score.delta, height[rows[score.layer], score.expert]),
            xytext=(0, 5 + 11 * (number % 3)), textcoords="offset points", fontsize=8, ha="center",
        )  # fmt: skip
    limit = 1.25 * max(float(np.abs(delta).max()), 1e-9)
    top = 1.3 * max(float(height.max()), -float(np.log10(q)))
    ax.set(
        xlim=(-limit, limit),
        ylim=(-0.05 * top, top),
        ylabel="−log₁₀ q",
        title=f"{scores.shape.model}: effect and evidence",
    )
    ax.set_xlabel(f"{_SCORE_LABELS.get(scores.score, scores.score)} (> 0: more under condition 1)")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False)
    return ax


def selected_by_layer(plan: SteeringPlan, *, ax: Axes | None = None) -> Axes:
    """Share of each MoE layer's experts that a plan activates (upward) and deactivates (downward).

    Raises:
        DataError: a plan without shape, which does not say how many experts a layer has.
    """
    if plan.shape is None:
        raise DataError("The plan has no shape; use plan.made_for(model.moe_shape).")
    layers = plan.shape.layers
    ax = ax or new_axes(max(6.0, 2.0 + 0.3 * len(layers)), rows=5)
    off = set(plan.deactivate)
    groups = (
        ("activated", [e for e in plan.activate if e not in off], COLORS["+"], 1),
        ("deactivated", list(plan.deactivate), COLORS["−"], -1),
    )
    for label, experts, color, sign in groups:
        numbers = np.array([sum(layer == own for own, _ in experts) for layer in layers])
        heights = sign * 100 * numbers / plan.shape.n_experts
        ax.bar(range(len(layers)), heights, color=color, label=f"{label}: {len(experts)} experts")
    ax.axhline(0, color="black", linewidth=0.8)
    step = max(1, len(layers) // 24)
    ax.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    ax.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    ax.set(xlabel="layer", ylabel=f"share of the layer's {plan.shape.n_experts} experts (%)")
    ax.set_title(f"{plan.shape.model}: experts that the plan selects, by layer")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False)
    return ax


def coactivation_matrix(stats: RoutingStats, layer: int, *, ax: Axes | None = None) -> Axes:
    """How much more often two experts of a layer run for the same token than independent ones: log₂ lift.

    Pairs that never ran together have no finite value and stay grey, as do experts that never ran, and the
    diagonal.

    Raises:
        DataError: a layer without router.
    """
    if layer not in stats.shape.layers:
        raise DataError(f"Layer {layer} has no router; MoE layers are {stats.shape.layers}.")
    lift = stats.coactivation.lift[stats.shape.layers.index(layer)].numpy().copy()
    np.fill_diagonal(lift, np.nan)
    with np.errstate(divide="ignore"):
        values = np.log2(lift)
    values[~np.isfinite(values)] = np.nan
    limit = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    size = 3.6 + 0.18 * min(stats.shape.n_experts, 24)
    ax = ax or new_axes(size + 1.6, rows=int(2 * (size - 1.9)))
    ax.set_facecolor("#BBBBBB")
    image = ax.imshow(values, cmap="PuOr", vmin=-limit, vmax=limit, origin="lower")
    count_axis(ax, stats.shape.n_experts)
    step = max(1, stats.shape.n_experts // 16)
    ax.set_yticks(range(0, stats.shape.n_experts, step))
    ax.set(xlabel="expert", ylabel="expert")
    ax.set_title(f"{stats.shape.model}, layer {layer}: experts that run together", fontsize=10)
    ax.figure.colorbar(image, ax=ax, label="log₂ lift (> 0: more often together\nthan if independent)")
    return ax


def load_balance(balance: LoadBalance, *, ax: Axes | None = None) -> Axes:
    """How evenly each layer uses its experts: normalised entropy, Gini, share of the busiest 10 %."""
    layers = balance.shape.layers
    ax = ax or new_axes(max(6.5, 2.0 + 0.3 * len(layers)), rows=6)
    places = range(len(layers))
    even = -(-balance.shape.n_experts // 10) / balance.shape.n_experts
    for values, label, color, marker in (
        (balance.normalised_entropy, "normalised entropy (1: even)", "#0072B2", "o"),
        (balance.gini, "Gini coefficient (0: even)", "#D55E00", "s"),
        (balance.top_10, f"share of the busiest 10 % ({even:.2f}: even)", "#009E73", "^"),
    ):
        ax.plot(places, values.numpy(), color=color, marker=marker, label=label)
    step = max(1, len(layers) // 24)
    ax.set_xticks(places[::step], [str(layer) for layer in layers[::step]])
    ax.set(xlabel="layer", ylabel="share or index, from 0 to 1", ylim=(-0.03, 1.03))
    ax.set_title(f"{balance.shape.model}: load balance of {balance.shape.n_experts} experts")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False)
    return ax


def sweep_curves(found: SweepResult, *, ax: Axes | None = None) -> Axes:
    """Behaviour against plan size, both directions, with intervals, beside random sets of the same size."""
    ax = ax or new_axes(7.5, rows=6)
    for side, name, marker in (("+", "toward condition 1", "^"), ("−", "toward condition 2", "v")):
        points = [point for point in found.points if point.direction == side]
        if not points:
            continue
        sizes, means = [point.size for point in points], np.array([point.mean for point in points])
        errors = np.array([[p.mean - p.low for p in points], [p.high - p.mean for p in points]])
        ax.errorbar(
            sizes, means, yerr=np.maximum(errors, 0), color=COLORS[side], marker=marker, capsize=3,
            label=f"{side} {name}",
        )  # fmt: skip
    pooled = [
        [rate for p in found.points if p.size == size for rate in p.control_means] for size in found.sizes
    ]
    if all(pooled):
        low, high = (np.array([np.quantile(rates, level) for rates in pooled]) for level in (0.05, 0.95))
        ax.fill_between(
            found.sizes, low, high, color=COLORS["random"], alpha=0.25, linewidth=0,
            label="random sets of as many experts, middle 90 %",
        )  # fmt: skip
    ax.axhline(found.unsteered, color=COLORS["unsteered"], linestyle="--", linewidth=1, label="unsteered")
    verb = {"deactivate": "deactivated", "activate": "activated"}.get(found.mode, "activated and deactivated")
    ax.set_xticks(found.sizes)
    ax.set(xlabel=f"experts {verb}", ylabel=f"{found.task}\n(mean over prompts)")
    ax.set_title(f"{found.model}: the effect by size of the plan")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, frameon=False)
    return ax


def token_routing(
    routing: PromptRouting, *, layers: Sequence[int] | None = None, ax: Axes | None = None
) -> Axes:
    """A prompt's tokens coloured by their route: one row a layer, the colour is the expert with most weight.

    Each cell holds the numbers of the chosen experts, that with most weight first.

    Args:
        routing: of one prompt, from `route_prompt`.
        layers: which layers to show, upward; all if None.
    """
    layers = routing.shape.layers if layers is None else tuple(layers)
    if not layers:
        raise DataError("layers is empty; name at least one, or None for all.")
    rows = [routing.row(layer) for layer in layers]
    order = routing.weights[rows].argsort(dim=-1, descending=True, stable=True)
    experts = routing.indices[rows].gather(-1, order).numpy()
    shown = min(routing.shape.top_k, 3)
    ax = ax or new_axes(max(6.0, 1.5 + 0.45 * len(routing.tokens)), rows=max(3, len(layers)))
    ax.imshow(
        experts[..., 0], cmap=_expert_colors(routing.shape.n_experts), vmin=-0.5, aspect="auto",
        vmax=routing.shape.n_experts - 0.5, origin="lower", alpha=0.75,
    )  # fmt: skip
    for (row, pos), _ in np.ndenumerate(experts[..., 0]):
        text = " ".join(str(expert) for expert in experts[row, pos, :shown])
        ax.text(pos, row, text, ha="center", va="center", fontsize=8)
    tokens = [repr(token)[1:-1].replace("$", r"\$") for token in routing.tokens]  # $ would open a formula
    ax.set_xticks(range(len(tokens)), tokens, rotation=60, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    more = "" if shown == routing.shape.top_k else f" (the first {shown} of {routing.shape.top_k})"
    ax.set(xlabel="token", ylabel="layer")
    ax.set_title(
        f"{routing.shape.model}: experts chosen for each token, most weight first{more}", fontsize=10
    )
    return ax


def steering_rates(reports: Mapping[str, SteeringReport], *, ax: Axes | None = None) -> Axes:
    """Each report's behaviour: unsteered, steered both ways, and under as many random experts.

    Args:
        reports: label -> report of `evaluate_steering`; all of the same task.
    """
    ax = ax or new_axes(width=2.2 + 1.6 * max(len(reports), 3), rows=7)
    places, found = np.arange(len(reports)), list(reports.values())
    _random_dots(ax, found)
    plus, minus = ([report.steered[side].rate for report in found] for side in DIRECTIONS)
    ax.vlines(places, minus, plus, color="#555555", linewidth=1, zorder=1)
    ax.scatter(places, plus, s=110, marker="^", color=COLORS["+"], label="+ the plan", zorder=3)
    ax.scatter(places, minus, s=110, marker="v", color=COLORS["−"], label="− its reverse", zorder=3)
    unsteered = [report.unsteered.rate for report in found]
    ax.hlines(
        unsteered, places - 0.1, places + 0.1, linewidth=2.5, color=COLORS["unsteered"], label="unsteered"
    )
    ax.set_xticks(places, [_caption(label, report) for label, report in reports.items()])
    ax.set(xlim=(-0.6, len(found) - 0.4), ylim=(-0.04, 1.04))
    ax.set_ylabel(f"{found[0].task}\n(share of held-out prompts)")
    ax.set_title("Unsteered, steered both ways, and under random sets of as many experts")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False)
    return ax


def _random_dots(ax: Axes, reports: Sequence[SteeringReport]) -> None:
    """Random sets in any layers right of each report's arrow, layer-matched ones left of it."""
    jitter = np.random.default_rng(0)
    for kind, offset in ((LAYER_MATCHED, -0.24), (ANY_LAYER, 0.24)):
        for side, marker in zip(DIRECTIONS, ("^", "v"), strict=True):
            sets = [report.controls[kind][side] for report in reports]
            rates = [outcome.rate for outcomes in sets for outcome in outcomes]
            places = np.repeat(np.arange(len(sets)), [len(outcomes) for outcomes in sets])
            across = places + offset + jitter.uniform(-0.12, 0.12, len(rates))
            face = COLORS["random"] if kind == ANY_LAYER else "none"
            ax.scatter(
                across, rates, s=18, marker=marker, edgecolors=COLORS["random"], facecolors=face,
                label=f"{len(sets[0])} random sets, {kind}, as {side}",
            )  # fmt: skip


def save(ax: Axes, path: str | Path) -> None:
    """Write the figure of an Axes as PNG (or whatever the path's ending says) and close it."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    try:
        check_writable(path)
        figure.savefig(path)
    except (OSError, ValueError) as error:  # ValueError: an ending that matplotlib does not know
        raise DataError(f"{path} cannot be written as a figure: {error}.") from error
    finally:
        plt.close(figure)


def _caption(label: str, report: SteeringReport) -> str:
    low, high = report.gap_interval
    size = len(report.plans["+"])
    return f"{label}\n{size} experts\ngap {report.gap:.2f} [{low:.2f}, {high:.2f}]"


def new_axes(width: float, rows: int) -> Axes:
    """A figure of this width, in inches, that is high enough for `rows` rows, at notebook resolution."""
    figure, ax = plt.subplots(figsize=(width, 1.9 + 0.5 * rows), layout="constrained")
    figure.set_dpi(150)
    return ax


def _expert_colors(n_experts: int) -> ListedColormap:
    """One light colour an expert, neighbours far apart; the cells' numbers, not colours alone, tell them."""
    golden = 0.61803398875
    hues = (np.arange(n_experts) * golden) % 1
    values = 0.82 + 0.16 * (np.arange(n_experts) % 2)
    return ListedColormap(hsv_to_rgb(np.stack([hues, np.full(n_experts, 0.5), values], axis=-1)))


def count_axis(ax: Axes, number: int) -> None:
    """At most about 16 ticks on the horizontal axis for 0 to number − 1."""
    step = max(1, number // 16)
    ax.set_xticks(range(0, number, step))
