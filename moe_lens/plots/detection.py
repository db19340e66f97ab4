"""Figures of expert scores: the map of all experts, effect against significance."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Final

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from moe_lens.detection.expert_scores import ExpertScores
from moe_lens.errors import DataError
from moe_lens.plots.style import COLORS, count_axis, layers_beside, legend_below, new_axes, signed_map
from moe_lens.steering.plan import SteeringPlan

_MARKERS: Final = ("x", "o", "s", "^")
_NAME_WIDTH: Final = 50
_NAME_HEIGHT: Final = 10
"""What the name of an expert takes at 8 points, in points."""


def expert_heat_map(
    scores: ExpertScores, plans: Mapping[str, SteeringPlan] | None = None, *, ax: Axes | None = None
) -> Axes:
    """Score of every expert, layers upward and experts to the right, with the experts of some plans marked.

    Args:
        scores: the colours, on a diverging scale centred on zero.
        plans: label -> plan; the experts that a plan names get its marker, explained below the map.
        ax: where to draw; a new figure if None.
    """
    shape = scores.shape
    ax = ax or new_axes(max(6.0, 2.0 + 0.5 * min(shape.n_experts, 32)), rows=len(shape.layers))
    image = signed_map(ax, scores.delta.numpy())
    for (label, plan), marker in zip((plans or {}).items(), cycle(_MARKERS), strict=False):
        plan.check_fits(shape)
        _mark(ax, sorted({*plan.activate, *plan.deactivate}), shape.layers, marker, label)
    count_axis(ax, shape.n_experts)
    layers_beside(ax, shape.layers)
    ax.set(xlabel="expert", title=f"{shape.model}: experts that follow the contrast")
    ax.figure.colorbar(image, ax=ax, label=f"{scores.label}\n(> 0: more under condition 1)")
    if plans:
        legend_below(ax, down=0.2)
    return ax


def _mark(
    ax: Axes, experts: Sequence[tuple[int, int]], layers: Sequence[int], marker: str, label: str
) -> None:
    """A black marker with a white edge on each (layer, expert), so that it shows on every colour."""
    ax.plot(
        [expert for _, expert in experts],
        [layers.index(layer) for layer, _ in experts],
        linestyle="none",
        marker=marker,
        markersize=9,
        markeredgecolor="black",
        markerfacecolor="none",
        markeredgewidth=1.8,
        label=label,
        path_effects=[withStroke(linewidth=4, foreground="white")],
    )


def volcano(scores: ExpertScores, *, q: float = 0.05, n_labels: int = 8, ax: Axes | None = None) -> Axes:
    """Every expert's score against −log10 of its q-value; those with q at most `q` in colour.

    Args:
        scores: with q-values, from `detect`.
        q: where the dashed line is drawn.
        n_labels: how many of the coloured experts, those with the largest |score|, are named.
        ax: where to draw; a new figure if None.

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
    limit = 1.25 * max(float(np.abs(delta).max()), 1e-9)
    top = 1.3 * max(float(height.max()), -float(np.log10(q)))
    ax.set(xlim=(-limit, limit), ylim=(-0.05 * top, top))
    ax.set(xlabel=f"{scores.label} (> 0: more under condition 1)", ylabel="−log₁₀ q")
    ax.set_title(f"{scores.shape.model}: effect and evidence")
    legend_below(ax)
    _name_largest(ax, scores, q, n_labels, height)
    return ax


def _name_largest(
    ax: Axes, scores: ExpertScores, q: float, n_labels: int, height: Float[np.ndarray, "layer expert"]
) -> None:
    """Names over the points with the largest |score| among those with q at most `q`, none over another."""
    assert scores.q is not None
    rows = {layer: row for row, layer in enumerate(scores.shape.layers)}
    coloured = [score for score in scores.ranked() if scores.q[rows[score.layer], score.expert] <= q]
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # the layout decides which names would meet
    taken: list[tuple[float, float]] = []  # where names stand, in points
    for score in sorted(coloured[:n_labels], key=lambda score: score.delta):
        name, point = (
            f"L{score.layer} E{score.expert}",
            (score.delta, height[rows[score.layer], score.expert]),
        )
        x, y = ax.transData.transform(point) * 72 / figure.dpi
        up = 5
        while any(
            abs(x - other) < _NAME_WIDTH and abs(y + up - above) < _NAME_HEIGHT for other, above in taken
        ):
            up += 1
        taken.append((x, y + up))
        ax.annotate(name, point, xytext=(0, up), textcoords="offset points", fontsize=8, ha="center")
