"""Formulas of notebooks as MathML, which browsers draw by themselves: nothing is fetched, no script runs."""

import html
import re

from latex2mathml.converter import convert

_TAGS = re.compile(r"(<(pre|code|script|style|svg)\b.*?</\2>|<[^>]+>)", re.DOTALL)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.DOTALL)


def with_formulas(page: str) -> str:
    """A page of HTML with `$...$` and `$$...$$` of its text set; code and outputs are left as they are.

    >>> with_formulas("<p>the $k$ experts</p> <code>$k$</code>")[:71]
    '<p>the <math xmlns="http://www.w3.org/1998/Math/MathML" display="inline'
    >>> with_formulas("<code>$k$</code>")
    '<code>$k$</code>'
    """
    parts = _TAGS.split(page)
    parts[::3] = [_FORMULA.sub(_set, text) for text in parts[::3]]
    del parts[2::3]  # the names of tags
    return "".join(part for part in parts if part is not None)


def _set(match: re.Match[str]) -> str:
    alone, within = match.groups()
    return convert(html.unescape(alone or within), display="block" if alone else "inline")
