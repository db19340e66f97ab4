"""Figures of counted routing: pairs of experts, load, one prompt token by token.

    ax = load_balance(stats.load_balance())
    ax = token_routing(route_prompt(model, prompt))

Each draws into `ax=`, or into a new figure.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, hsv_to_rgb

from moe_lens.errors import DataError
from moe_lens.plots.labels import label_font, token_labels, wrapped
from moe_lens.plots.style import (
    count_axis,
    count_ticks,
    layers_below,
    legend_below,
    new_axes,
    signed_map,
)
from moe_lens.statistics.balance import LoadBalance
from moe_lens.statistics.routes import PromptRouting
from moe_lens.statistics.routing_stats import RoutingStats

_MOST_NUMBERS: Final = 2000
"""Cells of a figure that can hold numbers."""
_GAP: Final = 3
"""Rows between the lines of a prompt, for its tokens."""


def coactivation_matrix(stats: RoutingStats, layer: int, *, ax: Axes | None = None) -> Axes:
    """How much more often two experts of a layer run for the same token than independent ones: log₂ lift.

    Pairs that never ran together have no finite value and stay grey, as do experts that never ran and the
    diagonal.

    Args:
        stats: the counts.
        layer: number of a MoE layer.
        ax: where to draw; a new figure if None.

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
    size = 3.6 + 0.18 * min(stats.shape.n_experts, 24)
    ax = ax or new_axes(size + 1.6, rows=int(2 * (size - 1.9)))
    ax.set_facecolor("#BBBBBB")
    image = signed_map(ax, values, aspect="equal")
    count_axis(ax, stats.shape.n_experts)
    ax.set_yticks(count_ticks(stats.shape.n_experts))
    ax.set(xlabel="expert", ylabel="expert")
    ax.set_title(f"{stats.shape.model}, layer {layer}: experts that run together", fontsize=10)
    label = "log₂ lift (> 0: more often together\nthan if independent; grey: never together)"
    ax.figure.colorbar(image, ax=ax, label=label)
    return ax


def load_balance(balance: LoadBalance, *, ax: Axes | None = None) -> Axes:
    """How evenly each layer uses its experts: normalised entropy, Gini, share of the busiest 10 %.

    Args:
        balance: from `RoutingStats.load_balance`.
        ax: where to draw; a new figure if None.
    """
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
    layers_below(ax, layers)
    ax.set(ylabel="share or index, from 0 to 1", ylim=(-0.03, 1.03))
    ax.set_title(f"{balance.shape.model}: load balance of {balance.shape.n_experts} experts")
    legend_below(ax)
    return ax


def token_routing(
    routing: PromptRouting, *, layers: Sequence[int] | None = None, ax: Axes | None = None
) -> Axes:
    """A prompt's tokens coloured by their route: one row a layer; the colour is the expert with most weight.

    Each cell holds the numbers of the chosen experts, most weight first. Long prompts are broken into lines;
    with more than 2,000 cells there is no room for numbers, and the colours of experts stand beside.

    Args:
        routing: of one prompt, from `route_prompt`.
        layers: which layers to show, upward; all if None.
        ax: where to draw; a new figure if None.

    Raises:
        DataError: no layers, or one without router.
    """
    layers = routing.shape.layers if layers is None else tuple(layers)
    if not layers:
        raise DataError("layers is empty; name at least one, or None for all.")
    rows = [routing.row(layer) for layer in layers]
    order = routing.weights[rows].argsort(dim=-1, descending=True, stable=True)
    experts = routing.indices[rows].gather(-1, order).numpy()
    numbered = experts[..., 0].size <= _MOST_NUMBERS
    shown = min(routing.shape.top_k, 3)
    n_letters = shown * (len(str(routing.shape.n_experts - 1)) + 1) - 1
    cell = max(0.45, 0.085 * n_letters) if numbered else 0.2  # inches
    lines = wrapped(len(routing.tokens), int((18 if numbered else 16) / cell))
    apart = len(layers) + (0 if len(lines) == 1 else _GAP if numbered else 3 * _GAP)
    n_rows, wide = apart * (len(lines) - 1) + len(layers), len(lines[0])
    ax = ax or new_axes(
        max(6.0, 1.5 + cell * wide),
        rows=max(3, round(n_rows * (1.0 if numbered else 0.22))),
    )
    cells, starts = np.full((n_rows, wide), np.nan), []
    for number, columns in enumerate(lines):
        start = apart * (len(lines) - 1 - number)  # rows go upward, lines downward
        starts.append(start)
        cells[start : start + len(layers), : len(columns)] = experts[:, columns, 0]
    n_experts = routing.shape.n_experts
    image = ax.imshow(
        cells,
        cmap=_expert_colors(n_experts),
        vmin=-0.5,
        vmax=n_experts - 0.5,
        aspect="auto",
        origin="lower",
        alpha=0.75,
    )
    if numbered:
        for start, columns in zip(starts, lines, strict=True):
            for (row, place), _ in np.ndenumerate(experts[:, columns, 0]):
                text = " ".join(str(expert) for expert in experts[row, columns[place], :shown])
                ax.text(place, start + row, text, ha="center", va="center", fontsize=8)
    else:
        ax.figure.colorbar(image, ax=ax, label="expert with most weight", aspect=60)
    _name_tokens(ax, routing.tokens, lines, starts, small=not numbered)
    every = 1 if numbered else max(1, len(layers) // 12)
    ticks = [(start + row, str(layers[row])) for start in starts for row in range(0, len(layers), every)]
    ax.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    ax.set(xlabel="token", ylabel="layer")
    more = "" if shown == routing.shape.top_k else f" (the first {shown} of {routing.shape.top_k})"
    what = f"experts chosen for each token, most weight first{more}"
    ax.set_title(
        f"{routing.shape.model}: {what if numbered else 'the expert with most weight, for each token'}",
        fontsize=10,
    )
    return ax


def _name_tokens(
    ax: Axes, tokens: Sequence[str], lines: Sequence[range], starts: Sequence[int], *, small: bool
) -> None:
    """Tokens under their columns: on the axis for the last line, as text under the other ones."""
    labels, size = token_labels(tokens), 6 if small else 9
    style = {"rotation": 90 if small else 60, "fontsize": size, **label_font(tokens)}
    for columns, start in zip(lines[:-1], starts, strict=False):
        for place, column in enumerate(columns):
            ax.text(
                place, start - 0.7, labels[column], ha="center" if small else "right", va="top",
                rotation_mode="default" if small else "anchor", **style,
            )  # fmt: skip
    last = lines[-1]
    ax.set_xticks(
        range(len(last)), [labels[column] for column in last], ha="center" if small else "right",
        rotation_mode="default" if small else "anchor", **style,
    )  # fmt: skip


def _expert_colors(n_experts: int) -> ListedColormap:
    """One light colour an expert, neighbours far apart. The cells' numbers tell experts apart, too."""
    golden = 0.61803398875
    hues = (np.arange(n_experts) * golden) % 1
    values = 0.82 + 0.16 * (np.arange(n_experts) % 2)
    return ListedColormap(hsv_to_rgb(np.stack([hues, np.full(n_experts, 0.5), values], axis=-1)))
