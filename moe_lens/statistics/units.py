"""Statistics by prompt: what scores that need more than counts resample, prompts being the units.

units = collect_by_prompt(model, prompts, outputs=True)      # RoutingStats of each prompt, in this order
saliency(units, "reap").low                                  # with intervals; saliency(sum(units)) has none
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moe_lens.checks import chosen_layers, whole_number
from moe_lens.errors import DataError
from moe_lens.resampling import interval_of
from moe_lens.shape import MoEShape
from moe_lens.statistics.sums import RoutingSums

Units = RoutingSums | Sequence[RoutingSums]
"""Statistics of all tokens; or a list, one for each independent unit (a prompt, or a cluster of prompts)."""
_OF_TOKENS: Final = ("co_routing", "per_prompt", "by_position")
"""Fields that scores of units do not need."""


def as_units(who: str, stats: Any) -> list[RoutingSums]:
    """The units; a single one for statistics of all tokens. Raises DataError, naming `who`, for others."""
    units = list(stats) if isinstance(stats, Iterable) else [stats]
    if not units or not all(isinstance(unit, RoutingSums) for unit in units):
        kinds = sorted({type(unit).__name__ for unit in units}) or ["nothing"]
        raise DataError(
            f"{who} needs RoutingStats, or a list of them, one for each prompt (collect_by_prompt); got "
            f"{', '.join(kinds)}."
        )
    for unit in units[1:]:
        if differences := units[0].shape.differences(unit.shape):
            raise DataError(f"{who}: the units are of different models: {'; '.join(differences)}.")
    return units


def summed(units: Sequence[RoutingSums]) -> RoutingSums:
    """The statistics of all units together, without the tables that only single tokens need."""
    return sum((unit.without(*_OF_TOKENS) for unit in units[1:]), units[0].without(*_OF_TOKENS))


def with_interval(
    formula: Callable[..., np.ndarray],
    tables: Sequence[np.ndarray],
    *,
    informs: Bool[np.ndarray, "unit *value"] | None = None,
    limits: tuple[float, float] = (-np.inf, np.inf),
    level: float,
    n_resamples: int,
    seed: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a formula gives for the sums of all units, and its interval; None, None for a single unit.

    Where a single unit informs a value, its bounds are NaN.

    Args:
        formula: of the summed tables, [resample *columns] each, to [resample *value].
        tables: [unit *columns] each.
        informs, limits: as in `interval_of`.
    """
    low, high = interval_of(
        formula, tables, informs=informs, limits=limits, level=level, n_resamples=n_resamples, seed=seed
    )
    if len(tables[0]) < 2:
        return of_all(formula, tables), None, None
    return of_all(formula, tables), torch.from_numpy(low), torch.from_numpy(high)


def of_all(formula: Callable[..., np.ndarray], tables: Sequence[np.ndarray]) -> Tensor:
    """What a formula gives for the sums of all units."""
    with np.errstate(divide="ignore", invalid="ignore"):
        sums = (np.asarray(table, dtype=np.float64).sum(0, keepdims=True) for table in tables)
        return torch.from_numpy(np.asarray(formula(*sums)[0]))


def first_experts(
    values: Float[Tensor, "layer expert"],
    shape: MoEShape,
    n: int,
    *,
    largest: bool = True,
    each_layer: bool = False,
    layers: Any = None,
    without: Iterable[tuple[int, int]] = (),
) -> list[tuple[int, int]]:
    """The n experts, as (layer, expert), with the largest or smallest values; ties in order.

    >>> values = torch.tensor([[0.1, 0.4], [0.3, 0.2]])
    >>> shape = MoEShape("m", layers=(0, 3), n_experts=2, top_k=1)
    >>> first_experts(values, shape, 2), first_experts(values, shape, 1, largest=False, each_layer=True)
    ([(0, 1), (3, 0)], [(0, 0), (3, 1)])

    Args:
        values: NaN is passed over.
        each_layer: n experts of every layer, instead of n in all.
        layers: choose among these; numbers, or "early", "middle", "late".
        without: experts that are not chosen.

    Raises:
        DataError: fewer experts than that, or layers that are not there.
    """
    number, left_out = whole_number(n, "n", least=1), set(without)
    among = chosen_layers(layers, shape.layers)
    ranked = sorted(
        (
            (-value if largest else value, layer, expert)
            for layer, row in zip(shape.layers, values.tolist(), strict=True)
            for expert, value in enumerate(row)
            if layer in among and value == value and (layer, expert) not in left_out
        ),
        key=lambda item: item[0],
    )
    groups = [[item for item in ranked if item[1] == layer] for layer in among] if each_layer else [ranked]
    if (fewest := min(len(group) for group in groups)) < number:
        raise DataError(f"n={number}, but only {fewest} experts{' of a layer' * each_layer} can be chosen.")
    return [(layer, expert) for group in groups for _, layer, expert in group[:number]]
