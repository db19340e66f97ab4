"""Names of other libraries that are not part of their documented interfaces: all of them stand here.

    add_points(bridge, {0: {"hook_router_logits": point}})     # TransformerLens knows them by both names
    remove_points(bridge, 0, ("hook_router_logits",))
    has_hooks(point), foreign_hooks(module), supports_padding(bridge), hf_path(name), become(bridge, cls)
    stands_on(router, HookedRouter), take_off(router, hooked, original, was_on_instance)
    execution_device(module), offloaded_weights(module), n_forward_hooks(module)
    is_compiled(module), inside_compiled(module), adapters_are_off(peft_model)
    attention_of(config), experts_of(config), implementation_of(experts), CHECKPOINT

`tests/model/test_private_names.py` checks that each still exists and does what is said here, and that no
other file of the package uses such a name.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from torch import nn
from transformer_lens.hook_points import HookPoint

from moe_lens import hook_names
from moe_lens.checks import pads_exactly


class PointsOnly(nn.Module):
    """Stands as `block.mlp` where TransformerLens gives the MoE block another name (`moe`, `mixer`)."""


def add_points(bridge: Any, added: Mapping[int, Mapping[str, Any]]) -> None:
    """Let a bridge know points (layer -> short name -> point) under both of their names.

    It does what TransformerLens' own scan for hooks would do, which walks the whole bridge each time.

    - `bridge._hook_registry`, name -> HookPoint: what `hook_dict`, caching and `run_with_hooks` look in.
    - `block._hook_alias_registry`, alias -> path below the block, and `block._register_aliases()`, which sets
      the attributes: so that aliases outlive the rebuilding of the registry in compatibility mode.
    """
    for number, points in added.items():
        block: Any = bridge.blocks[number]
        if not hasattr(block, "mlp"):
            block.mlp = PointsOnly().train(bridge.training)
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


def remove_points(bridge: Any, number: int, points: Iterable[str]) -> None:
    """Let a bridge forget points of one layer, under both of their names.

    - `mlp._hook_registry`, short name -> HookPoint: a component notes there every HookPoint that is set on
      it, and the next scan would find a detached point there. (`PointsOnly` is no component and has none.)
    - The others are those of `add_points`.
    """
    block: Any = bridge.blocks[number]
    of_component = {} if isinstance(block.mlp, PointsOnly) else block.mlp._hook_registry
    for alias, target in hook_names.block_aliases(tuple(points)).items():
        delattr(block.mlp, alias)
        of_component.pop(alias, None)
        vars(block).pop(alias, None)
        block._hook_alias_registry.pop(alias, None)
        for name in (alias, target):
            bridge._hook_registry.pop(f"blocks.{number}.{name}", None)


def supports_padding(bridge: Any) -> bool:
    """Whether the model inside a wrapper can run prompts of different lengths in one batch.

    `adapter.supports_batched_generation`, True by default: TransformerLens' own `generate` refuses lists of
    prompts by it. A RoutedModel has no adapter. Where padding changes the numbers (`pads_exactly`), none can.
    """
    can = getattr(getattr(bridge, "adapter", None), "supports_batched_generation", True)
    return can and pads_exactly(bridge)


def hf_path(name: str) -> str:
    """A module's path as Hugging Face has it, from its path below a bridge.

    A bridge's component holds the module that it wraps as the child `_original_component`. Only the places
    that errors name depend on it.
    """
    return name.replace("._original_component", "")


def become(bridge: Any, cls: type) -> None:
    """Make a bridge an instance of another class of bridges, in place, by assigning `__class__`.

    TransformerLens' builders cannot be told which class to make; and `attach` keeps the object that somebody
    already has.
    """
    bridge.__class__ = cls


def has_hooks(module: nn.Module) -> bool:
    """Whether any hook waits on a module: torch keeps them in `_forward_hooks` and the three others.

    TransformerLens' hooks are torch hooks of its HookPoints, so that these hold them too.
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


_THEIRS: Final = ("moe_lens", "transformers", "transformer_lens")


def foreign_hooks(module: nn.Module) -> bool:
    """Whether somebody's own forward hook waits on a module.

    Not a HookPoint's, nor those that moe_lens, transformers (to capture outputs, once asked for) and
    TransformerLens leave on modules.
    """
    if isinstance(module, HookPoint):
        return False
    waiting = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(str(getattr(hook, "__module__", "")).partition(".")[0] not in _THEIRS for hook in waiting)


def stands_on(module: nn.Module, kind: type) -> Any:
    """The object of this kind that stands as the module's `forward`; None where there is none.

    accelerate keeps the forward that it found as `_old_forward` and calls it from its own.
    """
    found = (vars(module).get(name) for name in ("forward", "_old_forward"))
    return next((forward for forward in found if isinstance(forward, kind)), None)


def take_off(module: nn.Module, stood: Any, original: Any, was_on_instance: bool) -> None:
    """Put back the forward that was there before `stood`, also under accelerate's own."""
    if vars(module).get("forward") is not stood:
        vars(module)["_old_forward"] = original
        vars(module)["forward"].__wrapped__ = original
    elif was_on_instance:
        vars(module)["forward"] = original
    else:
        del vars(module)["forward"]


CHECKPOINT: Final = "_gradient_checkpointing_func"
"""What transformers sets on a block when checkpointing is enabled: it takes a function to compute again."""


def execution_device(module: nn.Module) -> Any:
    """Where accelerate runs a module whose weights are offloaded, by its hook `_hf_hook`; None elsewhere."""
    return getattr(getattr(module, "_hf_hook", None), "execution_device", None)


def offloaded_weights(module: nn.Module) -> Mapping[str, Any] | None:
    """A module's weights by name where accelerate keeps them, by its hook `_hf_hook`; None elsewhere."""
    hook = getattr(module, "_hf_hook", None)
    kept = (getattr(each, "weights_map", None) for each in getattr(hook, "hooks", [hook]))
    return next((weights for weights in kept if weights is not None), None)


def attention_of(config: Any) -> str | None:
    """Which attention a config's model runs ("eager", "sdpa"...): `_attn_implementation`."""
    return getattr(config, "_attn_implementation", None)


def experts_of(config: Any) -> str | None:
    """How a config's model runs its experts ("grouped_mm", "eager"...): `_experts_implementation`."""
    return getattr(config, "_experts_implementation", None)


def implementation_of(experts: Any) -> str | None:
    """How a module runs its experts, by its config."""
    return experts_of(getattr(experts, "config", None))


def is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()` was called: torch keeps what it made as `_compiled_call_impl`."""
    return getattr(module, "_compiled_call_impl", None) is not None


def inside_compiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile(module)` was made of, its `_orig_mod`; a module itself otherwise."""
    return getattr(module, "_orig_mod", module)


def adapters_are_off(model: Any) -> bool:
    """Whether a PEFT model is within `disable_adapter()`, which prompt learning notes in this name alone."""
    return bool(getattr(model, "_adapters_disabled", False))


def n_forward_hooks(module: nn.Module) -> int:
    """How many hooks wait on a module's forward, before and after it."""
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


HOOK_TABLES: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""The tables in which torch keeps a module's hooks, handle's id -> function; `points` puts its own there."""
