"""Taking an expert out, in the three senses that differ: remove it, route around it, replace what it says.

    zero_ablate([(3, 5)])                      # its contribution is gone; the others' weights stay
    route_around([(3, 5)])                     # it cannot be chosen; the next-best expert takes its place
    mean_ablate([(3, 5)], means)               # it runs, but says what it says on average
    swap_experts([(3, 5, 2)])                  # it is chosen, but expert 2 runs in its place, at its weight

All give hook lists. The last two need `model.set_use_expert_out(True)`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from moe_lens import hook_names
from moe_lens.checks import as_index
from moe_lens.errors import DataError, HookError
from moe_lens.interventions.edits import Experts, RoutingEdit, experts_by_layer
from moe_lens.interventions.forcing import ScaleEdit, scale_experts
from moe_lens.interventions.positions import Positions, checked_positions
from moe_lens.model.expert_points import ExpertPoint
from moe_lens.model.registration import Model, moe_shape, with_expert_out
from moe_lens.model.router_points import HookList, RoutingPoint
from moe_lens.routers.rule import RoutingRule
from moe_lens.shape import MoEShape
from moe_lens.text.batching import Prompts, how_many
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
        """Asked by the hook point before the hook is added."""
        if (reason := rule.cannot_steer([], self.experts)) is not None:
            raise HookError(f"Layer {self.layer} cannot route around {list(self.experts)}: {reason}.")


@dataclass(frozen=True, eq=False)
class MeanEdit(RoutingEdit):
    """Puts fixed outputs [expert d_model] in the place of some experts' outputs."""

    point: ClassVar[str] = hook_names.EXPERT_OUT

    experts: tuple[int, ...]
    means: Float[Tensor, "expert d_model"] = field(repr=False)
    shape: MoEShape = field(kw_only=True)

    def edit(self, value: Tensor, hook: RoutingPoint) -> Tensor:
        if self.means.shape[-1] != value.shape[-1]:
            raise HookError(
                f"{hook.name}: means of {self.means.shape[-1]} numbers for outputs of {value.shape[-1]}; "
                "they are another model's."
            )
        meant = torch.isin(hook.chosen, torch.tensor(self.experts, device=value.device))
        return torch.where(meant.unsqueeze(-1), self.means.to(value)[hook.chosen], value)

    def check_fits(self, shape: MoEShape) -> None:
        """Asked by the hook point before the hook is added."""
        if misfits := self.shape.misfits(shape):
            raise HookError(f"The means are another model's: {'; '.join(misfits)}.")


@dataclass(frozen=True, eq=False)
class SwapEdit(RoutingEdit):
    """Runs other experts in the place of some, at their weights."""

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


@dataclass(frozen=True, eq=False)
class ExpertMeans:
    """What each expert gives on average, over the tokens that chose it.

    Attributes:
        shape: which model.
        values: mean output [layer expert d_model], before weights, float32; NaN for an expert never chosen.
        counts: at how many tokens each was chosen, int64 [layer expert].
    """

    shape: MoEShape
    values: Float[Tensor, "layer expert d_model"]
    counts: Int[Tensor, "layer expert"]

    def __repr__(self) -> str:
        never = int((self.counts == 0).sum())
        return f"ExpertMeans({self.shape}, {self.counts.numel() - never} experts, {never} never chosen)"


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
        positions: where; see `moe_lens.positions`.

    Raises:
        DataError: no experts, or not one of these forms. (HookError, before the forward: no such expert.)
    """
    return scale_experts(experts, 0.0, layers=layers, positions=positions)


def keep_only(
    experts: Experts, *, layers: int | Iterable[int] | None = None, positions: Positions = None
) -> HookList:
    """Remove what all other experts of the layers named contribute: the complement of `zero_ablate`.

    >>> from moe_lens import keep_only, organisms
    >>> model = organisms.load("specialised")
    >>> _ = model.run_with_hooks("Question : what", fwd_hooks=keep_only({0: [1, 5]}))

    The routed outputs under `zero_ablate(experts)` and `keep_only(experts)` sum to the layer's own. Arguments
    and errors as in `zero_ablate`.
    """
    where = checked_positions(positions)
    return [
        ScaleEdit(layer, where, tuple(found), 0.0, others=True).entry
        for layer, found in experts_by_layer(experts, layers).items()
    ]


def route_around(
    experts: Experts, *, layers: int | Iterable[int] | None = None, positions: Positions = None
) -> HookList:
    """Route as if these experts were not there: the next-best ones take their places.

    >>> from moe_lens import organisms, route_around
    >>> model = organisms.load("specialised")
    >>> _ = model.run_with_hooks("Question : what", fwd_hooks=route_around([(0, 5), (1, 2)]))

    For routers that choose by the order of their logits that is logit := -inf; others are held to it by their
    rule. The remaining weights are those that the rule derives, so they change too where it normalises.

    Args:
        experts: pairs (layer, expert), a mapping {layer: experts}, or experts with `layers`.
        positions: where; see `moe_lens.positions`.

    Raises:
        DataError: no experts, or not one of these forms. (HookError, before the forward: no such expert,
            fewer than k others, or a router that cannot be steered.)
    """
    where = checked_positions(positions)
    return [
        RouteAroundEdit(layer, where, tuple(found)).entry
        for layer, found in experts_by_layer(experts, layers).items()
    ]


def mean_ablate(
    experts: Experts,
    means: ExpertMeans,
    *,
    layers: int | Iterable[int] | None = None,
    positions: Positions = None,
) -> HookList:
    """Let these experts say what they say on average; routing and weights stay.

    >>> from moe_lens import mean_ablate, mean_expert_outputs, organisms
    >>> model = organisms.load("specialised")
    >>> means = mean_expert_outputs(model, ["Question : what is", "Document : the"])
    >>> model.set_use_expert_out(True)
    >>> _ = model.run_with_hooks("Question : what", fwd_hooks=mean_ablate([(0, 5)], means))

    Args:
        experts: pairs (layer, expert), a mapping {layer: experts}, or experts with `layers`.
        means: from `mean_expert_outputs`, which leaves special tokens (BOS, ...) out unless told otherwise;
            this acts on them, too, unless `positions` says otherwise.
        positions: where; see `moe_lens.positions`.

    Raises:
        DataError: no experts, one that the means do not know, or one that was never chosen there. (HookError,
            before the forward: set_use_expert_out is off, or another model.)
    """
    if not isinstance(means, ExpertMeans):
        raise DataError(f"mean_ablate needs means of mean_expert_outputs; got {type(means).__name__}.")
    where = checked_positions(positions)
    hooks: HookList = []
    for layer, found in experts_by_layer(experts, layers).items():
        if layer not in means.shape.layers or max(found) >= means.shape.n_experts:
            raise DataError(f"The means know no experts {found} of layer {layer}: {means.shape}.")
        row = means.shape.layers.index(layer)
        if never := [expert for expert in found if not int(means.counts[row, expert])]:
            raise DataError(
                f"Experts {never} of layer {layer} were never chosen in the prompts of the means, so they "
                "have none; take more prompts, or zero_ablate them."
            )
        hooks.append(MeanEdit(layer, where, tuple(found), means.values[row], shape=means.shape).entry)
    return hooks


def swap_experts(swaps: Iterable[Sequence[int]], *, positions: Positions = None) -> HookList:
    """Run another expert where one is chosen, at that one's weight; routing and weights stay.

    >>> from moe_lens import organisms, swap_experts
    >>> model = organisms.load("specialised")
    >>> model.set_use_expert_out(True)
    >>> both_ways = [(0, 5, 1), (0, 1, 5)]
    >>> _ = model.run_with_hooks("Question : what", fwd_hooks=swap_experts(both_ways))

    Args:
        swaps: triples (layer, expert, other): where `expert` was chosen, `other` runs. All are meant at once.
        positions: where; see `moe_lens.positions`.

    Raises:
        DataError: no triples, or two for one expert. (HookError, before the forward: set_use_expert_out is
            off, or no such expert.)
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
            raise DataError(f"swap_experts: expert {expert} of layer {layer} has two others to run.")
    return [SwapEdit(layer, where, tuple(pairs.items())).entry for layer, pairs in sorted(by_layer.items())]


def mean_expert_outputs(
    model: Model,
    prompts: Prompts,
    *,
    span: Span = "all",
    batch_size: int = 8,
    progress: bool = False,
) -> ExpertMeans:
    """What each expert gives on average over the tokens of a dataset that choose it: for `mean_ablate`.

    >>> from moe_lens import mean_expert_outputs, organisms
    >>> mean_expert_outputs(organisms.load("specialised"), ["Question : what is"]).values.shape
    torch.Size([4, 8, 64])

    Summed in float64, one batch at a time. `set_use_expert_out` is left as it was.

    Args:
        prompts: as in `collect_routing`.
        span: which tokens count; see `moe_lens.spans`. "all": all but special ones.
        progress: show a progress bar.

    Raises:
        DataError: as in `counted_batches`. HookError: as in `set_use_expert_out`.
    """
    shape = moe_shape(model)
    layers = shape.layers
    sums: dict[int, Tensor] = {}
    counts = {layer: torch.zeros(shape.n_experts, dtype=torch.int64) for layer in layers}
    counted = torch.zeros(0)

    def add(outputs: Tensor, hook: Any) -> None:
        layer = hook.layer()
        here = counted.to(outputs.device)
        chosen, rows = hook.chosen[here].flatten(), outputs[here].double().flatten(0, 1)
        zeros = torch.zeros(shape.n_experts, rows.shape[-1], dtype=torch.float64)
        part = zeros.to(rows.device).index_add_(0, chosen, rows).cpu()
        sums[layer] = sums.get(layer, 0) + part
        counts[layer] += torch.bincount(chosen.cpu(), minlength=shape.n_experts)

    hooks: HookList = [(hook_names.expert_out(layer), add) for layer in layers]
    bar = tqdm(total=how_many(prompts), unit="prompt", disable=not progress)
    with torch.no_grad(), with_expert_out(model), bar:
        for tokens, mask, counted in counted_batches(model, prompts, span, batch_size):  # noqa: B007
            padding: dict[str, Any] = {} if bool(mask.all()) else {"attention_mask": mask.long()}
            model.run_with_hooks(tokens, fwd_hooks=list(hooks), return_type=None, **padding)
            bar.update(len(tokens))
    number = torch.stack([counts[layer] for layer in layers])
    values = torch.stack([sums[layer] for layer in layers]) / number.unsqueeze(-1)
    return ExpertMeans(shape, values.float(), number)
