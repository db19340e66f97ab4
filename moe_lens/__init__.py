"""moe_lens: mechanistic interpretability of Mixture-of-Experts language models.

    from moe_lens import HookedMoE, RoutingStats, SteeringPlan, risk_difference, steer_hooks

Causal hook points on routing (`HookedMoE`, `attach`), routing statistics (`RoutingStats`,
`collect_routing`), the experts that follow a behaviour (`risk_difference`), steering by choosing the route
(`SteeringPlan`, `steer_hooks`), ablation, forcing and replay of routes (`route_around`, `force_experts`,
`replay_hooks`), mediation, patching and attribution (`mediation`, `patch_router`,
`expert_logit_attribution`), and small trained models to try it all on (`moe_lens.organisms`).
"""

from moe_lens import contrasts, hook_names, organisms
from moe_lens.ablation import (
    keep_only,
    mean_ablate,
    mean_expert_outputs,
    route_around,
    swap_experts,
    zero_ablate,
)
from moe_lens.attribution import expert_logit_attribution, expert_logit_lens
from moe_lens.collection import collect_routing
from moe_lens.contrast import ExpertScores, risk_difference
from moe_lens.contrastive_pairs import ContrastivePairs
from moe_lens.detection import compare_routing, detect, selection_stability, template_agreement
from moe_lens.errors import MoELensError
from moe_lens.generation_routing import collect_generation
from moe_lens.gradient_attribution import gradient_attribution
from moe_lens.hooked_moe import HookedMoE, attach, detach
from moe_lens.interventions import bias_experts, force_experts, scale_experts
from moe_lens.load_balance import domain_specialisation
from moe_lens.mediation import mediation
from moe_lens.model_table import supported_models
from moe_lens.patching import patch_expert_outputs, patch_router
from moe_lens.prompt_routing import route_prompt
from moe_lens.prompts import Prompt
from moe_lens.published import read_published_ranking
from moe_lens.route_record import RouteRecord, replay_hooks
from moe_lens.routing_rules import register_rule
from moe_lens.routing_stats import RoutingStats, is_routing_point
from moe_lens.rule_base import RoutingRule
from moe_lens.spans import TextSpan, span_mask
from moe_lens.steering import steer_hooks
from moe_lens.steering_evaluation import evaluate_steering
from moe_lens.steering_plan import SteeringPlan
from moe_lens.steering_report import SteeringReport
from moe_lens.steering_sweep import sweep
from moe_lens.tasks import SteeringTask, answer_task, load_task, split_clusters
from moe_lens.virtual_ablation import virtual_ablation
from moe_lens.vocabulary import vocabulary_specialisation

__all__ = [
    "ContrastivePairs",
    "ExpertScores",
    "HookedMoE",
    "MoELensError",
    "Prompt",
    "RouteRecord",
    "RoutingRule",
    "RoutingStats",
    "SteeringPlan",
    "SteeringReport",
    "SteeringTask",
    "TextSpan",
    "answer_task",
    "attach",
    "bias_experts",
    "collect_generation",
    "collect_routing",
    "compare_routing",
    "contrasts",
    "detach",
    "detect",
    "domain_specialisation",
    "evaluate_steering",
    "expert_logit_attribution",
    "expert_logit_lens",
    "force_experts",
    "gradient_attribution",
    "hook_names",
    "is_routing_point",
    "keep_only",
    "load_task",
    "mean_ablate",
    "mean_expert_outputs",
    "mediation",
    "organisms",
    "patch_expert_outputs",
    "patch_router",
    "read_published_ranking",
    "register_rule",
    "replay_hooks",
    "risk_difference",
    "route_around",
    "route_prompt",
    "scale_experts",
    "selection_stability",
    "span_mask",
    "split_clusters",
    "steer_hooks",
    "supported_models",
    "swap_experts",
    "sweep",
    "template_agreement",
    "virtual_ablation",
    "vocabulary_specialisation",
    "zero_ablate",
]
