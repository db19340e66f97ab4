"""Steering by choosing the route (SteerMoE, arXiv 2509.09660): the hooks that apply a plan.

    logits = model.run_with_hooks(prompt, fwd_hooks=steer_hooks(plan))
    with model.hooks(steer_hooks([plan, None, other], positions="generated")):    # one plan a prompt
        texts = model.generate(prompts)

On every token that is steered an activated expert is in the top-k, a deactivated one is not, and the other
experts keep their scores and order. An empty plan gives no hooks and changes nothing.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from typing import Any, Final, NamedTuple, SupportsFloat, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens import hook_names
from moe_lens.checks import numbers_of
from moe_lens.errors import HookError, PlanError
from moe_lens.hook_names import HookList
from moe_lens.interventions.positions import Positions, checked_positions, selected
from moe_lens.model.points import RoutingPoint
from moe_lens.routers.held import HeldRule
from moe_lens.routers.hold import Hold
from moe_lens.routers.rule import RoutingRule
from moe_lens.routers.transform import soften, steer_logits
from moe_lens.shape import MoEShape
from moe_lens.steering.plan import SteeringPlan, checked_only_unmet
from moe_lens.steering.slices import plans_by_row, tokens_of
from moe_lens.text.spans import TextSpan

Strength = float | Float[Tensor, ""] | None
"""λ of the soft form z ± λ·std(z); None for the paper's transform."""

_LOGITS: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Wish(NamedTuple):
    """What is wanted on the tokens of a forward."""

    hold: Hold
    """The experts; masks that broadcast to [batch pos expert]."""
    epsilon: float | Tensor
    """A number, or [batch pos 1] (or what broadcasts to it)."""


@dataclass(frozen=True, eq=False, repr=False)
class SteeringHook:
    """The hook function that carries out plans in one layer.

    Attributes:
        plans: one for all prompts, or one a prompt; None for a prompt that is not steered.
        layer: number of the layer.
        positions: at which tokens (checked).
        strength: of the soft form; None for the paper's transform.
        only_unmet: soft only where the router does not do by itself what the plan wants.
        needs_place: whether it steers tokens differently, so that it must know which prompts and positions
            run.
    """

    plans: tuple[SteeringPlan | None, ...]
    layer: int
    positions: Positions = None
    strength: Strength = None
    only_unmet: bool = False
    _fits: set[MoEShape] = field(default_factory=set)  # of models; the hooks of all layers share it
    needs_place: bool = field(init=False)
    _tables: dict[Any, Wish] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs_place", self.positions is not None or len(self.plans) > 1)

    def __call__(self, router_logits: Float[Tensor, "*batch expert"], hook: Any = None) -> Tensor:
        """Steered scores [*batch expert]; on a model's hook point, as the layer's rule reaches the guarantee.

        Called without a hook point (on logits alone), it gives `steer_logits`, SteerMoE's formulas. Called on
        a part of a point's logits, it steers that part, and nothing else.
        """
        if hook is not None and not self._is_for(str(hook.name)):
            raise HookError(
                f"The steering hook for {hook_names.router_logits(self.layer)} was put on {hook.name}; use "
                "the names that steer_hooks gives."
            )
        if not isinstance(hook, RoutingPoint):
            return self._alone(router_logits)
        batch, n_experts = hook.token_shape, hook.shape.n_experts
        if batch is None or router_logits.shape[-1] != n_experts:
            raise HookError(
                f"{hook.name}: a plan was called on logits of shape {tuple(router_logits.shape)}; it needs "
                f"those of all {n_experts} experts of some tokens, while the layer runs."
            )
        whole = router_logits if router_logits.shape[:-1] == batch else None
        if whole is not None or (self.strength is not None and not self.needs_place and not self.only_unmet):
            steered, hook.rule = self._steered(
                hook.rule, router_logits, self._wish(router_logits, hook.state)
            )
            return steered
        return self._on_part(router_logits, hook, batch)

    def steer(
        self, rule: RoutingRule, logits: Float[Tensor, "*batch expert"], place: Any = None
    ) -> tuple[Float[Tensor, "*batch expert"], RoutingRule]:
        """Steered logits and the rule to route them by, where no other hook follows: a pure function.

        Args:
            rule: the layer's.
            logits: [batch pos expert]; any batch dimensions where `needs_place` is false.
            place: the forward that is running (`hook.state`); not needed where `needs_place` is false.
        """
        return self._steered(rule, logits, self._wish(logits, place), watched=False)

    def decide(
        self, rule: RoutingRule, logits: Float[Tensor, "*batch expert"], place: Any = None
    ) -> tuple[Float[Tensor, "*batch expert"], Int[Tensor, "*batch k"], Float[Tensor, "*batch k"]]:
        """`steer`, then the choice: steered logits, indices and weights, where no other plan follows."""
        if self.needs_place:
            hold, epsilon = self._wish(logits, place)
        else:
            hold, epsilon = self._table(logits.shape[-1], logits.device, logits.dtype)
        if self.strength is None and isinstance(rule, HeldRule):
            return rule.decide(logits, hold, epsilon)
        steered, rule = self._steered(rule, logits, Wish(hold, epsilon), watched=False)
        indices = rule.select(steered)
        return steered, indices, rule.weigh(steered, indices)

    def is_fixed_plan(self, point_name: str) -> bool:
        """Whether it belongs on this point and always does the same: no tensor that may change is in it."""
        return self._is_for(point_name) and not isinstance(self.strength, Tensor)

    @property
    def plan(self) -> SteeringPlan:
        """The plan, where it is one for all prompts."""
        if len(self.plans) != 1 or self.plans[0] is None:
            raise PlanError(f"{self} carries out {len(self.plans)} plans, see its `plans`.")
        return self.plans[0]

    @property
    def digest(self) -> str | None:
        """Says what the hook does: plans, layer, positions, strength. None where positions are a function."""
        plans = " ".join("-" if plan is None else plan.digest for plan in self.plans)
        if self.positions is None and self.strength is None:
            return f"{plans} {self.layer}"
        where = _described(self.positions)
        strength = None if self.strength is None else _number(self.strength)
        unmet = " only unmet" * self.only_unmet
        return None if where is None else f"{plans} {self.layer} at {where} strength {strength}{unmet}"

    def check_fits(self, shape: MoEShape) -> None:
        """Called by the hook point before the hook is added; raises PlanError where a plan does not fit."""
        if shape in self._fits:
            return
        for plan in self.plans:
            if plan is not None:
                plan.check_fits(shape)
        self._fits.add(shape)

    def check_rule(self, rule: RoutingRule) -> None:
        """Called by the hook point before the hook is added; raises PlanError where the rule cannot obey."""
        for activate, deactivate in self._named:
            if self.strength is not None and rule.chooses_by_logits:
                continue  # a nudge, which promises nothing
            if (activate or deactivate) and (reason := rule.cannot_steer(activate, deactivate)) is not None:
                raise PlanError(f"Layer {self.layer} cannot be steered by this plan: {reason}.")

    def __repr__(self) -> str:
        n_named = sum(len(part) for plan in self.plans for part in self._experts(plan))
        parts = [f"layer {self.layer}", f"{n_named} expert{'s' * (n_named != 1)}"]
        parts += [f"{len(self.plans)} plans"] if len(self.plans) > 1 else []
        parts += ["at positions"] if self.positions is not None else []
        parts += [f"strength {_number(self.strength):g}"] if self.strength is not None else []
        parts += ["only where unmet"] if self.only_unmet else []
        return f"SteeringHook({', '.join(parts)})"

    def __eq__(self, other: object) -> bool:
        """Whether it does the same."""
        if not isinstance(other, SteeringHook):
            return False
        if (digest := self.digest) is None:
            return self is other
        return digest == other.digest

    def __hash__(self) -> int:
        return hash((self.plans, self.layer))

    def _is_for(self, point_name: str) -> bool:
        return hook_names.parse(point_name) == (self.layer, hook_names.ROUTER_LOGITS)

    @cached_property
    def _named(self) -> list[tuple[list[int], list[int]]]:
        return [self._experts(plan) for plan in self.plans]

    def _experts(self, plan: SteeringPlan | None) -> tuple[list[int], list[int]]:
        """Activated and deactivated experts of this layer; deactivation wins."""
        return ([], []) if plan is None else plan.in_layer(self.layer)

    def _table(self, n_experts: int, device: torch.device, dtype: torch.dtype) -> Wish:
        """What each plan wants, [plan 1 expert] and [plan 1 1]; of a single plan [expert] and a number."""
        key = (n_experts, device, dtype)
        wish = self._tables.get(key)
        if wish is None:
            hold, epsilon = self._made(n_experts, device)
            wish = self._tables[key] = Wish(replace(hold, dtype=dtype), epsilon)
        return wish

    def _made(self, n_experts: int, device: torch.device) -> Wish:
        """`_table` whatever the logits' dtype."""
        key = (n_experts, device)
        if key not in self._tables:
            named = self._named
            highest = max([0, *(expert for both in named for part in both for expert in part)])
            if highest >= n_experts:
                raise HookError(
                    f"The steering plan names expert {highest} of layer {self.layer}, which has experts 0 to "
                    f"{n_experts - 1}: the plan is for another model."
                )
            epsilons = [0.0 if plan is None else plan.epsilon for plan in self.plans]
            with torch.inference_mode(False):  # later runs may need gradients
                holds = [Hold.of_experts(*both, n_experts, device) for both in named]
                if len(holds) == 1:
                    wish = Wish(holds[0].fixed(epsilons[0]), epsilons[0])
                else:
                    inside = torch.stack([hold.inside for hold in holds])[:, None]
                    outside = torch.stack([hold.outside for hold in holds])[:, None]
                    epsilon = torch.tensor(epsilons, device=device)[:, None, None]
                    everywhere = all(activate or deactivate for activate, deactivate in named)
                    wish = Wish(Hold(inside, outside, everywhere=everywhere).fixed(epsilon), epsilon)
            self._tables[key] = wish
        return self._tables[key]

    def prepare(self, n_experts: int, device: torch.device) -> None:
        """Make what it needs on this device, before a run that may be compiled."""
        for dtype in _LOGITS:
            self._table(n_experts, device, dtype)

    def _wish(self, logits: Float[Tensor, "*batch expert"], place: Any, batch: Any = None) -> Wish:
        """What is wanted on the tokens of a forward, of [batch pos], whose experts are those of `logits`."""
        wish = self._table(logits.shape[-1], logits.device, logits.dtype)
        if not self.needs_place:
            return wish
        hold, epsilon = wish
        n_rows, n_pos = batch or logits.shape[:-1]
        if len(self.plans) > 1:
            rows = plans_by_row(len(self.plans), place, n_rows, logits.device)
            if rows is not None:
                masks = (hold.inside, hold.outside, hold.named, hold.steps, hold.ranks)
                inside, outside, named, steps, ranks = (cast(Tensor, mask)[rows] for mask in masks)
                hold = replace(hold, inside=inside, outside=outside, named=named, steps=steps, ranks=ranks)
                epsilon = torch.as_tensor(epsilon)[rows]
        if self.positions is not None:
            hold = hold.on(self._selected(place, n_rows, n_pos, logits.device))
        return Wish(hold, epsilon)

    def _selected(self, place: Any, n_rows: int, n_pos: int, device: torch.device) -> Tensor:
        """The positions' tokens, bool [batch pos]; the same in every layer."""
        key = ("steered", id(self.positions), n_rows, n_pos, device)
        if key not in place.memory:  # kept beside the positions, so that no others can get their id
            chosen = selected(self.positions, place, n_rows, n_pos).to(device)
            place.memory[key] = (self.positions, chosen)
        return place.memory[key][1]

    def _steered(
        self, rule: RoutingRule, logits: Float[Tensor, "*batch expert"], wish: Wish, watched: bool = True
    ) -> tuple[Float[Tensor, "*batch expert"], RoutingRule]:
        hold, epsilon = wish
        if self.strength is not None:
            return self._softened(rule, logits, hold), rule
        if isinstance(rule, HeldRule):
            return rule.steer_by(logits, hold, epsilon, watched)
        return self._by_value(rule, logits, hold)

    def _softened(
        self, rule: RoutingRule, logits: Float[Tensor, "*batch expert"], hold: Hold
    ) -> Float[Tensor, "*batch expert"]:
        inside, outside = hold.inside, hold.outside
        if self.only_unmet:
            chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, rule.select(logits), True)
            inside, outside = inside & ~chosen, outside & chosen
        return soften(logits, inside, outside, cast(Any, self.strength))

    def _by_value(
        self, rule: RoutingRule, logits: Float[Tensor, "*batch expert"], hold: Hold
    ) -> tuple[Float[Tensor, "*batch expert"], RoutingRule]:
        """With a rule that holds nobody, the logits alone must do: its own `steer`, plan by plan."""
        if not self.needs_place:
            return rule.steer(logits, *self._experts(self.plan), self.plan.epsilon)
        wanted, result = hold.like(logits), logits.float()
        for plan in {plan for plan in self.plans if plan is not None}:
            own = Hold.of_experts(*self._experts(plan), logits.shape[-1], logits.device)
            steered, after = rule.steer(logits, *self._experts(plan), plan.epsilon)
            if after is not rule:
                raise HookError(f"{type(rule).__name__} can be steered by one plan on all tokens only.")
            same = (wanted.inside == own.inside) & (wanted.outside == own.outside)
            result = torch.where(same.all(dim=-1, keepdim=True), steered, result)
        return result, rule

    def _on_part(self, part: Tensor, hook: RoutingPoint, batch: tuple[int, ...]) -> Tensor:
        """Steers some tokens of a forward, and holds there only."""
        tokens = tokens_of(part, batch, getattr(hook, "value", None))
        hold, epsilon = self._wish(part, hook.state, batch)
        whole = part.new_empty(1).expand(*batch, part.shape[-1])
        hold = replace(hold.like(whole).at(tokens), everywhere=False)
        if isinstance(epsilon, Tensor):
            epsilon = epsilon.expand(*batch, 1).flatten(0, -2)[tokens]
        rule = hook.rule
        steered, after = self._steered(
            rule.at(tokens) if isinstance(rule, HeldRule) else rule, part, Wish(hold, epsilon)
        )
        if isinstance(rule, HeldRule) and isinstance(after, HeldRule) and after.hold is not None:
            hook.rule = rule.joined(after, tokens, batch)
        return steered

    def _alone(self, logits: Float[Tensor, "*batch expert"]) -> Tensor:
        """On logits of no model."""
        if self.needs_place:
            raise HookError(f"{self} needs a model's hook point, which tells the prompts and positions.")
        if self.only_unmet:
            raise HookError(f"{self} needs a model's hook point, whose rule tells who is chosen.")
        hold, epsilon = self._made(logits.shape[-1], logits.device)
        if self.strength is not None:
            return soften(logits, hold.inside, hold.outside, self.strength)
        return steer_logits(logits, *self._experts(self.plan), float(epsilon))


def steer_hooks(
    plan: SteeringPlan | Sequence[SteeringPlan | None],
    *,
    layers: int | Iterable[int] | None = None,
    positions: Positions = None,
    strength: SupportsFloat | None = None,
    only_unmet: bool | None = None,
) -> HookList:
    """The hooks that carry out a plan: one for each layer it names, on that layer's router logits.

    >>> from moe_lens import SteeringPlan, steer_hooks
    >>> plan = SteeringPlan(deactivate=[(2, 5), (0, 1)])
    >>> [name for name, _ in steer_hooks(plan)]
    ['blocks.0.mlp.hook_router_logits', 'blocks.2.mlp.hook_router_logits']
    >>> steer_hooks([plan, None], positions="generated", strength=2.0)[0][1]     # two prompts
    SteeringHook(layer 0, 1 expert, 2 plans, at positions, strength 2)

    Use them with `run_with_hooks(fwd_hooks=...)`, `hooks(...)` or `add_hook`. Hooks on the same point run in
    the order of the list: the plan steers what hooks before it return, hooks after it edit what it steered.

    The rule that steers travels on the hook point and names the experts that it holds in and out, token by
    token. So the plan holds beside other hooks, on every router: a bias on other experts, a shift of all
    logits, noise, a temperature, another dtype. Only a later hook that is about a steered expert sets it
    free: one that changes its logit on a token, by more than rounding, and leaves those of at least a quarter
    of the experts as they are; or that sets it to -inf. A hook that replaces logits altogether says so by
    `hook.rule = hook.rule.released(tokens)`.
    Of two plans on one layer, the later one's word counts for the experts it names on a token; of the
    earlier one stays what is possible beside it: all, else what it keeps out, else what it puts in. On
    tokens that the later one does not steer, the earlier one holds whole.
    Steered logits from a cache do not by themselves repeat the route in another run: patch the indices and
    weights.

    Called within a hook of your own on some of the tokens (`logits[:1] = steer(logits[:1], hook)`), a hook
    function of this list steers those alone.

    Args:
        plan: for all prompts; or a list with one plan, or None, for each prompt of the batch. Beams and
            several sequences of one prompt have that prompt's plan.
        layers: only these of the layers that the plans name; None: all.
        positions: at which tokens; see `moe_lens.interventions.Positions`. All others keep their logits and
            weights bit for bit, and are not held.
        strength: None for that of the plans, which must agree in it (`SteeringPlan.strength`; None there is
            the paper's transform). A number λ ≥ 0 or a scalar tensor, which gets gradients, for the soft form
            z ± λ·std(z): the standard deviation (correction 0) over the token's experts. It raises and lowers
            logits and holds nobody, so that routers with a bias or groups may overrule it; 0 changes nothing,
            `math.inf` is the paper's transform.
        only_unmet: as `SteeringPlan.only_unmet`; None for that of the plans.

    Raises:
        PlanError: not plans; a strength that is not such a number; plans of different strengths; only_unmet
            without a strength; layers that no plan names. DataError: positions of no known form.
        HookError: during the run, another number of prompts than plans, or positions outside the prompt.
    """
    plans = _checked_plans(plan)
    where, (soft, unmet) = checked_positions(positions), _softness(plans, strength, only_unmet)
    named = {layer for one in plans if one is not None for layer, _ in one.activate + one.deactivate}
    kept = named if layers is None else set(numbers_of(layers, "layers"))
    if not kept <= named:
        raise PlanError(f"steer_hooks: layers={layers!r}, but the plan's layers are {sorted(named)}.")
    fits: set[MoEShape] = set()
    return [
        (hook_names.router_logits(layer), SteeringHook(plans, layer, where, soft, unmet, fits))
        for layer in sorted(kept)
    ]


def _checked_plans(given: Any) -> tuple[SteeringPlan | None, ...]:
    plans = (given,) if isinstance(given, SteeringPlan) else given
    if isinstance(plans, str) or not isinstance(plans, Sequence):
        raise PlanError(
            f"steer_hooks needs a SteeringPlan, or a list of one for each prompt; got {type(given).__name__}."
        )
    for plan in plans:
        if plan is not None and not isinstance(plan, SteeringPlan):
            raise PlanError(f"steer_hooks: a list holds SteeringPlans and None; got {type(plan).__name__}.")
    return tuple(plans)


def _softness(
    plans: tuple[SteeringPlan | None, ...], strength: Any, only_unmet: bool | None
) -> tuple[Strength, bool]:
    """Strength and only_unmet: those that are given, else those of the plans that name experts."""
    own = [plan for plan in plans if plan is not None and len(plan)]
    strengths, unmets = {plan.strength for plan in own}, {plan.only_unmet for plan in own}
    if (strength is None and len(strengths) > 1) or (only_unmet is None and len(unmets) > 1):
        raise PlanError(
            "steer_hooks: the plans of one list differ in strength or only_unmet. Give strength= and "
            "only_unmet= for all; or several lists, with None for the others' prompts."
        )
    soft = _checked_strength(next(iter(strengths), None) if strength is None else strength)
    if only_unmet is None:
        only_unmet = next(iter(unmets), False) and soft is not None
    return soft, checked_only_unmet(only_unmet, soft)


def _checked_strength(strength: Any) -> Strength:
    if strength is None:
        return None
    if isinstance(strength, Tensor) and strength.numel() == 1 and strength.is_floating_point():
        if 0 <= float(strength.detach()) < math.inf:
            return strength.reshape(())
    elif isinstance(strength, Real) and not isinstance(strength, bool) and float(strength) >= 0:
        return None if math.isinf(float(strength)) else float(strength)
    raise PlanError(
        "strength must be None or a number from 0 on (math.inf: the paper's transform), or a tensor of one "
        f"finite number from 0 on; got {strength!r}."
    )


def _number(strength: SupportsFloat) -> float:
    return float(strength.detach() if isinstance(strength, Tensor) else strength)


def _described(positions: Positions) -> str | None:
    """Checked positions in words; None for functions, which do not say what they do."""
    if isinstance(positions, Tensor):
        content = positions.contiguous().view(torch.uint8).numpy().tobytes()
        return f"{tuple(positions.shape)} {hashlib.sha256(content).hexdigest()}"
    if positions is None or isinstance(positions, str | tuple | slice | TextSpan):
        return repr(positions)
    return None
