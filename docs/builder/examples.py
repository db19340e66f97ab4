"""Examples in docstrings as code: to griffe a docstring is Markdown, in which `>>>` is three quotations.

Docstrings stay as people and doctest read them; this rewrites griffe's copy of them only.
"""

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^( *)>>> .*(?:\n(?! *$).*)*", re.MULTILINE)


def fenced(text: str) -> str:
    """A docstring with each of its examples (from `>>>` to the next empty line) in a fence.

    >>> fenced("One and one.\\n\\n>>> 1 + 1\\n2")
    'One and one.\\n\\n```pycon\\n>>> 1 + 1\\n2\\n```'
    """
    return _EXAMPLE.sub(lambda match: f"{match[1]}```pycon\n{match[0]}\n{match[1]}```", text)


class FencedExamples(griffe.Extension):
    """Called by griffe for every object that it has read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Fence the examples of its docstring."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
