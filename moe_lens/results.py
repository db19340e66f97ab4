"""How results show themselves: one line as `repr`, a table in a notebook.

@dataclass(frozen=True, eq=False, repr=False)
class LoadBalance(Result):
    def summary(self) -> str: ...                      # goes into the line
    def to_dataframe(self) -> pandas.DataFrame: ...    # goes into the notebook's table
"""

from html import escape
from typing import Any, Final

import numpy as np

_MOST: Final = 160
"""Characters of a line; what is longer is cut, between two words."""
_MOST_ROWS: Final = 20
"""Rows of a notebook's table; of longer ones the first and last are shown, as pandas does."""


class Result:
    """Base of everything that a function of the library gives back to be looked at."""

    def summary(self) -> str:
        """What the result says, in one line, without its class's name."""
        raise NotImplementedError

    def __repr__(self) -> str:
        line = f"{type(self).__name__}({' '.join(self.summary().split())})"
        return line if len(line) <= _MOST else f"{_cut(line, _MOST - 5)} ...)"

    def _repr_html_(self) -> str:
        """What a notebook shows for a result at the end of a cell: the line, and its table if it has one."""
        line = f"<p><code>{escape(repr(self))}</code></p>"
        to_dataframe: Any = getattr(self, "to_dataframe", None)
        if to_dataframe is None:
            return line
        return line + to_dataframe().to_html(max_rows=_MOST_ROWS, border=0, float_format="{:.4g}".format)


def _cut(line: str, most: int) -> str:
    """The whole words among the first `most` letters; a part of the word where there is only one."""
    words = line[: most + 1].rpartition(" ")[0] or line[:most]
    return words.rstrip(",;: ")


def columns(**parts: Any) -> dict[str, np.ndarray]:
    """Columns of a table from tensors of one shape, flat; NaN all over where one is None.

    >>> import torch
    >>> {name: column.tolist() for name, column in columns(value=torch.zeros(1, 2), low=None).items()}
    {'value': [0.0, 0.0], 'low': [nan, nan]}
    """
    length = next(part.numel() for part in parts.values() if part is not None)
    return {
        name: np.full(length, np.nan) if part is None else part.flatten().numpy()
        for name, part in parts.items()
    }
