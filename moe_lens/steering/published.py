"""`read_published_ranking`: the SteerMoE authors' result files, and their selection of experts.

ranking = read_published_ranking("risk_diff.pkl", shape=model.moe_shape)
plan = ranking.plan(n_deactivate=50, on_excess="drop")

Such a file is a pickled table. A pickle is a program, and `pandas.read_pickle` runs it; here nothing is ever
called, imported or built: the program is read as data, and the columns of counts are decoded from its bytes.
"""

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from jaxtyping import Float, Int, Shaped

from moe_lens.checks import as_index, whole_number
from moe_lens.detection.expert_scores import ExpertScore
from moe_lens.errors import DataError, PlanError, warn
from moe_lens.results import Result
from moe_lens.shape import UNKNOWN_MODEL, MoEShape
from moe_lens.steering.candidates import check_asks_for_some
from moe_lens.steering.choosing import OnExcess, select
from moe_lens.steering.pickled_table import read_columns
from moe_lens.steering.plan import SteeringPlan
from moe_lens.steering.survival import SelectionSurvival, survival

if TYPE_CHECKING:
    import pandas

COUNTS: Final = ("layer", "expert", "a1", "a2", "d1", "d2")
"""The columns that a file must have."""
SCORES: Final = ("risk_diff", "risk_diff_abs")
"""Columns that are compared with the counts where a file has them."""
_MAX_COUNT: Final = 2**40
_TOLERANCE: Final = 1e-6


@dataclass(frozen=True, eq=False, repr=False)
class PublishedRanking(Result):
    """The counts of a published result file, in the file's order; `read_published_ranking` makes it.

    >>> import pandas as pd
    >>> from moe_lens.steering import read_published_ranking
    >>> pd.DataFrame({
    ...     "layer": [0, 0, 0, 0], "expert": [0, 1, 2, 3],
    ...     "a1": [9, 5, 3, 3], "d1": [1, 5, 7, 7],      # with the document: active, not active
    ...     "a2": [1, 7, 6, 6], "d2": [9, 3, 4, 4],      # without it
    ... }).to_pickle("ranking.pkl")
    >>> ranking = read_published_ranking("ranking.pkl")
    >>> ranking.shape.top_k, [round(float(delta), 3) for delta in ranking.delta]
    (2, [0.8, -0.2, -0.3, -0.3])
    >>> ranking.plan(n_activate=1, n_deactivate=2).deactivate            # of a tie, the file's first
    ((0, 2), (0, 3))

    Attributes:
        shape: the model that the counts are of, as far as it is known.
        layer: [row], int64, layer numbers of the model.
        expert: [row], int64.
        a1: [row], int64, tokens of the first condition at which the expert was active.
        a2: [row], int64, tokens of the second condition at which it was.
        d1: [row], int64, tokens of the first condition at which it was not.
        d2: [row], int64, tokens of the second condition at which it was not.
    """

    shape: MoEShape
    layer: Int[np.ndarray, "row"]
    expert: Int[np.ndarray, "row"]
    a1: Int[np.ndarray, "row"]
    a2: Int[np.ndarray, "row"]
    d1: Int[np.ndarray, "row"]
    d2: Int[np.ndarray, "row"]

    @property
    def delta(self) -> Float[np.ndarray, "row"]:
        """[row], float64, in [-1, 1]: the risk difference, a1 / (a1 + d1) − a2 / (a2 + d2)."""
        return self.a1 / (self.a1 + self.d1) - self.a2 / (self.a2 + self.d2)

    def ranked(self) -> list[ExpertScore]:
        """All experts by |delta|, the largest first; ties in the file's order."""
        delta = self.delta
        order = np.argsort(-np.abs(delta), kind="stable")
        return [ExpertScore(int(self.layer[row]), int(self.expert[row]), float(delta[row])) for row in order]

    def plan(
        self,
        n_activate: int = 0,
        n_deactivate: int = 0,
        *,
        opposite: bool = False,
        on_excess: OnExcess = "raise",
        epsilon: float = 0.01,
        reverse: bool | None = None,
    ) -> SteeringPlan:
        """The plan of the authors' selection (arXiv 2509.09660): the most positive and most negative delta.

        Rows are sorted by |delta|, ties in the file's order (the authors' own sort promises none); as there,
        float64 decides what is a tie. An expert whose delta is 0 is never chosen.

        Args:
            n_activate: how many experts to promote.
            n_deactivate: how many experts to keep out.
            opposite: for the opposite contrast; delta is negated first, as the authors' `reversed` does.
            on_excess: with more than k activated or E − k deactivated experts in a layer, "raise", or "drop"
                those of lower rank with a warning. The authors drop activations beyond k without a word.
            epsilon: of the plan.
            reverse: what `opposite` was called in version 0.1; it still works.

        Raises:
            PlanError: no expert asked for, more than have the sign, an excess, or an argument out of range.
        """
        opposite = opposite if reverse is None else reverse
        if not isinstance(opposite, bool):
            raise PlanError(f"opposite must be True or False; got {opposite!r}.")
        sign = -1 if opposite else 1
        n_on = whole_number(n_activate, "n_activate", error=PlanError)
        n_off = whole_number(n_deactivate, "n_deactivate", error=PlanError)
        check_asks_for_some(n_on, n_off, "n_activate= or n_deactivate=")
        chosen = select(
            [score._replace(delta=sign * score.delta) for score in self.ranked()],
            n_on,
            n_off,
            self.shape,
            on_excess=on_excess,
        )
        return SteeringPlan(*chosen, epsilon, self.shape)

    def survival(
        self,
        n_activate: int = 0,
        n_deactivate: int = 0,
        *,
        opposite: bool = False,
        design_effect: float = 1.0,
        n_draws: int = 1000,
        seed: int = 0,
    ) -> SelectionSurvival:
        """Which experts of the selection would be selected again, if counts were what chance makes of them.

        Counts are drawn anew, binomial with the published rates and numbers of tokens, and the selection is
        made again. Tokens of a prompt are alike, which makes differences vary more than that, and pairs of
        prompts that share tokens make them vary less: give the ratio of both variances as `design_effect` (a
        run of your own can tell it). The largest of many published differences are larger than the true ones,
        so a selection looks steadier than it is, whatever the design effect.

        Args:
            n_activate: how many experts the selection promotes.
            n_deactivate: how many it keeps out.
            opposite: as in `plan`.
            design_effect: how many tokens are worth one, above 0.
            n_draws: how often counts are drawn.
            seed: of the draws.

        Raises:
            PlanError: no expert asked for, or more than have the sign.
            DataError: an argument out of range.
        """
        return survival(
            self,
            n_activate,
            n_deactivate,
            opposite=opposite,
            design_effect=design_effect,
            n_draws=n_draws,
            seed=seed,
        )

    def summary(self) -> str:
        """How many experts of which model are ranked."""
        shape = self.shape
        return (
            f"{len(self.layer)} experts: {shape.n_experts} in each of {len(shape.layers)} layers of "
            f"{shape.model}, k = {shape.top_k}"
        )

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row an expert, in the file's order: layer, expert, the four counts, p1, p2 and delta."""
        import pandas as pd

        table = pd.DataFrame({name: getattr(self, name) for name in COUNTS})
        rates = {"p1": self.a1 / (self.a1 + self.d1), "p2": self.a2 / (self.a2 + self.d2)}
        return table.assign(**rates, delta=self.delta)


def read_published_ranking(
    path: str | os.PathLike[str],
    *,
    shape: MoEShape | None = None,
    layers: Mapping[int, int] | Iterable[int] | None = None,
    top_k: int | None = None,
    model: str = UNKNOWN_MODEL,
) -> PublishedRanking:
    """Read a result file of SteerMoE (arXiv 2509.09660) without running anything in it.

    >>> import pandas as pd
    >>> from moe_lens.steering import read_published_ranking
    >>> counts = {"a1": [3, 1], "d1": [1, 3], "a2": [2, 2], "d2": [2, 2]}
    >>> pd.DataFrame({"layer": [0, 0], "expert": [0, 1], **counts}).to_csv("ranking.csv")
    >>> read_published_ranking("ranking.csv", layers=[1]).plan(n_activate=1).activate
    ((1, 0),)

    A file is a DataFrame pickled by pandas 1.0 to 3 (protocols 0 to 5, also gzipped), or a table of the same
    columns whose name ends in .csv or .csv.gz. Anything that such a DataFrame does not hold is refused by
    name. To convert a pickle that is refused, on a machine where its code may run:
    `pandas.read_pickle(path).to_csv("ranking.csv", index=False)`.

    Args:
        path: the file. Columns layer, expert, a1, a2, d1, d2; risk_diff and risk_diff_abs are compared with
            the counts where they exist, others are not read.
        shape: of the model to steer, `model.moe_shape`; the file is checked against it.
        layers: which layer of the model each layer number of the file means: a mapping, or the model's layer
            numbers in the order of the file's. The authors' code counts MoE layers from 0, so for a model
            whose first layers are dense pass `layers=model.moe_shape.layers`. Without it, the numbers must be
            those of `shape`, or go 0, 1, 2, ...; models where they do not mean the same then refuse the plan.
        top_k: experts per token, where the counts do not tell (they do if every token chose k experts).
        model: name of the model, where `shape` is not given.

    Raises:
        DataError: a file that cannot be read, holds anything but such a table, or whose counts contradict
            themselves, its risk_diff column, or what the arguments say. It names the file and the remedy.
    """
    if not isinstance(path, str | os.PathLike):
        raise DataError(f"path must name a file; got {type(path).__name__}.")
    if shape is not None and not isinstance(shape, MoEShape):
        raise DataError(f"shape must be a MoEShape, such as model.moe_shape; got {type(shape).__name__}.")
    try:
        counts, scores = _checked_columns(read_columns(Path(path), (*COUNTS, *SCORES)))
        grid = _checked_grid(counts)
        k = _experts_per_token(grid, shape.top_k if shape is not None and top_k is None else top_k)
        counts["layer"] = _model_layers(counts["layer"], layers, shape)
        of_counts = MoEShape(
            shape.model if shape is not None and model == UNKNOWN_MODEL else model,
            tuple(np.unique(counts["layer"]).tolist()),
            grid["expert"].shape[1],
            k,
        )
        if shape is not None and (misfits := of_counts.misfits(shape)):
            raise DataError(f"it is about another model than shape= (file / shape): {'; '.join(misfits)}.")
        for column in counts.values():
            column.flags.writeable = False
        ranking = PublishedRanking(of_counts, **counts)
        _check_scores(ranking.delta, scores)
    except DataError as error:
        raise DataError(f"{path} cannot be read as a published ranking: {error}") from error
    return ranking


# From a table to counts that belong together.


def _checked_columns(columns: dict[str, Shaped[np.ndarray, "row"]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The counts as int64 and the scores as float64, by name; every column as long as the others."""
    if missing := [name for name in COUNTS if name not in columns]:
        raise DataError(f"column {missing[0]!r} is missing; needed are {', '.join(COUNTS)}.")
    if len({len(column) for column in columns.values()}) > 1 or not len(columns["layer"]):
        raise DataError("its columns are empty or of different lengths.")
    counts = {name: _whole_numbers(name, columns[name]) for name in COUNTS}
    scores = {name: _numbers(name, columns[name]) for name in SCORES if name in columns}
    return counts, scores


def _numbers(name: str, column: Shaped[np.ndarray, "row"]) -> Float[np.ndarray, "row"]:
    """The column in float64; every entry a finite number, in a column of numbers or of Python objects."""
    if column.dtype.kind in "iuf":
        numbers = column.astype(np.float64)
    elif column.dtype.kind == "O":
        numbers = np.array([_number(entry) for entry in column], np.float64)
    else:
        raise DataError(f"column {name!r} holds {column.dtype.name}, not numbers.")
    if (bad := np.flatnonzero(~np.isfinite(numbers))).size:
        raise DataError(f"column {name!r}, row {bad[0]}: no finite number.")
    return numbers


def _number(entry: Any) -> float:
    """A Python number, True and False excepted, as float; NaN for anything else."""
    small = type(entry) is float or (type(entry) is int and abs(entry) <= _MAX_COUNT)
    return float(entry) if small else math.nan


def _whole_numbers(name: str, column: Shaped[np.ndarray, "row"]) -> Int[np.ndarray, "row"]:
    numbers = _numbers(name, column)
    wrong = (numbers < 0) | (numbers > _MAX_COUNT) | (numbers != np.floor(numbers))
    if (bad := np.flatnonzero(wrong)).size:
        number = f"{numbers[bad[0]]:g}"
        raise DataError(f"column {name!r}, row {bad[0]}: {number} is not a whole number from 0 on.")
    return numbers.astype(np.int64)


def _checked_grid(counts: dict[str, Int[np.ndarray, "row"]]) -> dict[str, Int[np.ndarray, "layer expert"]]:
    """The counts by layer and expert; every pair once, one number of tokens a layer and condition."""
    pairs = list(zip(counts["layer"].tolist(), counts["expert"].tolist(), strict=True))
    if repeated := [pair for pair, number in Counter(pairs).items() if number > 1]:
        raise DataError(f"{repeated[0]} (layer, expert) has more than one row.")
    n_experts = int(counts["expert"].max()) + 1
    for layer, present in Counter(layer for layer, _ in pairs).items():
        if present != n_experts:
            raise DataError(f"layer {layer} has {present} experts, but experts go up to {n_experts - 1}.")
    order = np.lexsort((counts["expert"], counts["layer"]))
    grid = {name: column[order].reshape(-1, n_experts) for name, column in counts.items()}
    for condition in "12":
        tokens = grid[f"a{condition}"] + grid[f"d{condition}"]
        low, high = tokens.min(axis=1), tokens.max(axis=1)
        if (bad := np.flatnonzero((low != high) | (low == 0))).size:
            raise DataError(
                f"layer {grid['layer'][bad[0], 0]}: a{condition} + d{condition} must be one number of tokens "
                f"above 0 for all its experts; it goes from {low[bad[0]]} to {high[bad[0]]}."
            )
    return grid


def _experts_per_token(grid: dict[str, Int[np.ndarray, "layer expert"]], given: int | None) -> int:
    """k: every token adds one to k of a layer's experts, so the counts a of a layer sum to k × tokens."""
    if given is not None:
        given = whole_number(given, "top_k", least=1)
    sums = [grid[f"a{condition}"].sum(axis=1) for condition in "12"]
    tokens = [(grid[f"a{condition}"] + grid[f"d{condition}"])[:, 0] for condition in "12"]
    rates = np.concatenate(sums) / np.concatenate(tokens)
    low, high = float(rates.min()), float(rates.max())
    counted = int(low) if low == high and low.is_integer() and low >= 1 else None
    if given is not None and counted not in (None, given):
        raise DataError(f"{counted} experts are active for every token, not the {given} of shape= or top_k=.")
    k = counted if given is None else given
    if k is None:
        raise DataError(
            f"between {low:g} and {high:g} experts are active for a token, depending on the layer: no k. If "
            "the model does so, pass top_k=."
        )
    return k


def _model_layers(
    layer: Int[np.ndarray, "row"], layers: Any, shape: MoEShape | None
) -> Int[np.ndarray, "row"]:
    """The model's layer number of every row; what the file's numbers mean must be known."""
    numbers: list[int] = np.unique(layer).tolist()
    if layers is None:
        if shape is not None and tuple(numbers) != shape.layers:
            raise DataError(
                f"its layers {_some(numbers)} are not the model's MoE layers {_some(shape.layers)}. If they "
                "are positions among them, pass layers=shape.layers; if not, a mapping to the model's."
            )
        if shape is None and numbers != list(range(len(numbers))):
            raise DataError(
                f"its layers {_some(numbers)} do not go 0, 1, 2, ...; say what they mean with "
                "shape=model.moe_shape, or with layers=."
            )
        return layer
    names = _layer_names(numbers, layers)
    if None in names.values() or len(set(names.values())) < len(names) or set(names) != set(numbers):
        raise DataError(
            f"layers= must give each layer {_some(numbers)} of the file a layer of its own; got {layers!r}."
        )
    return np.array([names[number] for number in layer.tolist()], np.int64)


def _layer_names(numbers: list[int], layers: Any) -> dict[int, int | None]:
    if isinstance(layers, Mapping):
        return {number: as_index(layers[number]) for number in layers}
    try:
        return {number: as_index(name) for number, name in zip(numbers, layers, strict=True)}
    except (TypeError, ValueError):
        return {}


def _some(numbers: Iterable[int]) -> str:
    """The first and the last of many layer numbers."""
    shown = list(map(str, numbers))
    return ", ".join(shown if len(shown) <= 6 else [*shown[:3], "...", shown[-1]])


def _check_scores(delta: Float[np.ndarray, "row"], scores: dict[str, Float[np.ndarray, "row"]]) -> None:
    """The file's own scores must be those of its counts, and put the experts in the same order."""
    for name, stated in scores.items():
        expected = np.abs(delta) if name == "risk_diff_abs" else delta
        if (bad := np.flatnonzero(np.abs(stated - expected) > _TOLERANCE)).size:
            row = bad[0]
            raise DataError(
                f"column {name!r}, row {row}: {stated[row]:.7g}, but the counts give {expected[row]:.7g}: "
                "not one table. To go by the counts, take the column out."
            )
        ranks, stated_ranks = (np.argsort(-np.abs(column), kind="stable") for column in (delta, stated))
        other_signs = name == "risk_diff" and not np.array_equal(np.sign(stated), np.sign(delta))
        if other_signs or not np.array_equal(ranks, stated_ranks):
            warn(
                f"column {name!r} is rounded and orders experts otherwise than the counts do; plans follow "
                "the counts."
            )
