"""Routing hooks in training: gradients equal those of a model whose routers' forwards are written by hand."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

from moe_lens import (
    RoutedModel,
    RouteRecord,
    SteeringPlan,
    attach,
    detach,
    hook_names,
    replay_hooks,
    steer_hooks,
)
from moe_lens.errors import HookError
from moe_lens.steering.context import steered
from tests.families import recipes
from tests.tiny_models import router_of, sparse_blocks, tiny_model, tokens

MODELS = ("olmoe", "mixtral", "qwen3_moe")
CHECKPOINTING = {
    "plain": None,
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
}
checkpointing = pytest.mark.parametrize("checkpointing", CHECKPOINTING)
DEACTIVATED = 1


def model_in_training(recipe: str, checkpointing: str) -> Any:
    model = tiny_model(recipe).train()
    if (options := CHECKPOINTING[checkpointing]) is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()
    return model


def plan_of(model: Any) -> SteeringPlan:
    return SteeringPlan(deactivate=[(layer, DEACTIVATED) for layer in sparse_blocks(model)])


@contextmanager
def without_expert(model: Any, n_first_columns: int, n_pos: int) -> Iterator[None]:
    """The plan by hand: in these columns the router's logits of the expert lie below all others."""

    def rerouted(router: Any, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden: Tensor) -> Any:
            logits = torch.nn.functional.linear(hidden, router.weight)
            scores = logits.float().log_softmax(-1)
            low = scores.min(-1, keepdim=True).values - 0.01
            expert = torch.arange(logits.shape[-1]) == DEACTIVATED
            column = torch.arange(len(hidden))[:, None] % n_pos < n_first_columns
            chosen = torch.where(expert & column, low, torch.where(column, scores, logits.float()))
            weights, indices = chosen.softmax(-1).topk(own_k(router), dim=-1)
            if normalises(router):
                weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights, indices

        return forward

    def own_k(router: Any) -> int:
        return router.top_k

    def normalises(router: Any) -> bool:
        return getattr(router, "norm_topk_prob", True)

    routers = [router_of(block) for block in sparse_blocks(model).values()]
    for router in routers:
        router.forward = rerouted(router, router.forward)
    try:
        yield
    finally:
        for router in routers:
            del router.forward


def step(model: Any, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a training step, and every parameter's gradient."""
    model.zero_grad()
    loss = model(input_ids=inputs, labels=inputs, use_cache=False).loss
    loss.backward()
    return loss.detach(), gradients(model)


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, theirs[1][name], rtol=1e-3, atol=1e-6, msg=name)


def assert_different(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert not torch.equal(one[0], other[0])
    routers = [name for name in one[1] if name.endswith("gate.weight")]
    assert any(not torch.allclose(one[1][name], other[1][name], atol=1e-6) for name in routers)


@recipes(MODELS)
@checkpointing
def test_a_steered_step_equals_one_written_by_hand(recipe: str, checkpointing: str) -> None:
    model, inputs = model_in_training(recipe, checkpointing), tokens(2, 6)
    plain = step(model, inputs)
    with without_expert(model, 6, 6):
        expected = step(model, inputs)
    plan = plan_of(model)
    with steered(model, plan, training=True):
        ours = step(model, inputs)
    assert_same(ours, expected)
    assert_different(ours, plain)
    assert_same(step(model, inputs), plain)


@recipes(MODELS)
@checkpointing
@pytest.mark.parametrize(("positions", "n_columns"), [("prompt", 6), (range(3), 3)], ids=str)
def test_a_replayed_route_equals_one_written_by_hand(
    recipe: str, checkpointing: str, positions: Any, n_columns: int
) -> None:
    """Where a block is computed again, too, and the replay asks which columns are running."""
    model, inputs = model_in_training(recipe, checkpointing), tokens(2, 6)
    plain = step(model, inputs)
    record = a_route_of(model, tokens(2, 6, seed=1))
    with on_the_route(model, record, n_columns):
        expected = step(model, inputs)
    routed = attach(model)
    with routed.hooks(replay_hooks(record, positions=positions), training=True):
        ours = step(model, inputs)
    assert_same(ours, expected)
    assert_different(ours, plain)
    detach(model)
    assert_same(step(model, inputs), plain)


def a_route_of(model: Any, other: Tensor) -> RouteRecord:
    """The experts that another text goes to."""
    routed = RoutedModel(copy.deepcopy(model).eval())
    _, cache = routed.run_with_cache(other)
    return RouteRecord.from_cache(cache)


@contextmanager
def on_the_route(model: Any, record: RouteRecord, n_columns: int) -> Iterator[None]:
    """The replay by hand: in the first columns, the experts of the record with the router's own scores."""

    def rerouted(router: Any, recorded: Tensor) -> Callable[..., Any]:
        def forward(hidden: Tensor) -> Any:
            logits = torch.nn.functional.linear(hidden, router.weight)
            p = logits.float().softmax(-1)
            own = p.topk(router.top_k, dim=-1).indices
            column = torch.arange(len(hidden)) % recorded.shape[1]
            indices = torch.where((column < n_columns)[:, None], recorded.flatten(0, 1), own)
            weights = p.gather(-1, indices)
            if getattr(router, "norm_topk_prob", True):
                weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights, indices

        return forward

    routers = [router_of(block) for block in sparse_blocks(model).values()]
    for router, recorded in zip(routers, record.indices, strict=True):
        router.forward = rerouted(router, recorded.long())
    try:
        yield
    finally:
        for router in routers:
            del router.forward


@checkpointing
def test_a_trainers_step_equals_one_written_by_hand(checkpointing: str, tmp_path: Path) -> None:
    """One step of plain descent, by transformers' Trainer; its weights afterwards tell the gradient."""
    inputs, options = tokens(2, 6), CHECKPOINTING[checkpointing]

    def trained(around: Any) -> Any:
        model = tiny_model("olmoe")
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            max_steps=1,
            learning_rate=0.1,
            max_grad_norm=0.0,
            optim="sgd",
            lr_scheduler_type="constant",
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            gradient_checkpointing=options is not None,
            gradient_checkpointing_kwargs=options,
            disable_tqdm=True,
        )
        rows: Any = [{"input_ids": row, "labels": row} for row in inputs]
        with around(model):
            Trainer(model, arguments, train_dataset=rows).train()
        return model

    by_hand = trained(lambda model: without_expert(model, 6, 6))
    ours = trained(lambda model: steered(model, plan_of(model), training=True))
    plain = trained(lambda model: nullcontext())
    pairs = [(ours.get_parameter(name), p) for name, p in by_hand.named_parameters()]
    assert all(torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6) for mine, theirs in pairs)
    assert any(not torch.allclose(ours.get_parameter(n), p, atol=1e-5) for n, p in plain.named_parameters())


@pytest.mark.parametrize("checkpointing", ["reentrant", "not reentrant"])
def test_two_forwards_then_their_backwards(checkpointing: str) -> None:
    """Gradients of a batch in two parts, whose graphs are there at the same time."""
    model, parts = model_in_training("olmoe", checkpointing), tokens(2, 6).split(1)
    record = a_route_of(model, tokens(1, 6, seed=1))
    routed = attach(model)

    def losses_of(parts: Any) -> list[Tensor]:
        return [model(input_ids=part, labels=part, use_cache=False).loss for part in parts]

    with routed.hooks(replay_hooks(record, positions="prompt"), training=True):
        one_by_one = []
        for part in parts:
            model.zero_grad()
            losses_of([part])[0].backward()
            one_by_one.append(gradients(model))
        model.zero_grad()
        torch.stack(losses_of(parts)).sum().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, one_by_one[0][name] + one_by_one[1][name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("checkpointing", ["reentrant", "not reentrant"])
def test_activations_may_lie_elsewhere_when_a_block_is_computed_again(checkpointing: str) -> None:
    model, inputs = model_in_training("olmoe", checkpointing), tokens(2, 6)
    record = a_route_of(model, tokens(2, 6, seed=1))
    routed = attach(model)
    with routed.hooks(replay_hooks(record, positions="prompt"), training=True):
        expected = step(model, inputs)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()):
            assert_same(step(model, inputs), expected)


@pytest.mark.parametrize("checkpointing", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("hooked", ["in the forward", "in the backward"])
def test_a_block_is_not_computed_again_under_other_hooks(checkpointing: str, hooked: str) -> None:
    model, inputs = model_in_training("olmoe", checkpointing), tokens(2, 6)
    plan = plan_of(model)
    attach(model)

    def loss() -> Tensor:
        return model(input_ids=inputs, labels=inputs, use_cache=False).loss

    if hooked == "in the forward":
        with steered(model, plan, training=True):
            there = loss()
        with pytest.raises(HookError, match="same context"):
            there.backward()
    else:
        there = loss()
        with steered(model, plan, training=True), pytest.raises(HookError, match="same context"):
            there.backward()
    step(model, inputs)  # and is as it was


def test_not_after_the_points_are_gone_either() -> None:
    model, inputs = model_in_training("olmoe", "not reentrant"), tokens(2, 6)
    with steered(model, plan_of(model), training=True):
        loss = model(input_ids=inputs, labels=inputs, use_cache=False).loss
    with pytest.raises(HookError, match="same context"):
        loss.backward()


def test_hooks_that_came_and_went_in_between_do_not_matter() -> None:
    model, inputs = model_in_training("olmoe", "not reentrant"), tokens(2, 6)
    plain = step(model, inputs)
    attach(model)
    model.zero_grad()
    loss = model(input_ids=inputs, labels=inputs, use_cache=False).loss
    with steered(model, plan_of(model), training=True), torch.no_grad():
        model(input_ids=inputs)
    loss.backward()
    assert_same((loss.detach(), gradients(model)), plain)


def test_checkpointing_by_other_means_is_refused_where_a_hook_needs_to_know() -> None:
    model, inputs = tiny_model("olmoe").train(), tokens(2, 6)
    routed, record = attach(model), a_route_of(tiny_model("olmoe"), inputs)
    for layer in model.model.layers:
        own = layer.mlp.forward
        layer.mlp.forward = lambda hidden, own=own: own(hidden)
    layer = model.model.layers[0]
    block = type(layer).forward

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(block, layer, *args, use_reentrant=False, **kwargs)

    layer.forward = checkpointed
    with routed.hooks(replay_hooks(record, positions="prompt"), training=True):
        loss = model(input_ids=inputs, labels=inputs, use_cache=False).loss
        with pytest.raises(HookError, match="outside of a forward"):
            loss.backward()


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_nothing_of_a_step_is_left_on_the_model(checkpointing: str) -> None:
    model, inputs = model_in_training("olmoe", checkpointing), tokens(2, 6)
    before = {name: dict(vars(part)) for name, part in model.named_modules()}
    with steered(model, plan_of(model), training=True):
        step(model, inputs)
    model.zero_grad()
    after = {name: dict(vars(part)) for name, part in model.named_modules()}
    assert all(before[name].keys() == after[name].keys() for name in before)
    checkpoints = [part.get("_gradient_checkpointing_func") for part in after.values()]
    assert checkpoints == [part.get("_gradient_checkpointing_func") for part in before.values()]


@pytest.mark.parametrize("hooks", ["a hook", "a plan"])
def test_without_training_hooks_are_refused(hooks: str) -> None:
    model = tiny_model("olmoe").train()
    routed = attach(model)
    point = hook_names.router_logits(0)
    entries = steer_hooks(plan_of(model)) if hooks == "a plan" else [(point, lambda value, hook: None)]
    with routed.hooks(entries), pytest.raises(HookError, match="training mode"):
        model(tokens())
    with routed.hooks(entries, training=True):
        model(tokens())
    with routed.hooks(entries), pytest.raises(HookError, match="training mode"):
        model(tokens())


def test_a_router_that_draws_chooses_as_in_eval_mode_and_says_so() -> None:
    model = tiny_model("phimoe", input_jitter_noise=0.0, router_jitter_noise=0.01)
    plan = SteeringPlan(deactivate=[(0, 0), (1, 0)])
    with steered(model, plan):
        expected = model(tokens()).logits
    model.train()
    warned = pytest.warns(UserWarning, match="PhimoeTopKRouter draws experts at random")
    with warned, steered(model, plan, training=True):
        ours = model(tokens()).logits
    torch.testing.assert_close(ours, expected)


def test_noise_on_what_a_router_reads_stays() -> None:
    model = tiny_model("mixtral", router_jitter_noise=0.3).train()
    with steered(model, plan_of(model), training=True):
        torch.manual_seed(0)
        one = model(tokens()).logits
        torch.manual_seed(0)
        again = model(tokens()).logits
        other = model(tokens()).logits
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
