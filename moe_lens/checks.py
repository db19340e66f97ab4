"""What arguments are asked: a whole number, padded tokens; and how a long one is shown in an error."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_lens.errors import DataError, MoELensError


def as_index(number: Any) -> int | None:
    """An integer from 0 on (Python's, numpy's or torch's) as int; None for anything else, every True, too."""
    if isinstance(number, bool | np.bool_) or (isinstance(number, Tensor) and number.dtype == torch.bool):
        return None
    try:
        index = operator.index(number)
    except (TypeError, ValueError, RuntimeError):
        return None
    return index if index >= 0 else None


def whole_number(
    value: Any,
    name: str,
    least: int = 0,
    most: int | None = None,
    *,
    error: type[MoELensError] = DataError,
    remedy: str = "",
) -> int:
    """A whole number from `least` on (Python's, numpy's or torch's) as int; True and False are none.

    >>> whole_number(8, "batch_size", least=1)
    8

    Args:
        name: of the argument, for the error.
        most: the largest number allowed; None for any.
        remedy: a further sentence for the error.

    Raises:
        `error`: for anything else.
    """
    number = as_index(value)
    if number is None or number < least or (most is not None and number > most):
        end = "on" if most is None else f"to {most}"
        raise error(
            f"{name} must be a whole number from {least} {end}; got {short(value)}.{remedy and ' '}{remedy}"
        )
    return number


def share(value: Any, name: str, *, error: type[MoELensError] = DataError, remedy: str = "") -> float:
    """A number between 0 and 1, both excluded, as float.

    >>> share(0.95, "level")
    0.95

    Raises:
        `error`: for anything else.
    """
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not is_number or not 0 < value < 1:
        raise error(f"{name} must be a number between 0 and 1; got {short(value)}.{remedy and ' '}{remedy}")
    return float(value)


def short(thing: Any) -> str:
    """`repr`, at most 80 characters."""
    text = repr(thing)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_text(text: str, what: str) -> None:
    """Raise DataError for a text with a lone surrogate: half a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} holds {text[error.start]!r} at character {error.start}: half of a character, which is "
            "no text. Take it out, or put U+FFFD there: "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
        ) from error


def numbers_of(given: Any, what: str) -> list[int]:
    """A number from 0 on, or several, as a list. Raises DataError, naming `what`, for anything else."""
    single = as_index(given)
    try:
        found = [single] if single is not None else [as_index(number) for number in given]
    except TypeError:
        found = [None]
    numbers = [number for number in found if number is not None]
    if not found or len(numbers) < len(found):
        raise DataError(f"{what} must be numbers from 0 on, at least one; got {given!r}.")
    return numbers


def chosen_layers(layers: Any, among: Sequence[int]) -> list[int]:
    """Layers that somebody names, in that order; None: all.

    >>> chosen_layers(slice(2, None), [1, 2, 5]), chosen_layers([5, 1], [1, 2, 5])
    ([2, 5], [5, 1])
    >>> [chosen_layers(name, range(8)) for name in ("early", "middle", "late")]
    [[0, 1], [2, 3, 4, 5], [6, 7]]

    Args:
        layers: a number, several (a list, range, tensor or array), or a slice of numbers. Or a third of them
            by name: "early" and "late", ⌊n / 3⌋ of n layers each, and "middle", the others between them.
        among: those that can be named.

    Raises:
        DataError: none, one named twice, or one that is not there.
    """
    if isinstance(layers, str):
        return _third(layers, among)
    if isinstance(layers, slice):
        wanted = range(*layers.indices(max(among) + 1))
        layers = [layer for layer in wanted if layer in among]
    found = list(among) if layers is None else [as_index(layer) for layer in _several(layers, "layers")]
    known = [layer for layer in found if layer is not None and layer in among]
    if not found or len(set(known)) < len(found):
        raise DataError(f"layers must name some of the layers {list(among)}, each once; got {short(layers)}.")
    return known


def _third(name: str, among: Sequence[int]) -> list[int]:
    """The layers of this part of the model, ascending."""
    ordered = sorted(among)
    third = len(ordered) // 3
    parts = {
        "early": ordered[:third],
        "middle": ordered[third : len(ordered) - third],
        "late": ordered[len(ordered) - third :] if third else [],
    }
    if name not in parts:
        raise DataError(f"layers must be numbers of MoE layers, or {', '.join(parts)}; got {name!r}.")
    if not parts[name]:
        raise DataError(f"{len(ordered)} layers have no third to be called {name!r}; name them by number.")
    return parts[name]


def chosen_positions(positions: Any, n_pos: int) -> list[int]:
    """Positions that somebody names, as places from the start, in that order; None: all.

    >>> chosen_positions([0, -1], 5), chosen_positions(slice(3, None), 5)
    ([0, 4], [3, 4])

    Args:
        positions: a number, several (a list, range, tensor or array), or a slice; negative ones count
            from the end.
        n_pos: of the prompt.

    Raises:
        DataError: none, one named twice, or one outside the prompt.
    """
    if positions is None or isinstance(positions, slice):
        found: list[int | None] = list(range(n_pos)[positions or slice(None)])
    else:
        found = [_place(position, n_pos) for position in _several(positions, "positions")]
    places = [place for place in found if place is not None]
    if not found or len(set(places)) < len(found):
        raise DataError(
            f"positions must be whole numbers from {-n_pos} to {n_pos - 1}, each position once, for a prompt "
            f"of {n_pos} tokens; got {short(positions)}."
        )
    return places


def _several(given: Any, name: str) -> list[Any]:
    """What may be one number, as a list."""
    if isinstance(given, str):
        raise DataError(f"{name} must be numbers; got {short(given)}.")
    try:
        return [given] if getattr(given, "ndim", None) == 0 else list(given)
    except TypeError:
        return [given]


def _place(position: Any, n_pos: int) -> int | None:
    if isinstance(position, bool):
        return None
    try:
        number = operator.index(position)
    except (TypeError, ValueError, RuntimeError):
        return None
    return number % n_pos if -n_pos <= number < n_pos else None


def pads_exactly(model: Any) -> bool:
    """Whether a prompt that is padded on the left has the numbers in this model that it has alone.

    DeepSeek-V4's attention has others, in Hugging Face's own forward.
    """
    config = getattr(getattr(model, "original_model", None), "config", None)
    return getattr(config, "model_type", None) != "deepseek_v4"


def padding_at_ends(pad: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """With how many padding tokens each of the rows [batch pos] begins, and ends: int64 [batch] each."""
    is_pad = rows == pad
    return is_pad.long().cumprod(1).sum(1), is_pad.flip(1).long().cumprod(1).sum(1)


def pads_only(tokenizer: Any) -> bool:
    """Whether the padding token stands for nothing else."""
    pad, *others = (getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "unk"))
    return pad is not None and pad not in others


def may_be_padded(tokenizer: Any, tokens: Any) -> bool:
    """Whether tokens [batch pos] have padding at their ends, or what cannot be told from it.

    That is a padding token there which stands for nothing else; or one that does, of which rows begin or end
    with different numbers.
    """
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None or not isinstance(tokens, Tensor) or tokens.is_floating_point() or not tokens.numel():
        return False
    before, after = padding_at_ends(pad, tokens if tokens.ndim == 2 else tokens.reshape(1, -1))
    if pads_only(tokenizer):
        return bool((before + after).any())
    return bool((before != before[0]).any() or (after != after[0]).any())


def looks_padded(tokenizer: Any, tokens: Any) -> bool:
    """Whether tokens [batch pos] begin or end with a padding token that stands for nothing else."""
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or not tokens.numel():
        return False
    pad, *marks = (getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "bos", "eos"))
    is_known = pad is not None and pad not in marks and not tokens.is_floating_point()
    return is_known and bool((tokens[:, [0, -1]] == pad).any())
