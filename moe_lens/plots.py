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
from matplotlib.patheffects import withStroke

from moe_lens.contrast import ExpertScores
from moe_lens.demo import DemoResult
from moe_lens.steering_plan import SteeringPlan

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS: Final = {"+": "#0072B2", "−": "#D55E00", "unsteered": "#000000", "random": "#999999"}
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
    ax = ax or _new_axes(width, rows=len(scores.shape.layers))
    limit = max(float(scores.delta.abs().max()), 1e-9)
    image = ax.imshow(
        scores.delta.numpy(), cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto", origin="lower"
    )
    for (label, plan), marker in zip((plans or {}).items(), cycle(_MARKERS), strict=False):
        experts = sorted({*plan.activate, *plan.deactivate})
        rows = [scores.shape.layers.index(layer) for layer, _ in experts]
        ax.plot(
            [expert for _, expert in experts], rows, linestyle="none", marker=marker, markersize=9,
            markeredgecolor="black", markerfacecolor="none", markeredgewidth=1.8, label=label,
            path_effects=[withStroke(linewidth=4, foreground="white")],
        )  # fmt: skip
    _count_axis(ax, scores.shape.n_experts)
    ax.set_yticks(range(len(scores.shape.layers)), [str(layer) for layer in scores.shape.layers])
    ax.set(xlabel="expert", ylabel="layer", title=f"{scores.shape.model}: experts that follow the contrast")
    ax.figure.colorbar(image, ax=ax, label="risk difference of activation\n(> 0: more under condition 1)")
    if plans:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    return ax


def steering_rates(results: Sequence[DemoResult], *, ax: Axes | None = None) -> Axes:
    """Document rate of each organism: unsteered, steered both ways, and under as many random experts."""
    ax = ax or _new_axes(width=2.2 + 1.6 * max(len(results), 3), rows=7)
    places = np.arange(len(results))
    _controls(ax, results)
    plus, minus = ([r.steered[direction].document_rate for r in results] for direction in ("+", "−"))
    ax.vlines(places, minus, plus, color="#555555", linewidth=1, zorder=1)
    ax.scatter(places, plus, s=110, marker="^", color=COLORS["+"], label="+ toward the document", zorder=3)
    ax.scatter(places, minus, s=110, marker="v", color=COLORS["−"], label="− toward memory", zorder=3)
    unsteered = [result.unsteered.document_rate for result in results]
    ax.hlines(
        unsteered, places - 0.1, places + 0.1, linewidth=2.5, color=COLORS["unsteered"], label="unsteered"
    )
    ax.set_xticks(places, [_caption(result) for result in results])
    ax.set(xlim=(-0.6, len(results) - 0.4), ylim=(-0.04, 1.04))
    ax.set_ylabel("answers with the document's value\n(share of held-out conflicts)")
    ax.set_title("Document rate: unsteered, steered both ways, and under random sets of as many experts")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False)
    return ax


def _controls(ax: Axes, results: Sequence[DemoResult]) -> None:
    """Random sets right of each organism's arrow, layer-matched ones left of it."""
    jitter = np.random.default_rng(0)
    groups = [("any layers", "o", 0.24, [r.random for r in results])]
    for direction, marker in (("+", "^"), ("−", "v")):
        groups.append(
            (f"layers as {direction}", marker, -0.24, [r.layer_matched[direction] for r in results])
        )
    for label, marker, offset, sets in groups:
        rates = [outcome.document_rate for outcomes in sets for outcome in outcomes]
        places = np.repeat(np.arange(len(sets)), [len(outcomes) for outcomes in sets])
        across = places + offset + jitter.uniform(-0.12, 0.12, len(rates))
        label = f"{len(sets[0])} random sets, {label}"
        face = COLORS["random"] if marker == "o" else "none"
        ax.scatter(
            across, rates, s=18, marker=marker, edgecolors=COLORS["random"], facecolors=face, label=label
        )


def save(ax: Axes, path: str | Path) -> None:
    """Write the figure of an Axes as PNG (or whatever the path's ending says) and close it."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.savefig(path)
    plt.close(figure)


def _caption(result: DemoResult) -> str:
    low, high = result.gap_interval
    return f"{result.name}\n{result.size} experts off\ngap {result.gap:.2f} [{low:.2f}, {high:.2f}]"


def _new_axes(width: float, rows: int) -> Axes:
    figure, ax = plt.subplots(figsize=(width, 1.9 + 0.5 * rows), layout="constrained")
    figure.set_dpi(150)
    return ax


def _count_axis(ax: Axes, number: int) -> None:
    step = max(1, number // 16)
    ax.set_xticks(range(0, number, step))
