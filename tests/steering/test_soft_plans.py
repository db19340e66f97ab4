"""Plans with a strength: what they do to logits, in files, in controls; and biases in standard deviations."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from moe_lens import (
    MoEShape,
    RoutedModel,
    SteeringPlan,
    bake,
    bias_experts,
    collect_routing,
    is_routing_point,
    organisms,
    risk_difference,
    steer_hooks,
    steered,
)
from moe_lens.errors import DataError, HookError, PlanError
from moe_lens.steering.controls import bottom_set, random_sets
from tests.families import some_kinds
from tests.tiny_models import prompt, tiny_model, tokenizer, tokens

Hooked = Callable[..., Any]


def routes(model: Any, hooks: Any = ()) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Layer -> (logits, indices, weights) [batch pos ...]."""
    with torch.no_grad(), model.hooks(list(hooks)):
        _, cache = model.run_with_cache(tokens(2, 6), names_filter=is_routing_point)
    points = ("router_logits", "topk_indices", "topk_weights")
    return {n: tuple(cache[point, n] for point in points) for n in model.moe_layers}  # type: ignore[misc]


def by_hand(
    z: Tensor, chosen: list[int], on: list[int], off: list[int], strength: float, unmet: bool
) -> Tensor:
    """The formula for one token, in float64."""
    numbers = [float(each) for each in z]
    mean = sum(numbers) / len(numbers)
    std = math.sqrt(sum((each - mean) ** 2 for each in numbers) / len(numbers))
    for expert in on:
        if not (unmet and expert in chosen):
            numbers[expert] += strength * std
    for expert in off:
        if not unmet or expert in chosen:
            numbers[expert] -= strength * std
    return torch.tensor(numbers, dtype=torch.float64)


@some_kinds
@pytest.mark.parametrize("unmet", [False, True])
def test_a_soft_plan_moves_logits_by_the_formula(hooked: Hooked, recipe: str, unmet: bool) -> None:
    model = hooked(recipe)
    layer = next(n for n in model.moe_layers if model.routing_rule(n).chooses_by_logits)
    plan = SteeringPlan([(layer, 0)], [(layer, 2)], strength=1.3, only_unmet=unmet)
    plain, got = routes(model)[layer], routes(model, steer_hooks(plan))[layer]
    for row in range(2):
        for pos in range(6):
            chosen = plain[1][row, pos].tolist()
            expected = by_hand(plain[0][row, pos], chosen, [0], [2], 1.3, unmet)
            torch.testing.assert_close(got[0][row, pos].double(), expected, rtol=1e-5, atol=1e-5)
    indices, _ = model.routing_rule(layer).route(got[0])
    assert torch.equal(indices.sort(-1).values, got[1].sort(-1).values)


def test_only_unmet_leaves_tokens_alone_that_already_comply(hooked: Hooked) -> None:
    model = hooked("olmoe")
    plain = routes(model)[0]
    plan = SteeringPlan([(0, 1)], strength=2.0, only_unmet=True)
    got = routes(model, steer_hooks(plan))[0]
    has = (plain[1] == 1).any(-1)
    assert 0 < int(has.sum()) < has.numel()
    assert torch.equal(got[0][has], plain[0][has])
    assert bool((got[0][~has][:, 1] > plain[0][~has][:, 1]).all())
    on_part = steer_hooks(plan)[0][1]

    def first_row(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[:1] = on_part(z[:1], hook)
        return z

    parted = routes(model, [("blocks.0.mlp.hook_router_logits", first_row)])[0]
    assert torch.equal(parted[0][0], got[0][0])
    assert torch.equal(parted[0][1], plain[0][1])


def test_a_strength_of_the_plan_is_that_of_the_hooks(hooked: Hooked) -> None:
    model = hooked("olmoe")
    hard = SteeringPlan([(0, 1)], [(1, 2)])
    soft = SteeringPlan([(0, 1)], [(1, 2)], strength=0.7)
    [own, given] = [routes(model, hooks) for hooks in (steer_hooks(soft), steer_hooks(hard, strength=0.7))]
    assert all(torch.equal(a, b) for n in own for a, b in zip(own[n], given[n], strict=True))
    back = routes(model, steer_hooks(soft, strength=math.inf))
    assert all(
        torch.equal(a, b)
        for n, of in routes(model, steer_hooks(hard)).items()
        for a, b in zip(of, back[n], strict=True)
    )
    by_row = routes(model, steer_hooks([soft, None]))
    assert all(torch.equal(by_row[n][0][1], routes(model)[n][0][1]) for n in by_row)
    assert all(torch.equal(by_row[n][0][0], own[n][0][0]) for n in by_row)
    with pytest.raises(PlanError, match="differ in"):
        steer_hooks([soft, hard])
    steer_hooks([soft, SteeringPlan()])
    for one in steer_hooks([soft, hard], strength=0.7):
        assert cast(Any, one[1]).strength == 0.7
    assert repr(steer_hooks(SteeringPlan([(0, 1)], strength=2, only_unmet=True))[0][1]) == (
        "SteeringHook(layer 0, 1 expert, strength 2, only where unmet)"
    )


def test_in_generation_and_on_a_bare_model() -> None:
    """Soft only while the model writes: what it writes is what formulas by hand make it write."""
    hf_model = tiny_model("mixtral")
    model = RoutedModel(hf_model, tokenizer())
    plan = SteeringPlan([(0, 1)], [(1, 0)], strength=3.0, only_unmet=True)

    def manual(z: Tensor, hook: Any) -> Tensor:
        if not hook.state.offset:
            return z
        layer = int(hook.name.split(".")[1])
        on, off = ([1], []) if layer == 0 else ([], [0])
        chosen = z.topk(2, dim=-1).indices
        return torch.stack(
            [
                torch.stack(
                    [
                        by_hand(token, those.tolist(), on, off, 3.0, True).float()
                        for token, those in zip(row, of, strict=True)
                    ]
                )
                for row, of in zip(z, chosen, strict=True)
            ]
        )

    given = model.to_tokens([prompt(5, 1), prompt(3, 2)])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = (given != 0).long()
    with steered(model, plan, positions="generated"):
        ours = hf_model.generate(given, attention_mask=mask, **options)
    hooks = [(f"blocks.{n}.mlp.hook_router_logits", manual) for n in (0, 1)]
    with model.hooks(hooks):
        assert torch.equal(ours, hf_model.generate(given, attention_mask=mask, **options))
    model.detach()


def test_files_and_digests(tmp_path: Path) -> None:
    hard, soft = SteeringPlan([(0, 1)]), SteeringPlan([(0, 1)], strength=0.5, only_unmet=True)
    soft.save(tmp_path / "soft.json")
    hard.save(tmp_path / "hard.json")
    assert SteeringPlan.load(tmp_path / "soft.json") == soft
    assert SteeringPlan.load(tmp_path / "hard.json") == hard
    written = json.loads((tmp_path / "hard.json").read_text())
    assert written["schema"] == 2  # what an older reader takes
    assert "strength" not in written
    assert json.loads((tmp_path / "soft.json").read_text())["schema"] == 3
    assert len({hard.digest, soft.digest, SteeringPlan([(0, 1)], strength=0.5).digest}) == 3
    assert json.loads((tmp_path / "soft.json").read_text())["digest"] == soft.digest


def test_what_is_made_of_a_soft_plan_is_as_soft(hooked: Hooked) -> None:
    model = hooked("olmoe")
    plan = SteeringPlan([(0, 1)], [(1, 2)], shape=model.moe_shape, strength=0.5, only_unmet=True)
    assert all(
        (each.strength, each.only_unmet) == (0.5, True)
        for each in (
            plan.reversed(), plan.made_for(model.moe_shape), plan.random_like(seed=0),
            *random_sets(model, plan, 3, layer_matched=True),
        )
    )  # fmt: skip
    texts = ["Question : what is", "Document : the"]
    planted = organisms.load("planted")
    scores = risk_difference(*(collect_routing(planted, text, progress=False) for text in texts))
    chosen = SteeringPlan.from_scores(scores, n_deactivate=2, strength=1.5)
    assert chosen.strength == 1.5
    assert bottom_set(scores, chosen, planted).strength == 1.5


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: SteeringPlan(strength=-1), PlanError, "strength must be"),
        (lambda: SteeringPlan(strength=math.inf), PlanError, "strength must be"),
        (lambda: SteeringPlan(strength=True), PlanError, "strength must be"),
        (lambda: SteeringPlan(only_unmet=True), PlanError, "Give a strength"),
        (lambda: steer_hooks(SteeringPlan([(0, 1)]), only_unmet=True), PlanError, "Give a strength"),
        (lambda: bake(tiny_model("olmoe"), SteeringPlan(strength=1.0)), PlanError, "is soft"),
        (lambda: bias_experts({0: [-math.inf]}, scale="std"), DataError, "finite"),
        (lambda: bias_experts(torch.zeros(2, 3)), DataError, "needs a mapping"),
        (
            lambda: steer_hooks(SteeringPlan([(0, 1)], strength=1, only_unmet=True))[0][1](torch.zeros(3)),
            HookError,
            "who is chosen",
        ),
    ],
)
def test_refused(make: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_other_kinds_of_arguments_are_refused() -> None:
    unknown: Any = "nats"
    with pytest.raises((DataError, TypeCheckError), match="scale"):
        bias_experts({0: [1.0]}, scale=unknown)
    with pytest.raises((PlanError, TypeCheckError), match="only_unmet"):
        SteeringPlan(strength=1, only_unmet=unknown)


def test_a_damaged_soft_file_is_refused(tmp_path: Path) -> None:
    SteeringPlan([(0, 1)], strength=0.5).save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    del content["digest"], content["strength"]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(PlanError, match="'strength' is missing"):
        SteeringPlan.load(tmp_path / "plan.json")


@some_kinds
def test_a_bias_in_standard_deviations(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    layer = model.moe_layers[-1]
    bias = torch.linspace(-1, 1, model.n_experts)
    plain = routes(model)[layer][0].double()
    got = routes(model, bias_experts({layer: bias}, scale="std", positions=[1]))[layer][0]
    std = (plain - plain.mean(-1, keepdim=True)).square().mean(-1, keepdim=True).sqrt()
    expected = torch.where(torch.arange(6)[:, None] == 1, plain + bias.double() * std, plain)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_plan_and_a_bias_of_one_number_agree(hooked: Hooked) -> None:
    model = hooked("olmoe", torch.bfloat16)
    bias = torch.zeros(6)
    bias[1] = 0.8
    plan = SteeringPlan([(0, 1)], strength=0.8)
    ours, theirs = routes(model, bias_experts({0: bias}, scale="std")), routes(model, steer_hooks(plan))
    assert all(torch.equal(a, b) for n in ours for a, b in zip(ours[n], theirs[n], strict=True))


def test_the_shape_is_checked_as_of_any_plan() -> None:
    shape = MoEShape("m", (0, 1), 4, 2)
    with pytest.raises(PlanError, match="does not exist"):
        SteeringPlan([(0, 9)], shape=shape, strength=1.0)
