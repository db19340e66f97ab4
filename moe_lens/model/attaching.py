"""Putting hook points on a model that somebody has: a TransformerLens bridge, or a Hugging Face model.

attach(bridge)                             # an existing bridge becomes a HookedMoE
attach(hf_model)                           # a RoutedModel around an unchanged Hugging Face model
detach(either)                             # what was there before
"""

from typing import Any, overload

from torch import nn
from transformer_lens.model_bridge import TransformerBridge

from moe_lens.errors import HookError, MoELensError
from moe_lens.model import hooked_moe
from moe_lens.model.hf_models import decoder_of
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.layers import find_moe_layers
from moe_lens.model.registration import routing_layers, running_of
from moe_lens.model.routed_model import RoutedModel
from moe_lens.model.router_points import points_of
from moe_lens.model.wrapper import Model


@overload
def attach(model: TransformerBridge) -> HookedMoE: ...  # pyright: ignore[reportOverlappingOverload]
@overload
def attach(model: nn.Module, tokenizer: Any = None) -> RoutedModel: ...
def attach(model: Any, tokenizer: Any = None) -> Any:
    """Put hook points on the routing of a TransformerBridge, in place, or of a Hugging Face model.

    >>> from moe_lens import HookedMoE, attach, detach, organisms
    >>> bridge = detach(organisms.load("specialised"))       # any TransformerBridge around an MoE model
    >>> attach(bridge) is bridge, isinstance(bridge, HookedMoE)
    (True, True)

    A bridge (or an instance of a subclass of it) becomes a HookedMoE and stays an instance of its own class.
    A Hugging Face model gets a RoutedModel around it. Every router is first compared with its rule; if one
    differs, nothing is changed. Attaching again changes nothing.

    Args:
        model: a TransformerBridge or a Hugging Face model; a HookedMoE or RoutedModel is given back as it is.
        tokenizer: for a Hugging Face model; optional.

    Returns: the same bridge, or the RoutedModel.

    Raises:
        UnsupportedRouterError: no router, or one without a rule. RouterMismatchError: the check failed.
        HookError: blocks or routers that had points were replaced or copied since. MoELensError: neither of
            them.
    """
    if isinstance(model, RoutedModel):
        return model
    if isinstance(model, TransformerBridge):
        return hooked_moe.attach(model)
    if not isinstance(model, nn.Module):
        raise MoELensError(
            f"attach needs a TransformerBridge or a Hugging Face model, got {type(model).__name__}; "
            "for a name or a folder use RoutedModel.from_pretrained or HookedMoE.from_pretrained."
        )
    there = wrapper_of(model)
    if there is None or tokenizer is not None:
        return RoutedModel(model, tokenizer)
    if isinstance(there, RoutedModel):  # perhaps around its decoder alone
        running_of(there).widen(model, decoder_of(model, routing_layers(there))[0])
    return there


def detach(model: Any) -> Any:
    """Remove the routing hook points: the bridge, or the Hugging Face model, is what it was before `attach`.

    >>> from moe_lens import detach, organisms
    >>> bridge = detach(organisms.load("specialised"))
    >>> "blocks.0.mlp.hook_router_logits" in bridge.hook_dict, type(bridge).__name__
    (False, 'TransformerBridge')

    HF's own router code runs again, and hooks that were on the points are gone. (An instance of your own
    subclass of HookedMoE stays one, without points.)

    Args:
        model: a bridge, a RoutedModel, or the Hugging Face model in one.

    Returns: the same bridge, or the Hugging Face model.

    Raises:
        MoELensError: none of them, or no points.
    """
    if isinstance(model, TransformerBridge):
        return hooked_moe.detach(model)
    wrappers = [model] if isinstance(model, RoutedModel) else wrappers_of(model)
    if not wrappers:
        raise MoELensError(
            f"detach needs a TransformerBridge or a RoutedModel; got {type(model).__name__}, without points."
        )
    inside = [
        hooked_moe.detach(each) if isinstance(each, TransformerBridge) else each.detach() for each in wrappers
    ]
    return inside[0] if len(inside) == 1 else model


def wrapper_of(hf_model: Any) -> Model | None:
    """The HookedMoE or RoutedModel whose points a Hugging Face model has; None where it has none.

    Raises:
        HookError: some layers have no points, or those of another wrapper, since blocks or routers were
            replaced or copied under the points.
    """
    wrappers = wrappers_of(hf_model)
    if not wrappers:
        return None
    routers = {id(moe.block): moe.router for moe in find_moe_layers(hf_model)}
    for moe in routing_layers(wrappers[0]).values():
        if len(wrappers) > 1 or routers.get(id(moe.block)) is not moe.router:
            raise HookError(
                f"The hook points in {type(hf_model).__name__} are not of one wrapper any more: blocks or "
                f"routers ({moe.where} for one) were replaced or copied since they were put in "
                "(modules_to_save, copy.deepcopy of a part), so what is set on them could not fire "
                "everywhere. Take them off, detach(model) and wrapper.detach(), and attach again; add "
                "adapters that copy routers before."
            )
    return wrappers[0]


def wrappers_of(hf_model: Any) -> list[Any]:
    """All wrappers whose points the MoE layers of a Hugging Face model have, layer by layer."""
    if not isinstance(hf_model, nn.Module):
        return []
    points = [points_of(moe) for moe in find_moe_layers(hf_model)]
    return list(
        {id(each.running.wrapper): each.running.wrapper for each in points if each is not None}.values()
    )
