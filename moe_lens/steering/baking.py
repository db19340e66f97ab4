"""Leaving with a plan: a plain Hugging Face model that never runs the deactivated experts.

    baked = bake(model, plan)                  # a new model; the given one is unchanged
    baked.save_pretrained("without-experts")   # an ordinary checkpoint: no moe_lens is needed to run it

"prune" cuts the experts out of the weights, "bias" writes a number into the router that keeps them out.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_lens.errors import MoELensError, PlanError
from moe_lens.model.hf_models import hf_model_of, numbered_layers, tensors_of
from moe_lens.model.layers import MoELayer
from moe_lens.routers.biased import BiasedSoftmaxTopK, FixedExperts, GroupLimitedSoftmax, SigmoidTopK
from moe_lens.routers.groups import GroupLimit
from moe_lens.routers.plain import ByOrderOfLogits, SoftmaxTopK, SparseMixer, TopKSigmoid, TopKSoftmax
from moe_lens.routers.rule import RoutingRule
from moe_lens.shape import MoEShape
from moe_lens.steering.plan import SteeringPlan
from moe_lens.steering.router_bias import RouterBias

How = Literal["auto", "prune", "bias"]

_FIELDS: Final = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""The config fields in which architectures keep the number of experts of every MoE layer."""
_CORRECTION_BIASES: Final = ("e_score_correction_bias", "expert_bias")
_PRUNABLE: Final = (SoftmaxTopK, TopKSoftmax, TopKSigmoid, SparseMixer, SigmoidTopK, GroupLimitedSoftmax)
"""Rules by which what an expert counts does not depend on how many others there are."""
_FAR: Final = 1e4
"""How far a written bias lies below all others: float16 holds it, and no score or logit reaches it."""


class _CannotError(Exception):
    """Why one way of baking does not serve this model and plan; the message is a clause."""


def bake(model: Any, plan: SteeringPlan | RouterBias, *, how: How = "auto") -> PreTrainedModel:
    """A new Hugging Face model that computes, without hooks, what the model computes without some experts.

    >>> from moe_lens import SteeringPlan, bake, organisms
    >>> model = organisms.load("planted")
    >>> baked = bake(model, SteeringPlan(deactivate=[(layer, 5) for layer in model.moe_layers]))
    >>> type(baked).__name__, baked.config.num_experts, model.n_experts
    ('OlmoeForCausalLM', 7, 8)

    Its logits are those of the model under `route_around(plan.deactivate)`: bit for bit with a written bias
    (ERNIE: up to rounding), up to rounding where experts were pruned. (Of experts with equal scores, which
    bfloat16 makes likelier, a smaller router may take another one than the larger.) They are those under
    `steer_hooks(plan)`, too, except where deactivated experts share in the others' weights: steering leaves
    them the token's smallest probability, which here goes to the others. So it is with routers that do not
    divide the chosen probabilities by their sum (OLMoE's, Jamba's, DeepSeek-V2's...) and Phi-3.5-MoE's.

    The model is of the same class, dtype and device and has the same generation config; tied weights stay
    tied, and no part of it is moe_lens'. It needs memory of its own, as much as the given one has.

    Args:
        model: a HookedMoE, a RoutedModel, or a Hugging Face model itself; it stays as it is.
        plan: which experts to leave out. It activates none: no weights of a router force an expert to run
            at the weight that a plan gives it. Or a `RouterBias`, which is added to the bias of routers that
            have one on their logits (GPT-OSS); a correction bias decides the choice alone and will not do.
        how: "prune" cuts the experts out of routers, biases and batched experts, and lowers the config's
            number of experts, for a smaller checkpoint. That number is one for all layers, so every MoE layer
            must lose as many (with expert groups: every group). Experts behind a removed one move up.
            "bias" writes a low number into the bias by which the router chooses (GPT-OSS, the families with
            a correction bias), for any numbers in any layers; expert numbers stay. "auto": prune where
            possible, else bias.

    Raises:
        PlanError: the plan activates experts, does not fit the model, or cannot be baked in this way, with
            the reason for each way.
        MoELensError: a quantised or offloaded model, a bridge in compatibility mode, or no Hugging Face
            model.
    """
    if isinstance(plan, RouterBias) and how in ("auto", "bias"):
        return _with_bias(model, plan)
    if not isinstance(plan, SteeringPlan):
        raise PlanError(
            f"bake needs a SteeringPlan, or a RouterBias (not to be pruned by); got {type(plan).__name__}."
        )
    if plan.strength is not None:
        raise PlanError(
            "bake: the plan is soft, and how far it moves a logit differs from token to token, which no "
            "router's weights do. Bake it without strength, or keep it as steer_hooks."
        )
    if how not in ("auto", *_WAYS):
        raise PlanError(f'how must be "auto", "prune" or "bias"; got {how!r}.')
    source = _source(model, plan)
    reasons = []
    for way in _WAYS if how == "auto" else (how,):
        try:
            return _WAYS[way](source)
        except _CannotError as reason:
            reasons.append(f"{way}: {reason}")
    raise PlanError(f"{type(source.hf_model).__name__} cannot be baked with this plan. {'. '.join(reasons)}.")


@dataclass(frozen=True)
class _Source:
    """A model to bake, and which experts of which layer to leave out."""

    hf_model: PreTrainedModel
    layers: dict[int, MoELayer]
    out: dict[int, list[int]]  # ascending

    @property
    def n_experts(self) -> int:
        """Number of experts in each MoE layer."""
        return next(iter(self.layers.values())).rule.n_experts


def _source(model: Any, plan: SteeringPlan) -> _Source:
    hf_model = hf_model_of(model)
    _refuse_unreadable(model, hf_model)
    layers = numbered_layers(hf_model)
    plan.check_fits(_shape(model, hf_model, layers, plan.shape))
    out = {}
    for number, moe in layers.items():
        activate, deactivate = plan.in_layer(number)
        if activate:
            raise PlanError(
                f"bake: the plan activates experts {activate} of layer {number}, and no router's weights "
                "force an expert to run at the weight that a plan gives it. Bake SteeringPlan(deactivate="
                "plan.deactivate), and keep the activation as steer_hooks."
            )
        if (reason := moe.rule.cannot_steer([], deactivate)) is not None and deactivate:
            raise PlanError(f"bake: layer {number} cannot be steered by this plan: {reason}.")
        out[number] = sorted(deactivate)
    return _Source(hf_model, layers, out)


def _refuse_unreadable(model: Any, hf_model: PreTrainedModel) -> None:
    """Raise where the tensors are not the model's own numbers."""
    name = type(hf_model).__name__
    if getattr(hf_model, "hf_quantizer", None) is not None or _quantized(hf_model):
        raise MoELensError(
            f"bake: this {name} is quantised, and its experts are stored packed. Load it in a floating-point "
            "dtype, bake that, and quantise the result."
        )
    if any(tensor.is_meta for tensor in tensors_of(hf_model).values()):
        raise MoELensError(
            f"bake: weights of this {name} are offloaded (on the meta device). Load it without offloading "
            "(device_map=None), on the CPU for one."
        )
    if getattr(model, "compatibility_mode", False):
        raise MoELensError(
            f"bake: this {name}'s weights were processed by enable_compatibility_mode. Load the model again "
            "and bake that; plans hold for both."
        )


def _quantized(hf_model: PreTrainedModel) -> bool:
    return getattr(hf_model.config, "quantization_config", None) is not None


def _shape(
    model: Any, hf_model: PreTrainedModel, layers: dict[int, MoELayer], known: MoEShape | None
) -> MoEShape:
    """The model's shape; a model that bears no name is taken for the plan's."""
    shape = getattr(model, "moe_shape", None)
    if isinstance(shape, MoEShape):
        return shape
    rule = next(iter(layers.values())).rule
    name = str(hf_model.config.name_or_path or "").rstrip("/").rsplit("/", 1)[-1]
    if not name and known is not None:
        name = known.model
    return MoEShape(name, tuple(layers), rule.n_experts, rule.top_k)


def _prune(source: _Source) -> PreTrainedModel:
    """The experts cut out of every tensor that has a row for each."""
    n_out = _equal_number(source)
    config, n_left = copy.deepcopy(source.hf_model.config), source.n_experts - n_out
    for moe, out in zip(source.layers.values(), source.out.values(), strict=True):
        if (reason := _cannot_prune(moe, out)) is not None:
            raise _CannotError(f"{moe.where}: {reason}")
    if n_out:
        _set_number(config.get_text_config(), source, n_left)
    kept = {
        moe.where: [expert for expert in range(source.n_experts) if expert not in source.out[number]]
        for number, moe in source.layers.items()
    }

    def piece(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
        cut = [axis for axis, (old, new) in enumerate(zip(tensor.shape, shape, strict=True)) if old != new]
        if not cut:
            return tensor.detach().clone()
        where = next((where for where in kept if name.startswith(f"{where}.")), None)
        sizes = [(tensor.shape[axis], shape[axis]) for axis in cut]
        if where is None or sizes != [(source.n_experts, n_left)]:
            raise _CannotError(
                f"the config's number of experts also gives the size of {name}, outside of the MoE layers "
                "whose experts a plan names"
            )
        return tensor.detach().index_select(cut[0], torch.tensor(kept[where], device=tensor.device))

    return _rebuilt(source.hf_model, config, piece)


def _equal_number(source: _Source) -> int:
    """How many experts each layer loses."""
    tables = [n for n, moe in source.layers.items() if isinstance(moe.rule, FixedExperts)]
    if tables and any(source.out.values()):
        raise _CannotError(f"layers {tables} take experts from a table by token id, so none of theirs can go")
    numbers = {number: len(out) for number, out in source.out.items()}
    if len(set(numbers.values())) > 1:
        raise _CannotError(
            "the config has one number of experts for all MoE layers, and the plan deactivates different "
            f"numbers (layer: number) {numbers}; deactivate as many in each"
        )
    return next(iter(numbers.values()))


def _cannot_prune(moe: MoELayer, out: list[int]) -> str | None:
    """Why a router without some experts would not be the router that routes around them, in words."""
    if not out:
        return None
    rule = moe.rule
    if isinstance(rule, BiasedSoftmaxTopK):
        return (
            "it adds a bias to probabilities over all experts; without some, the others' grow against their "
            "biases, and other experts would be chosen"
        )
    if not isinstance(rule, _PRUNABLE):
        return f"moe_lens does not know whether {type(rule).__name__} means the same with fewer experts"
    groups = getattr(rule, "groups", None)
    if groups is None:
        alone = isinstance(rule, SigmoidTopK) and len(out) == rule.n_experts - 1
        if alone and hasattr(moe.router, "num_group"):
            return "its code sums the two best scores of a group, and the plan leaves one expert"
        return None
    available = _available(groups, rule, out)
    if len(set(available)) > 1:
        return (
            f"its {groups.n_groups} groups are of one size, and the plan leaves {available} experts in them; "
            "deactivate as many in each group"
        )
    return _other_groups(groups, rule, available)


def _available(groups: GroupLimit, rule: RoutingRule, out: list[int]) -> list[int]:
    """How many experts of each group are left."""
    size = rule.n_experts // groups.n_groups
    return [size - sum(expert // size == group for expert in out) for group in range(groups.n_groups)]


def _other_groups(groups: GroupLimit, rule: RoutingRule, available: list[int]) -> str | None:
    """Why a router that scores its groups by the experts left would choose other groups, in words.

    Routing around experts counts a missing one of a group's `n_summed` best as the lowest score of all, and
    passes over groups that would leave fewer than k experts; a router by itself does neither.
    """
    nonempty = sorted(number for number in available if number)
    if nonempty[0] < groups.n_summed:
        return (
            f"it scores a group by its best {groups.n_summed} experts, and the plan leaves {available} in "
            "its groups; leave as many in each"
        )
    if len(nonempty) < groups.n_chosen or sum(nonempty[: groups.n_chosen]) < rule.top_k:
        return (
            f"the plan leaves {available} experts in its groups, and {groups.n_chosen} of them may hold "
            f"fewer than the {rule.top_k} that must run; deactivate fewer"
        )
    return None


def _set_number(config: Any, source: _Source, n_left: int) -> None:
    """Write the number of experts into a config; groups that limit nothing become one group."""
    names = [name for name in _FIELDS if getattr(config, name, None) == source.n_experts]
    if not names:
        raise _CannotError(
            f"none of its config's fields {', '.join(_FIELDS)} is its number of experts, {source.n_experts}"
        )
    for name in names:
        setattr(config, name, n_left)
    limited = any(getattr(moe.rule, "groups", None) is not None for moe in source.layers.values())
    if not limited and (getattr(config, "n_group", None) or 1) > 1:
        # all of them are chosen, so one does as well; several might not divide the experts that are left
        config.n_group = config.topk_group = 1


def _write_biases(source: _Source) -> PreTrainedModel:
    """The experts' biases lowered so far that the router never chooses them."""
    for number, moe in source.layers.items():
        if (reason := _cannot_bias(moe, source.out[number])) is not None:
            raise _CannotError(f"{moe.where}: {reason}")
    baked = _rebuilt(source.hf_model, copy.deepcopy(source.hf_model.config), _whole)
    with torch.no_grad():
        for number, moe in numbered_layers(baked).items():
            bias = _choosing_bias(moe)
            if source.out[number] and bias is not None:
                flat = bias.view(-1)
                flat[source.out[number]] = flat.min() - _FAR
    return baked


def _cannot_bias(moe: MoELayer, out: list[int]) -> str | None:
    if not out:
        return None
    rule, bias = moe.rule, _choosing_bias(moe)
    if bias is None:
        return f"{type(moe.router).__name__} has no bias by which it chooses"
    if not bool(torch.isfinite(bias.min() - _FAR)):
        return f"its bias is {float(bias.min()):.3g}, and nothing lies far enough below it in {bias.dtype}"
    groups = getattr(rule, "groups", None)
    return None if groups is None else _other_groups(groups, rule, _available(groups, rule, out))


def _choosing_bias(moe: MoELayer) -> Tensor | None:
    """The tensor that is added to what the router chooses by, or to its logits where it chooses by those."""
    rule = moe.rule
    if isinstance(rule, SigmoidTopK | BiasedSoftmaxTopK) and rule.bias is not None:
        named = tensors_of(moe.block).items()
        biases = [tensor for name, tensor in named if name.rpartition(".")[-1] in _CORRECTION_BIASES]
        return biases[0] if len(biases) == 1 else None
    return _bias_of_logits(moe)


def _bias_of_logits(moe: MoELayer) -> Tensor | None:
    bias = getattr(moe.router, "bias", None)
    if isinstance(moe.rule, ByOrderOfLogits) and isinstance(bias, Tensor):
        return bias if bias.numel() == moe.rule.n_experts else None
    return None


def _with_bias(model: Any, bias: RouterBias) -> PreTrainedModel:
    """A router bias added to the routers' own; in the model's dtype, so up to its rounding."""
    hf_model = hf_model_of(model)
    _refuse_unreadable(model, hf_model)
    layers = numbered_layers(hf_model)
    if misfits := bias.shape.misfits(_shape(model, hf_model, layers, bias.shape)):
        raise PlanError(f"bake: the bias was made for another model (bias / model): {'; '.join(misfits)}.")
    for number in bias.mapping:
        if _bias_of_logits(layers[number]) is None:
            raise PlanError(
                f"bake: {type(layers[number].router).__name__} in layer {number} has no bias on its logits "
                "to add to. Keep the bias as bias_experts(bias), or bake a plan, bias.to_plan(...)."
            )
    baked = _rebuilt(hf_model, copy.deepcopy(hf_model.config), _whole)
    with torch.no_grad():
        for number, values in bias.mapping.items():
            own = _bias_of_logits(numbered_layers(baked)[number])
            assert own is not None
            own.view(-1).add_(values.to(own.device))
    return baked


_WAYS: Final[dict[str, Callable[[_Source], PreTrainedModel]]] = {"prune": _prune, "bias": _write_biases}


def _whole(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    return tensor.detach().clone()


def _rebuilt(
    hf_model: PreTrainedModel, config: Any, piece: Callable[[str, Tensor, torch.Size], Tensor]
) -> PreTrainedModel:
    """A new model of the same class with this config, its tensors pieces of the old ones of the same names.

    piece: function of a tensor's name, the old tensor and the new one's shape.
    """
    with torch.device("meta"):  # no memory, no random numbers
        rebuilt = type(hf_model)(config)
    given = tensors_of(hf_model)
    made: dict[int, Any] = {}  # by the old tensor, so that tied ones stay tied
    for name, slot in tensors_of(rebuilt).items():
        old = given.get(name)
        if old is None or old.ndim != slot.ndim:
            raise MoELensError(
                f"bake: {name} of {type(hf_model).__name__} is not there as the config says; adapters or "
                "edits have changed the model's layers. Of a PEFT model, bake what merge_and_unload() gives."
            )
        if id(old) not in made:
            new = piece(name, old, slot.shape)
            is_parameter = isinstance(slot, nn.Parameter)
            made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new
        path, _, last = name.rpartition(".")
        setattr(rebuilt.get_submodule(path), last, made[id(old)])
    rebuilt.tie_weights()
    if hf_model.can_generate():
        rebuilt.generation_config = copy.deepcopy(hf_model.generation_config)
    return rebuilt.train(hf_model.training)
