"""Choosing experts, as (layer, expert) pairs: the first of a ranking, or as many at random.

    activate, deactivate = select(scores.ranked(), 0, 50, scores.shape)
    activate, deactivate = draw_like(plan.activate, plan.deactivate, shape, seed=0)
    plus, minus = draw_jointly([(plus_on, plus_off), (minus_on, minus_off)], model, seed=0)

`SteeringPlan.from_scores`, `PublishedRanking.plan` and `SteeringPlan.random_like` make plans of such pairs.
"""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, Protocol, get_args, runtime_checkable

from moe_lens.checks import whole_number
from moe_lens.detection.expert_scores import ExpertScore
from moe_lens.errors import PlanError, warn
from moe_lens.routers.rule import RoutingRule
from moe_lens.shape import MoEShape

Expert = tuple[int, int]
"""(layer, expert)"""
Experts = Sequence[Expert]
TwoLists = tuple[Experts, Experts]
"""The experts of a plan to activate, and those to deactivate."""
Chosen = tuple[list[Expert], list[Expert]]
"""The experts to activate, and those to deactivate."""
OnExcess = Literal["raise", "drop"]
HowMany = int | Literal["all"]

_ATTEMPTS: Final = 100


@runtime_checkable
class SteerableModel(Protocol):
    """What choosing experts needs to know of a model: `HookedMoE` and `RoutedModel` have it."""

    @property
    def moe_shape(self) -> MoEShape:
        """Layers, experts and k."""
        ...

    def routing_rule(self, layer: int) -> RoutingRule:
        """The rule of that layer's router, which knows what it cannot be steered to."""
        ...


def in_layer(
    activate: Iterable[Expert], deactivate: Iterable[Expert], layer: int
) -> tuple[list[int], list[int]]:
    """The activated and the deactivated experts of one layer; deactivation wins."""
    off = [expert for other, expert in deactivate if other == layer]
    on = [expert for other, expert in activate if other == layer and expert not in off]
    return on, off


def refused_layers(
    activate: Sequence[Expert], deactivate: Sequence[Expert], model: SteerableModel
) -> list[int]:
    """The layers whose rule cannot be steered so (`RoutingRule.cannot_steer`), ascending."""
    layers = sorted({layer for layer, _ in (*activate, *deactivate)})
    return [
        layer
        for layer in layers
        if model.routing_rule(layer).cannot_steer(*in_layer(activate, deactivate, layer)) is not None
    ]


# From a ranking


def select(
    ranked: Sequence[ExpertScore],
    n_activate: HowMany,
    n_deactivate: HowMany,
    shape: MoEShape,
    *,
    on_excess: OnExcess = "raise",
    condition: str = "",
) -> Chosen:
    """The first experts with a positive score, to activate, and the first with a negative one, to deactivate.

    >>> ranked = [ExpertScore(0, 3, -0.9), ExpertScore(0, 1, 0.5), ExpertScore(1, 2, -0.4)]
    >>> select(ranked, 1, 2, MoEShape("m", (0, 1), n_experts=4, top_k=2))
    ([(0, 1)], [(0, 3), (1, 2)])

    Args:
        ranked: in the order in which experts are to be chosen.
        n_activate: how many to activate; "all" takes every expert with a positive score that fits its layer.
        n_deactivate: the same for negative scores.
        on_excess: what to do with experts beyond k (activated) or E − k (deactivated) of one layer: "raise"
            leaves them in, for the plan to refuse; "drop" leaves them out, with a warning that names them.
        condition: what else is true of all ranked experts, for the error: " and a q-value up to 0.05".

    Raises:
        PlanError: not a number from 0 on, or more than there are experts of that sign.
    """
    if on_excess not in get_args(OnExcess):
        raise PlanError(f"on_excess must be one of {get_args(OnExcess)}; got {on_excess!r}.")
    chosen = []
    for verb, number, sign, room in (
        ("activate", n_activate, 1, shape.top_k),
        ("deactivate", n_deactivate, -1, shape.max_deactivated),
    ):
        candidates = [(score.layer, score.expert) for score in ranked if score.delta * sign > 0]
        experts = candidates
        if number != "all":
            words = f"{'positive' if sign > 0 else 'negative'} score{condition}"
            experts = _first(f"n_{verb}", number, candidates, words)
        if number == "all" or on_excess == "drop":
            experts = _fitting_layers(verb, experts, room)
        chosen.append(experts)
    return chosen[0], chosen[1]


def _first(name: str, number: Any, candidates: list[Expert], words: str) -> list[Expert]:
    wanted = whole_number(number, name, error=PlanError)
    if wanted > len(candidates):
        raise PlanError(
            f"{name}={wanted}, but only {len(candidates)} experts have a {words}; ask for at most that many."
        )
    return candidates[:wanted]


def _fitting_layers(verb: str, experts: list[Expert], room: int) -> list[Expert]:
    """The experts without those beyond `room` in their layer, of which a warning tells."""
    in_layers: Counter[int] = Counter()
    kept, dropped = [], []
    for layer, expert in experts:
        in_layers[layer] += 1
        (kept if in_layers[layer] <= room else dropped).append((layer, expert))
    if dropped:
        warn(f"{verb}: dropped {len(dropped)} experts beyond {room} in their layer: {dropped}")
    return kept


# At random


def draw_like(
    activate: Sequence[Expert],
    deactivate: Sequence[Expert],
    shape: MoEShape,
    *,
    seed: int,
    layer_matched: bool = False,
    model: SteerableModel | None = None,
) -> Chosen:
    """As many experts of each kind, at random; no expert is drawn twice.

    >>> shape = MoEShape("m", (0, 1), n_experts=4, top_k=2)
    >>> on, off = draw_like([(0, 1)], [(0, 2), (1, 3)], shape, seed=0)
    >>> len(on), len(off)
    (1, 2)

    Experts come in random order, and those of full layers are passed over.

    Args:
        activate: experts to be matched by as many activated ones.
        deactivate: experts to be matched by as many deactivated ones; no expert may be in both.
        seed: the same seed gives the same experts.
        layer_matched: keep the numbers in each layer too.
        model: draw only what its routers accept, from the layers that can be steered at all.

    Raises:
        PlanError: no room for so many, or 100 draws of which the routers accept none.
    """
    rng = random.Random(whole_number(seed, "seed", error=PlanError))
    if model is None:
        return _drawn(rng, activate, deactivate, shape, layer_matched, set())
    closed = set() if layer_matched else _closed_layers(model, shape)
    size, refused = len(activate) + len(deactivate), []
    for _ in range(_ATTEMPTS):
        on, off = _drawn(rng, activate, deactivate, shape, layer_matched, closed)
        if len(on) + len(off) < size:
            raise PlanError(
                f"No room for {size} experts beside the layers {sorted(closed)}, which cannot be steered."
            )
        refused = refused_layers(on, off, model)
        for layer in refused:
            on, off = _redrawn(rng, on, off, layer, shape, model)
        if not refused_layers(on, off, model):
            return on, off
    raise PlanError(
        f"{_ATTEMPTS} random draws of {size} experts gave none that the routers accept; layer "
        f"{refused[0]} refuses most. Steer fewer experts, or none in that layer."
    )


def _closed_layers(model: SteerableModel, shape: MoEShape) -> set[int]:
    """The layers of which no single expert can be steered."""

    def is_closed(layer: int) -> bool:
        refuses = model.routing_rule(layer).cannot_steer
        return all(refuses([], [e]) and refuses([e], []) for e in range(shape.n_experts))

    return {layer for layer in shape.layers if is_closed(layer)}


def _drawn(
    rng: random.Random,
    activate: Sequence[Expert],
    deactivate: Sequence[Expert],
    shape: MoEShape,
    layer_matched: bool,
    closed: set[int],
) -> Chosen:
    """One draw; shorter than asked for where the open layers have no room."""
    free = [(layer, e) for layer in shape.layers if layer not in closed for e in range(shape.n_experts)]
    rng.shuffle(free)
    off = _taken(deactivate, free, shape.layers, shape.max_deactivated, layer_matched)
    free = [expert for expert in free if expert not in off]
    return _taken(activate, free, shape.layers, shape.top_k, layer_matched), off


def _taken(
    like: Sequence[Expert], free: list[Expert], layers: tuple[int, ...], room: int, layer_matched: bool
) -> list[Expert]:
    """As many experts as in `like`, from `free` in order; a layer gives at most `room`, or as in `like`."""
    left = Counter(layer for layer, _ in like) if layer_matched else Counter(dict.fromkeys(layers, room))
    taken: list[Expert] = []
    for layer, expert in free:
        if len(taken) < len(like) and left[layer] > 0:
            left[layer] -= 1
            taken.append((layer, expert))
    return taken


def _redrawn(
    rng: random.Random,
    on: list[Expert],
    off: list[Expert],
    layer: int,
    shape: MoEShape,
    model: SteerableModel,
) -> Chosen:
    """The same with other experts in one layer, if some that its rule accepts are soon found."""
    n_on, n_off = (len(experts) for experts in in_layer(on, off, layer))
    for _ in range(_ATTEMPTS):
        drawn = rng.sample(range(shape.n_experts), n_on + n_off)
        if model.routing_rule(layer).cannot_steer(drawn[:n_on], drawn[n_on:]) is None:
            return (
                [expert for expert in on if expert[0] != layer] + [(layer, e) for e in drawn[:n_on]],
                [expert for expert in off if expert[0] != layer] + [(layer, e) for e in drawn[n_on:]],
            )
    return on, off


def draw_jointly(
    several: Sequence[TwoLists],
    model: SteerableModel,
    *,
    seed: int,
    layer_matched: bool = False,
) -> list[Chosen]:
    """The experts of several plans under other names, the same in all: they share what they shared before.

    Args:
        several: experts to activate and to deactivate, of each plan; no expert may be in both lists of one.
        model: whose routers are to accept each plan; layers that cannot be steered are not drawn from.
        seed: the same seed gives the same experts.
        layer_matched: each expert stays in its layer.

    Returns: of each plan its experts' new names, in their order.

    Raises:
        PlanError: no room for so many, or 100 draws of which the routers accept none.
    """
    rng = random.Random(whole_number(seed, "seed", error=PlanError))
    closed = set() if layer_matched else _closed_layers(model, model.moe_shape)
    refused: list[int] = []
    for _ in range(_ATTEMPTS):
        names = _names_in_layer(rng, several, model) if layer_matched else _names(rng, several, model, closed)
        if names is None:
            continue
        refused = _refusing(several, names, model)
        for layer in refused:
            names = _renamed(rng, several, names, layer, model)
        if not _refusing(several, names, model):
            return _under(names, several)
    why = f"layer {refused[0]} refuses most" if refused else "there is no room"
    raise PlanError(
        f"{_ATTEMPTS} random draws of {len(_all_of(several))} experts for plans that share some gave none "
        f"that the routers accept; {why}. Steer fewer experts."
    )


def _names_in_layer(
    rng: random.Random, several: Sequence[TwoLists], model: SteerableModel
) -> dict[Expert, Expert]:
    """Expert -> another of its layer, or itself; no two get the same."""
    names: dict[Expert, Expert] = {}
    experts = _all_of(several)
    for layer in sorted({layer for layer, _ in experts}):
        there = [expert for expert in experts if expert[0] == layer]
        drawn = rng.sample(range(model.moe_shape.n_experts), len(there))
        names |= {expert: (layer, e) for expert, e in zip(there, drawn, strict=True)}
    return names


def _names(
    rng: random.Random, several: Sequence[TwoLists], model: SteerableModel, closed: set[int]
) -> dict[Expert, Expert] | None:
    """Expert -> another of any open layer in which every plan that names it has room for one more.

    None where the last ones find none: in another order they may. Those with the most roles come first.
    """
    shape, names = model.moe_shape, {}
    free = [(layer, e) for layer in shape.layers if layer not in closed for e in range(shape.n_experts)]
    rng.shuffle(free)
    left = Counter(
        {
            (number, kind, layer): room
            for number in range(len(several))
            for kind, room in enumerate((shape.top_k, shape.max_deactivated))
            for layer in shape.layers
        }
    )
    experts = _all_of(several)
    roles_of: dict[Expert, list[tuple[int, int]]] = {expert: [] for expert in experts}
    for number, plan in enumerate(several):
        for kind in (0, 1):
            for expert in plan[kind]:
                roles_of[expert].append((number, kind))
    for expert in sorted(rng.sample(experts, len(experts)), key=lambda each: -len(roles_of[each])):
        roles = roles_of[expert]
        fitting = (place for place in free if all(left[*role, place[0]] for role in roles))
        if (place := next(fitting, None)) is None:
            return None
        free.remove(place)
        left.subtract([(*role, place[0]) for role in roles])
        names[expert] = place
    return names


def _renamed(
    rng: random.Random,
    several: Sequence[TwoLists],
    names: dict[Expert, Expert],
    layer: int,
    model: SteerableModel,
) -> dict[Expert, Expert]:
    """The same with other names in one layer, if some that its rule accepts are soon found."""
    there = [expert for expert, place in names.items() if place[0] == layer]
    for _ in range(_ATTEMPTS):
        drawn = rng.sample(range(model.moe_shape.n_experts), len(there))
        other = names | {expert: (layer, e) for expert, e in zip(there, drawn, strict=True)}
        if layer not in _refusing(several, other, model):
            return other
    return names


def _under(names: dict[Expert, Expert], several: Sequence[TwoLists]) -> list[Chosen]:
    return [([names[expert] for expert in on], [names[expert] for expert in off]) for on, off in several]


def _refusing(several: Sequence[TwoLists], names: dict[Expert, Expert], model: SteerableModel) -> list[int]:
    """The layers that refuse one of the plans, ascending."""
    return sorted({layer for plan in _under(names, several) for layer in refused_layers(*plan, model)})


def _all_of(several: Sequence[TwoLists]) -> list[Expert]:
    return list(dict.fromkeys(expert for on, off in several for expert in (*on, *off)))
