"""On every family under torch.autocast: hooks that change nothing change nothing; the cache is HF's route.

The oracle is what Hugging Face's own routers return, watched by torch's forward hooks while no routing hook
is set.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import SteeringPlan, steer_hooks
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.statistics.routing_stats import is_routing_point
from tests import router_oracle as oracle
from tests.edits import same
from tests.families import one_of_each_kind
from tests.promises.decisions import Hooked, hf_model, on_all_points, routing
from tests.tiny_models import tokens

pytestmark = pytest.mark.usefixtures("no_gradients")
PROMPTS = tokens(16, 16)


def own_decisions(model: HookedMoE) -> tuple[Tensor, dict[int, oracle.Decision]]:
    """The model's output without routing hooks, and what each of its routers decided."""
    seen: dict[int, oracle.Decision] = {}

    def keep(layer: int) -> Any:
        def note(module: Any, args: Any, output: Any) -> None:
            no_logits = torch.zeros(PROMPTS.numel(), model.n_experts)
            seen[layer] = oracle._decision(module, output, no_logits)

        return note

    routers = oracle.routers(hf_model(model))
    handles = [router.register_forward_hook(keep(layer)) for layer, router in routers.items()]
    try:
        return model(PROMPTS), seen
    finally:
        for handle in handles:
            handle.remove()


@one_of_each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cache_is_the_models_route_and_identity_hooks_change_nothing(
    hooked: Hooked, recipe: str, dtype: torch.dtype
) -> None:
    model = hooked(recipe, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        expected, decisions = own_decisions(model)
        _, cache = model.run_with_cache(PROMPTS, names_filter=is_routing_point)
        unchanged = model.run_with_hooks(PROMPTS, fwd_hooks=on_all_points(model, same))
    assert torch.equal(unchanged, expected)
    assert sorted(decisions) == list(model.moe_layers)
    for layer, decision in decisions.items():
        ours = routing(cache, layer)
        assert torch.equal(ours.chosen, decision.chosen)
        assert torch.equal(ours.weights, decision.weights)


@pytest.mark.parametrize("recipe", ["olmoe", "deepseek_v3", "ernie4_5_moe", "lfm2_moe", "gpt_oss"])
def test_a_plan_holds_and_leaves_other_prompts_alone(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    layer = model.moe_layers[-1]
    plan = SteeringPlan([(layer, 3)], [(layer, 1), (layer, 2)])
    with torch.autocast("cpu", torch.bfloat16):
        _, before = model.run_with_cache(PROMPTS, names_filter=is_routing_point)
        with model.hooks(steer_hooks([plan] + 15 * [None])):
            _, cache = model.run_with_cache(PROMPTS, names_filter=is_routing_point)
    indices = cache["topk_indices", layer]
    assert bool((indices[0] == 3).any(-1).all())
    assert not bool(torch.isin(indices[0], torch.tensor([1, 2])).any())
    assert torch.equal(indices[1:], before["topk_indices", layer][1:])
    assert torch.equal(cache["topk_weights", layer][1:], before["topk_weights", layer][1:])
