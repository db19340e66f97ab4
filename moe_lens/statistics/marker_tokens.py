"""Which experts go with marker tokens ("<think>", "Wait"): normalised pointwise mutual information.

stats = collect_routing(model, prompts, vocabulary=True)
npmi(stats, ["<think>", "</think>"], tokenizer=model.tokenizer).top(2)      # (layer, expert)
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from moe_lens.checks import as_index
from moe_lens.errors import DataError
from moe_lens.results import Result, columns
from moe_lens.shape import MoEShape
from moe_lens.statistics.sums import RoutingSums
from moe_lens.statistics.units import Units, as_units, first_experts, of_all, with_interval

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, repr=False)
class MarkerScores(Result):
    """How much each expert goes with marker tokens, in [-1, 1]; float64.

    Attributes:
        shape: the model; rows are `shape.layers`.
        tokens: ids of the markers.
        values: [layer expert], mean over the markers; NaN for an expert that was never chosen.
        by_token: [token layer expert], of each marker.
        low, high: interval of `values` over prompts; None where the statistics are not by prompt, NaN where
            a single prompt chose the expert, or holds a marker.
        n_units: independent units.
        level: of the intervals.
    """

    shape: MoEShape
    tokens: tuple[int, ...]
    values: Float[Tensor, "layer expert"]
    by_token: Float[Tensor, "token layer expert"]
    low: Float[Tensor, "layer expert"] | None
    high: Float[Tensor, "layer expert"] | None
    n_units: int
    level: float

    def top(self, n: int, *, layers: Any = None) -> list[tuple[int, int]]:
        """The n experts with the largest values, as (layer, expert); RICE multiplies the weights of two."""
        return first_experts(self.values, self.shape, n, layers=layers)

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per expert: layer, expert, npmi, low, high."""
        import pandas

        table = columns(npmi=self.values, low=self.low, high=self.high)
        return pandas.DataFrame({**self.shape.grid(), **table})

    def summary(self) -> str:
        """The first expert, the number of markers, and the model."""
        ((layer, expert),) = self.top(1)
        value = float(self.values[self.shape.layers.index(layer), expert])
        return f"L{layer}E{expert} {value:+.2f} first; {len(self.tokens)} marker tokens; {self.shape.words}"


def npmi(
    stats: Units,
    tokens: Iterable[int | str],
    *,
    tokenizer: Any = None,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> MarkerScores:
    """Normalised pointwise mutual information of experts and marker tokens (RICE, arXiv 2505.14681).

    >>> from moe_lens import collect_routing, npmi, organisms
    >>> model = organisms.load("specialised")
    >>> prompts = ["Question : what is", "Document : the"]
    >>> stats = collect_routing(model, prompts, vocabulary=True, progress=False)
    >>> found = npmi(stats, ["Question"], tokenizer=model.tokenizer)
    >>> found.values.shape, len(found.top(2))
    (torch.Size([4, 8]), 2)

    nPMI(x, e) = log₂[p(e | x) / p(e)] / −log₂ p(x, e), over counted tokens: p(e) is the share that chose
    expert e (so that a layer's p(e) sum to k), p(x, e) the share that are token x and chose e. It is 1 where
    x and e come only together, 0 where they are independent, −1 where they never meet. Where every token is
    x and chose e, it is 0 (there is nothing to be learnt). Of several markers it is the mean over them: how
    the paper joins them was not read.

    Counts of a few occurrences make it large for any expert, and its interval too short (where an expert met
    a marker fewer than ten times; docs/methods.md has numbers): take markers that come often. A marker that
    always stands at one place, such as the first, also marks that place.

    Args:
        stats: from `collect_routing(..., vocabulary=True)`; or a list, one a prompt, from
            `collect_by_prompt(..., vocabulary=True)`, for intervals.
        tokens: ids; or texts that are single tokens, which need the tokenizer.
        tokenizer: of the model, for texts.
        level: confidence level of the intervals.
        n_resamples: bootstrap resamples of the units.
        seed: the same seed gives the same intervals.

    Raises:
        DataError: statistics without a vocabulary, no tokens, one named twice, one that no counted text
            holds, or a text that is not one token.
    """
    units = as_units("npmi", stats)
    ids = _ids(tokens, tokenizer)
    both = np.stack([_met(unit, ids) for unit in units])  # [unit token layer expert]
    marked = np.stack([_seen(unit, ids) for unit in units])  # [unit token]
    if len(unseen := np.flatnonzero(marked.sum(0) == 0)):
        raise DataError(
            f"Token {ids[unseen[0]]} comes nowhere among the counted tokens; count texts (and spans) that "
            "hold it."
        )
    chosen = np.stack([unit.counts.numpy() for unit in units]).astype(np.float64)
    counted = np.array([unit.n_tokens for unit in units], dtype=np.float64)
    tables = [both, marked, chosen, counted]
    values, low, high = with_interval(
        lambda *sums: _npmi(*sums).mean(1),
        tables,
        informs=_informing(marked, chosen),
        limits=(-1.0, 1.0),
        level=level,
        n_resamples=n_resamples,
        seed=seed,
    )
    return MarkerScores(
        units[0].shape, tuple(ids), values, of_all(_npmi, tables), low, high, len(units), level
    )


def _npmi(
    both: Float[np.ndarray, "draw token layer expert"],
    marked: Float[np.ndarray, "draw token"],
    chosen: Float[np.ndarray, "draw layer expert"],
    counted: Float[np.ndarray, "draw"],
) -> Float[np.ndarray, "draw token layer expert"]:
    """NaN for experts that were not chosen, and tokens that a draw does not hold."""
    n = counted[:, None, None, None]
    joint, token, expert = both / n, marked[..., None, None] / n, chosen[:, None] / n
    values = np.log2(joint / (token * expert)) / -np.log2(joint)
    values = np.where(joint == 0, -1.0, np.where(joint == 1, 0.0, values))
    return np.where((expert == 0) | (token == 0), np.nan, values)


def _informing(
    marked: Float[np.ndarray, "unit token"], chosen: Float[np.ndarray, "unit layer expert"]
) -> Bool[np.ndarray, "unit layer expert"]:
    """Units that hold the rarest marker, or in which the expert ran, whichever are fewer."""
    held, ran = marked > 0, chosen > 0
    rarest = held[:, held.sum(0).argmin(), None, None]
    return np.where(ran.sum(0) < rarest.sum(0), ran, rarest)


def _met(unit: RoutingSums, ids: list[int]) -> Float[np.ndarray, "token layer expert"]:
    """How often each expert ran for each of these tokens."""
    table = unit.vocabulary
    if table is None:
        raise DataError("These statistics hold no counts by token; collect them with vocabulary=True.")
    found = np.zeros((len(ids), unit.counts.numel()))
    tokens, experts, counts = (part.numpy() for part in (table.tokens, table.experts, table.counts))
    for row, number in enumerate(ids):
        here = tokens == number
        found[row, experts[here]] = counts[here]
    return found.reshape(len(ids), *unit.counts.shape)


def _seen(unit: RoutingSums, ids: list[int]) -> Float[np.ndarray, "token"]:
    assert unit.vocabulary is not None
    totals = unit.vocabulary.totals.numpy()
    return np.array([totals[number] if number < len(totals) else 0 for number in ids], dtype=np.float64)


def _ids(tokens: Any, tokenizer: Any) -> list[int]:
    """The markers' ids."""
    if isinstance(tokens, str) or not isinstance(tokens, Iterable):
        raise DataError(f"tokens must be a list of ids or texts; got {tokens!r}.")
    ids: list[int] = []
    for token in tokens:
        number = as_index(token)
        if number is None and isinstance(token, str):
            number = _id_of(token, tokenizer)
        if number is None:
            raise DataError(f"tokens must be ids from 0 on, or texts; got {token!r}.")
        ids.append(number)
    if not ids or len(set(ids)) < len(ids):
        raise DataError(f"tokens must name at least one marker, each once; got ids {ids}.")
    return ids


def _id_of(text: str, tokenizer: Any) -> int:
    if tokenizer is None:
        raise DataError(f"The marker {text!r} is text; pass tokenizer=model.tokenizer, or token ids.")
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise DataError(
            f"The marker {text!r} is {len(ids)} tokens; name single ones (a space before the word may make "
            "it one), or give ids."
        )
    if ids[0] == tokenizer.unk_token_id and text != tokenizer.unk_token:
        raise DataError(f"The tokenizer does not know the marker {text!r}.")
    return int(ids[0])
