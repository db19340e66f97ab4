"""Parts of pages that the code itself says: a page holds `<!-- generated: NAME ... -->` in their place."""

import argparse
import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import moe_lens
from moe_lens.cli.parser import _parser

_PRIVATE = {"warn", "unknown"}  # helpers without an underscore
_MARK = re.compile(r"^<!-- generated: ([\w. ]+) -->$", re.MULTILINE)


def room(name: str) -> str:
    """Everything public of one room, each with its docstring."""
    public = importlib.import_module(f"moe_lens.{name}").__all__
    return "\n\n".join(f"::: moe_lens.{name}.{each}" for each in public)


def module(name: str) -> str:
    """What a file of the ground defines, each with its docstring."""
    path = f"moe_lens.{name}"
    things = vars(importlib.import_module(path)).items()
    public = [
        key for key, thing in things if getattr(thing, "__module__", "") == path and key not in _PRIVATE
    ]
    return "\n\n".join(f"::: {path}.{each}" for each in public if not each.startswith("_"))


def text(name: str) -> str:
    """What the docstring of a file says after its sentence and its code: how well what it computes holds."""
    paragraphs = (inspect.getdoc(importlib.import_module(f"moe_lens.{name}")) or "").split("\n\n")
    return "\n\n".join(paragraphs[2:])


def names() -> str:
    """The names that `import moe_lens` gives, by room."""
    rows = ["| name | room | what it is |", "|---|---|---|"]
    for name in moe_lens.__all__:
        thing = getattr(moe_lens, name)
        if inspect.ismodule(thing):
            continue
        home = thing.__module__.split(".")[1]
        first = re.split(r"(?<=[.?])\s", " ".join((inspect.getdoc(thing) or "").split()))[0]
        page = "ground.md" if home == "shape" else f"{home}.md"
        anchor = f"moe_lens.{home}.{name}"
        rows.append(f"| [`{name}`]({page}#{anchor}) | `{home}` | {first.replace('|', '&#124;')} |")
    return "\n".join(rows)


def command_line() -> str:
    """The help of `moe-lens` and of each of its commands."""
    parser = _parser()
    [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    parts = [_help(parser)]
    for name, command in commands.choices.items():
        parts.append(f"## moe-lens {name}\n\n{_help(command)}")
    return "\n\n".join(parts)


def _help(parser: argparse.ArgumentParser) -> str:
    parser.formatter_class = _width(parser.formatter_class)
    return f"```text\n{parser.format_help()}```"


def _width(formatter: Any) -> Any:
    return lambda prog: formatter(prog, width=88, max_help_position=26)


GENERATED: dict[str, Callable[..., str]] = {
    "room": room,
    "module": module,
    "text": text,
    "names": names,
    "command line": command_line,
}


def with_generated(markdown: str) -> str:
    """The page with its marks replaced. Raises KeyError for a mark that nothing here writes."""

    def written(match: re.Match[str]) -> str:
        if match[1] in GENERATED:
            return GENERATED[match[1]]()
        kind, _, argument = match[1].partition(" ")
        return GENERATED[kind](argument)

    return _MARK.sub(written, markdown)
