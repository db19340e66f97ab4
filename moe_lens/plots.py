"""Figures: a function takes a result and returns a matplotlib Axes; it computes nothing of its own.

ax = expert_heat_map(scores, {"toward the document": plan})
ax.figure.savefig("experts.png")
"""

from collections.abc import Mapping, Sequence
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
    for (label, plan), marker in zip((plans or {}).items(), _MARKERS, strict=False):
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
    ax.figure.colorbar(image, ax=ax, label="risk difference of activation")
    if plans:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    return ax


def steering_rates(results: Sequence[DemoResult], *, ax: Axes | None = None) -> Axes:
    """Document rate of each organism: unsteered, steered both ways, and under as many random experts."""
    ax = ax or _new_axes(width=2.2 + 1.6 * max(len(results), 3), rows=7)
    places = np.arange(len(results))
    _random_dots(ax, results)
    plus, minus = ([r.steered[direction].document_rate for r in results] for direction in ("+", "−"))
    ax.vlines(places, minus, plus, color="#555555", linewidth=1, zorder=1)
    ax.scatter(
        places, plus, s=110, marker="^", color=COLORS["+"], label="steered toward the document", zorder=3
    )
    ax.scatter(places, minus, s=110, marker="v", color=COLORS["−"], label="steered toward memory", zorder=3)
    unsteered = [result.unsteered.document_rate for result in results]
    ax.hlines(
        unsteered, places - 0.22, places + 0.22, linewidth=2.5, color=COLORS["unsteered"], label="unsteered"
    )
    ax.set_xticks(places, [_caption(result) for result in results])
    ax.set(xlim=(-0.6, len(results) - 0.4), ylim=(-0.04, 1.04))
    ax.set_ylabel("answers with the document's value\n(share of held-out conflicts)")
    ax.set_title("Steering by choosing the route, beside its control")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False)
    return ax


def _random_dots(ax: Axes, results: Sequence[DemoResult]) -> None:
    jitter = np.random.default_rng(0)
    across = [place + jitter.uniform(-0.28, 0.28, len(r.random)) for place, r in enumerate(results)]
    rates = np.concatenate([result.random_rates for result in results])
    label = f"{len(results[0].random)} random sets of as many experts"
    ax.scatter(np.concatenate(across), rates, s=16, color=COLORS["random"], label=label, zorder=2)


def save(ax: Axes, path: str | Path) -> None:
    """Write the figure of an Axes as PNG (or whatever the path's ending says) and close it."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.savefig(path)
    plt.close(figure)


def _caption(result: "DemoResult") -> str:
    low, high = result.gap_interval
    return f"{result.name}\n{result.size} experts off\ngap {result.gap:.2f} [{low:.2f}, {high:.2f}]"


def _new_axes(width: float, rows: int) -> Axes:
    figure, ax = plt.subplots(figsize=(width, 1.9 + 0.5 * rows), layout="constrained")
    figure.set_dpi(150)
    return ax


def _count_axis(ax: Axes, number: int) -> None:
    step = max(1, number // 16)
    ax.set_xticks(range(0, number, step))
