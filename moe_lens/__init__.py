"""moe_lens: mechanistic interpretability of Mixture-of-Experts language models.

    from moe_lens import HookedMoE, RoutingStats, SteeringPlan, risk_difference, steer_hooks

Causal hook points on routing (`HookedMoE`, `attach`), routing statistics (`RoutingStats`,
`collect_routing`), the experts that follow a behaviour (`risk_difference`), steering by choosing the route
(`SteeringPlan`, `steer_hooks`), ablation, forcing and replay of routes (`route_around`, `force_experts`,
`replay_hooks`), mediation, patching and attribution (`mediation`, `patch_router`,
`expert_logit_attribution`), and small trained models to try it all on (`moe_lens.organisms`).
"""

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
# A star import must not put names like `model` and `text` in the place of a notebook's own.
_ROOMS = {
    *("attribution", "cli", "detection", "engines", "evaluation", "interventions", "model"),
    *("plots", "routers", "statistics", "steering", "text"),
}
__all__ = [name for name in __all__ if name not in _ROOMS]  # pyright: ignore[reportUnsupportedDunderAll]
