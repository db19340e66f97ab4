"""Learned router biases: gradients against finite differences, stopping, sparsity, files, baking."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import (
    MoEShape,
    RoutedModel,
    RouterBias,
    answer_objective,
    bake,
    bias_experts,
    hook_names,
    learn_router_bias,
    organisms,
    steer_hooks,
    text_objective,
)
from moe_lens.errors import DataError, HookError, PlanError
from moe_lens.evaluation import continuation_log_probs, text_loss
from moe_lens.organisms.demo import document_task
from moe_lens.steering import LearningStep, Objective
from moe_lens.steering.learning import loss_and_gradient
from tests.families import some_kinds
from tests.tiny_models import VOCAB_SIZE, prompt, tiny_model, tokenizer

Hooked = Callable[..., Any]
TEXTS = [prompt(5, 1), prompt(3, 2), prompt(7, 3)]


@some_kinds
def test_gradients_are_those_of_finite_differences(hooked: Hooked, recipe: str) -> None:
    """In every layer, for the expert on which the loss depends most of those whose step changes no choice."""
    model = hooked(recipe)
    objective = text_objective(model, TEXTS, batch_size=2)
    layers = model.moe_layers
    start = torch.zeros(len(layers), model.n_experts)

    def hooks_for(values: Tensor) -> Any:
        return bias_experts(dict(zip(layers, values.unbind(), strict=True)))

    def loss_at(values: Tensor) -> tuple[float, list[list[int]]]:
        choices: list[list[int]] = []

        def keep(chosen: Tensor, hook: Any) -> None:
            choices.append(chosen.flatten().tolist())

        watching = [(hook_names.topk_indices(layer), keep) for layer in layers]
        with torch.no_grad():
            return float(objective(model, [*hooks_for(values), *watching])), choices

    loss, gradient = loss_and_gradient(model, objective, start, hooks_for)
    unmoved, choices = loss_at(start)
    assert loss == pytest.approx(unmoved, rel=1e-5)
    assert choices
    step = 1e-3
    for row, slopes in enumerate(gradient):
        compared = False
        for expert in slopes.abs().argsort(descending=True).tolist():
            up, down = start.clone(), start.clone()
            up[row, expert] += step
            down[row, expert] -= step
            (above, chosen_above), (below, chosen_below) = loss_at(up), loss_at(down)
            if chosen_above == chosen_below == choices:
                assert float(slopes[expert]) == pytest.approx(
                    (above - below) / (2 * step), rel=0.05, abs=2e-3
                )
                compared = True
                break
        assert compared, f"each expert of row {row} changes a choice"


@torch.no_grad()
def test_objectives_are_the_losses_measured_elsewhere(hooked: Hooked) -> None:
    model = hooked("olmoe")
    hooks = bias_experts({0: torch.linspace(-1, 1, 6)})
    assert float(text_objective(model, TEXTS, batch_size=2)(model, hooks)) == pytest.approx(
        text_loss(model, TEXTS, hooks=hooks), rel=1e-5
    )
    answers, others = ["w1 w2", "w3", "w4 w5 w6"], ["w7", "w8", "w9 w10"]
    first, second = (
        continuation_log_probs(model, TEXTS, texts, reduction="sum", hooks=hooks)
        for texts in (answers, others)
    )
    alone = answer_objective(model, TEXTS, answers, batch_size=2)(model, hooks)
    assert float(alone) == pytest.approx(-first.mean(), rel=1e-5)
    against = answer_objective(model, TEXTS, answers, others)(model, hooks)
    expected = sum(math.log1p(math.exp(b - a)) for a, b in zip(first, second, strict=True)) / 3
    assert float(against) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_positions_tell_the_answer_from_the_prompt(hooked: Hooked) -> None:
    """A bias on generated tokens acts on an answer's tokens, as it does where answers are measured."""
    model = hooked("olmoe")
    hooks = bias_experts({0: torch.linspace(-3, 3, 6)}, positions="generated")
    found = answer_objective(model, TEXTS, ["w1 w2", "w3 w4", "w5 w6"])(model, hooks)
    measured = continuation_log_probs(model, TEXTS, ["w1 w2", "w3 w4", "w5 w6"], reduction="sum", hooks=hooks)
    assert float(found) == pytest.approx(-measured.mean(), rel=1e-5)
    plain = answer_objective(model, TEXTS, ["w1 w2", "w3 w4", "w5 w6"])(model, ())
    assert float(plain) != pytest.approx(float(found), rel=1e-4)


def test_the_best_step_on_development_prompts_comes_back(hooked: Hooked) -> None:
    model = hooked("olmoe")
    training = text_objective(model, TEXTS)

    def never_better(model: Any, hooks: Any) -> Tensor:
        return torch.tensor(float(bool(hooks)) + 1)

    asked: list[int] = []

    def worse_and_worse(model: Any, hooks: Any) -> Tensor:
        asked.append(len(hooks))
        return torch.tensor(float(len(asked)))

    bias = learn_router_bias(model, training, worse_and_worse, patience=3, progress=False)
    assert [step.step for step in bias.history] == [0, 1, 2, 3]
    assert not bool(bias.values.any())
    assert bias_experts(bias) == []
    same = learn_router_bias(model, training, never_better, patience=2, max_steps=9, progress=False)
    assert len(same.history) == 3
    both = learn_router_bias(model, training, training, max_steps=5, layers=[1], progress=False)
    assert set(both.mapping) == {1}
    losses = [step.development for step in both.history]
    with torch.no_grad():
        assert float(training(model, bias_experts(both))) == pytest.approx(min(losses), rel=1e-5)
    assert min(losses) < losses[0]
    assert all(parameter.grad is None for parameter in model.original_model.parameters())


def test_penalties(hooked: Hooked) -> None:
    """A slope below l1 leaves an expert at 0: of a loss that is linear in δ it is known which."""
    model = hooked("olmoe")
    slopes = torch.tensor([0.5, -0.2, 0.05, 0.0, 1.0, -0.04])

    def linear(model: Any, hooks: Any) -> Tensor:
        [edit] = [hook for name, hook in hooks if name.startswith("blocks.1.")]
        return (edit.bias * slopes).sum() + 3

    options: dict[str, Any] = {"layers": 1, "max_steps": 20, "progress": False}
    free = learn_router_bias(model, linear, linear, **options)
    assert free.values[1].nonzero().flatten().tolist() == [0, 1, 2, 4, 5]
    sparse = learn_router_bias(model, linear, linear, l1=0.1, **options)
    assert sparse.values[1].nonzero().flatten().tolist() == [0, 1, 4]
    assert bool((sparse.values[1].sign() == -slopes.sign() * (slopes.abs() > 0.1)).all())
    # the minimum of slope · δ + δ² lies at −slope / 2
    options |= {"max_steps": 120, "patience": 120, "learning_rate": 0.02}
    held = learn_router_bias(model, linear, linear, l2=1.0, **options)
    loose = learn_router_bias(model, linear, linear, **options)
    assert -0.7 < float(held.values[1, 4]) < -0.45
    assert float(loose.values[1, 4]) < -2


def test_a_planted_route_is_found_and_ends_as_a_plan() -> None:
    """On prompts of the test split the document's answers come, by few experts and by a plan of them."""
    model, world = organisms.load("planted"), organisms.world("planted")

    def objective(split: str) -> Objective:
        conflicts = world.conflicts(split)[:24]
        return answer_objective(
            model,
            [c.open_book for c in conflicts],
            [c.document_answer for c in conflicts],
            [c.memory_answer for c in conflicts],
            batch_size=24,
        )

    bias = learn_router_bias(
        model, objective("detection"), objective("development"), l1=0.02, max_steps=14, progress=False
    )
    assert 1 <= len(bias.numbers) <= 12
    task = document_task(world, "test")
    plain = task.values(model).mean()
    assert task.values(model, bias_experts(bias)).mean() > plain + 0.3
    plan = bias.kept(4).to_plan(on_excess="drop")
    assert 1 <= len(plan) <= 4
    assert task.values(model, steer_hooks(plan)).mean() > plain + 0.3


SHAPE = MoEShape("m", (0, 2), 4, 2)
NUMBERS = {(0, 3): -0.5, (2, 1): 1.5, (2, 0): 0.25, (0, 0): -2.0}


def test_of_kept_and_to_plan() -> None:
    bias = RouterBias.of(NUMBERS, SHAPE)
    assert bias.numbers == NUMBERS
    assert set(bias.mapping) == {0, 2}
    assert bias.kept(2).numbers == {(2, 1): 1.5, (0, 0): -2.0}
    assert bias.kept(0).numbers == {}
    plan = bias.to_plan(1, 2)
    assert (plan.activate, plan.deactivate) == (((2, 1),), ((0, 0), (0, 3)))
    assert bias.to_plan(n_activate=2).deactivate == ()
    soft = bias.to_plan(strength=0.5)
    assert (len(soft), soft.strength, soft.shape) == (4, 0.5, SHAPE)
    with pytest.raises(PlanError, match="only 2 experts"):
        bias.to_plan(n_activate=3)
    assert list(bias.to_dataframe()["expert"]) == [0, 1, 3, 0]


def test_files(tmp_path: Path) -> None:
    bias = RouterBias(SHAPE, torch.randn(2, 4), (LearningStep(0, 1.5, 2.5), LearningStep(1, 1.0, 2.0)))
    bias.save(tmp_path / "bias.json")
    back = RouterBias.load(tmp_path / "bias.json")
    assert torch.equal(back.values, bias.values)
    assert (back.shape, back.history) == (bias.shape, bias.history)
    content = json.loads((tmp_path / "bias.json").read_text())
    content["values"][0][0] += 1
    (tmp_path / "bias.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="damaged"):
        RouterBias.load(tmp_path / "bias.json")


def test_baked_where_the_router_has_a_bias_and_refused_elsewhere() -> None:
    hf_model = tiny_model("gpt_oss")
    model = RoutedModel(hf_model, tokenizer())
    given = torch.randint(4, VOCAB_SIZE, (2, 6), generator=torch.Generator().manual_seed(0))
    bias = RouterBias.of({(model.moe_layers[0], 1): 1.5, (model.moe_layers[1], 0): -2.0}, model.moe_shape)
    with torch.no_grad():
        expected = model.run_with_hooks(given, fwd_hooks=bias_experts(bias))
        plain = model(given)
        baked = bake(model, bias)
        torch.testing.assert_close(baked(given).logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(given), plain)
    assert not torch.allclose(expected, plain)
    for recipe in ("olmoe", "deepseek_v3", "ernie4_5_moe"):
        other = RoutedModel(tiny_model(recipe), tokenizer())
        of_other = RouterBias.of({(other.moe_layers[0], 1): 1.0}, other.moe_shape)
        with pytest.raises(PlanError, match="no bias on its logits"):
            bake(other, of_other)
    with pytest.raises(PlanError, match="another model"):
        bake(model, RouterBias.of({(0, 1): 1.0}, MoEShape("else", (0,), 4, 2)))
    with pytest.raises(PlanError, match="RouterBias"):
        bake(model, bias, how="prune")


def test_a_bias_of_another_model_is_refused_before_the_forward(hooked: Hooked) -> None:
    model = hooked("olmoe")
    with pytest.raises(HookError, match="another model"):
        model.run_with_hooks(TEXTS[0], fwd_hooks=bias_experts(RouterBias.of(NUMBERS, SHAPE)))


def one(model: Any, hooks: Any) -> Tensor:
    return torch.tensor(1.0)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((one, one), "No gradient"),
        ((one, lambda m, h: torch.tensor(math.nan)), "finite"),
        ((lambda m, h: 1.0, one), "one finite number"),
        ((one, lambda m, h: torch.ones(2)), r"shape \(2,\)"),
        ((3, one), "objective"),
    ],
)
def test_losses_that_cannot_be_learned_from(hooked: Hooked, arguments: Any, match: str) -> None:
    with pytest.raises(Exception, match=match) as caught:
        learn_router_bias(hooked("olmoe"), *arguments, progress=False)
    assert isinstance(caught.value, DataError) or "Type-check" in str(caught.value)


def test_a_single_expert_at_weight_one_has_no_gradient(hooked: Hooked) -> None:
    model = hooked("qwen3_moe_k1", norm_topk_prob=True)
    objective = text_objective(model, TEXTS)
    with pytest.raises(DataError, match="No gradient"):
        learn_router_bias(model, objective, objective, progress=False)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"l1": -1.0}, "l1"), ({"l2": math.nan}, "l2"), ({"learning_rate": 0.0}, "learning_rate"),
        ({"max_steps": 0}, "max_steps"), ({"patience": 0}, "patience"), ({"layers": [9]}, "layers"),
    ],
)  # fmt: skip
def test_refused(hooked: Hooked, options: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        learn_router_bias(hooked("olmoe"), one, one, progress=False, **options)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: RouterBias(SHAPE, torch.zeros(2, 3)), "layer expert"),
        (lambda: RouterBias(SHAPE, torch.full((2, 4), math.inf)), "finite"),
        (lambda: RouterBias.of({(1, 0): 1.0}, SHAPE), "is no"),
        (lambda: RouterBias.of({(0, 4): 1.0}, SHAPE), "is no"),
        (lambda: RouterBias.of({3: 1.0}, SHAPE), "is no"),
        (lambda: answer_objective(organisms.load("null"), ["the"], ["the", "the"]), "as many answers"),
        (lambda: answer_objective(organisms.load("null"), ["the"], [""]), "no tokens"),
    ],
)
def test_refused_forms(make: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        make()
