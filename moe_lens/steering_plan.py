"""`SteeringPlan`: which experts to promote and which to keep out; chosen, drawn at random, saved and loaded.

plan = SteeringPlan.from_scores(scores, n_activate=0, n_deactivate=50)
plan = SteeringPlan(activate=[(3, 17)], deactivate=[(5, 2), (5, 9)])     # (layer, expert)
control = plan.random_like(seed=0)
plan.save("plan.json")
"""

import json
import math
import random
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Final, Literal, SupportsFloat, get_args

from moe_lens.contrast import ExpertScore, ExpertScores
from moe_lens.errors import DataError, PlanError
from moe_lens.files import atomic_write
from moe_lens.moe_shape import MoEShape, as_index, shape_from_json

Expert = tuple[int, int]
"""(layer, expert)"""
OnExcess = Literal["raise", "drop"]

EPSILON_RANGE: Final = (1e-4, 30.0)
"""Nats; with a smaller or larger epsilon float32's rounding would merge scores that differ."""
_KIND: Final = "moe_lens.SteeringPlan"
_SCHEMA: Final = 1


@dataclass(frozen=True, init=False)
class SteeringPlan:
    """Which experts to promote into the top-k and which to keep out of it.

    >>> from moe_lens import SteeringPlan, is_routing_point, organisms, steer_hooks
    >>> plan = SteeringPlan(activate=[(0, 1)], deactivate=[(2, 5), (2, 6)])
    >>> model = organisms.load("specialised")
    >>> with model.hooks(steer_hooks(plan)):
    ...     _, cache = model.run_with_cache("Document : the", names_filter=is_routing_point)
    >>> bool((cache["topk_indices", 0] == 1).any(-1).all()), bool((cache["topk_indices", 2] == 5).any())
    (True, False)

    Attributes:
        activate, deactivate: (layer, expert) pairs, in rank order where they come from scores. Where an
            expert stands in both, deactivation wins.
        epsilon: distance above the largest and below the smallest score, in `EPSILON_RANGE`; in nats on
            softmax routers, for others see the docstring of their rule.
        shape: the model that the plan was made for; None for a plan written by hand, which is checked when
            it is applied.

    Raises:
        PlanError: an expert named twice, negative or missing in the model; more than k activated or more than
            E − k deactivated in a layer; epsilon out of range.
    """

    activate: tuple[Expert, ...] = ()
    deactivate: tuple[Expert, ...] = ()
    epsilon: float = 0.01
    shape: MoEShape | None = None

    def __init__(
        self,
        activate: Iterable[Any] = (),
        deactivate: Iterable[Any] = (),
        epsilon: SupportsFloat = 0.01,
        shape: MoEShape | None = None,
    ) -> None:
        for name, value in (("activate", activate), ("deactivate", deactivate)):
            object.__setattr__(self, name, _checked_experts(name, value))
        object.__setattr__(self, "epsilon", _checked_epsilon(epsilon))
        object.__setattr__(self, "shape", shape)
        if shape is not None:
            self.check_fits(_checked_shape(shape))

    @classmethod
    def from_scores(
        cls,
        scores: ExpertScores,
        n_activate: int = 0,
        n_deactivate: int = 0,
        *,
        epsilon: float = 0.01,
        on_excess: OnExcess = "raise",
    ) -> "SteeringPlan":
        """The experts with the `n_activate` most positive and the `n_deactivate` most negative scores.

        Args:
            on_excess: what to do with more than k activated or more than E − k deactivated experts in one
                layer. "raise", or "drop" those of lower rank with a warning, as the paper's code does (which
                drops activations beyond k without a word).

        Raises:
            PlanError: a negative number, more experts asked for than have the sign, or an excess.
        """
        if on_excess not in get_args(OnExcess):
            raise PlanError(f"on_excess must be one of {get_args(OnExcess)}; got {on_excess!r}.")
        if not isinstance(scores, ExpertScores):
            raise PlanError(f"from_scores needs ExpertScores; got {type(scores).__name__}.")
        ranked = scores.ranked()
        activate = _first("n_activate", n_activate, [score for score in ranked if score.delta > 0])
        deactivate = _first("n_deactivate", n_deactivate, [score for score in ranked if score.delta < 0])
        if on_excess == "drop":
            activate = _drop_excess("activate", activate, scores.shape.top_k)
            deactivate = _drop_excess("deactivate", deactivate, scores.shape.max_deactivated)
        return cls(activate, deactivate, epsilon, scores.shape)

    def random_like(
        self, *, seed: int, layer_matched: bool = False, shape: MoEShape | None = None
    ) -> "SteeringPlan":
        """A random plan of the same size, the control: as many activated and deactivated experts.

        Experts are drawn in random order, passing over those of layers that are full. A shape knows nothing
        of expert groups and of layers that cannot be steered; where a model refuses the plan for that, draw
        again.

        Args:
            seed: the same seed gives the same plan.
            layer_matched: keep the numbers in each layer too; otherwise any MoE layer may be drawn.
            shape: of the model to draw from (`model.moe_shape`); needed only where the plan has none.

        Raises:
            PlanError: no shape known, or the model has no room for so many experts.
        """
        shape = self.shape if shape is None else _checked_shape(shape)
        if shape is None:
            raise PlanError("random_like of a plan without shape: pass shape=model.moe_shape.")
        if (number := as_index(seed)) is None:
            raise PlanError(f"seed must be a number from 0 on; got {seed!r}.")
        self.check_fits(shape)
        free = [(layer, expert) for layer in shape.layers for expert in range(shape.n_experts)]
        random.Random(number).shuffle(free)
        deactivate = _take(self.deactivate, free, shape.layers, shape.max_deactivated, layer_matched)
        free = [expert for expert in free if expert not in deactivate]
        activate = _take(self._activated, free, shape.layers, shape.top_k, layer_matched)
        return SteeringPlan(activate, deactivate, self.epsilon, shape)

    def check_fits(self, shape: MoEShape) -> None:
        """Raise PlanError unless the plan can be applied to a model of this shape and was made for one."""
        if self.shape is not None and (misfits := self.shape.misfits(shape)):
            raise PlanError(
                f"The plan was made for another model (plan / model): {'; '.join(misfits)}. "
                "If the transfer is meant, use plan.made_for(model.moe_shape)."
            )
        for name, experts, room in (
            ("activate", self._activated, shape.top_k),
            ("deactivate", self.deactivate, shape.max_deactivated),
        ):
            for layer, expert in experts:
                if layer not in shape.layers:
                    raise PlanError(f"{name}: layer {layer} has no router; MoE layers are {shape.layers}.")
                if expert >= shape.n_experts:
                    raise PlanError(
                        f"{name}: expert {expert} of layer {layer} does not exist; "
                        f"there are 0 to {shape.n_experts - 1}."
                    )
            for layer, number in Counter(layer for layer, _ in experts).items():
                if number > room:
                    raise PlanError(
                        f"{name}: {number} experts in layer {layer}, at most {room} are possible with "
                        f"{shape.n_experts} experts and k = {shape.top_k}. Name fewer (from_scores can drop "
                        'the excess: on_excess="drop").'
                    )

    def made_for(self, shape: MoEShape) -> "SteeringPlan":
        """The same experts for another model, checked against its shape."""
        return SteeringPlan(self.activate, self.deactivate, self.epsilon, shape)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically."""
        with atomic_write(path) as temporary:
            content = {"kind": _KIND, "schema": _SCHEMA, **asdict(self)}
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "SteeringPlan":
        """Read what `save` wrote. Raises PlanError, naming the file and the field at fault."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return _plan_from_json(content)
        except (OSError, ValueError, RecursionError, DataError, PlanError) as error:
            raise PlanError(f"{path} cannot be read as a steering plan: {error}") from error

    @property
    def _activated(self) -> tuple[Expert, ...]:
        """The activated experts without those that are deactivated too."""
        return tuple(expert for expert in self.activate if expert not in self.deactivate)

    def __len__(self) -> int:
        return len({*self.activate, *self.deactivate})


def _checked_experts(name: str, experts: Iterable[Any]) -> tuple[Expert, ...]:
    try:
        pairs = [tuple(item) for item in experts]
    except TypeError as error:
        raise PlanError(f"{name} must be a list of (layer, expert) pairs; got {experts!r}.") from error
    checked: list[Expert] = []
    for pair in pairs:
        numbers = [as_index(number) for number in pair]
        if len(numbers) != 2 or numbers[0] is None or numbers[1] is None:
            raise PlanError(f"{name}: {pair!r} is no (layer, expert) pair of numbers from 0 on.")
        checked.append((numbers[0], numbers[1]))
    if repeated := [expert for expert, number in Counter(checked).items() if number > 1]:
        raise PlanError(f"{name} names {repeated[0]} (layer, expert) more than once.")
    return tuple(checked)


def _checked_shape(shape: Any) -> MoEShape:
    if not isinstance(shape, MoEShape):
        raise PlanError(f"shape must be a MoEShape, such as model.moe_shape; got {type(shape).__name__}.")
    return shape


def _checked_epsilon(epsilon: SupportsFloat) -> float:
    low, high = EPSILON_RANGE
    try:
        value = float(epsilon) if isinstance(epsilon, Real) and not isinstance(epsilon, bool) else math.nan
    except OverflowError:
        value = math.inf
    if not low <= value <= high:
        raise PlanError(
            f"epsilon must be a number of nats from {low} to {high:g}, where float32 keeps the steered "
            f"scores apart; got {epsilon!r}."
        )
    return value


def _first(name: str, number: int, candidates: list[ExpertScore]) -> list[Expert]:
    if (wanted := as_index(number)) is None:
        raise PlanError(f"{name} must be a number from 0 on; got {number!r}.")
    if wanted > len(candidates):
        sign = "positive" if name == "n_activate" else "negative"
        raise PlanError(f"{name}={wanted}, but only {len(candidates)} experts have a {sign} score.")
    return [(score.layer, score.expert) for score in candidates[:wanted]]


def _drop_excess(name: str, experts: list[Expert], room: int) -> list[Expert]:
    """The experts without those beyond `room` in their layer; `experts` come in rank order."""
    used: Counter[int] = Counter()
    kept: list[Expert] = []
    for layer, expert in experts:
        used[layer] += 1
        if used[layer] <= room:
            kept.append((layer, expert))
    if dropped := [expert for expert in experts if expert not in kept]:
        warnings.warn(
            f"{name}: dropped {len(dropped)} experts beyond {room} in their layer: {dropped}", stacklevel=3
        )
    return kept


def _take(
    like: Iterable[Expert], free: list[Expert], layers: tuple[int, ...], room: int, layer_matched: bool
) -> list[Expert]:
    """As many experts as in `like`, from `free` in order; a layer gives at most `room`, or as in `like`."""
    left = Counter(layer for layer, _ in like)
    number = left.total()
    if not layer_matched:
        left = Counter(dict.fromkeys(layers, room))
    taken: list[Expert] = []
    for layer, expert in free:
        if len(taken) < number and left[layer] > 0:
            left[layer] -= 1
            taken.append((layer, expert))
    return taken


def _plan_from_json(content: Any) -> SteeringPlan:
    if not isinstance(content, dict):
        raise PlanError("the file holds no JSON object.")
    expected = {"kind", "schema", "activate", "deactivate", "epsilon", "shape"}
    if wrong := sorted(expected.symmetric_difference(content)):
        raise PlanError(f"field {wrong[0]!r} is {'missing' if wrong[0] in expected else 'unknown'}.")
    if content["kind"] != _KIND or content["schema"] is True or content["schema"] != _SCHEMA:
        raise PlanError(
            f"fields 'kind' and 'schema' must be {_KIND!r} and {_SCHEMA}; "
            f"got {content['kind']!r} and {content['schema']!r}."
        )
    for name in ("activate", "deactivate"):
        if not isinstance(content[name], list):
            raise PlanError(f"field {name!r} must be a list of [layer, expert]; got {content[name]!r}.")
    shape = None if content["shape"] is None else shape_from_json(content["shape"])
    return SteeringPlan(content["activate"], content["deactivate"], content["epsilon"], shape)
