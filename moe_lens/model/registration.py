"""The MoE layers of a TransformerBridge: finding them, and hook points there that the bridge knows by name.

check_hooked(model)                        # the error for anything that is not a HookedMoE
layers = routing_layers(bridge)            # layer number -> MoE block and router
register(bridge, layers, shape)            # blocks.{l}.mlp.hook_router_logits and the others
register_expert_out(bridge)                # blocks.{l}.mlp.hook_expert_out; unregister_expert_out(bridge)
unregister(bridge)
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from transformer_lens.model_bridge import TransformerBridge

from moe_lens import hook_names
from moe_lens.errors import MoELensError, UnsupportedRouterError
from moe_lens.model.expert_points import install_expert_out, uninstall_expert_out
from moe_lens.model.layers import MoELayer, find_moe_layers, no_moe
from moe_lens.model.private_names import PointsOnly, add_points, remove_points
from moe_lens.model.router_points import install, installed_points, points_of, uninstall
from moe_lens.model.state import ForwardState, unwatch, watch
from moe_lens.shape import MoEShape

Model = TransformerBridge
"""What functions that run a model take: a `HookedMoE`, or a bridge after `attach`."""

_LAYERS: Final = "_routing_layers"
"""The attribute in which an attached bridge keeps its layers."""

_STATE: Final = "_forward_state"
"""The attribute in which it keeps its `ForwardState`."""


def check_hooked(
    model: Any, kind: type[TransformerBridge] = TransformerBridge, *, error: type[MoELensError] = MoELensError
) -> None:
    """Raise `error`, which says what to pass instead, for anything that is not a bridge of this kind."""
    if not isinstance(model, kind):
        raise error(
            "A HookedMoE is needed here (HookedMoE.from_pretrained, or attach(bridge)); got "
            f"{type(model).__name__}."
        )


def routing_layers(bridge: TransformerBridge) -> dict[int, MoELayer]:
    """Layer number -> MoE block and router, for every layer of the bridge that has a router.

    Raises:
        UnsupportedRouterError: the model has no MoE layer, or a router without a rule.
        MoELensError: not a TransformerBridge.
    """
    check_hooked(bridge)
    return vars(bridge).get(_LAYERS) or find_routing_layers(bridge)


def find_routing_layers(bridge: TransformerBridge) -> dict[int, MoELayer]:
    """`routing_layers`, by a search of the model itself."""
    layers = {}
    for number, block in enumerate(getattr(bridge, "blocks", ())):
        for moe in find_moe_layers(block, prefix=f"blocks.{number}"):
            layers[number] = MoELayer(f"blocks.{number}.mlp", moe.block, moe.router)
    if not layers:
        raise no_moe(bridge.cfg.model_name, elsewhere=list(find_moe_layers(bridge)))
    return layers


def moe_shape(bridge: TransformerBridge) -> MoEShape:
    """Name, MoE layers, number of experts and k of the model inside a bridge.

    The name is the last part of the hub id or folder that the model was loaded from, so that results carry
    no paths of a machine.

    Raises:
        UnsupportedRouterError: as in `routing_layers`, or the layers differ in number of experts or k.
    """
    return shape_of(bridge, routing_layers(bridge))


def shape_of(bridge: TransformerBridge, layers: dict[int, MoELayer]) -> MoEShape:
    """`moe_shape` of a bridge with these layers."""
    n_experts, top_k = common_size(layers.values())
    name = str(bridge.cfg.model_name)
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
    vars(bridge)[_LAYERS] = layers
    new = {number: moe for number, moe in layers.items() if points_of(moe) is None}
    if not new:
        return
    state = vars(bridge)[_STATE] = vars(bridge).get(_STATE) or watch(bridge.original_model, bridge)
    added = {}
    for number, moe in new.items():
        points = install(moe, shape, state)
        named = (points.router_logits, points.topk_indices, points.topk_weights)
        added[number] = dict(zip(hook_names.POINTS, named, strict=True))
    add_points(bridge, added)


def register_expert_out(bridge: TransformerBridge) -> None:
    """Install the points on expert outputs in all layers, or in none if one of them cannot have it.

    Raises:
        HookError: as in `install_expert_out`.
    """
    layers = {number: moe for number, moe in routing_layers(bridge).items() if not has_expert_out(moe)}
    if not layers:
        return
    try:
        added = {number: {hook_names.EXPERT_OUT: install_expert_out(moe)} for number, moe in layers.items()}
    except Exception:  # whatever it is: no layer keeps a point that the bridge does not know
        for moe in layers.values():
            uninstall_expert_out(moe)
        raise
    add_points(bridge, added)


def unregister_expert_out(bridge: TransformerBridge) -> None:
    """Remove the points on expert outputs, with their names and the hooks that were on them."""
    for number, moe in routing_layers(bridge).items():
        if points_of(moe) is not None and has_expert_out(moe):
            uninstall_expert_out(moe)
            remove_points(bridge, number, (hook_names.EXPERT_OUT,))


def has_expert_out(moe: MoELayer) -> bool:
    """Whether the point on expert outputs is installed. Raises HookError where no points are at all."""
    return installed_points(moe).expert_out is not None


@contextmanager
def with_expert_out(bridge: TransformerBridge) -> Iterator[None]:
    """Points on expert outputs within the context; afterwards as before."""
    were_on = all(has_expert_out(moe) for moe in routing_layers(bridge).values())
    register_expert_out(bridge)
    try:
        yield
    finally:
        if not were_on:
            unregister_expert_out(bridge)


def forward_state(bridge: TransformerBridge) -> ForwardState:
    """What an attached bridge is running at the moment; an empty state for other bridges."""
    return vars(bridge).get(_STATE) or ForwardState()


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
    if (state := vars(bridge).pop(_STATE, None)) is not None:
        unwatch(state)
    vars(bridge).pop(_LAYERS, None)
