"""Arguments that several commands of `moe-lens` take, and how their words become numbers."""

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

SPANS = (
    'which tokens count: "all" (default; for pairs: what their file says), "last", "question" or "answer" '
    "(of chats, or of pairs that name them), or any other text: its last occurrence in each prompt. Special "
    "tokens never count, unless --special-tokens"
)


class Choices:
    """The choices of an argument, asked for when an argument is checked or its help is shown."""

    def __init__(self, names: Callable[[], Iterable[str]]) -> None:
        self._names = names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())


def score_names() -> Iterable[str]:
    """What --score takes."""
    from moe_lens.detection.scores import SCORES

    return tuple(SCORES)


def built_names() -> Iterable[str]:
    """Organisms that `moe-lens organism build` makes."""
    from moe_lens.organisms.built import BUILT

    return BUILT


def new_command(adder: Any, name: str, short: str, long: str) -> argparse.ArgumentParser:
    """The parser of the command that the function of this name in commands.py carries out."""
    return adder.add_parser(name, help=short, description=long)


def add_model_and(command: argparse.ArgumentParser, name: str, text: str, *, needed: bool = True) -> None:
    """MODEL, how it is loaded, and a file of this name; not `needed`: both may be left out."""
    number = None if needed else "?"
    command.add_argument(
        "model", nargs=number, metavar="MODEL", help="shipped or built model, folder, or name on the hub"
    )
    command.add_argument(name, nargs=number, type=Path, metavar=name.upper(), help=text)
    add_loading(command)


def add_loading(command: argparse.ArgumentParser) -> None:
    """How a model is loaded."""
    add_wrapper(command)
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: the checkpoint's)",
    )
    command.add_argument(
        "--prepend-bos",
        choices=("yes", "no"),
        help="a BOS before every text, or none (default: as the model's tokenizer does by itself; a text's "
        "own BOS gets no second one, and chats get what their template writes)",
    )
    place = command.add_mutually_exclusive_group()
    place.add_argument("--device", help='such as "cuda" (default: a GPU if there is one)')
    place.add_argument(
        "--device-map", metavar="MAP", help='such as "auto": spread over all devices, and the rest offloaded'
    )


def add_wrapper(command: argparse.ArgumentParser) -> None:
    """Bridge is the default: so the numbers of a command stay those that it has given before."""
    command.add_argument(
        "--wrapper",
        choices=("bridge", "routed"),
        default="bridge",
        help="bridge (the default): a HookedMoE, TransformerLens' bridge; routed: a RoutedModel, the Hugging "
        "Face model as it is. Use one wrapper for all steps: their numbers differ by rounding",
    )


def add_spans(command: argparse.ArgumentParser) -> None:
    """Which tokens count, and how many run at a time."""
    command.add_argument("--span", help=SPANS)
    command.add_argument("--special-tokens", action="store_true", help="count special tokens too")
    command.add_argument("--batch-size", type=whole, help="prompts a forward, at most")
    command.add_argument(
        "--batch-tokens",
        type=whole,
        help="tokens a forward, at most (without either: 1024 on a CPU, 16384 on a GPU)",
    )


def add_sharing(command: argparse.ArgumentParser) -> None:
    """How several processes share the work."""
    command.add_argument(
        "--folder",
        type=Path,
        metavar="F",
        help="share the work with all processes that run this command with this folder, where their files go",
    )
    command.add_argument(
        "--unit", type=whole, metavar="N", help="with --folder: batches a file there (default: 8)"
    )


def add_random(command: argparse.ArgumentParser) -> None:
    """How many random sets, and which."""
    command.add_argument(
        "--n-random", type=whole, default=20, metavar="N", help="random sets of each kind (default: 20)"
    )
    command.add_argument("--seed", type=whole, default=0, help="of random sets and bootstrap (default: 0)")


def whole(text: str) -> int:
    """A whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def whole_or_all(text: str) -> int | str:
    """A whole number from 0 on, or "all"."""
    return text if text == "all" else whole(text)


def several(text: str) -> tuple[int, ...]:
    """Whole numbers between commas."""
    return tuple(whole(part.strip()) for part in text.split(","))
