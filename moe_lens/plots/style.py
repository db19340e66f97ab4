"""What all figures share: colours, sizes, axes of layers and experts, maps of signed numbers, saving.

    ax = new_axes(6.0, rows=8)
    image = signed_map(ax, values)              # [row column]; white is zero
    layers_beside(ax, layers)
    save(ax, "figure.png")

Colours mean the same in every figure.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Shaped
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from moe_lens.errors import DataError
from moe_lens.files import check_writable


class _Colors(dict[str, str]):
    """Colours by what they stand for; code of version 0.1 asks for "-" by a minus sign."""

    def __missing__(self, name: str) -> str:
        if name == "−":
            return self["-"]
        raise KeyError(name)


COLORS: Final = _Colors({"+": "#0072B2", "-": "#D55E00", "unsteered": "#000000", "random": "#999999"})
"""What stands for what: "+" and "-" for two directions or signs. The palette is Okabe and Ito's, whose
colours colour-blind readers can tell apart."""


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


def new_axes(width: float, rows: int) -> Axes:
    """A figure of this width, in inches, that is high enough for `rows` rows, at notebook resolution."""
    figure, ax = plt.subplots(figsize=(width, 1.9 + 0.5 * rows), layout="constrained")
    figure.set_dpi(150)
    return ax


def signed_map(ax: Axes, values: Shaped[np.ndarray, "row column"], *, aspect: Any = "auto") -> AxesImage:
    """Draw a map of signed numbers, first row at the bottom, in colours that are centred on zero."""
    sizes = np.abs(values[np.isfinite(values)])
    limit = max(float(sizes.max()), 1e-9) if sizes.size else 1.0
    return ax.imshow(values, cmap="PuOr", vmin=-limit, vmax=limit, aspect=aspect, origin="lower")


def count_axis(ax: Axes, number: int) -> None:
    """At most about 16 ticks on the horizontal axis for 0 to number − 1."""
    ax.set_xticks(count_ticks(number))


def count_ticks(number: int) -> range:
    """At most about 16 of the numbers 0 to number − 1, evenly spaced: by 1, 2, 4, 8, ... or by tens."""
    steps = (1, 2, 4, 8, 10, 16, 20, 32, 50)
    if number <= 16 * steps[-1]:
        return range(0, number, next(step for step in steps if number <= 18 * step))
    return range(0, number, 100 * -(-number // 1600))


def layers_below(ax: Axes, layers: Sequence[int]) -> None:
    """Label the horizontal axis, where place i is layers[i], with at most about 24 layers."""
    shown = range(0, len(layers), max(1, len(layers) // 24))
    ax.set_xticks(shown, [str(layers[place]) for place in shown])
    ax.set_xlabel("layer")


def layers_beside(ax: Axes, layers: Sequence[int]) -> None:
    """Label the vertical axis, where row i is layers[i]."""
    ax.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    ax.set_ylabel("layer")


def legend_below(ax: Axes, *, down: float = 0.17, ncols: int = 1) -> None:
    """A legend under the axes, as far below their lower edge as ticks and a label need.

    Args:
        down: how far, in axes heights of a figure of 4.9 inches; higher figures do not widen the gap.
    """
    figure = ax.get_figure(root=True)
    height = 4.9 if figure is None else float(figure.get_size_inches()[1])
    ax.legend(
        loc="upper center", bbox_to_anchor=(0.5, -down * min(1.0, 4.9 / height)), ncols=ncols, frameon=False
    )
