"""The MoE layers of a wrapper, and hook points there that the wrapper knows by name.

layers = routing_layers(model)             # layer number -> MoE block and router
register(bridge, layers, shape)            # blocks.{l}.mlp.hook_router_logits and the others, on a bridge
register_expert_out(model)                 # blocks.{l}.mlp.hook_expert_out; unregister_expert_out(model)
unregister(bridge)

A wrapper is a TransformerBridge after `attach`, or a RoutedModel, which names its own points.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

from torch import nn
from transformer_lens.model_bridge import TransformerBridge

from moe_lens import hook_names
from moe_lens.errors import MoELensError, UnsupportedRouterError, warn
from moe_lens.model.expert_points import install_expert_out, uninstall_expert_out
from moe_lens.model.layers import MoELayer, find_moe_layers, no_moe
from moe_lens.model.private_names import PointsOnly, add_points, remove_points
from moe_lens.model.router_points import install, installed_points, points_of, uninstall
from moe_lens.model.running import Running
from moe_lens.shape import MoEShape

LAYERS: Final = "_routing_layers"
"""The attribute in which an attached bridge or a RoutedModel keeps its layers."""

RUNNING: Final = "_running"
"""The attribute in which it keeps its `Running`."""

_DRAWING: Final = ("PhimoeTopKRouter",)
"""Routers whose choice in training mode is not a function of their logits."""


def routing_layers(model: Any) -> dict[int, MoELayer]:
    """Layer number -> MoE block and router, for every layer of a wrapper or bridge that has a router.

    Raises:
        UnsupportedRouterError: the model has no MoE layer, or a router without a rule.
        MoELensError: neither a RoutedModel nor a TransformerBridge.
    """
    if isinstance(model, nn.Module) and (layers := vars(model).get(LAYERS)) is not None:
        return layers
    if not isinstance(model, TransformerBridge):
        raise MoELensError(
            "A HookedMoE or RoutedModel is needed here (from_pretrained, or attach(model)); got "
            f"{type(model).__name__}."
        )
    return find_routing_layers(model)


def find_routing_layers(bridge: TransformerBridge) -> dict[int, MoELayer]:
    """`routing_layers`, by a search of the model itself."""
    layers = {}
    for number, block in enumerate(getattr(bridge, "blocks", ())):
        for moe in find_moe_layers(block, prefix=f"blocks.{number}"):
            layers[number] = MoELayer(f"blocks.{number}.mlp", moe.block, moe.router)
    if not layers:
        raise no_moe(bridge.cfg.model_name, elsewhere=list(find_moe_layers(bridge)))
    return layers


def moe_shape(model: Any) -> MoEShape:
    """Name, MoE layers, number of experts and k of the model inside a wrapper or bridge.

    The name is the last part of the hub id or folder that the model was loaded from, so that results carry
    no paths of a machine.

    Raises:
        UnsupportedRouterError: as in `routing_layers`, or the layers differ in number of experts or k.
    """
    return shape_of(model, routing_layers(model))


def shape_of(model: Any, layers: dict[int, MoELayer]) -> MoEShape:
    """`moe_shape` of a model with these layers."""
    n_experts, top_k = common_size(layers.values())
    name = str(model.cfg.model_name)
    name = Path(name).resolve().name if Path(name).is_dir() else name.rstrip("/").rsplit("/", 1)[-1]
    return MoEShape(name, tuple(layers), n_experts, top_k)


def common_size(layers: Iterable[MoELayer]) -> tuple[int, int]:
    """Number of experts and k, which all layers must share."""
    sizes = {moe.where: (moe.rule.n_experts, moe.rule.top_k) for moe in layers}
    if len(set(sizes.values())) > 1:
        raise UnsupportedRouterError(f"The layers differ in (number of experts, k): {sizes}.")
    return next(iter(sizes.values()))


def register(bridge: TransformerBridge, layers: dict[int, MoELayer], shape: MoEShape) -> None:
    """Install points in those of these layers that have none, and let the bridge know them by both names."""
    vars(bridge)[LAYERS] = layers
    new = {number: moe for number, moe in layers.items() if points_of(moe) is None}
    if not new:
        return
    running = vars(bridge).get(RUNNING)
    if running is None:
        running = vars(bridge)[RUNNING] = Running(bridge)
        running.watch(bridge.original_model)
    added = {}
    for number, moe in new.items():
        points = install(moe, shape, running)
        named = (points.router_logits, points.topk_indices, points.topk_weights)
        added[number] = dict(zip(hook_names.POINTS, named, strict=True))
    _add(bridge, added)


def register_expert_out(model: Any) -> None:
    """Install the points on expert outputs in all layers, or in none if one of them cannot have it.

    Raises:
        HookError: as in `install_expert_out`.
    """
    layers = {number: moe for number, moe in routing_layers(model).items() if not has_expert_out(moe)}
    if not layers:
        return
    try:
        added = {number: {hook_names.EXPERT_OUT: install_expert_out(moe)} for number, moe in layers.items()}
    except Exception:  # whatever it is: no layer keeps a point that the wrapper does not know
        for moe in layers.values():
            uninstall_expert_out(moe)
        raise
    _add(model, added)


def unregister_expert_out(model: Any) -> None:
    """Remove the points on expert outputs, with their names and the hooks that were on them."""
    for number, moe in routing_layers(model).items():
        if points_of(moe) is not None and has_expert_out(moe):
            uninstall_expert_out(moe)
            _remove(model, number, (hook_names.EXPERT_OUT,))


def has_expert_out(moe: MoELayer) -> bool:
    """Whether the point on expert outputs is installed. Raises HookError where no points are at all."""
    return installed_points(moe).expert_out is not None


def _add(model: Any, added: dict[int, dict[str, Any]]) -> None:
    """Let a wrapper know points: a RoutedModel keeps them itself."""
    if isinstance(model, TransformerBridge):
        add_points(model, added)
    else:
        model.name_points(added)


def _remove(model: Any, number: int, points: tuple[str, ...]) -> None:
    if isinstance(model, TransformerBridge):
        remove_points(model, number, points)
    else:
        model.forget_points(number, points)


@contextmanager
def with_expert_out(model: Any) -> Iterator[None]:
    """Points on expert outputs within the context; afterwards as before."""
    were_on = all(has_expert_out(moe) for moe in routing_layers(model).values())
    register_expert_out(model)
    try:
        yield
    finally:
        if not were_on:
            unregister_expert_out(model)


@contextmanager
def allow_training(
    model: Any, allow: bool, within: AbstractContextManager[Any] | None = None
) -> Iterator[Any]:
    """Within the context (and another one, if given), routing hooks may act in training mode, if `allow`.

    Warns of routers that draw experts at random in training: hooks get the decision of eval mode.
    """
    drawing = {type(moe.router).__name__ for moe in routing_layers(model).values()} & set(_DRAWING)
    if allow and drawing:
        warn(
            f"In training, {' and '.join(sorted(drawing))} draws experts at random. Under routing hooks that "
            "is frozen: it chooses as in eval mode. (Noise on what a router reads stays.)"
        )
    points = [each for moe in routing_layers(model).values() if (each := points_of(moe)) is not None]
    for each in points:
        each.allow_training += allow
    try:
        with running_of(model).hooking(), within or nullcontext() as inside:
            yield inside
    finally:
        for each in points:
            each.allow_training -= allow


def running_of(model: Any) -> Running:
    """The forwards of a wrapper; of one that knows nothing for a bridge without points."""
    return vars(model).get(RUNNING) or Running(model)


def unregister(bridge: TransformerBridge) -> None:
    """Remove the points of all layers, with their names."""
    unregister_expert_out(bridge)
    for number, moe in routing_layers(bridge).items():
        if points_of(moe) is None:
            continue
        uninstall(moe)
        remove_points(bridge, number, hook_names.POINTS)
        block: Any = bridge.blocks[number]
        if isinstance(block.mlp, PointsOnly):
            del block.mlp
    if (running := vars(bridge).pop(RUNNING, None)) is not None:
        running.unwatch()
    vars(bridge).pop(LAYERS, None)
