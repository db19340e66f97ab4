"""`steer_hooks` with positions, a strength, a plan a prompt: against each plan alone, and formulas."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lens import HookedMoE, RoutingRule, SteeringPlan, hook_names, scale_experts, steer_hooks
from moe_lens.errors import DataError, HookError, PlanError
from moe_lens.statistics.routing_stats import is_routing_point
from moe_lens.steering.hooks import SteeringHook
from moe_lens.text import TextSpan
from tests.families import recipes
from tests.tiny_models import prompt, tiny_model, tokenizer, tokens

RECIPES = ("olmoe", "deepseek_v3", "ernie4_5_moe", "deepseek_v2_grouped", "gpt_oss")
WRITE: dict[str, Any] = {
    "max_new_tokens": 4,
    "do_sample": False,
    "stop_at_eos": False,
    "verbose": False,
    "return_type": "tokens",
}


def random_plans(model: Any, n: int) -> list[SteeringPlan | None]:
    """Plans of one activated and one deactivated expert in every layer that takes them; every fifth None."""
    generator = torch.Generator().manual_seed(0)
    layers = [layer for layer in model.moe_layers if model.routing_rule(layer).chooses_by_logits]
    plans: list[SteeringPlan | None] = []
    for number in range(n):
        pairs = [
            (layer, *torch.randperm(model.n_experts, generator=generator)[:2].tolist()) for layer in layers
        ]
        plan = SteeringPlan(
            [(layer, up) for layer, up, _ in pairs],
            [(layer, down) for layer, _, down in pairs],
            0.1 + number / 8,
        )
        plans.append(None if number % 5 == 4 else plan)
    return plans


def first(*args: Any, **kwargs: Any) -> SteeringHook:
    """The hook function of the first layer."""
    hook: Any = steer_hooks(*args, **kwargs)[0][1]
    return hook


def one(plan: SteeringPlan | None, **kwargs: Any) -> list[Any]:
    return [] if plan is None else steer_hooks(plan, **kwargs)


@recipes(("olmoe", "deepseek_v2_grouped"), RECIPES)
def test_sixty_four_prompts_under_sixty_four_plans_are_sixty_four_runs(hooked: Any, recipe: str) -> None:
    model = hooked(recipe)
    plans, given = random_plans(model, 64), tokens(64, 6)
    with torch.no_grad():
        together = model.run_with_hooks(given, fwd_hooks=steer_hooks(plans))
        alone = torch.cat(
            [model.run_with_hooks(given[i : i + 1], fwd_hooks=one(plan)) for i, plan in enumerate(plans)]
        )
        unsteered = model(given)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    changed = (together - unsteered).abs().amax((1, 2)) > 1e-3
    assert changed.tolist() == [plan is not None for plan in plans]


@recipes(("olmoe", "deepseek_v2_grouped"), RECIPES)
@pytest.mark.parametrize("cache", [True, False])
def test_generation_of_a_padded_batch_under_several_plans(hooked: Any, recipe: str, cache: bool) -> None:
    model = hooked(recipe)
    texts = [prompt(length, length) for length in (3, 7, 5, 2, 6)]
    for positions in (None, "generated", "prompt", -1):
        plans = random_plans(model, 5)
        with torch.no_grad(), model.hooks(steer_hooks(plans, positions=positions)):
            together = model.generate(texts, use_past_kv_cache=cache, **WRITE)
        for row, (text, plan) in enumerate(zip(texts, plans, strict=True)):
            with torch.no_grad(), model.hooks(one(plan, positions=positions)):
                alone = model.generate(text, use_past_kv_cache=cache, **WRITE)
            assert torch.equal(together[row, -4:], alone[0, -4:])


@pytest.mark.parametrize("recipe", ["olmoe", "deepseek_v3"])
def test_beams_have_the_plan_of_their_prompt(hooked: Any, recipe: str) -> None:
    model = hooked(recipe)
    plans, given = random_plans(model, 3), tokens(3, 5)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "eos_token_id": None}
    with torch.no_grad():
        with model.hooks(steer_hooks(plans)):
            together = model.hf_generate(given, **options)
        for row, plan in enumerate(plans):
            with model.hooks(one(plan)):
                alone = model.hf_generate(given[row : row + 1], **options)
            assert torch.equal(together[row], alone[0])


@pytest.mark.parametrize(
    "options", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}], ids=str
)
@pytest.mark.parametrize("n_prompts", [1, 2])
def test_plans_and_masks_for_copies_of_prompts_are_refused(
    hooked: Any, options: dict[str, Any], n_prompts: int
) -> None:
    """As many as beams or samples: beams change places, so each would have now this plan, now that."""
    model, given = hooked("olmoe"), tokens(n_prompts, 5)
    plans = random_plans(model, 2 * n_prompts)
    mask = torch.ones(2 * n_prompts, 5, dtype=torch.bool)
    for hooks in (steer_hooks(plans), steer_hooks(SteeringPlan([(0, 1)]), positions=mask)):
        with model.hooks(hooks), pytest.raises(HookError, match=rf"{n_prompts} prompts"):
            model.hf_generate(given, max_new_tokens=2, eos_token_id=None, **options)


@pytest.mark.parametrize("positions", [None, "prompt", [0, -1], slice(3, 4)], ids=str)
def test_all_at_once_is_the_plan_at_its_positions(hooked: Any, positions: Any) -> None:
    """Where positions= selects nothing of a layer, logits are those of no plan; else those of the plan."""
    model = hooked("deepseek_v3")
    text = "w1 w2 w3 w4 w5"
    layer = model.moe_layers[0]
    plan = SteeringPlan([(layer, 3)], [(layer, 1)])
    columns = {"None": range(6), "prompt": range(6), "[0, -1]": [0, 5], "slice": [3]}
    wanted = columns[next(key for key in columns if str(positions).startswith(key))]
    caches = []
    for hooks in ([], steer_hooks(plan), steer_hooks(plan, positions=positions)):
        with torch.no_grad(), model.hooks(hooks):
            caches.append(model.run_with_cache(text, names_filter=is_routing_point)[1])
    for point in ("router_logits", "topk_indices", "topk_weights"):
        without, everywhere, placed = (cache[point, layer][0] for cache in caches)
        for column in range(6):
            expected = everywhere if column in wanted else without
            assert torch.equal(placed[column], expected[column].to(placed.dtype))


def test_gradients_of_a_strength_are_those_of_the_formula() -> None:
    model = HookedMoE.from_hf(tiny_model("olmoe"), tokenizer())
    plan = SteeringPlan([(0, 3), (1, 2)], [(0, 1)])
    given, gradients = tokens(2, 5), []
    signs = {0: torch.tensor([0, -1.0, 0, 1, 0, 0]), 1: torch.tensor([0, 0, 1.0, 0, 0, 0])}

    def by_hand(strength: Tensor) -> list[Any]:
        def hook_for(layer: int) -> Any:
            def hook(z: Tensor, hook: Any) -> Tensor:
                mean = z.mean(-1, keepdim=True)
                return z + signs[layer] * strength * (z - mean).square().mean(-1, keepdim=True).sqrt()

            return hook_names.router_logits(layer), hook

        return [hook_for(layer) for layer in signs]

    for make in (lambda s: steer_hooks(plan, strength=s), by_hand):
        strength = torch.tensor(0.7, requires_grad=True)
        logits = model.run_with_hooks(given, fwd_hooks=make(strength))
        logits.log_softmax(-1)[..., 3].sum().backward()
        assert strength.grad is not None
        gradients.append(strength.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)
    assert float(gradients[0].abs()) > 1e-3


def test_gradients_of_a_factor_are_those_of_the_formula() -> None:
    model = HookedMoE.from_hf(tiny_model("olmoe"), tokenizer())
    given, gradients = tokens(2, 5), []

    def by_hand(factor: Tensor) -> list[Any]:
        def hook(weights: Tensor, hook: Any) -> Tensor:
            return torch.where((hook.chosen == 1) | (hook.chosen == 4), weights * factor, weights)

        return [(hook_names.topk_weights(0), hook)]

    for make in (lambda s: scale_experts([(0, 1), (0, 4)], s), by_hand):
        factor = torch.tensor(1.5, requires_grad=True)
        model.run_with_hooks(given, fwd_hooks=make(factor)).log_softmax(-1)[..., 3].sum().backward()
        assert factor.grad is not None
        gradients.append(factor.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert float(gradients[0].abs()) > 1e-4


def test_soft_steering_of_logits_at_minus_infinity_takes_the_others_spread() -> None:
    [(_, hook)] = steer_hooks(SteeringPlan([(0, 0)], [(0, 2)]), strength=2.0)
    z = torch.tensor([[1.0, -math.inf, 4.0, 2.5]])
    std = torch.tensor([1.0, 4.0, 2.5]).double().std(correction=0)
    expected = torch.tensor([[1 + 2 * std, -math.inf, 4 - 2 * std, 2.5]])
    torch.testing.assert_close(hook(z).double(), expected.double())


@pytest.mark.parametrize("recipe", ["olmoe", "deepseek_v3"])
def test_a_copy_of_a_steered_model_is_steered_too(recipe: str) -> None:
    model = HookedMoE.from_hf(tiny_model(recipe), tokenizer())
    layer = model.moe_layers[0]
    hooks = steer_hooks([SteeringPlan([(layer, 3)]), None], positions=[1])
    with torch.no_grad(), model.hooks(hooks):
        expected = model(tokens(2, 4))
    twin = copy.deepcopy(hooks)
    with torch.no_grad():
        assert torch.equal(model.run_with_hooks(tokens(2, 4), fwd_hooks=twin), expected)
    assert twin[0][1] == hooks[0][1]


def test_masks_made_in_inference_mode_serve_runs_with_gradients() -> None:
    model = HookedMoE.from_hf(tiny_model("olmoe"), tokenizer())
    hooks = steer_hooks(SteeringPlan([(0, 3)], [(0, 1)]))
    with torch.inference_mode():
        model.run_with_hooks(tokens(1, 3), fwd_hooks=hooks)
    model.run_with_hooks(tokens(1, 3), fwd_hooks=hooks).sum().backward()


def test_what_a_hook_says_of_itself() -> None:
    plan, other = SteeringPlan([(0, 3)], [(0, 1), (1, 2)]), SteeringPlan([(0, 3)])

    assert repr(first(plan)) == "SteeringHook(layer 0, 2 experts)"
    assert repr(first([plan, None], positions=-1, strength=2)) == (
        "SteeringHook(layer 0, 2 experts, 2 plans, at positions, strength 2)"
    )
    mask = torch.tensor([True, False])
    variants = [
        first(plan), first(other), first([plan, None]), first([None, plan]), first(plan, strength=1.0),
        first(plan, strength=2.0), first(plan, positions="prompt"), first(plan, positions=[0]),
        first(plan, positions=mask), first(plan, positions=~mask), first(plan, positions=TextSpan("w1")),
    ]  # fmt: skip
    digests = [hook.digest for hook in variants]
    assert len(set(digests)) == len(digests)
    assert first(plan, positions=mask.clone()) == first(plan, positions=mask)
    assert first(plan) == first([plan])
    assert first(plan, positions=lambda text: slice(0, 1)).digest is None
    before = (repr(first(plan)), first(plan).digest)
    used = first(plan)
    used(torch.zeros(2, 6))
    assert (repr(used), used.digest) == before
    assert used == first(plan)


def test_what_the_protocol_of_plans_says(hooked: Any) -> None:
    model, plan = hooked("deepseek_v3"), SteeringPlan([(1, 3)])
    name, hook = hook_names.router_logits(1), first(plan)
    assert hook.is_fixed_plan(name)
    assert not hook.is_fixed_plan(hook_names.router_logits(0))
    assert not hook.is_fixed_plan("blocks.1.hook_resid_pre")
    assert not first(plan, strength=torch.tensor(1.0)).is_fixed_plan(name)
    assert not hook.needs_place
    assert first([plan, None]).needs_place
    assert first(plan, positions=0).needs_place
    rule, z = (
        model.routing_rule(1),
        torch.randn(4, model.n_experts, generator=torch.Generator().manual_seed(0)),
    )
    logits, steered = hook.steer(rule, z)
    by_lists = rule.steer(z, [3], [], plan.epsilon)
    assert torch.equal(logits, by_lists[0])
    for ours, theirs in zip(steered.route(logits), by_lists[1].route(by_lists[0]), strict=True):
        assert torch.equal(ours, theirs)


def test_no_plan_gives_no_hooks() -> None:
    assert steer_hooks([]) == steer_hooks([None, None]) == steer_hooks([SteeringPlan(), None]) == []


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda p: steer_hooks(p, strength=-1), PlanError, "from 0 on"),
        (lambda p: steer_hooks(p, strength=float("nan")), PlanError, "from 0 on"),
        (lambda p: steer_hooks(p, strength=True), PlanError, "from 0 on"),
        (lambda p: steer_hooks(p, strength=torch.tensor([1.0, 2.0])), PlanError, "from 0 on"),
        (lambda p: steer_hooks(p, strength=torch.tensor(math.inf)), PlanError, "from 0 on"),
        (lambda p: steer_hooks(p, strength=torch.tensor(1)), PlanError, "from 0 on"),
        (lambda p: steer_hooks(p, positions=[]), DataError, "positions"),
        (lambda p: steer_hooks(p, positions=1.5), DataError, "positions"),
    ],
)
def test_refused(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(SteeringPlan([(0, 1)]))


def test_refused_before_and_in_a_run(hooked: Any) -> None:
    model = hooked("olmoe")
    foreign, fine = SteeringPlan([(0, 77)]), SteeringPlan([(0, 1)])
    with pytest.raises(PlanError, match="does not exist"):
        model.run_with_hooks(tokens(), fwd_hooks=steer_hooks([fine, foreign]))
    with pytest.raises(HookError, match="position 9"):
        model.run_with_hooks(tokens(), fwd_hooks=steer_hooks(fine, positions=9))
    hashed = hooked("deepseek_v4_hash")
    layer = next(n for n in hashed.moe_layers if not hashed.routing_rule(n).chooses_by_logits)
    with pytest.raises(PlanError, match="table by token id"):
        hashed.run_with_hooks(tokens(), fwd_hooks=steer_hooks(SteeringPlan([(layer, 1)]), strength=1.0))
    with pytest.raises(HookError, match="hook point"):
        steer_hooks(fine, positions=0)[0][1](torch.zeros(2, 6))
    with pytest.raises(PlanError, match="2 plans"):
        _ = first([fine, None]).plan


@dataclass(frozen=True, eq=False)
class SoftplusTopK(RoutingRule):
    """A rule of a user's own, with nothing but its two functions."""

    n_experts: int
    top_k: int

    def select(self, logits: Tensor) -> Tensor:
        return torch.topk(F.softplus(logits), self.top_k, dim=-1).indices

    def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
        weights = F.softplus(logits).gather(-1, indices)
        return weights / weights.sum(dim=-1, keepdim=True)


def test_rules_of_ones_own_are_steered_where_a_plan_says(hooked: Any) -> None:
    model = hooked("olmoe")
    plan, other = SteeringPlan([(0, 3)], [(0, 1)]), SteeringPlan([(0, 1)], [(0, 3)])

    def own(logits: Tensor, hook: Any) -> None:
        hook.rule = SoftplusTopK(6, 3)

    with (
        torch.no_grad(),
        model.hooks([(hook_names.router_logits(0), own), *steer_hooks([plan, None, other])]),
    ):
        _, cache = model.run_with_cache(tokens(3, 5), names_filter=is_routing_point)
    _, plain = model.run_with_cache(tokens(3, 5), names_filter=is_routing_point)
    logits, indices = cache["router_logits", 0], cache["topk_indices", 0]
    assert torch.equal(logits[1], plain["router_logits", 0][1])
    for row, inside, outside in ((0, 3, 1), (2, 1, 3)):
        assert bool((indices[row] == inside).any(-1).all())
        assert not bool((indices[row] == outside).any())
    masked, rule = SoftplusTopK(6, 3).excluding(logits[1], torch.arange(6) == 2)
    assert not bool((rule.select(masked) == 2).any())
