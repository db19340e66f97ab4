"""Figures of patching, mediation and attribution: a function takes a result and returns a matplotlib Axes.

ax = patching_map(patch_router(model, clean_cache, tokens, metric), corrupted=0.3, clean=4.1)
ax = mediation_curves(mediation(model, clean, corrupted, metric))
ax = attribution_bars(expert_logit_attribution(model, prompt, answer))
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from moe_lens.attribution.logits import LogitAttribution
from moe_lens.checks import as_index
from moe_lens.errors import DataError
from moe_lens.interventions.mediating import Mediation
from moe_lens.plots.style import COLORS, count_axis, new_axes

_MANY: Final = 40  # more labels than that cannot be read


def patching_map(
    values: Float[Tensor, "layer column"],
    *,
    corrupted: float,
    clean: float | None = None,
    layers: Sequence[int] | None = None,
    columns: Sequence[str] | str = "position",
    what: str = "router logits",
    ax: Axes | None = None,
) -> Axes:
    """What patching does, layer by layer: a map of `patch_router` or `patch_expert_outputs`.

    >>> import torch
    >>> patching_map(torch.tensor([[0.5, 1.0], [2.0, 0.0]]), corrupted=0.0, clean=2.0).get_ylabel()
    'layer'

    Args:
        values: the metric after each patch.
        corrupted: the metric of the unpatched corrupted run, the centre of the colours.
        clean: that of the clean run; then shares of the difference are drawn, else differences of the metric.
        layers: numbers of the rows; None: 0, 1, ...
        columns: labels of the columns (a prompt's tokens), or what they are ("position", "expert").
        what: what was patched, for the title.

    Raises:
        DataError: labels that are not one a row or column, or clean and corrupted metrics that are equal.
    """
    n_rows, n_columns = values.shape
    rows = list(range(n_rows)) if layers is None else list(layers)
    if len(rows) != n_rows or (not isinstance(columns, str) and len(columns) != n_columns):
        raise DataError(f"The map has {n_rows} layers and {n_columns} columns; give one label each.")
    if clean == corrupted:
        raise DataError("The clean and the corrupted metric are equal, so that no share can be drawn.")
    change = (values.detach().cpu().double() - corrupted) / (1.0 if clean is None else clean - corrupted)
    limit = max(float(change.abs().max()), 1e-9)
    ax = ax or new_axes(max(6.0, 2.2 + 0.42 * min(n_columns, _MANY)), rows=n_rows)
    image = ax.imshow(change.numpy(), cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto", origin="lower")
    ax.set_yticks(range(n_rows), [str(layer) for layer in rows])
    if isinstance(columns, str) or n_columns > _MANY:
        count_axis(ax, n_columns)
    else:
        ax.set_xticks(range(n_columns), list(columns), rotation=60, ha="right", rotation_mode="anchor")
    ax.set(
        xlabel=columns if isinstance(columns, str) else "token",
        ylabel="layer",
        title=f"Patching {what} from the clean run",
    )
    label = "change of the metric\n(0: corrupted run)"
    if clean is not None:
        label = "share of the difference restored\n(0: corrupted run, 1: clean run)"
    ax.figure.colorbar(image, ax=ax, label=label)
    return ax


def mediation_curves(
    found: Mediation, *, clusters: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """How much of the total effect the routes carry, layer by layer: each alone, and all up to it.

    Args:
        found: of at least two pairs.
        clusters: one label a pair, for the 95 % intervals (bands); None: each pair by itself.

    Raises:
        DataError: as in `Mediation.share`.
    """
    ax = ax or new_axes(7.5, rows=6)
    rows = np.arange(len(found.layers))
    for cumulative, style, which in ((True, "-", "all layers up to it"), (False, ":", "this layer alone")):
        shares = found.shares_by_layer(cumulative=cumulative, clusters=clusters)
        for name, color, says in (
            ("restored", COLORS["+"], "restored by the clean route"),
            ("lost", COLORS["-"], "lost with the corrupted route"),
        ):
            share, low, high = np.where(np.isfinite(shares[name]), shares[name], np.nan).T
            ax.plot(rows, share, style, marker="o", markersize=4, color=color, label=f"{says}, {which}")
            ax.fill_between(rows, low, high, color=color, alpha=0.15, linewidth=0)
    for height in (0, 1):
        ax.axhline(height, color="black", linewidth=0.8, linestyle="--" if height else "-")
    ax.set_xticks(rows, [str(layer) for layer in found.layers])
    kind = "experts and weights" if found.weights else "experts"
    ax.set(
        xlabel="layer",
        ylabel="share of the total effect",
        title=f"What travels by the route ({kind}; {len(found.clean)} pairs, 95 % intervals)",
    )
    ax.legend(loc="upper left", bbox_to_anchor=(0, -0.16), frameon=False, fontsize=8, ncols=2)
    return ax


def attribution_bars(
    found: LogitAttribution, *, prompt: int | None = None, n_experts: int = 10, ax: Axes | None = None
) -> Axes:
    """The experts that wrote most into the logit, the other experts together, and the rest by kind.

    Args:
        found: from `expert_logit_attribution`.
        prompt: which of its prompts; None: the mean over all.
        n_experts: how many experts get a bar of their own.

    Raises:
        DataError: no such prompt, or a number of experts below 1.
    """
    n_prompts, n_bars = len(found.logit), as_index(n_experts)
    if prompt is not None and not -n_prompts <= prompt < n_prompts:
        raise DataError(f"The attribution is of {n_prompts} prompts; there is no prompt {prompt}.")
    if not n_bars:
        raise DataError(f"n_experts must be a number from 1 on; got {n_experts!r}.")

    def of(values: Tensor) -> Any:
        return (values.mean(-1) if prompt is None else values[..., prompt]).double().numpy()

    experts = of(found.by_expert().movedim(1, -1))
    order = np.argsort(-np.abs(experts), axis=None)[:n_bars]
    names = [np.unravel_index(place, experts.shape) for place in order]
    bars = [(f"layer {found.layers[row]}, expert {expert}", experts[row, expert]) for row, expert in names]
    bars.append(("other experts", experts.sum() - sum(value for _, value in bars)))
    parts = of(found.parts)
    for kind, says in _KINDS.items():
        meant = [value for name, value in zip(found.part_names, parts, strict=True) if _kind(name) == kind]
        if meant:
            bars.append((says, sum(meant)))
    ax = ax or new_axes(7.5, rows=max(5, round(0.62 * len(bars))))
    heights = np.arange(len(bars))[::-1]
    values = np.array([value for _, value in bars])
    ax.barh(heights, values, color=[COLORS["+"] if value >= 0 else COLORS["-"] for value in values])
    ax.axhline(heights[len(names)] + 0.5, color="black", linewidth=0.6, linestyle=":")
    ax.axvline(0, color="black", linewidth=0.8)
    limit = 1.25 * max(float(np.abs(values).max()), 1e-9)
    for height, value in zip(heights, values, strict=True):
        ax.annotate(
            f"{value:+.2f}", (value, height), xytext=(3 if value >= 0 else -3, 0), textcoords="offset points",
            ha="left" if value >= 0 else "right", va="center", fontsize=8,
        )  # fmt: skip
    ax.set_yticks(heights, [name for name, _ in bars])
    whose = f"mean over {n_prompts} prompts" if prompt is None else f"prompt {prompt}"
    ax.set(
        xlim=(-limit, limit),
        xlabel="share of the logit (nats)",
        title=f"Who wrote the logit {float(of(found.logit)):+.2f} ({whose})",
    )
    return ax


_KINDS: Final = {
    "embed": "embedding",
    "attn": "attention and mixers",
    "mlp": "dense and shared experts",
    "bias": "biases and other parts",
}


def _kind(part: str) -> str:
    last = part.rsplit(".", 1)[-1]
    return last if last in _KINDS else "bias"
