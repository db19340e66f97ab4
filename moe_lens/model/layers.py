"""Finding the MoE layers of a Hugging Face model: each block with the router inside it.

for moe in find_moe_layers(hf_model):      # works on a bare HF model and on one inside a bridge
    print(moe.where, moe.rule)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from moe_lens.errors import UnsupportedRouterError
from moe_lens.model.private_names import hf_path
from moe_lens.model.probing import closest_rules
from moe_lens.routers.rule import RoutingRule
from moe_lens.routers.table import REFUSED_ROUTERS, RULES, Family, is_known_router, row_for, rule_for

_NOT_FEED_FORWARD: Final = ("JetMoeAttention", "JetMoeMoA")  # attention heads as experts


@dataclass(frozen=True)
class MoELayer:
    """One MoE block of a Hugging Face model and the router inside it."""

    where: str
    block: nn.Module
    router: nn.Module

    @property
    def row(self) -> Family:
        """How this class of routers is read."""
        return row_for(self.router)

    @property
    def rule(self) -> RoutingRule:
        """The routing rule, with the parameters that the router has now."""
        return rule_for(self.router, self.block)

    @property
    def experts(self) -> nn.Module | None:
        """The module whose forward runs the experts (`expert_points` replaces it); None without one."""
        experts = self.row.experts.module(self.block)
        return None if experts is None else unwrap(experts)


def find_moe_layers(root: nn.Module, prefix: str = "") -> Iterator[MoELayer]:
    """Every MoE block below `root` with its router, in module order; `prefix` goes before their names.

    Raises:
        UnsupportedRouterError: a block holds experts but no router that `RULES` names. The message says which
            rules come closest to what its router computes.
    """
    for name, block in root.named_modules(prefix=prefix):
        if hasattr(block, "original_component"):  # a bridge's wrapper around the actual block or router
            continue
        if type(block).__name__ in _NOT_FEED_FORWARD or has_adapters(block):
            continue
        if type(block) is nn.ModuleDict:  # an adapter's, with routers of its own
            continue
        where = hf_path(name) or type(block).__name__
        children = [unwrap(child) for child in block.children()]
        routers = [child for child in children if is_known_router(child)]
        if len(routers) == 1:
            yield MoELayer(where, block, routers[0])
        elif len(routers) > 1 or (not routers and hasattr(block, "experts")):
            raise UnsupportedRouterError(_why_refused(where, block, children))


def no_moe(name: str, elsewhere: Sequence[MoELayer] = ()) -> UnsupportedRouterError:
    """The error for a model without MoE layers, or with such layers only outside its decoder blocks."""
    if elsewhere:
        places = ", ".join(moe.where for moe in elsewhere)
        return UnsupportedRouterError(
            f"{name} has its Mixture-of-Experts layers outside the blocks of the bridge ({places}), where "
            "there is no layer number to hook them by."
        )
    return UnsupportedRouterError(
        f"{name} has no Mixture-of-Experts layer, so there is no routing to hook. "
        "Use TransformerLens' TransformerBridge for dense models."
    )


def _why_refused(where: str, block: nn.Module, children: list[nn.Module]) -> str:
    for child in children:
        if (reason := REFUSED_ROUTERS.get(type(child).__name__)) is not None:
            return f"{where}: moe_lens does not hook {type(child).__name__}: {reason}."
    parts = ", ".join(sorted(type(child).__name__ for child in children)) or "nothing"
    described = (closest_rules(child, block) for child in _perhaps_routers(children))
    closest = next((rules for rules in described if rules), [])
    hint = (
        f"Closest rules: {'; '.join(closest)}"
        if closest
        else "Its decision could not be compared with any rule"
    )
    return (
        f"{where}: {type(block).__name__} holds experts but no router that moe_lens has a rule for (its "
        f"parts: {parts}). {hint}. Known router classes: {', '.join(sorted(RULES))}. If a rule fits yours, "
        "add it with moe_lens.register_rule(router_class_name, factory); docs/how-to/add-a-rule.md shows how."
    )


def _perhaps_routers(children: list[nn.Module]) -> list[nn.Module]:
    """The children that may be routers, judged by their class names: likely ones first, experts left out."""

    def rank(child: nn.Module) -> int:
        name = type(child).__name__.lower()
        return 0 if "router" in name or "gat" in name else 2 if "expert" in name or "mlp" in name else 1

    return sorted((child for child in children if rank(child) < 2), key=rank)


def has_adapters(module: nn.Module) -> bool:
    """Whether it stands around one module of a model and its adapters (PEFT)."""
    return any(
        isinstance(getattr(module, name, None), nn.Module) for name in ("base_layer", "original_module")
    )


def unwrap(module: Any) -> Any:
    """The Hugging Face module inside a bridge's wrapper or an adapter's (PEFT), or the module itself.

    Of one that is trained whole (`modules_to_save`), the copy that runs.
    """
    if isinstance(getattr(module, "original_module", None), nn.Module):
        copies, active = module.modules_to_save, module.active_adapters
        runs = bool(active) and active[0] in copies and not module.disable_adapters
        return unwrap(copies[active[0]] if runs else module.original_module)
    for name in ("original_component", "base_layer"):
        if isinstance(inner := getattr(module, name, None), nn.Module):
            return unwrap(inner)
    return module
