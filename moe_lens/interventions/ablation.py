"""Ablating an expert, in three different senses: remove it, route around it, replace its output.

    zero_ablate([(3, 5)])                      # its contribution is gone; the others' weights stay
    route_around([(3, 5)])                     # it cannot be chosen; the next-best expert takes its place
    mean_ablate([(3, 5)], means)               # it runs, but its output is its average output
    swap_experts([(3, 5, 2)])                  # it is chosen, but expert 2 runs in its place, at its weight

All return hook lists. The last two need `model.set_use_expert_out(True)`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from moe_lens import hook_names
from moe_lens.checks import as_index
from moe_lens.errors import DataError, HookError
from moe_lens.hook_names import HookList, Hooks, hook_list
from moe_lens.interventions.edits import Experts, RoutingEdit, experts_by_layer
from moe_lens.interventions.forcing import ScaleEdit, scale_experts
from moe_lens.interventions.positions import Positions, checked_positions
from moe_lens.interventions.results import ExpertMeans
from moe_lens.model.expert_points import ExpertPoint
from moe_lens.model.points import RoutingPoint
from moe_lens.model.registration import moe_shape, running_of, with_expert_out
from moe_lens.model.state import Pass
from moe_lens.model.wrapper import Model
from moe_lens.routers.rule import RoutingRule
from moe_lens.shape import MoEShape
from moe_lens.text.batching import Prompts, how_many, padding
from moe_lens.text.spans import Span, counted_batches


@dataclass(frozen=True, eq=False)
class RouteAroundEdit(RoutingEdit):
    """Routes as if some experts were not there."""

    point: ClassVar[str] = hook_names.ROUTER_LOGITS

    experts: tuple[int, ...]

    def edit(self, value: Tensor, hook: RoutingPoint) -> Tensor:
        logits, hook.rule = hook.rule.without(value, self.experts)
        return logits

    def highest_expert(self) -> int:
        return max(self.experts)

    def check_rule(self, rule: RoutingRule) -> None:
        """Called by the hook point before the hook is added."""
        if (reason := rule.cannot_steer([], self.experts)) is not None:
            raise HookError(f"Layer {self.layer} cannot route around {list(self.experts)}: {reason}.")


@dataclass(frozen=True, eq=False)
class MeanEdit(RoutingEdit):
    """Replaces some experts' outputs by fixed ones [expert d_model]."""

    point: ClassVar[str] = hook_names.EXPERT_OUT

    experts: tuple[int, ...]
    means: Float[Tensor, "expert d_model"] = field(repr=False)
    shape: MoEShape = field(kw_only=True)

    def edit(self, value: Tensor, hook: RoutingPoint) -> Tensor:
        if self.means.shape[-1] != value.shape[-1]:
            raise HookError(
                f"{hook.name}: the means have {self.means.shape[-1]} numbers, this model's outputs "
                f"{value.shape[-1]}; give means of this model."
            )
        meant = torch.isin(hook.chosen, torch.tensor(self.experts, device=value.device))
        return torch.where(meant.unsqueeze(-1), self.means.to(value)[hook.chosen], value)

    def check_fits(self, shape: MoEShape) -> None:
        """Called by the hook point before the hook is added."""
        if misfits := self.shape.misfits(shape):
            raise HookError(
                f"The means belong to another model: {'; '.join(misfits)}; give means of this one."
            )


@dataclass(frozen=True, eq=False)
class SwapEdit(RoutingEdit):
    """Runs other experts in place of some, at their weights."""

    point: ClassVar[str] = hook_names.EXPERT_OUT

    others: tuple[tuple[int, int], ...]

    def edit(self, value: Tensor, hook: RoutingPoint) -> Tensor:
        indices = hook.chosen
        for expert, other in self.others:
            indices = torch.where(hook.chosen == expert, other, indices)
        swapped = cast(ExpertPoint, hook).outputs_of(indices)
        return torch.where((indices != hook.chosen).unsqueeze(-1), swapped, value)

    def highest_expert(self) -> int:
        return max(max(pair) for pair in self.others)


def zero_ablate(
    experts: Experts, *, layers: int | Iterable[int] | None = None, positions: Positions = None
) -> HookList:
    """Remove what these experts contribute; routing and the others' weights stay as they are.

    >>> from moe_lens import organisms, zero_ablate
    >>> model = organisms.load("specialised")
    >>> _ = model.run_with_hooks("Question : what", fwd_hooks=zero_ablate([(0, 5)], positions="prompt"))

    The block's output loses weight × output of each. (Done by weight 0: the result is that of a zero output.)

    Args:
        experts: pairs (layer, expert), a mapping {layer: experts}, or experts with `layers`.
        layers: the layers of `experts`, where those are bare numbers.
        positions: at which tokens; see `moe_lens.interventions.Positions`.

    Raises:
        DataError: no experts, or not one of these forms.
        HookError: no such expert. (Raised before the forward.)
    """
    return scale_experts(experts, 0.0, layers=layers, positions=positions)


def keep_only(
    experts: Experts, *, layers: int | Iterable[int] | None = None, positions: Positions = None
) -> HookList:
    """Remove what all other experts of the named layers contribute: the complement of `zero_ablate`.

    >>> from moe_lens import keep_only, organisms
    >>> model = organisms.load("specialised")
    >>> _ = model.run_with_hooks("Question : what", fwd_hooks=keep_only({0: [1, 5]}))

    The routed outputs under `zero_ablate(experts)` and `keep_only(experts)` sum to the unedited output.

    Args:
        experts: pairs (layer, expert), a mapping {layer: experts}, or experts with `layers`.
        layers: the layers of `experts`, where those are bare numbers.
        positions: at which tokens; see `moe_lens.interventions.Positions`.

    Raises:
        DataError: no experts, or not one of these forms.
        HookError: no such expert. (Raised before the forward.)
    """
    where = checked_positions(positions)
    return [
        ScaleEdit(layer, where, tuple(numbers), 0.0, others=True).entry
        for layer, numbers in experts_by_layer(experts, layers).items()
    ]


def route_around(
    experts: Experts, *, layers: int | Iterable[int] | None = None, positions: Positions = None
) -> HookList:
    """Route as if these experts were not there: the next-best ones take their places.

    >>> from moe_lens import organisms, route_around
    >>> model = organisms.load("specialised")
    >>> _ = model.run_with_hooks("Question : what", fwd_hooks=route_around([(0, 5), (1, 2)]))

    For routers that choose by the order of their logits this means logit := -inf; for others their rule does
    what has that effect. The rule derives the remaining weights, so where it normalises, they change, too.

    Args:
        experts: pairs (layer, expert), a mapping {layer: experts}, or experts with `layers`.
        layers: the layers of `experts`, where those are bare numbers.
        positions: at which tokens; see `moe_lens.interventions.Positions`.

    Raises:
        DataError: no experts, or not one of these forms.
        HookError: no such expert, fewer than k others, or a router that cannot be steered. (Raised before the
            forward.)
    """
    where = checked_positions(positions)
    return [
        RouteAroundEdit(layer, where, tuple(numbers)).entry
        for layer, numbers in experts_by_layer(experts, layers).items()
    ]


def mean_ablate(
    experts: Experts,
    means: ExpertMeans,
    *,
    layers: int | Iterable[int] | None = None,
    positions: Positions = None,
) -> HookList:
    """Replace these experts' outputs by their average outputs; routing and weights stay.

    >>> from moe_lens import mean_ablate, mean_expert_outputs, organisms
    >>> model = organisms.load("specialised")
    >>> means = mean_expert_outputs(model, ["Question : what is", "Document : the"], progress=False)
    >>> model.set_use_expert_out(True)
    >>> _ = model.run_with_hooks("Question : what", fwd_hooks=mean_ablate([(0, 5)], means))

    Args:
        experts: pairs (layer, expert), a mapping {layer: experts}, or experts with `layers`.
        layers: the layers of `experts`, where those are bare numbers.
        means: from `mean_expert_outputs`, which by default leaves out special tokens (BOS, ...), while this
            by default acts on them, too (see `positions`).
        positions: at which tokens; see `moe_lens.interventions.Positions`.

    Raises:
        DataError: no experts, or one that the means lack or that was never chosen in their prompts.
        HookError: set_use_expert_out is off, or another model. (Raised before the forward.)
    """
    if not isinstance(means, ExpertMeans):
        raise DataError(f"mean_ablate needs means of mean_expert_outputs; got {type(means).__name__}.")
    where = checked_positions(positions)
    hooks: HookList = []
    for layer, numbers in experts_by_layer(experts, layers).items():
        if layer not in means.shape.layers or max(numbers) >= means.shape.n_experts:
            raise DataError(f"The means have no experts {numbers} of layer {layer}: {means.shape}.")
        row = means.shape.layers.index(layer)
        if never := [expert for expert in numbers if not int(means.counts[row, expert])]:
            raise DataError(
                f"Experts {never} of layer {layer} were never chosen in the prompts of the means, so they "
                "have no mean; take more prompts, or zero_ablate them."
            )
        hooks.append(MeanEdit(layer, where, tuple(numbers), means.values[row], shape=means.shape).entry)
    return hooks


def swap_experts(swaps: Iterable[Sequence[int]], *, positions: Positions = None) -> HookList:
    """Where an expert is chosen, run another one at its weight; routing and weights stay.

    >>> from moe_lens import organisms, swap_experts
    >>> model = organisms.load("specialised")
    >>> model.set_use_expert_out(True)
    >>> both_ways = [(0, 5, 1), (0, 1, 5)]
    >>> _ = model.run_with_hooks("Question : what", fwd_hooks=swap_experts(both_ways))

    Args:
        swaps: triples (layer, expert, other): where `expert` was chosen, `other` runs. All are made at once.
        positions: at which tokens; see `moe_lens.interventions.Positions`.

    Raises:
        DataError: no triples, or two for one expert.
        HookError: set_use_expert_out is off, or no such expert. (Raised before the forward.)
    """
    where = checked_positions(positions)
    try:
        triples = [tuple(as_index(number) for number in swap) for swap in swaps]
    except TypeError:
        triples = [()]
    if not triples or any(len(triple) != 3 or None in triple for triple in triples):
        raise DataError(f"swap_experts needs triples (layer, expert, other), at least one; got {swaps!r}.")
    by_layer: dict[int, dict[int, int]] = {}
    for layer, expert, other in cast(list[tuple[int, int, int]], triples):
        if by_layer.setdefault(layer, {}).setdefault(expert, other) != other:
            raise DataError(
                f"swap_experts: expert {expert} of layer {layer} is to be replaced by two others; name one."
            )
    return [SwapEdit(layer, where, tuple(pairs.items())).entry for layer, pairs in sorted(by_layer.items())]


def mean_expert_outputs(
    model: Model,
    prompts: Prompts,
    *,
    span: Span = "all",
    batch_size: int = 8,
    hooks: Hooks = (),
    progress: bool = True,
) -> ExpertMeans:
    """What each expert outputs on average over the tokens of a dataset that choose it: for `mean_ablate`.

    >>> from moe_lens import mean_expert_outputs, organisms
    >>> model = organisms.load("specialised")
    >>> mean_expert_outputs(model, ["Question : what is"], progress=False).values.shape
    torch.Size([4, 8, 64])

    Summed in float64, one batch at a time. `set_use_expert_out` is left as it was.

    Args:
        model: a HookedMoE or RoutedModel.
        prompts: strings, chats or tokens; see `moe_lens.text.Prompts`.
        span: which tokens count; see `moe_lens.text.Span`. "all": all except special ones.
        batch_size: prompts a forward.
        hooks: forward hooks to run under (`steer_hooks(plan)`, for one).
        progress: show a progress bar.

    Raises:
        DataError: no prompts, an empty prompt, or a span that selects no token of some prompt.
        HookError: as in `set_use_expert_out`.
    """
    totals = _Totals.of(moe_shape(model))
    points: HookList = [(hook_names.expert_out(layer), totals.add) for layer in totals.shape.layers]
    among, done = Pass(how_many(prompts)), 0
    bar = tqdm(total=among.n_prompts, desc="expert outputs", unit="prompt", disable=not progress)
    with torch.no_grad(), with_expert_out(model), model.hooks([*hook_list(hooks), *points]), bar:
        for tokens, mask, counted in counted_batches(model, prompts, span, batch_size):
            totals.counted = counted
            with running_of(model).of_prompts(torch.arange(done, done + len(tokens)), among):
                model(tokens, return_type=None, **padding(mask))
            done += len(tokens)
            bar.update(len(tokens))
    among.end(done)
    return totals.means()


@dataclass(eq=False)
class _Totals:
    """Running sums of experts' outputs over the tokens that count in the batch that is running."""

    shape: MoEShape
    counts: dict[int, Tensor]  # layer -> [expert]
    sums: dict[int, Tensor] = field(default_factory=dict)  # layer -> [expert d_model], float64
    counted: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))  # [batch pos]

    @classmethod
    def of(cls, shape: MoEShape) -> "_Totals":
        return cls(shape, {layer: torch.zeros(shape.n_experts, dtype=torch.int64) for layer in shape.layers})

    def add(self, outputs: Tensor, hook: Any) -> None:
        layer, counted = hook_names.layer_of(hook.name), self.counted.to(outputs.device)
        chosen = hook.chosen[counted].flatten()
        rows = outputs[counted].double().flatten(0, 1)  # [token·k d_model]
        zeros = torch.zeros(self.shape.n_experts, rows.shape[-1], dtype=torch.float64, device=rows.device)
        self.sums[layer] = self.sums.get(layer, 0) + zeros.index_add_(0, chosen, rows).cpu()
        self.counts[layer] += torch.bincount(chosen.cpu(), minlength=self.shape.n_experts)

    def means(self) -> ExpertMeans:
        counts = torch.stack([self.counts[layer] for layer in self.shape.layers])
        sums = torch.stack([self.sums[layer] for layer in self.shape.layers])
        return ExpertMeans(self.shape, (sums / counts.unsqueeze(-1)).float(), counts)
