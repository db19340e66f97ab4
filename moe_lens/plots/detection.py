"""Figures of expert scores: the map of all experts, effect against significance."""

from collections.abc import Mapping
from itertools import cycle
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from moe_lens.detection.expert_scores import ExpertScores
from moe_lens.errors import DataError
from moe_lens.plots.style import COLORS, count_axis, new_axes
from moe_lens.steering.plan import SteeringPlan

_MARKERS: Final = ("x", "o", "s", "^")


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
    ax.figure.colorbar(image, ax=ax, label=f"{scores.label}\n(> 0: more under condition 1)")
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
        ((values <= q) & (delta < 0), COLORS["-"], f"q ≤ {q:g}, more under condition 2"),
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
    ax.set_xlabel(f"{scores.label} (> 0: more under condition 1)")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False)
    return ax
