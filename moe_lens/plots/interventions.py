"""Figures of patching, mediation and attribution.

    patched = patch_router(model, clean_cache, tokens, metric)
    ax = patching_map(patched, corrupted=0.3, clean=4.1, layers=model.moe_layers, what="router logits")
    ax = mediation_curves(mediation(model, clean, corrupted, metric))
    ax = attribution_bars(expert_logit_attribution(model, prompt, answer))

Each draws into `ax=`, or into a new figure.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from torch import Tensor

from moe_lens.attribution.results import LogitAttribution
from moe_lens.checks import whole_number
from moe_lens.errors import DataError
from moe_lens.interventions.results import Mediation
from moe_lens.plots.labels import label_font, token_labels
from moe_lens.plots.style import COLORS, count_ticks, layers_below, layers_beside, new_axes, signed_map

_MANY: Final = 40  # more labels than that cannot be read


def patching_map(
    values: Float[Tensor, "layer column"],
    *,
    corrupted: float,
    clean: float | None = None,
    layers: Sequence[int] | None = None,
    columns: Sequence[str] | str = "position",
    positions: Sequence[int] | None = None,
    what: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """What patching does, layer by layer: a map of `patch_router` or `patch_expert_outputs`.

    >>> import torch
    >>> restored = torch.tensor([[0.5, 1.0], [2.0, 0.0]])
    >>> patching_map(restored, corrupted=0.0, clean=2.0, layers=[2, 3]).get_ylabel()
    'layer'

    Args:
        values: the metric after each patch.
        corrupted: the metric of the unpatched corrupted run, the centre of the colours.
        clean: that of the clean run. With it shares of the difference are drawn, without it differences of
            the metric.
        layers: numbers of the rows (`model.moe_layers` of a sweep over all); None: not known, so that the
            axis counts the rows and does not say which layers they are.
        columns: labels of the columns (a prompt's tokens; of more than 40 the numbers), or what they are
            ("position", "expert").
        positions: numbers of the columns, of a sweep over some positions; None: 0, 1, ...
        what: what was patched, for the title ("router logits"); None: not known.
        ax: where to draw; a new figure if None.

    Raises:
        DataError: labels that are not one a row or column, or clean and corrupted metrics that are equal.
    """
    n_rows, n_columns = values.shape
    rows = list(range(n_rows)) if layers is None else list(layers)
    labels = columns if not isinstance(columns, str) else positions
    if len(rows) != n_rows or any(
        len(given) != n_columns for given in (labels, positions) if given is not None
    ):
        raise DataError(f"The map has {n_rows} layers and {n_columns} columns; give one label each.")
    if clean == corrupted:
        raise DataError("The clean and the corrupted metric are equal, so no share can be drawn.")
    change = (values.detach().cpu().double() - corrupted) / (1.0 if clean is None else clean - corrupted)
    ax = ax or new_axes(max(6.0, 2.2 + 0.42 * min(n_columns, _MANY)), rows=n_rows)
    image = signed_map(ax, change.numpy())
    layers_beside(ax, rows)
    if layers is None:
        ax.set_ylabel("row (MoE layers in order)")
    numbered = isinstance(columns, str) or n_columns > _MANY
    if numbered:
        shown = count_ticks(n_columns)
        ax.set_xticks(shown, [str(n if positions is None else positions[n]) for n in shown])
    else:
        ax.set_xticks(
            range(n_columns), token_labels(columns), rotation=60, ha="right", rotation_mode="anchor",
            **label_font(columns),
        )  # fmt: skip
    ax.set_xlabel(columns if isinstance(columns, str) else "position of the token" if numbered else "token")
    ax.set_title(f"Patching {f'{what} ' if what else ''}from the clean run")
    label = "change of the metric\n(0: corrupted run)"
    if clean is not None:
        label = "share of the difference restored\n(0: corrupted run, 1: clean run)"
    ax.figure.colorbar(image, ax=ax, label=label)
    return ax


def mediation_curves(
    found: Mediation, *, clusters: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """How much of the total effect the routes carry, layer by layer: each layer's, and all up to it.

    Where the total effect may be 0, the share may be anything (`Mediation.share`): bands of the full height
    say so, and the title.

    Args:
        found: from `mediation`, of at least two pairs.
        clusters: one label a pair, for the 95 % intervals (bands); None: each pair by itself.
        ax: where to draw; a new figure if None.

    Raises:
        DataError: as in `Mediation.share`.
    """
    ax = ax or new_axes(7.5, rows=6)
    rows, bands = np.arange(len(found.layers)), []
    for cumulative, style, which in ((True, "-", "all layers up to it"), (False, ":", "this layer alone")):
        shares = found.shares_by_layer(cumulative=cumulative, clusters=clusters)
        for name, color, says in (
            ("restored", COLORS["+"], "restored by the clean route"),
            ("lost", COLORS["-"], "lost with the corrupted route"),
        ):
            share, low, high = shares[name].T
            ax.plot(rows, share, style, marker="o", markersize=4, color=color, label=f"{says}, {which}")
            bands.append((low, high, color))
    for height in (0, 1):
        ax.axhline(height, color="black", linewidth=0.8, linestyle="--" if height else "-")
    unsure = any(np.isinf(low).any() or np.isinf(high).any() for low, high, _ in bands)
    for low, high, color in bands:
        ends = ax.get_ylim() if unsure else (-np.inf, np.inf)
        ax.fill_between(rows, *np.clip((low, high), *ends), color=color, alpha=0.15, linewidth=0)
        if unsure:
            ax.set_ylim(ends)
    layers_below(ax, found.layers)
    ax.set_ylabel("share of the total effect")
    kind = "experts and weights" if found.weights else "experts"
    note = "\nno bounds: the total effect may be 0, and the share anything" if unsure else ""
    ax.set_title(f"What travels by the route ({kind}; {len(found.clean)} pairs, 95 % intervals){note}")
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
        ax: where to draw; a new figure if None.

    Raises:
        DataError: no such prompt, or a number of experts below 1.
    """
    n_prompts, n_bars = len(found.logit), whole_number(n_experts, "n_experts", least=1)
    if prompt is not None and not -n_prompts <= prompt < n_prompts:
        raise DataError(f"The attribution is of {n_prompts} prompts; there is no prompt {prompt}.")
    experts = _expert_bars(found, prompt, n_bars)
    bars = [*experts, *_rest_bars(found, prompt)]
    ax = ax or new_axes(7.5, rows=max(5, round(0.62 * len(bars))))
    heights = np.arange(len(bars))[::-1]
    values = np.array([value for _, value in bars])
    ax.barh(heights, values, color=[COLORS["+"] if value >= 0 else COLORS["-"] for value in values])
    _write_values(ax, heights, values)
    ax.axhline(heights[len(experts) - 1] + 0.5, color="black", linewidth=0.6, linestyle=":")
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(heights, [name for name, _ in bars])
    limit = 1.25 * max(float(np.abs(values).max()), 1e-9)
    ax.set(xlim=(-limit, limit), xlabel=f"part of the {found.logit_name} (nats)")
    logit = float(_of_prompt(found.logit, prompt))
    whose = f"prompt {prompt}" if prompt is not None else f"mean over {n_prompts} prompts"
    whose = "one prompt" if n_prompts == 1 else whose
    ax.set_title(f"Who wrote the {found.logit_name} {_signed(logit)} ({whose})")
    return ax


def _expert_bars(found: LogitAttribution, prompt: int | None, n_bars: int) -> list[tuple[str, float]]:
    """(name, share) of the experts that ran with the largest shares, and of all others together."""
    shares = _of_prompt(found.by_expert().movedim(1, -1), prompt)  # [layer expert]
    ran = np.zeros(shares.shape, dtype=bool)
    chosen = found.indices if prompt is None else found.indices[:, [prompt]]
    for row, experts in enumerate(chosen.flatten(1)):
        ran[row, experts.unique()] = True
    largest = np.argsort(np.where(ran, -np.abs(shares), 1.0), axis=None)[: min(n_bars, int(ran.sum()))]
    places = [np.unravel_index(place, shares.shape) for place in largest]
    bars = [
        (f"layer {found.layers[row]}, expert {expert}", float(shares[row, expert])) for row, expert in places
    ]
    return [*bars, ("other experts", float(shares.sum()) - sum(share for _, share in bars))]


def _rest_bars(found: LogitAttribution, prompt: int | None) -> list[tuple[str, float]]:
    """(name, share) of everything else, by kind."""
    shares = list(zip(found.part_names, _of_prompt(found.parts, prompt), strict=True))
    bars = []
    for kind, words in _KINDS.items():
        of_kind = [share for name, share in shares if _kind(name) == kind]
        if any(of_kind):  # a model without such parts has zeros there
            bars.append((words, sum(of_kind)))
    return bars


def _of_prompt(values: Float[Tensor, "*rest batch"], prompt: int | None) -> Float[np.ndarray, "*rest"]:
    """The values of one prompt, or their mean over all."""
    return np.asarray((values.mean(-1) if prompt is None else values[..., prompt]).double())


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _write_values(ax: Axes, heights: Int[np.ndarray, "bar"], values: Float[np.ndarray, "bar"]) -> None:
    """The number at the end of each bar."""
    for height, value in zip(heights, values, strict=True):
        ax.annotate(
            _signed(value),
            (value, height),
            xytext=(3 if value >= 0 else -3, 0),
            textcoords="offset points",
            ha="left" if value >= 0 else "right",
            va="center",
            fontsize=8,
        )


_KINDS: Final = {
    "embed": "embedding",
    "attn": "attention",
    "mixer": "mixers",
    "mlp": "dense and shared experts",
    "bias": "biases and other parts",
}
_OTHER_NAMES: Final = {"linear_attn": "mixer", "conv": "mixer", "shared_mlp": "mlp", "moe": "mlp"}
"""Names that hybrid architectures give such parts."""


def _kind(part: str) -> str:
    last = part.rsplit(".", 1)[-1]
    last = _OTHER_NAMES.get(last, last)
    return last if last in _KINDS else "bias"
