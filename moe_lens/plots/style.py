"""What all figures share: colours, sizes, and saving."""

from pathlib import Path
from typing import Final

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from moe_lens.errors import DataError
from moe_lens.files import check_writable


class _Colors(dict[str, str]):
    """Colours by what they stand for; code of version 0.1 asks for "-" by a minus sign."""

    def __missing__(self, name: str) -> str:
        if name == "−":
            return self["-"]
        raise KeyError(name)


COLORS: Final = _Colors({"+": "#0072B2", "-": "#D55E00", "unsteered": "#000000", "random": "#999999"})
"""Okabe and Ito's, which colour-blind readers can tell apart."""


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


def count_axis(ax: Axes, number: int) -> None:
    """At most about 16 ticks on the horizontal axis for 0 to number − 1."""
    step = max(1, number // 16)
    ax.set_xticks(range(0, number, step))
