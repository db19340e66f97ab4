"""How tokens are written in figures: white space that shows, no formulas, letters that the font has.

    ax.set_xticks(places, token_labels(tokens), **label_font(tokens))

Every figure that names tokens takes its labels from here.
"""

import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

from matplotlib import font_manager, rcParams
from matplotlib.ft2font import FT2Font

_MOST: Final = 16
"""Letters of a label; of longer ones the middle is left out."""
_SHOWN: Final = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}
_CJK_FONTS: Final = (
    "cjk",
    "wenquanyi",
    "wqy",
    "hiragino",
    "pingfang",
    "yahei",
    "meiryo",
    "simhei",
    "unifont",
)
"""Parts of the names of fonts that have Chinese, Japanese and Korean letters."""


def token_labels(tokens: Sequence[str]) -> list[str]:
    """Tokens as labels of an axis.

    >>> token_labels([" sea", "a\\n", "$x$", "\\x00"])
    ['␣sea', 'a↵', '\\\\$x\\\\$', '\\\\x00']

    White space is shown by signs, what cannot be seen by its number, `$` is no formula; letters for which
    neither matplotlib's font nor a font for Chinese, Japanese or Korean on this system has a form are written
    as U+6C34.
    """
    return [_label(token) for token in tokens]


def label_font(tokens: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments for text that shows these tokens: the fonts that have their letters.

    >>> label_font(["sea"])
    {}
    """
    if all(set(map(ord, token)) <= _letters(_default_font()) for token in tokens if token.isprintable()):
        return {}
    return {"fontfamily": [*rcParams["font.family"], *(name for name, _ in _cjk_fonts())]}


def wrapped(n_columns: int, width: int) -> list[range]:
    """The columns of each line, where at most `width` stand in one; lines are nearly equally long.

    >>> wrapped(5, 2)
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    n_lines = max(1, -(-n_columns // width))
    size = -(-n_columns // n_lines)
    return [range(start, min(start + size, n_columns)) for start in range(0, n_columns, size)]


def _label(token: str) -> str:
    middle = len(token) - _MOST
    if middle > 1:
        token = f"{token[: _MOST - 5]}…{token[-4:]}"
    written = "".join(_SHOWN.get(letter) or _written(letter) for letter in token)
    return written.replace("$", r"\$")


def _written(letter: str) -> str:
    if not letter.isprintable() or unicodedata.category(letter) in ("Cs", "Co", "Cn"):
        return repr(letter)[1:-1]
    if ord(letter) in _letters(_default_font()):
        return letter
    has = any(ord(letter) in _letters(path) for _, path in _cjk_fonts())
    return letter if has else f"U+{ord(letter):04X}"


@cache
def _letters(path: str) -> frozenset[int]:
    return frozenset(FT2Font(path).get_charmap())


def _default_font() -> str:
    return str(font_manager.findfont(font_manager.FontProperties(family=rcParams["font.family"])))


@cache
def _cjk_fonts() -> tuple[tuple[str, str], ...]:
    """(name, path) of the fonts for Chinese, Japanese and Korean that matplotlib finds on this system."""
    found = {
        entry.name: str(entry.fname)
        for entry in font_manager.fontManager.ttflist
        if any(part in entry.name.lower() for part in _CJK_FONTS)
    }
    return tuple(sorted(found.items())[:3])
