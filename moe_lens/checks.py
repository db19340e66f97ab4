"""What arguments are asked: a whole number, padded tokens; and how a long one is shown in an error."""

import operator
from typing import Any

import numpy as np
from torch import Tensor

from moe_lens.errors import DataError, MoELensError


def as_index(number: Any) -> int | None:
    """An integer from 0 on (Python's, numpy's or torch's) as int; None for anything else, True included."""
    if isinstance(number, bool):
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


def looks_padded(tokenizer: Any, tokens: Any) -> bool:
    """Whether tokens [batch pos] begin or end with a padding token that stands for nothing else."""
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or not tokens.numel():
        return False
    pad, *marks = (getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "bos", "eos"))
    is_known = pad is not None and pad not in marks and not tokens.is_floating_point()
    return is_known and bool((tokens[:, [0, -1]] == pad).any())
