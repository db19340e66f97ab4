"""`SteeringPlan`: which experts to promote and which to keep out.

plan = SteeringPlan.from_scores(scores, n_activate=0, n_deactivate=50)
plan = SteeringPlan(activate=[(3, 17)], deactivate=[(5, 2), (5, 9)])     # (layer, expert)
control = plan.random_like(seed=0)
soft = SteeringPlan(deactivate=[(5, 2)], strength=1.5)                   # z − 1.5 · std(z), no guarantee
plan.save("plan.json")
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, SupportsFloat

from moe_lens.checks import as_index
from moe_lens.detection.expert_scores import ExpertScores
from moe_lens.errors import DataError, PlanError, warn
from moe_lens.files import FileKind, digest_of
from moe_lens.results import Result
from moe_lens.shape import MoEShape, shape_from_json
from moe_lens.steering.candidates import (
    at_most,
    candidates,
    check_asks_for_some,
    stable_candidates,
    warn_of_super_experts,
)
from moe_lens.steering.choosing import (
    Expert,
    HowMany,
    OnExcess,
    SteerableModel,
    draw_like,
    in_layer,
    refused_layers,
    select,
)

if TYPE_CHECKING:
    import pandas

_FIELDS: Final = ("activate", "deactivate", "epsilon", "shape")
"""Of every plan, in files and digests; strength and only_unmet follow where a plan is soft."""
EPSILON_RANGE: Final = (1e-4, 30.0)
"""Nats; with a smaller or larger epsilon float32's rounding would merge scores that differ."""
_KIND: Final = FileKind("moe_lens.SteeringPlan", 2, (1, 2, 3), "a steering plan", error=PlanError)
"""Schema 1 had no digest."""
_SOFT_KIND: Final = replace(_KIND, schema=3)
"""Soft plans, which a reader of schema 2 must refuse rather than take for the paper's transform."""


@dataclass(frozen=True, init=False, repr=False)
class SteeringPlan(Result):
    """Which experts to promote into the top-k and which to keep out of it.

    >>> from moe_lens import SteeringPlan, is_routing_point, organisms, steer_hooks
    >>> plan = SteeringPlan(activate=[(0, 1)], deactivate=[(2, 5), (2, 6)])
    >>> model = organisms.load("specialised")
    >>> with model.hooks(steer_hooks(plan)):
    ...     _, cache = model.run_with_cache("Document : the", names_filter=is_routing_point)
    >>> bool((cache["topk_indices", 0] == 1).any(-1).all()), bool((cache["topk_indices", 2] == 5).any())
    (True, False)

    Attributes:
        activate: (layer, expert) pairs to promote, in rank order where they come from scores; may be given as
            layer -> experts, {0: [1, 2]}, too.
        deactivate: pairs to keep out. Where an expert is in both, deactivation wins.
        epsilon: distance above the largest and below the smallest score, in `EPSILON_RANGE`; in nats on
            softmax routers, for others see the docstring of their rule.
        shape: the model that the plan was made for; None for a plan written by hand, which is checked when
            it is applied.
        strength: None for the paper's transform, with its guarantee. A number λ ≥ 0 makes the plan soft:
            activated experts' logits get + λ·std(z), deactivated ones' − λ·std(z), the standard deviation
            (correction 0) over the token's experts (EasySteer's form). Nobody is held in or out, and epsilon
            plays no part. Random sets like the plan are soft, too: EasySteer's control `soft_random`.
        only_unmet: of a soft plan: nudge an activated expert only on tokens that the router would send
            elsewhere, a deactivated one only where it is chosen. EasySteer's `soft_topk` says so of
            activated experts; for deactivated ones this is its mirror.

    Raises:
        PlanError: an expert named twice, negative or missing in the model; more than k activated or more than
            E − k deactivated in a layer; epsilon or strength out of range; only_unmet without a strength.
    """

    activate: tuple[Expert, ...] = ()
    deactivate: tuple[Expert, ...] = ()
    epsilon: float = 0.01
    shape: MoEShape | None = None
    strength: float | None = None
    only_unmet: bool = False

    def __init__(
        self,
        activate: Iterable[Any] | Mapping[int, Iterable[int]] = (),
        deactivate: Iterable[Any] | Mapping[int, Iterable[int]] = (),
        epsilon: SupportsFloat = 0.01,
        shape: MoEShape | None = None,
        strength: SupportsFloat | None = None,
        only_unmet: bool = False,
    ) -> None:
        for name, value in (("activate", activate), ("deactivate", deactivate)):
            object.__setattr__(self, name, _checked_experts(name, value))
        object.__setattr__(self, "epsilon", _checked_epsilon(epsilon))
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "strength", _checked_strength(strength))
        object.__setattr__(self, "only_unmet", checked_only_unmet(only_unmet, self.strength))
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
        layers: Any = None,
        stable: float | None = None,
        n_resamples: int = 1000,
        seed: int = 0,
        epsilon: float = 0.01,
        on_excess: OnExcess = "raise",
        strength: float | None = None,
        only_unmet: bool = False,
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
            n_activate: how many; without `q`, at least one of both numbers is needed. "all" takes every
                expert with a positive score that fits its layer (at most k activated), with a warning that
                names those left out.
            n_deactivate: the same for negative scores (at most E − k deactivated in a layer).
            q: take significant experts only, those with a q-value up to this; needs scores from `detect`.
                With neither number given, "all" of both signs.
            layers: choose among these only: numbers, a slice, or "early", "middle" or "late" (the first and
                the last third of the MoE layers, and those between).
            stable: keep only experts that at least this share of bootstrap resamples of the prompts selects,
                too (above 0, at most 1); then the plan may name fewer experts than asked for. Needs scores
                from `detect` or `compare_routing`.
            n_resamples: of `stable`.
            seed: of `stable`; the same seed gives the same plan.
            epsilon: of the plan.
            on_excess: what to do with more than k activated or more than E − k deactivated experts in one
                layer. "raise", or "drop" those of lower rank with a warning, as the paper's code does (which
                drops activations beyond k without a word).
            strength, only_unmet: of the plan.

        Raises:
            PlanError: no expert asked for, a negative number, more experts asked for than have the sign (and
                the significance), an excess, scores without q-values where `q` is given, or no stable expert.

        Warns if "all" finds none, and if the scores know how large the experts' outputs are
        (`detect(..., outputs=True)`) and the plan deactivates `super_experts`.
        """
        if not isinstance(scores, ExpertScores):
            raise PlanError(f"from_scores needs ExpertScores; got {type(scores).__name__}.")
        if q is not None and n_activate is None and n_deactivate is None:
            n_activate = n_deactivate = "all"
        ranked = candidates(scores, q, layers)
        n_on: HowMany = 0 if n_activate is None else n_activate
        n_off: HowMany = 0 if n_deactivate is None else n_deactivate
        check_asks_for_some(n_on, n_off, "n_activate=, n_deactivate= or q=")
        if stable is not None:
            ranked = stable_candidates(
                scores, ranked, n_on, n_off, share=stable, n_resamples=n_resamples, seed=seed
            )
            n_on, n_off = at_most(n_on, ranked, 1), at_most(n_off, ranked, -1)
        where = "" if layers is None else f" in the layers {layers!r}"
        activate, deactivate = select(
            ranked,
            n_on,
            n_off,
            scores.shape,
            on_excess=on_excess,
            condition=where if q is None else f" and a q-value up to {q:g}{where}",
        )
        if not activate and not deactivate:
            warn("The plan names no expert: none has the sign (or the significance) that was asked for.")
        warn_of_super_experts(deactivate, scores.super_experts)
        return cls(activate, deactivate, epsilon, scores.shape, strength, only_unmet)

    def random_like(
        self,
        *,
        seed: int,
        layer_matched: bool = False,
        shape: MoEShape | None = None,
        model: SteerableModel | None = None,
    ) -> "SteeringPlan":
        """A random plan of the same size, the control: as many activated and deactivated experts.

        It is as soft as this plan.
        Experts are drawn in random order, passing over those of layers that are full. A shape does not
        tell expert groups or layers that cannot be steered. A model does: with it, only layers that can be
        steered are drawn from, and only plans that its routers accept are returned.

        Args:
            seed: the same seed gives the same plan.
            layer_matched: keep the numbers in each layer too; otherwise any MoE layer may be drawn.
            shape: the shape of the model to draw from (`model.moe_shape`), if the plan has none.
            model: a HookedMoE or RoutedModel to draw from, instead of a shape.

        Raises:
            PlanError: no shape known, or the model has no room for so many experts.
        """
        if model is not None:
            if not isinstance(model, SteerableModel):
                raise PlanError(f"random_like needs a model with hook points; got {type(model).__name__}.")
            shape = model.moe_shape
        shape = self.shape if shape is None else _checked_shape(shape)
        if shape is None:
            raise PlanError("random_like of a plan without shape: pass shape=model.moe_shape.")
        self.check_fits(shape)
        activate, deactivate = draw_like(
            self._activated, self.deactivate, shape, seed=seed, layer_matched=layer_matched, model=model
        )
        return self._with(activate, deactivate, shape)

    def reversed(self) -> "SteeringPlan":
        """The same experts, activated ones deactivated and the other way round.

        Not the plan for the opposite behaviour, which takes other experts:
        `SteeringPlan.from_scores(-scores, ...)`.

        Raises:
            PlanError: more than k experts of a layer would be activated, or more than E − k deactivated.
        """
        return self._with(self.deactivate, self._activated, self.shape)

    def in_layer(self, layer: int) -> tuple[list[int], list[int]]:
        """Activated and deactivated experts of a layer; deactivation wins."""
        return in_layer(self.activate, self.deactivate, layer)

    def refused_layers(self, model: SteerableModel) -> list[int]:
        """The layers of a model whose rule cannot obey the plan (`RoutingRule.cannot_steer`).

        Of a soft plan, which promises nothing, those in which no logit decides who runs.
        """
        refused = refused_layers(self.activate, self.deactivate, model)
        if self.strength is None:
            return refused
        return [layer for layer in refused if not model.routing_rule(layer).chooses_by_logits]

    def check_fits(self, shape: MoEShape) -> None:
        """Check that the plan was made for a model of this shape, or for none, and can be applied to it.

        Raises:
            PlanError: another model, an expert that does not exist, more experts than a layer has room for.
        """
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
        return self._with(self.activate, self.deactivate, shape)

    def _with(
        self, activate: Iterable[Any], deactivate: Iterable[Any], shape: MoEShape | None
    ) -> "SteeringPlan":
        """Other experts, as strong as this plan."""
        return SteeringPlan(activate, deactivate, self.epsilon, shape, self.strength, self.only_unmet)

    @property
    def digest(self) -> str:
        """SHA-256 of the plan's content, in hexadecimal: equal plans have equal digests, in files too."""
        return digest_of(self._content)

    @property
    def _content(self) -> dict[str, Any]:
        """What goes into a file; of a plan without strength what schema 2 had."""
        content = asdict(self)
        return content if self.strength is not None else {name: content[name] for name in _FIELDS}

    @property
    def _kind(self) -> FileKind:
        return _KIND if self.strength is None else _SOFT_KIND

    def summary(self) -> str:
        """How many experts the plan names, in which layers, of which model."""
        layers = sorted({layer for layer, _ in (*self.activate, *self.deactivate)})
        of_model = "" if self.shape is None else f" of {self.shape.model}"
        how = f"epsilon {self.epsilon:g}"
        if self.strength is not None:
            how = f"softly, strength {self.strength:g}{', only where unmet' * self.only_unmet}"
        return (
            f"activates {len(self._activated)}, deactivates {len(self.deactivate)} experts in layers "
            f"{layers}{of_model}, {how}"
        )

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row an expert, in rank order: layer, expert, and whether it is activated or deactivated."""
        import pandas as pd

        rows = [(*expert, "activate") for expert in self._activated]
        rows += [(*expert, "deactivate") for expert in self.deactivate]
        return pd.DataFrame(rows, columns=["layer", "expert", "role"])

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically, making folders as needed; equal plans give equal files."""
        self._kind.save_json(path, self._content)

    def to_json(self) -> dict[str, Any]:
        """What `save` writes, as a JSON object."""
        return self._kind.sealed(self._content)

    @classmethod
    def load(cls, path: str | Path) -> "SteeringPlan":
        """Read what `save` wrote, or a file written by hand, which needs no digest.

        Raises:
            PlanError: naming the file and the field at fault.
        """
        content = _KIND.load_json(path)
        try:
            return _from_content(content)
        except (DataError, PlanError) as error:
            raise PlanError(f"{path} cannot be read as a steering plan: {error}") from error

    @property
    def _activated(self) -> tuple[Expert, ...]:
        """The activated experts without those that are deactivated too."""
        return tuple(expert for expert in self.activate if expert not in self.deactivate)

    def __len__(self) -> int:
        return len({*self.activate, *self.deactivate})


def _checked_experts(name: str, experts: Iterable[Any]) -> tuple[Expert, ...]:
    try:
        if isinstance(experts, Mapping):
            experts = [(layer, expert) for layer, own in experts.items() for expert in own]
        pairs = [tuple(item) for item in experts]
    except TypeError as error:
        raise PlanError(
            f"{name} must be a list of (layer, expert) pairs, or a mapping from layers to lists of experts; "
            f"got {experts!r}."
        ) from error
    checked: list[Expert] = []
    for pair in pairs:
        numbers = [as_index(number) for number in pair]
        if len(numbers) != 2 or numbers[0] is None or numbers[1] is None:
            raise PlanError(f"{name}: {pair!r} is not a (layer, expert) pair of whole numbers from 0 on.")
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


def _checked_strength(strength: Any) -> float | None:
    if strength is None:
        return None
    number = float(strength) if isinstance(strength, Real) and not isinstance(strength, bool) else math.nan
    if not 0 <= number < math.inf:
        raise PlanError(
            "strength must be a finite number from 0 on, of standard deviations of a token's logits, or None "
            f"for the paper's transform; got {strength!r}."
        )
    return number


def checked_only_unmet(only_unmet: Any, strength: Any) -> bool:
    """True or False; raises PlanError for anything else, and for True where nothing is soft."""
    if not isinstance(only_unmet, bool):
        raise PlanError(f"only_unmet must be True or False; got {only_unmet!r}.")
    if only_unmet and strength is None:
        raise PlanError(
            "only_unmet=True is about soft plans: the paper's transform puts experts in and keeps them out "
            "wherever they are. Give a strength."
        )
    return only_unmet


def plan_from_json(content: Any) -> SteeringPlan:
    """The plan that `to_json` made a JSON object of. Raises PlanError, naming the field at fault."""
    return _from_content(_KIND.opened("The JSON object", content))


def _from_content(content: dict[str, Any]) -> SteeringPlan:
    expected = {"schema", *_FIELDS, *(("strength", "only_unmet") if content["schema"] == 3 else ())}
    if wrong := sorted(expected.symmetric_difference(content)):
        what = "missing" if wrong[0] in expected else "unknown"
        raise PlanError(f"field {wrong[0]!r} is {what} in schema {content['schema']}.")
    for name in ("activate", "deactivate"):
        if not isinstance(content[name], list):
            raise PlanError(f"field {name!r} must be a list of [layer, expert]; got {content[name]!r}.")
    shape = None if content["shape"] is None else shape_from_json(content["shape"])
    soft = (content["strength"], content["only_unmet"]) if content["schema"] == 3 else ()
    return SteeringPlan(content["activate"], content["deactivate"], content["epsilon"], shape, *soft)
