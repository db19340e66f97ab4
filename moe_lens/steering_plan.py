"""`SteeringPlan`: which experts to promote and which to keep out; chosen, drawn at random, saved and loaded.

plan = SteeringPlan.from_scores(scores, n_activate=0, n_deactivate=50)
plan = SteeringPlan(activate=[(3, 17)], deactivate=[(5, 2), (5, 9)])     # (layer, expert)
control = plan.random_like(seed=0)
plan.save("plan.json")
"""

import json
import random
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from moe_lens.contrast import ExpertScore, ExpertScores
from moe_lens.errors import DataError, PlanError
from moe_lens.files import atomic_write
from moe_lens.moe_shape import MoEShape

Expert = tuple[int, int]
"""(layer, expert)"""
OnExcess = Literal["raise", "drop"]

EPSILON_RANGE: Final = (1e-4, 1e3)
"""Nats; a smaller or larger epsilon would be lost in float32's rounding."""
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
        epsilon: distance in nats above the largest and below the smallest score, in `EPSILON_RANGE`.
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
        activate: Iterable[Iterable[int]] = (),
        deactivate: Iterable[Iterable[int]] = (),
        epsilon: float = 0.01,
        shape: MoEShape | None = None,
    ) -> None:
        for name, value in (("activate", activate), ("deactivate", deactivate)):
            object.__setattr__(self, name, _checked_experts(name, value))
        object.__setattr__(self, "epsilon", _checked_epsilon(epsilon))
        object.__setattr__(self, "shape", shape)
        if shape is not None:
            self.check_fits(shape)

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
        ranked = scores.ranked()
        activate = _first("n_activate", n_activate, [score for score in ranked if score.delta > 0])
        deactivate = _first("n_deactivate", n_deactivate, [score for score in ranked if score.delta < 0])
        if on_excess == "drop":
            activate = _drop_excess("activate", activate, scores.shape.top_k)
            deactivate = _drop_excess("deactivate", deactivate, scores.shape.n_deactivatable)
        return cls(activate, deactivate, epsilon, scores.shape)

    def random_like(
        self, *, seed: int, layer_matched: bool = False, shape: MoEShape | None = None
    ) -> "SteeringPlan":
        """A random plan of the same size, the control: as many activated and deactivated experts.

        Args:
            seed: the same seed gives the same plan.
            layer_matched: keep the numbers in each layer too; otherwise any MoE layer may be drawn.
            shape: of the model to draw from (`model.moe_shape`); needed only where the plan has none.

        Raises:
            PlanError: no shape known, or the model has no room for so many experts.
        """
        shape = shape or self.shape
        if shape is None:
            raise PlanError("random_like of a plan without shape: pass shape=model.moe_shape.")
        self.check_fits(shape)
        deactivate, activate = list(self.deactivate), [e for e in self.activate if e not in self.deactivate]
        draw = _Draw(shape, random.Random(seed))
        for room, experts in ((shape.n_deactivatable, deactivate), (shape.top_k, activate)):
            draw.take(len(experts), room, Counter(layer for layer, _ in experts) if layer_matched else None)
        return SteeringPlan(draw.taken[len(deactivate) :], draw.taken[: len(deactivate)], self.epsilon, shape)

    def check_fits(self, shape: MoEShape) -> None:
        """Raise PlanError unless the plan can be applied to a model of this shape and was made for one."""
        if self.shape is not None and (differences := self.shape.differences(shape)):
            raise PlanError(
                f"The plan was made for another model: {'; '.join(differences)}. "
                "If the transfer is meant, use plan.made_for(model.moe_shape)."
            )
        for name, experts, room in (
            ("activate", [e for e in self.activate if e not in self.deactivate], shape.top_k),
            ("deactivate", list(self.deactivate), shape.n_deactivatable),
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
                        f"{shape.n_experts} experts and k = {shape.top_k}. Name fewer, or use "
                        'SteeringPlan.from_scores(..., on_excess="drop").'
                    )

    def made_for(self, shape: MoEShape) -> "SteeringPlan":
        """The same experts for another model, checked against its shape."""
        return SteeringPlan(self.activate, self.deactivate, self.epsilon, shape)

    def reversed(self) -> "SteeringPlan":
        """The opposite plan: activated and deactivated experts swapped."""
        return SteeringPlan(self.deactivate, self.activate, self.epsilon, self.shape)

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

    def __len__(self) -> int:
        return len({*self.activate, *self.deactivate})


def _checked_experts(name: str, experts: Iterable[Iterable[int]]) -> tuple[Expert, ...]:
    checked: list[Expert] = []
    for item in experts:
        pair = tuple(item) if isinstance(item, Iterable) else (item,)
        if len(pair) != 2 or not all(_is_index(number) for number in pair):
            raise PlanError(f"{name}: {item!r} is no (layer, expert) pair of numbers from 0 on.")
        checked.append((int(pair[0]), int(pair[1])))
    if repeated := [expert for expert, number in Counter(checked).items() if number > 1]:
        raise PlanError(f"{name} names {repeated[0]} (layer, expert) more than once.")
    return tuple(checked)


def _is_index(number: Any) -> bool:
    if isinstance(number, bool):
        return False
    try:
        return int(number) == number and number >= 0  # numpy's and torch's integers too
    except (TypeError, ValueError, OverflowError):
        return False


def _checked_epsilon(epsilon: float) -> float:
    low, high = EPSILON_RANGE
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not low <= epsilon <= high:
        raise PlanError(
            f"epsilon must be a number of nats from {low} to {high:g}, where float32 keeps the steered "
            f"scores apart; got {epsilon!r}."
        )
    return float(epsilon)


def _first(name: str, number: int, candidates: list[ExpertScore]) -> list[Expert]:
    if not _is_index(number):
        raise PlanError(f"{name} must be a number from 0 on; got {number!r}.")
    if number > len(candidates):
        sign = "positive" if name == "n_activate" else "negative"
        raise PlanError(f"{name}={number}, but only {len(candidates)} experts have a {sign} score.")
    return [(score.layer, score.expert) for score in candidates[:number]]


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


@dataclass
class _Draw:
    """Draws experts without replacement, at most `room` a layer and call."""

    shape: MoEShape
    rng: random.Random

    def __post_init__(self) -> None:
        self.taken: list[Expert] = []

    def take(self, number: int, room: int, per_layer: Counter[int] | None) -> None:
        free = [
            expert
            for layer in self.shape.layers
            for expert in ((layer, e) for e in range(self.shape.n_experts))
            if expert not in self.taken
        ]
        self.rng.shuffle(free)
        left = (
            Counter(per_layer) if per_layer is not None else Counter(dict.fromkeys(self.shape.layers, room))
        )
        drawn = 0
        for layer, expert in free:
            if drawn < number and left[layer] > 0:
                left[layer] -= 1
                drawn += 1
                self.taken.append((layer, expert))


def _plan_from_json(content: Any) -> SteeringPlan:
    if not isinstance(content, dict):
        raise PlanError("the file holds no JSON object.")
    expected = {"kind", "schema", "activate", "deactivate", "epsilon", "shape"}
    if wrong := sorted(expected.symmetric_difference(content)):
        raise PlanError(f"field {wrong[0]!r} is {'missing' if wrong[0] in expected else 'unknown'}.")
    if content["kind"] != _KIND or content["schema"] != _SCHEMA:
        raise PlanError(
            f"fields 'kind' and 'schema' must be {_KIND!r} and {_SCHEMA}; "
            f"got {content['kind']!r} and {content['schema']!r}."
        )
    for name in ("activate", "deactivate"):
        if not isinstance(content[name], list):
            raise PlanError(f"field {name!r} must be a list of [layer, expert]; got {content[name]!r}.")
    return SteeringPlan(
        content["activate"], content["deactivate"], content["epsilon"], _shape_from_json(content["shape"])
    )


def _shape_from_json(content: Any) -> MoEShape | None:
    if content is None:
        return None
    types = {"model": str, "layers": list, "n_experts": int, "top_k": int}
    if not isinstance(content, dict) or set(content) != set(types):
        raise PlanError(f"field 'shape' must be null or hold {', '.join(types)}; got {content!r}.")
    for name, kind in types.items():
        if not isinstance(content[name], kind) or isinstance(content[name], bool):
            raise PlanError(f"field 'shape.{name}' must be {kind.__name__}; got {content[name]!r}.")
    if not all(_is_index(layer) for layer in content["layers"]):
        raise PlanError(f"field 'shape.layers' must hold layer numbers; got {content['layers']!r}.")
    return MoEShape(content["model"], tuple(content["layers"]), content["n_experts"], content["top_k"])
