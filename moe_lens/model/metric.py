"""A metric: what a run is judged by, a function of its logits that the user writes."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.errors import DataError

Metric = Callable[[Float[Tensor, "batch pos d_vocab"]], Any]
"""Logits of a run [batch pos d_vocab] -> one number, or one a prompt [batch], as the function says."""

TokenMetric = Callable[[Float[Tensor, "batch pos d_vocab"], Int[Tensor, "batch pos"]], Any]
"""Logits [batch pos d_vocab] and tokens [batch pos] -> a number a prompt [batch], as a loss needs them."""


def check_metric(metric: Any, takes: str = "the logits [batch pos d_vocab]") -> None:
    """Raise DataError for what cannot be called."""
    if not callable(metric):
        raise DataError(f"metric must be a function of {takes}; got {metric!r}.")
