"""The MoE layers of a TransformerBridge: finding them, and hook points there that the bridge knows by name.

layers = routing_layers(bridge)            # layer number -> MoE block and router
register(bridge, layers, shape)            # blocks.{l}.mlp.hook_router_logits and the others
register_expert_out(bridge)                # blocks.{l}.mlp.hook_expert_out; unregister_expert_out(bridge)
unregister(bridge)
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from torch import nn
from transformer_lens.model_bridge import TransformerBridge

from moe_lens import hook_names
from moe_lens.errors import MoELensError, UnsupportedRouterError
from moe_lens.model.expert_points import install_expert_out, uninstall_expert_out
from moe_lens.model.layers import MoELayer, find_moe_layers
from moe_lens.model.router_points import install, uninstall
from moe_lens.model.state import ForwardState, unwatch, watch
from moe_lens.shape import MoEShape

Model = TransformerBridge
"""What functions that run a model take: a `HookedMoE`, or a bridge after `attach`."""

_LAYERS: Final = "_routing_layers"
"""Where an attached bridge keeps what `find_routing_layers` found."""

_STATE: Final = "_forward_state"
"""Where it keeps its `ForwardState`."""


def routing_layers(bridge: TransformerBridge) -> dict[int, MoELayer]:
    """Layer number -> MoE block and router, for every layer of the bridge that has a router.

    Raises:
        UnsupportedRouterError: the model has no MoE layer, or a router without a rule.
        MoELensError: not a TransformerBridge.
    """
    if not isinstance(bridge, TransformerBridge):
        raise MoELensError(
            f"A HookedMoE is needed here (HookedMoE.from_pretrained, or attach(bridge)); got {bridge!r}."
        )
    return vars(bridge).get(_LAYERS) or find_routing_layers(bridge)


def find_routing_layers(bridge: TransformerBridge) -> dict[int, MoELayer]:
    """`routing_layers`, looked for in the model itself."""
    layers = {}
    for number, block in enumerate(getattr(bridge, "blocks", ())):
        for moe in find_moe_layers(block, prefix=f"blocks.{number}"):
            layers[number] = MoELayer(f"blocks.{number}.mlp", moe.block, moe.router)
    if not layers:
        for _ in find_moe_layers(bridge):  # outside the blocks there may be routers to refuse by name
            pass
    return layers or no_moe(bridge.cfg.model_name)


def moe_shape(bridge: TransformerBridge) -> MoEShape:
    """Name, MoE layers, number of experts and k of the model inside a bridge.

    The name is the last part of the hub id or folder that the model was loaded from, so that results do
    not carry a machine's paths.

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


def no_moe(name: str) -> Any:
    """Raise UnsupportedRouterError for a model without routers."""
    raise UnsupportedRouterError(
        f"{name} has no Mixture-of-Experts layer, so there is no routing to hook. "
        "Use TransformerLens' TransformerBridge for dense models."
    )


class _PointsOnly(nn.Module):
    """Stands as `block.mlp` where TransformerLens gives the MoE block another name (`moe`, `mixer`)."""


def register(bridge: TransformerBridge, layers: dict[int, MoELayer], shape: MoEShape) -> None:
    """Install points in those of these layers that have none; the bridge knows them under both names."""
    vars(bridge)[_LAYERS] = layers
    new = {n: moe for n, moe in layers.items() if moe.points is None}
    if not new:
        return
    state = vars(bridge)[_STATE] = vars(bridge).get(_STATE) or watch(bridge.original_model, bridge)
    added = {}
    for number, moe in new.items():
        points = install(moe, shape, state)
        named = (points.router_logits, points.topk_indices, points.topk_weights)
        added[number] = dict(zip(hook_names.POINTS, named, strict=True))
    _name(bridge, added)


def register_expert_out(bridge: TransformerBridge) -> None:
    """Install the points on expert outputs in all layers, or in none if one of them cannot have it.

    Raises:
        HookError: as in `install_expert_out`.
    """
    layers = {n: moe for n, moe in routing_layers(bridge).items() if moe.points.expert_out is None}
    if not layers:
        return
    try:
        added = {n: {hook_names.EXPERT_OUT: install_expert_out(moe)} for n, moe in layers.items()}
    except Exception:
        for moe in layers.values():
            uninstall_expert_out(moe)
        raise
    _name(bridge, added)


def unregister_expert_out(bridge: TransformerBridge) -> None:
    """Take the points on expert outputs out again, with their names and the hooks that were on them."""
    for number, moe in routing_layers(bridge).items():
        if moe.points is not None and moe.points.expert_out is not None:
            uninstall_expert_out(moe)
            _forget(bridge, number, (hook_names.EXPERT_OUT,))


@contextmanager
def with_expert_out(bridge: TransformerBridge) -> Iterator[None]:
    """Points on expert outputs while it lasts; afterwards as before."""
    were_on = all(moe.points.expert_out is not None for moe in routing_layers(bridge).values())
    register_expert_out(bridge)
    try:
        yield
    finally:
        if not were_on:
            unregister_expert_out(bridge)


def forward_state(bridge: TransformerBridge) -> ForwardState:
    """What an attached bridge is running at the moment; one that knows nothing for other bridges."""
    return vars(bridge).get(_STATE) or ForwardState()


def unregister(bridge: TransformerBridge) -> None:
    """Take the points out of all layers again, with their names."""
    unregister_expert_out(bridge)
    for number, moe in routing_layers(bridge).items():
        if moe.points is None:
            continue
        uninstall(moe)
        _forget(bridge, number, hook_names.POINTS)
        block: Any = bridge.blocks[number]
        if isinstance(block.mlp, _PointsOnly):
            del block.mlp
    if (state := vars(bridge).pop(_STATE, None)) is not None:
        unwatch(state)
    vars(bridge).pop(_LAYERS, None)


def _name(bridge: TransformerBridge, added: dict[int, dict[str, Any]]) -> None:
    """Let the bridge know points (layer -> short name -> point) under both of their names.

    As TransformerLens' own scan for hooks would, which walks the whole bridge each time.
    """
    for number, points in added.items():
        block: Any = bridge.blocks[number]
        if not hasattr(block, "mlp"):  # the MoE block has another name here; the points' names are the same
            block.mlp = _PointsOnly().train(bridge.training)
        for name, target in hook_names.block_aliases(tuple(points)).items():
            point = points[name].train(bridge.training)
            setattr(block.mlp, name, point)
            point.name = f"blocks.{number}.{target}"
            bridge._hook_registry[point.name] = point
    for number, points in added.items():
        block = bridge.blocks[number]
        block._hook_alias_registry.update(hook_names.block_aliases(tuple(points)))
        block._register_aliases()
        for name, point in points.items():
            bridge._hook_registry[f"blocks.{number}.{name}"] = point


def _forget(bridge: TransformerBridge, number: int, points: tuple[str, ...]) -> None:
    block: Any = bridge.blocks[number]
    for alias, target in hook_names.block_aliases(points).items():
        delattr(block.mlp, alias)
        getattr(block.mlp, "_hook_registry", {}).pop(alias, None)  # the next scan would find it there
        block.__dict__.pop(alias, None)
        block._hook_alias_registry.pop(alias, None)
        for name in (alias, target):
            bridge._hook_registry.pop(f"blocks.{number}.{name}", None)
