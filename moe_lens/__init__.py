"""moe_lens: mechanistic interpretability of Mixture-of-Experts language models.

    from moe_lens import HookedMoE, RoutingStats, SteeringPlan, risk_difference, steer_hooks

Causal hook points on routing (`HookedMoE`, `attach`), routing statistics (`RoutingStats`,
`collect_routing`), the experts that follow a behaviour (`risk_difference`), steering by choosing the route
(`SteeringPlan`, `steer_hooks`), and small trained models to try it all on (`moe_lens.organisms`).
"""

from moe_lens import hook_names, organisms
from moe_lens.contrast import ExpertScores, risk_difference
from moe_lens.errors import MoELensError
from moe_lens.hooked_moe import HookedMoE, attach, detach
from moe_lens.model_table import supported_models
from moe_lens.routing_rules import register_rule
from moe_lens.routing_stats import RoutingStats, collect_routing, is_routing_point
from moe_lens.rule_base import RoutingRule
from moe_lens.steering import steer_hooks
from moe_lens.steering_plan import SteeringPlan

__all__ = [
    "ExpertScores",
    "HookedMoE",
    "MoELensError",
    "RoutingRule",
    "RoutingStats",
    "SteeringPlan",
    "attach",
    "collect_routing",
    "detach",
    "hook_names",
    "is_routing_point",
    "organisms",
    "register_rule",
    "risk_difference",
    "steer_hooks",
    "supported_models",
]
