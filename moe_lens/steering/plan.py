"""`SteeringPlan`: which experts to promote and which to keep out; chosen, drawn at random, saved and loaded.

plan = SteeringPlan.from_scores(scores, n_activate=0, n_deactivate=50)
plan = SteeringPlan(activate=[(3, 17)], deactivate=[(5, 2), (5, 9)])     # (layer, expert)
control = plan.random_like(seed=0)
plan.save("plan.json")
"""

import json
import math
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Final, Literal, SupportsFloat, get_args

from moe_lens.checks import as_index
from moe_lens.detection.expert_scores import ExpertScore, ExpertScores
from moe_lens.errors import DataError, PlanError, warn
from moe_lens.files import atomic_write
from moe_lens.shape import MoEShape, shape_from_json

Expert = tuple[int, int]
"""(layer, expert)"""
OnExcess = Literal["raise", "drop"]
HowMany = int | Literal["all"]

EPSILON_RANGE: Final = (1e-4, 30.0)
"""Nats; with a smaller or larger epsilon float32's rounding would merge scores that differ."""
_ATTEMPTS: Final = 100
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
        n_activate: HowMany | None = None,
        n_deactivate: HowMany | None = None,
        *,
        q: float | None = None,
        epsilon: float = 0.01,
        on_excess: OnExcess = "raise",
    ) -> "SteeringPlan":
        """The experts with the `n_activate` most positive and the `n_deactivate` most negative scores.

        >>> from moe_lens import ContrastivePairs, SteeringPlan, detect, organisms
        >>> conflicts = organisms.world("planted").conflicts("detection")
        >>> pairs = ContrastivePairs.from_lists(
        ...     [c.open_book for c in conflicts], [c.closed_book for c in conflicts]
        ... )
        >>> scores = detect(organisms.load("planted"), pairs, progress=False)
        >>> len(SteeringPlan.from_scores(scores, n_deactivate=4, q=0.05))
        4

        Args:
            n_activate, n_deactivate: how many; none by default. "all" takes every expert of that sign which
                fits its layer (at most k activated, E − k deactivated), with a warning that names those left
                out.
            q: take significant experts only, those with a q-value up to this; needs scores from `detect`.
                With neither number given, "all" of both signs.
            on_excess: what to do with more than k activated or more than E − k deactivated experts in one
                layer. "raise", or "drop" those of lower rank with a warning, as the paper's code does (which
                drops activations beyond k without a word).

        Raises:
            PlanError: a negative number, more experts asked for than have the sign (and the significance), an
                excess, or scores without q-values where `q` is given.
        """
        if on_excess not in get_args(OnExcess):
            raise PlanError(f"on_excess must be one of {get_args(OnExcess)}; got {on_excess!r}.")
        if not isinstance(scores, ExpertScores):
            raise PlanError(f"from_scores needs ExpertScores; got {type(scores).__name__}.")
        candidates = _candidates(scores, q)
        if q is not None and n_activate is None and n_deactivate is None:
            n_activate = n_deactivate = "all"
        chosen = {}
        for name, number, sign, room in (
            ("activate", n_activate, 1, scores.shape.top_k),
            ("deactivate", n_deactivate, -1, scores.shape.max_deactivated),
        ):
            of_sign = [score for score in candidates if score.delta * sign > 0]
            wanted = len(of_sign) if number == "all" else 0 if number is None else number
            experts = _first(f"n_{name}", wanted, of_sign, q)
            if number == "all" or on_excess == "drop":
                experts = _drop_excess(name, experts, room)
            chosen[name] = experts
        return cls(chosen["activate"], chosen["deactivate"], epsilon, scores.shape)

    def random_like(
        self,
        *,
        seed: int,
        layer_matched: bool = False,
        shape: MoEShape | None = None,
        model: Any = None,
    ) -> "SteeringPlan":
        """A random plan of the same size, the control: as many activated and deactivated experts.

        Experts are drawn in random order, passing over those of layers that are full. A shape knows nothing
        of expert groups and of layers that cannot be steered; a model does, and with it only plans that its
        routers accept are drawn, from the layers that can be steered at all.

        Args:
            seed: the same seed gives the same plan.
            layer_matched: keep the numbers in each layer too; otherwise any MoE layer may be drawn.
            shape: of the model to draw from (`model.moe_shape`); needed only where the plan has none.
            model: a HookedMoE to draw from, instead of a shape.

        Raises:
            PlanError: no shape known, or the model has no room for so many experts.
        """
        if model is not None:
            shape = getattr(model, "moe_shape", None)
            if shape is None or not hasattr(model, "routing_rule"):
                raise PlanError(f"random_like needs a HookedMoE as model; got {type(model).__name__}.")
        shape = self.shape if shape is None else _checked_shape(shape)
        if shape is None:
            raise PlanError("random_like of a plan without shape: pass shape=model.moe_shape.")
        if (number := as_index(seed)) is None:
            raise PlanError(f"seed must be a number from 0 on; got {seed!r}.")
        self.check_fits(shape)
        rng = random.Random(number)
        closed = set() if model is None or layer_matched else _closed_layers(model, shape)
        refused: list[int] = []
        for _ in range(_ATTEMPTS if model is not None else 1):
            plan = self._drawn(rng, shape, layer_matched, closed)
            if len(plan) < len(self):
                raise PlanError(
                    f"No room for {len(self)} experts beside the layers {sorted(closed)}, which "
                    "cannot be steered."
                )
            refused = [] if model is None else plan.refused_layers(model)
            for layer in refused:
                plan = plan._redrawn(rng, layer, model)
            if model is None or not plan.refused_layers(model):
                return plan
        raise PlanError(
            f"{_ATTEMPTS} random draws of {len(self)} experts gave none that the routers accept; layer "
            f"{refused[0]} refuses most. Steer fewer experts, or none in that layer."
        )

    def reversed(self) -> "SteeringPlan":
        """The same experts, activated ones deactivated and the other way round.

        Not the plan for the opposite behaviour, which takes other experts:
        `SteeringPlan.from_scores(-scores, ...)`.

        Raises:
            PlanError: more than k experts of a layer would be activated, or more than E − k deactivated.
        """
        return SteeringPlan(self.deactivate, self._activated, self.epsilon, self.shape)

    def _drawn(
        self, rng: random.Random, shape: MoEShape, layer_matched: bool, closed: set[int]
    ) -> "SteeringPlan":
        layers = [layer for layer in shape.layers if layer not in closed]
        free = [(layer, expert) for layer in layers for expert in range(shape.n_experts)]
        rng.shuffle(free)
        deactivate = _take(self.deactivate, free, shape.layers, shape.max_deactivated, layer_matched)
        free = [expert for expert in free if expert not in deactivate]
        activate = _take(self._activated, free, shape.layers, shape.top_k, layer_matched)
        return SteeringPlan(activate, deactivate, self.epsilon, shape)

    def in_layer(self, layer: int) -> tuple[list[int], list[int]]:
        """Activated and deactivated experts of a layer; deactivation wins."""
        return (
            [expert for own, expert in self._activated if own == layer],
            [expert for own, expert in self.deactivate if own == layer],
        )

    def refused_layers(self, model: Any) -> list[int]:
        """The layers of a HookedMoE whose rule cannot obey the plan (`RoutingRule.cannot_steer`)."""
        layers = sorted({layer for layer, _ in self.activate + self.deactivate})
        return [layer for layer in layers if model.routing_rule(layer).cannot_steer(*self.in_layer(layer))]

    def _redrawn(self, rng: random.Random, layer: int, model: Any) -> "SteeringPlan":
        """The same with other experts in one layer, if some that its rule accepts are soon found."""
        assert self.shape is not None
        n_activate, n_deactivate = (len(experts) for experts in self.in_layer(layer))
        for _ in range(_ATTEMPTS):
            drawn = rng.sample(range(self.shape.n_experts), n_activate + n_deactivate)
            activate, deactivate = drawn[:n_activate], drawn[n_activate:]
            if model.routing_rule(layer).cannot_steer(activate, deactivate) is None:
                return SteeringPlan(
                    [e for e in self.activate if e[0] != layer] + [(layer, e) for e in activate],
                    [e for e in self.deactivate if e[0] != layer] + [(layer, e) for e in deactivate],
                    self.epsilon,
                    self.shape,
                )
        return self

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
            temporary.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        """What `save` writes, as a JSON object."""
        return {"kind": _KIND, "schema": _SCHEMA, **asdict(self)}

    @classmethod
    def load(cls, path: str | Path) -> "SteeringPlan":
        """Read what `save` wrote. Raises PlanError, naming the file and the field at fault."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return plan_from_json(content)
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


def _candidates(scores: ExpertScores, q: float | None) -> list[ExpertScore]:
    """All experts, ranked; with `q` the significant ones only."""
    ranked = scores.ranked()
    if q is None:
        return ranked
    if isinstance(q, bool) or not isinstance(q, Real) or not 0 < q <= 1:
        raise PlanError(f"q must be a number above 0, at most 1; got {q!r}.")
    if scores.q is None:
        raise PlanError("These scores carry no q-values to choose by; use scores from detect(...), or no q.")
    rows = {layer: row for row, layer in enumerate(scores.shape.layers)}
    return [score for score in ranked if float(scores.q[rows[score.layer], score.expert]) <= q]


def _first(name: str, number: Any, candidates: list[ExpertScore], q: float | None) -> list[Expert]:
    if (wanted := as_index(number)) is None:
        raise PlanError(f'{name} must be a number from 0 on, or "all"; got {number!r}.')
    if wanted > len(candidates):
        sign = "positive" if name == "n_activate" else "negative"
        significant = "" if q is None else f" and a q-value up to {q:g}"
        raise PlanError(
            f"{name}={wanted}, but only {len(candidates)} experts have a {sign} score{significant}; "
            'ask for at most that many, or for "all".'
        )
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
        warn(f"{name}: dropped {len(dropped)} experts beyond {room} in their layer: {dropped}")
    return kept


def _closed_layers(model: Any, shape: MoEShape) -> set[int]:
    """The layers of which no single expert can be steered."""

    def is_closed(layer: int) -> bool:
        refuses = model.routing_rule(layer).cannot_steer
        return all(refuses([], [e]) and refuses([e], []) for e in range(shape.n_experts))

    return {layer for layer in shape.layers if is_closed(layer)}


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


def plan_from_json(content: Any) -> SteeringPlan:
    """The plan that `save` wrote as a JSON object. Raises PlanError, naming the field at fault."""
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
