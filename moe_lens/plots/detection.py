"""Figures of expert scores: the map of all experts, effect against significance."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from moe_lens.detection.expert_scores import ExpertScores
from moe_lens.errors import DataError
from moe_lens.plots.style import COLORS, count_axis, layers_beside, legend_below, new_axes, signed_map
from moe_lens.steering.plan import SteeringPlan

_MARKERS: Final = (("+", "x"), ("s", "o"), ("D", "h"), ("^", "v"))
"""Of a plan's activated experts and of its deactivated ones; the first two as in the routing explorer."""
_LETTER: Final = 5.4
_NAME_HEIGHT: Final = 10.0
"""What a letter of a name takes at 8 points, across and upward, in points."""
_DOT: Final = 3.0
"""Radius of a point, in points."""
_NEAR: Final = 6.0
"""From a point to a name beside it, in points."""

Points = Float[np.ndarray, "point 2"]


def expert_heat_map(
    scores: ExpertScores, plans: Mapping[str, SteeringPlan] | None = None, *, ax: Axes | None = None
) -> Axes:
    """Score of every expert, layers upward and experts to the right, with the experts of some plans marked.

    Args:
        scores: the colours, on a diverging scale centred on zero.
        plans: label -> plan; the experts that a plan activates get a marker, those that it deactivates
            another, explained below the map. Where a plan names an expert twice, deactivation wins.
        ax: where to draw; a new figure if None.
    """
    shape = scores.shape
    ax = ax or new_axes(max(6.0, 2.0 + 0.5 * min(shape.n_experts, 32)), rows=len(shape.layers))
    image = signed_map(ax, scores.delta.numpy())
    for number, (label, plan) in enumerate((plans or {}).items()):
        plan.check_fits(shape)
        markers, size = _MARKERS[number % len(_MARKERS)], 8 + 5 * number  # one stands within the other
        off = set(plan.deactivate)
        groups = (("activated", set(plan.activate) - off), ("deactivated", off))
        for (verb, experts), marker in zip(groups, markers, strict=True):
            if experts:
                _mark(ax, sorted(experts), shape.layers, marker, size, f"{label}: {verb}")
    count_axis(ax, shape.n_experts)
    layers_beside(ax, shape.layers)
    ax.set(xlabel="expert", title=f"{shape.model}: experts that follow the contrast")
    ax.figure.colorbar(image, ax=ax, label=f"{scores.label}\n(> 0: more under condition 1)")
    if ax.get_lines():
        legend_below(ax, down=0.2)
    return ax


def _mark(
    ax: Axes,
    experts: Sequence[tuple[int, int]],
    layers: Sequence[int],
    marker: str,
    size: int,
    label: str,
) -> None:
    """A black marker with a white edge on each (layer, expert), so that it shows on every colour."""
    ax.plot(
        [expert for _, expert in experts],
        [layers.index(layer) for layer, _ in experts],
        linestyle="none",
        marker=marker,
        markersize=size,
        markeredgecolor="black",
        markerfacecolor="none",
        markeredgewidth=1.8,
        label=label,
        zorder=2 + 1 / size,
        path_effects=[withStroke(linewidth=4, foreground="white")],
    )


def volcano(scores: ExpertScores, *, q: float = 0.05, n_labels: int = 8, ax: Axes | None = None) -> Axes:
    """Every expert's score against −log10 of its q-value; those with q at most `q` in colour.

    Args:
        scores: with q-values, from `detect`.
        q: where the dashed line is drawn.
        n_labels: how many of the coloured experts, those with the largest |score|, are named at most; one
            without room for its name near its point, on no other point, is left out.
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
    """Names of the points with the largest |score| among those with q at most `q`, where there is room.

    None stands over another one or over a point, and a thin line leads from a point to a name that is not
    beside it. The largest are placed first; one for which there is no room near its point is left out.
    """
    assert scores.q is not None
    rows = {layer: row for row, layer in enumerate(scores.shape.layers)}
    coloured = [score for score in scores.ranked() if scores.q[rows[score.layer], score.expert] <= q]
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # the layout decides which names would meet

    def in_points(data: Any) -> Float[np.ndarray, "*points 2"]:
        return np.asarray(ax.transData.transform(data)) * 72 / figure.dpi

    dots = in_points(np.stack([scores.delta.numpy().ravel(), height.ravel()], axis=1))
    frame = in_points(np.stack([ax.get_xlim(), ax.get_ylim()], axis=1))
    taken: list[_Place] = []
    for score in coloured[:n_labels]:
        name, point = (
            f"L{score.layer} E{score.expert}",
            (score.delta, height[rows[score.layer], score.expert]),
        )
        own, width = in_points(point), _LETTER * len(name)
        places = (_Place(own, own + shift, width) for shift in _shifts(width))
        place = next((place for place in places if place.is_free(frame, dots, taken)), None)
        if place is None:
            continue
        taken.append(place)
        line = {"arrowstyle": "-", "linewidth": 0.5, "color": "#555555", "shrinkA": 0, "shrinkB": 2}
        ax.annotate(
            name,
            point,
            xytext=tuple(place.middle - own),
            textcoords="offset points",
            fontsize=8,
            ha="center",
            va="center",
            arrowprops=None if place.is_beside else line,
        )


class _Place(NamedTuple):
    """Where a name may stand: of which point, its middle, its width; all in points."""

    own: Float[np.ndarray, "2"]
    middle: Float[np.ndarray, "2"]
    width: float

    @property
    def is_beside(self) -> bool:
        """Whether it is so near to its point that no line need lead to it."""
        return bool(self.distance(self.own[None])[0] <= _NEAR + 0.01)

    @property
    def line(self) -> Points:
        """Places on the line from the point to the name; none where there is no line."""
        steps = np.linspace(0, 1, 0 if self.is_beside else 30)
        return self.own + steps[:, None] * (self.middle - self.own)

    def distance(self, points: Points) -> Float[np.ndarray, "point"]:
        """From the edge of the name to each of these; 0 within it."""
        beyond = np.abs(points - self.middle) - (self.width / 2, _NAME_HEIGHT / 2)
        return np.linalg.norm(np.maximum(beyond, 0), axis=1)

    def is_free(self, frame: Float[np.ndarray, "2 2"], dots: Points, taken: Sequence["_Place"]) -> bool:
        """Whether it lies in the frame (lower left, upper right), on no dot, name or line.

        Nor nearer to another's dot than a name beside its own; its line passes no other dot.
        """
        half = np.array([self.width, _NAME_HEIGHT]) / 2
        if (self.middle - half < frame[0]).any() or (self.middle + half > frame[1]).any():
            return False
        others = dots[(np.abs(dots - self.own) > 0.01).any(axis=1)]
        if len(others) and self.distance(others).min() < _NEAR - 0.01:
            return False
        passed = self.line[len(self.line) // 5 :]  # dots may touch at its beginning
        if len(passed) and len(others) and np.linalg.norm(passed[:, None] - others, axis=-1).min() < 1.5:
            return False
        for other in taken:
            apart = np.abs(self.middle - other.middle)
            if apart[0] < (self.width + other.width) / 2 and apart[1] < _NAME_HEIGHT:
                return False
            gaps = np.linalg.norm(self.line[:, None] - other.line[None], axis=-1)
            meets = (self.distance(other.line), other.distance(self.line), gaps)
            if any((gap < 1).any() for gap in meets):
                return False
        return True


def _shifts(width: float) -> Iterator[Float[np.ndarray, "2"]]:
    """From a point to the middle of its name, nearest first: above it, then around it in growing rings."""
    for ring in range(7):
        away = _NEAR + 9 * ring
        for angle in (90, 270, 60, 120, 0, 180, 30, 150, 300, 240, 330, 210):
            direction = np.array([np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))])
            yield direction * (away + width / 2, away + _NAME_HEIGHT / 2)
