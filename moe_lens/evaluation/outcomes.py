"""What an evaluation of steering measured: outcomes of every condition, and the statistics of their gap.

`SteeringOutcomes` is what a `SteeringReport` (report.py) knows; verdict.py puts it into words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import inf, isfinite, nan
from typing import Any, Final, NamedTuple

import numpy as np
from jaxtyping import Float

from moe_lens.checks import share, whole_number
from moe_lens.errors import DataError, warn
from moe_lens.resampling import bounds_of, cluster_weights, clustered_interval
from moe_lens.results import Result
from moe_lens.steering.controls import share_experts
from moe_lens.steering.plan import SteeringPlan

DIRECTIONS: Final = ("+", "-")
"""The plan's own direction, and the opposite one."""
LAYER_MATCHED: Final = "layer-matched"
ANY_LAYER: Final = "any layer"
ROUNDING: Final = 1e-12
"""Zeros and ones often tie, and a difference of exactly 0 may come out a little above it."""
_N_RESAMPLES: Final = 1000
_MINUS_SIGN: Final = "−"


def direction_of(name: Any) -> str:
    """The direction "+" or "-"; a minus sign, with which version 0.1 wrote "-", is read as a hyphen.

    Raises:
        DataError: anything else.
    """
    direction = "-" if name == _MINUS_SIGN else name
    if direction not in DIRECTIONS:
        raise DataError(f'There is no direction {name!r}; give "+" or "-".')
    return direction


class ByDirection(dict[str, Any]):
    """What belongs to "+" and to "-"; a minus sign, which code of version 0.1 asks for, gets the latter.

    >>> both = ByDirection({"+": 1, "−": 2})
    >>> both["-"], both["−"], both
    (2, 2, {'+': 1, '-': 2})
    """

    def __init__(self, items: Any = ()) -> None:
        super().__init__({direction_of(name): item for name, item in dict(items).items()})

    def __contains__(self, name: Any) -> bool:
        return super().__contains__("-" if name == _MINUS_SIGN else name)

    def get(self, name: Any, default: Any = None) -> Any:
        """As of any dictionary."""
        return super().get("-" if name == _MINUS_SIGN else name, default)

    def __missing__(self, name: Any) -> Any:
        direction = direction_of(name)
        if direction == name:
            raise KeyError(name)
        return self[direction]


@dataclass(frozen=True, eq=False, repr=False)
class Outcome(Result):
    """What a model does under one plan.

    Attributes:
        values: [prompt], the behaviour.
        collateral: name -> what should not suffer.
    """

    values: Float[np.ndarray, "prompt"]
    collateral: Mapping[str, float]

    @property
    def rate(self) -> float:
        """Mean behaviour: a share in [0, 1] where the values are zeros and ones."""
        return float(self.values.mean())

    def summary(self) -> str:
        """Mean behaviour, and what should not suffer."""
        parts = [f"mean {self.rate:.3g} over {len(self.values)} prompts"]
        return ", ".join([*parts, *(f"{name} {value:.3g}" for name, value in self.collateral.items())])


SATURATED: Final = 0.95
"""A condition sits at an extreme value if at least this share of its prompts has it."""


def saturation_of(outcomes: Sequence[Outcome]) -> str | None:
    """Why a measure tells no condition from another, by what it gave under all of them.

    >>> ones, some = np.ones(40), np.ones(40)
    >>> some[0] = 0.0
    >>> saturation_of([Outcome(ones, {}), Outcome(some, {})])
    'ceiling'

    Returns: "floor" or "ceiling" where at least 95 % of the prompts have its lowest or highest value under
        every condition; "constant" where no condition changes the value of any prompt; None: it has room.
    """
    values = np.stack([outcome.values for outcome in outcomes])  # [condition prompt]
    lowest, highest = values.min(), values.max()
    if lowest == highest:  # of zeros and ones it is known which of the two they are
        return {0.0: "floor", 1.0: "ceiling"}.get(float(lowest), "constant")
    for name, extreme in (("floor", lowest), ("ceiling", highest)):
        if ((values == extreme).mean(axis=1) >= SATURATED).all():
            return name
    return "constant" if (values == values[0]).all() else None


@dataclass(frozen=True)
class Limit:
    """How much worse a plan may make a collateral measure; infinite for no limit."""

    limit: float
    larger_is_worse: bool

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Limit":
        """As a file holds it, where null stands for no limit."""
        return cls(**{**content, "limit": inf if content["limit"] is None else content["limit"]})


def gap_p_value(plus: Sequence[float], minus: Sequence[float], *, joint: bool = False) -> float:
    """Exact p-value of the two-way gap `plus[0] − minus[0]` against the other sets of both lists.

    Under the null hypothesis the plan's set is exchangeable with the random sets of its own list, in each of
    the two lists independently. The gap is then one of the (M + 1)(M' + 1) differences plus[i] − minus[j],
    each as probable as the others, and p is the share of them that are at least as large (a permutation test
    over the product of two symmetric groups). It never falls below 1 / ((M + 1)(M' + 1)).

    Two plans that share experts are no independent draws: where the reverse is the plan with its roles
    swapped, one number decides the effects of both. Their random sets must then be drawn together, too, and
    with `joint` the gap is compared with the M gaps plus[i] − minus[i]; p is at least 1 / (M + 1). (Swapped
    plans that do nothing, against sets drawn for each alone, had p ≤ .05 in 8 to 11 % of simulations.)
    Plans that share none, but come from one ranking, depend on each other a little: where effects of experts
    add up, two plans of a quarter of the experts each have p ≤ .05 in 7 %, and both p-values of a report in
    5 %; of an eighth in 6 and 3 %.

    >>> gap_p_value([0.9, 0.5, 0.4], [0.1, 0.5, 0.6])
    0.1111111111111111
    >>> gap_p_value([0.9, 0.5, 0.4], [0.1, 0.5, 0.6], joint=True)
    0.3333333333333333

    Raises:
        DataError: no numbers under a direction, or some that are not finite; joint, and not as many under
            both.
    """
    x, y = np.asarray(plus, dtype=float), np.asarray(minus, dtype=float)
    if not len(x) or not len(y) or not np.isfinite([*x, *y]).all():
        raise DataError("gap_p_value needs finite numbers, at least one under each direction.")
    if joint and len(x) != len(y):
        raise DataError(f"Joint draws come in pairs; got {len(x)} numbers under + and {len(y)} under -.")
    gaps = x - y if joint else x[:, None] - y[None, :]
    return float((gaps >= x[0] - y[0] - 1e-12).mean())


class Excess(NamedTuple):
    """How far the two-way gap exceeds all but a share alpha of the gaps between random sets.

    `value` is the gap minus the (1 − alpha) quantile of the random sets' differences plus[i] − minus[j] (of
    joint draws, plus[i] − minus[i]);
    `low` and `high` are its bootstrap interval, the prompts' clusters resampled for plan and controls alike.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False, repr=False)
class SteeringOutcomes:
    """Outcomes under a plan and its opposite, beside those of random sets; what `SteeringReport` knows.

    Raises:
        DataError: as in `SteeringReport`.
    """

    task: str
    model: str
    plans: dict[str, SteeringPlan]
    clusters: tuple[str, ...]
    unsteered: Outcome
    steered: dict[str, Outcome]
    controls: dict[str, dict[str, list[Outcome]]]
    bottom: Outcome | None
    limits: dict[str, Limit]
    alpha: float
    level: float
    seed: int
    joint_controls: bool = False

    def __post_init__(self) -> None:
        for name in ("plans", "steered"):
            object.__setattr__(self, name, ByDirection(getattr(self, name)))
        controls = {kind: ByDirection(both) for kind, both in self.controls.items()}
        object.__setattr__(self, "controls", controls)
        kinds, sides = {LAYER_MATCHED, ANY_LAYER}, set(DIRECTIONS)
        by_direction = [self.plans, self.steered, *controls.values()]
        if set(controls) != kinds or any(set(both) != sides for both in by_direction):
            raise DataError(f"A report needs both directions {DIRECTIONS}, with controls {sorted(kinds)}.")
        self._check_outcomes()
        for name in ("alpha", "level"):
            object.__setattr__(self, name, share(getattr(self, name), name))
        object.__setattr__(self, "seed", whole_number(self.seed, "seed"))
        if share_experts(*self.plans.values()) and not self.joint_controls:
            warn(
                "Plan and reverse share experts, but their random sets were drawn for each alone, as "
                "older versions did, so p-values may be too small. Evaluate again."
            )

    def _check_outcomes(self) -> None:
        random = [outcomes for both in self.controls.values() for outcomes in both.values()]
        if not all(random):
            raise DataError("A report needs at least one random set of each kind and direction.")
        if self.joint_controls and any(len(both["+"]) != len(both["-"]) for both in self.controls.values()):
            raise DataError("Joint controls come in pairs: as many random sets in both directions.")
        bottom = [] if self.bottom is None else [self.bottom]
        for outcome in [self.unsteered, *self.steered.values(), *bottom, *chain(*random)]:
            if outcome.values.shape != (len(self.clusters),) or not np.isfinite(outcome.values).all():
                raise DataError(
                    f"Every outcome needs a finite value for each of {len(self.clusters)} prompts."
                )
            if missing := [name for name in self.limits if not isfinite(outcome.collateral.get(name, nan))]:
                raise DataError(f"An outcome lacks the collateral measure {missing[0]!r}.")

    @property
    def gap(self) -> float:
        """Two-way gap: mean behaviour under the plan minus that under the reverse."""
        return self.steered["+"].rate - self.steered["-"].rate

    @cached_property
    def gap_interval(self) -> tuple[float, float]:
        """Bootstrap interval of the gap over the clusters of prompts."""
        return self.interval(self.steered["+"].values - self.steered["-"].values)

    @property
    def p_matched(self) -> float:
        """`gap_p_value` against random sets with as many experts in each layer as the two plans."""
        return self._p(LAYER_MATCHED)

    @property
    def p_any(self) -> float:
        """`gap_p_value` against random sets in any layers."""
        return self._p(ANY_LAYER)

    @property
    def excess_matched(self) -> Excess:
        """How far the gap exceeds those of layer-matched random sets; for what, see `Excess`."""
        return self.excesses[LAYER_MATCHED]

    @property
    def excess_any(self) -> Excess:
        """How far the gap exceeds those of random sets in any layers."""
        return self.excesses[ANY_LAYER]

    @property
    def verdict(self) -> bool:
        """Whether the two-way gap exceeds its controls.

        It does if both p-values are at most alpha, and if, with the prompts resampled, the gap still exceeds
        all but a share alpha of the random sets' gaps, of both kinds. The p-values alone hold for the prompts
        at hand: a plan that does a little more than random sets on these may do no more on others.
        """
        if max(self.p_matched, self.p_any) > self.alpha or not self.gap_interval[0] > ROUNDING:
            return False
        return all(excess.low > ROUNDING for excess in self.excesses.values())

    @cached_property
    def saturation(self) -> str | None:
        """Why the measure tells no condition from another: "floor", "ceiling", "constant"; None: it has room.

        At its floor or ceiling are at least 95 % of the prompts under every condition, random sets included;
        it is constant where no condition changes the value of any prompt. A p-value is then no evidence that
        the plan has no effect: the measure would not show one.
        """
        random = [outcome for both in self.controls.values() for one in both.values() for outcome in one]
        bottom = [] if self.bottom is None else [self.bottom]
        return saturation_of([self.unsteered, *self.steered.values(), *bottom, *random])

    def effect_interval(self, direction: str) -> tuple[float, float]:
        """Bootstrap interval of the mean change against the unsteered model, in direction "+" or "-".

        Raises:
            DataError: another direction.
        """
        return self.interval(self.steered[direction].values - self.unsteered.values)

    def harms(self) -> dict[str, dict[str, float]]:
        """Collateral measure -> direction -> how much worse than unsteered."""
        return {
            name: {
                direction: (outcome.collateral[name] - self.unsteered.collateral[name])
                * (1 if limit.larger_is_worse else -1)
                for direction, outcome in self.steered.items()
            }
            for name, limit in self.limits.items()
        }

    def interval(self, values: Float[np.ndarray, "prompt"]) -> tuple[float, float]:
        """Bootstrap interval of a mean over the prompts, their clusters resampled."""
        return clustered_interval(values, self.clusters, level=self.level, seed=self.seed)

    def _p(self, kind: str) -> float:
        rates = {
            side: [self.steered[side].rate, *(o.rate for o in self.controls[kind][side])]
            for side in DIRECTIONS
        }
        return gap_p_value(rates["+"], rates["-"], joint=self.joint_controls)

    @cached_property
    def excesses(self) -> dict[str, Excess]:
        """Kind of random sets -> how far the gap exceeds theirs."""
        return {kind: self._excess(kind) for kind in self.controls}

    def _excess(self, kind: str) -> Excess:
        weights = cluster_weights(self.clusters, _N_RESAMPLES, self.seed)
        weights = np.vstack([np.ones(weights.shape[1]), weights])  # first the prompts as they are
        rates = {}
        for side in DIRECTIONS:
            outcomes = [self.steered[side], *self.controls[kind][side]]
            values = np.stack([outcome.values for outcome in outcomes], axis=1)  # [prompt set]
            rates[side] = weights @ values / weights.sum(1, keepdims=True)
        plus, minus = rates["+"], rates["-"]  # [resample set], the plan's first
        if self.joint_controls:
            controls = plus[:, 1:] - minus[:, 1:]
        else:
            controls = (plus[:, 1:, None] - minus[:, None, 1:]).reshape(len(plus), -1)
        excess = plus[:, 0] - minus[:, 0] - np.quantile(controls, 1 - self.alpha, axis=1)
        low, high = bounds_of(excess[0], excess[1:], len(set(self.clusters)), self.level)
        return Excess(float(excess[0]), float(low), float(high))
