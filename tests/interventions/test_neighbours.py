"""Dense routes and C3PO's neighbours: against a plain loop written from the description, on every rule."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lens import (
    DenseRoutes,
    MoEShape,
    RoutedModel,
    SteeringPlan,
    follow_dense,
    is_routing_point,
    neighbour_routes,
    organisms,
    record_dense,
    steer_hooks,
    with_top_k,
)
from moe_lens.errors import DataError, HookError
from moe_lens.routers import dense_weights, logits_of_dense, no_dense_weights
from tests.families import some_kinds
from tests.tiny_models import prompt, tiny_model, tokenizer, tokens

Hooked = Callable[..., Any]
WITHOUT = ("deepseek_v4_hash", "phimoe")


def routed(model: Any, texts: Any, hooks: Any = ()) -> Any:
    with torch.no_grad(), model.hooks(list(hooks)):
        _, cache = model.run_with_cache(texts, names_filter=is_routing_point)
    return cache


@some_kinds
def test_every_rule_routes_by_its_own_dense_weights_as_before(hooked: Hooked, recipe: str) -> None:
    """Weights to logits and back: same experts, same weights, or a refusal that says why."""
    model = hooked(recipe)
    layer = model.moe_layers[0]
    rule = model.routing_rule(layer)
    if no_dense_weights(rule) is not None:
        with pytest.raises(HookError, match="dense"):
            dense_weights(rule, torch.zeros(model.n_experts))
        with pytest.raises(HookError, match="dense"):
            record_dense(model, tokens(1, 4), progress=False)
        assert recipe in WITHOUT or recipe.startswith(("phimoe", "deepseek_v4"))
        return
    z = torch.randn(200, model.n_experts, generator=torch.Generator().manual_seed(0)) * 2
    back = logits_of_dense(rule, dense_weights(rule, z))
    ours, theirs = rule.route(back), rule.route(z)
    assert torch.equal(ours.indices.sort(-1).values, theirs.indices.sort(-1).values)
    order, other = ours.indices.argsort(-1), theirs.indices.argsort(-1)
    torch.testing.assert_close(
        ours.weights.gather(-1, order).float(),
        theirs.weights.gather(-1, other).float(),
        rtol=1e-4,
        atol=1e-5,
    )


@some_kinds
def test_following_ones_own_record_changes_nothing_but_rounding(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    if no_dense_weights(model.routing_rule(model.moe_layers[0])) is not None:
        return
    given = tokens(3, 5)
    records = record_dense(model, given, progress=False)
    with torch.no_grad():
        plain = model(given)
        followed = model.run_with_hooks(given, fwd_hooks=follow_dense(records))
    torch.testing.assert_close(followed, plain, rtol=1e-3, atol=1e-3)
    assert torch.equal(followed[:, :-1], plain[:, :-1])


def by_hand(records: DenseRoutes, similarity: list[float], k: int) -> list[list[float]]:
    """C3PO's mean, for one query: layer by layer, expert by expert."""
    nearest = sorted(range(len(similarity)), key=lambda i: -similarity[i])[:k]
    total = sum(similarity[i] for i in nearest)
    return [
        [
            sum(similarity[i] * float(layer[i, expert]) for i in nearest) / total
            for expert in range(layer.shape[1])
        ]
        for layer in records.weights
    ]


@pytest.mark.parametrize("recipe", ["olmoe", "mixtral", "deepseek_v3"])
def test_the_last_token_is_routed_by_the_neighbours_mean(hooked: Hooked, recipe: str) -> None:
    """Top-k of ŵ, with ŵ's weights, normalised where the architecture does; other tokens as before."""
    model = hooked(recipe)
    solved = [prompt(4, 1), prompt(6, 2), prompt(3, 3), prompt(5, 4)]
    records = record_dense(model, solved, batch_size=3, progress=False)
    texts = [prompt(5, 7), prompt(3, 8)]
    similarity = [[0.9, 0.2, 0.7, 0.1], [0.3, 0.3, 0.0, 0.8]]
    last = model.moe_layers[-1]
    hooks = neighbour_routes(records, similarity, 3, layers=last)
    plain, got = routed(model, texts), routed(model, texts, hooks)
    rule = model.routing_rule(last)
    row = records.shape.layers.index(last)
    for query in range(2):
        mixed = by_hand(records, similarity[query], 3)[row]
        bias = getattr(rule, "bias", None)
        chosen_by = [m + (0.0 if bias is None else float(bias[e])) for e, m in enumerate(mixed)]
        if recipe != "deepseek_v3":  # whose groups limit the choice
            best = sorted(range(len(mixed)), key=lambda e: -chosen_by[e])[: model.top_k]
            assert sorted(got["topk_indices", last][query, -1].tolist()) == sorted(best)
        for expert, weight in zip(
            got["topk_indices", last][query, -1].tolist(),
            got["topk_weights", last][query, -1].tolist(),
            strict=True,
        ):
            chosen = got["topk_indices", last][query, -1].tolist()
            total = sum(mixed[e] for e in chosen)
            expected = mixed[expert] / (total if recipe != "olmoe" else 1.0)
            scaling = getattr(rule, "scaling", 1.0)
            assert weight == pytest.approx(expected * scaling, rel=1e-3)
    assert torch.equal(got["topk_indices", last][:, :-1], plain["topk_indices", last][:, :-1])
    assert torch.equal(got["topk_weights", last][:, :-1], plain["topk_weights", last][:, :-1])


def test_by_default_the_last_five_moe_layers(hooked: Hooked) -> None:
    model = hooked("olmoe", num_hidden_layers=7)
    records = record_dense(model, tokens(3, 4), progress=False)
    hooks = neighbour_routes(records, [0.5, 0.4, 0.3])
    assert [name for name, _ in hooks] == [f"blocks.{n}.mlp.hook_router_logits" for n in range(2, 7)]


def test_all_experts_run_at_dense_weights_under_a_larger_k() -> None:
    """The block's output is Σ over all experts of ŵ_e times what e gives."""
    model = RoutedModel(tiny_model("mixtral"), tokenizer())
    records = record_dense(model, tokens(1, 5), progress=False)
    with with_top_k(model, model.n_experts):
        cache = routed(model, tokens(1, 5, seed=3), follow_dense(records, positions=None))
    for row, layer in enumerate(model.moe_layers):
        found = torch.zeros(5).scatter(
            0, cache["topk_indices", layer][0, -1], cache["topk_weights", layer][0, -1]
        )
        torch.testing.assert_close(found, records.weights[row, 0], rtol=1e-4, atol=1e-6)
    model.detach()


def test_while_a_model_writes_and_beside_a_plan() -> None:
    model: Any = RoutedModel(tiny_model("olmoe"), tokenizer())
    records = record_dense(model, tokens(4, 5), progress=False)
    texts = [prompt(5, 1), prompt(2, 2)]
    similarity = [[0.9, 0.2, 0.7, 0.1], [0.3, 0.3, 0.1, 0.8]]
    both = [
        *neighbour_routes(records, similarity),
        *neighbour_routes(records, similarity, positions="generated"),
    ]
    plan = steer_hooks(SteeringPlan(deactivate=[(0, 2)]))
    seen: list[Tensor] = []
    watch = [("blocks.0.mlp.hook_topk_indices", lambda value, hook: seen.append(value))]
    given = model.to_tokens(texts)
    options = {"attention_mask": (given != 0).long(), "max_new_tokens": 4, "do_sample": False,
               "pad_token_id": 0, "eos_token_id": None}  # fmt: skip
    with model.hooks([*both, *plan, *watch]):
        model.original_model.generate(given, **options)
    assert not bool((torch.cat([step[:, -1:] for step in seen]) == 2).any())
    seen.clear()
    with model.hooks([*both, *watch]):
        model.original_model.generate(given, num_beams=2, **options)  # beams have their prompt's neighbours
    mixed = records.neighbours(similarity, 3).weights[0]
    for step in seen:
        best = (
            mixed.repeat_interleave(2, 0).topk(3, dim=-1).indices if len(step) == 4 else mixed.topk(3).indices
        )
        assert torch.equal(step[:, -1].sort(-1).values, best.sort(-1).values)
    model.detach()


@settings(max_examples=20)
@given(
    st.lists(st.floats(0.01, 1), min_size=4, max_size=4),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_a_mean_of_neighbours_lies_between_them(similarity: list[float], k: int, seed: int) -> None:
    weights = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(seed))
    records = DenseRoutes(MoEShape("m", (0, 3), 5, 2), weights)
    mixed = records.neighbours(similarity, k).weights[:, 0]
    for ours, theirs in zip(mixed.tolist(), by_hand(records, similarity, k), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert bool((mixed <= weights.amax(1) + 1e-6).all())
    assert bool((mixed >= weights.amin(1) - 1e-6).all())


def test_files(tmp_path: Path) -> None:
    records = record_dense(organisms.load("null"), ["Question : what", "the"], progress=False)
    records.save(tmp_path / "dense.safetensors")
    back = DenseRoutes.load(tmp_path / "dense.safetensors")
    assert back.shape == records.shape
    assert torch.equal(back.weights, records.weights)


RECORDS = DenseRoutes(MoEShape("tiny", (0, 1, 2), 6, 3), torch.full((3, 2, 6), 1 / 6))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: DenseRoutes(RECORDS.shape, torch.full((3, 2, 5), 0.2)), "layer prompt expert"),
        (lambda: DenseRoutes(RECORDS.shape, -RECORDS.weights), "from 0 on"),
        (lambda: DenseRoutes(RECORDS.shape, RECORDS.weights * math.nan), "finite"),
        (lambda: neighbour_routes(RECORDS, [0.1, 0.2], 3), "k must be"),
        (lambda: neighbour_routes(RECORDS, [0.1, 0.2, 0.3], 2), "similarity must be"),
        (lambda: neighbour_routes(RECORDS, [0.1, -0.2], 2), "similarities"),
        (lambda: neighbour_routes(RECORDS, [0.0, 0.0], 2), "similarities"),
        (lambda: neighbour_routes(RECORDS, [0.1, math.nan], 1), "similarity must be"),
        (lambda: neighbour_routes([1], [0.1], 1), "DenseRoutes|record_dense"),  # type: ignore[arg-type]
        (lambda: follow_dense(RECORDS, layers=7), "no layer 7"),
    ],
)
def test_refused(make: Any, match: str) -> None:
    with pytest.raises(Exception, match=match) as caught:
        make()
    assert isinstance(caught.value, DataError) or "Type-check" in str(caught.value)


def test_other_models_and_numbers_of_prompts_are_refused(hooked: Hooked) -> None:
    model = hooked("olmoe")
    with pytest.raises(HookError, match="another model"):
        model.run_with_hooks(tokens(2, 4), fwd_hooks=follow_dense(RECORDS))
    records = record_dense(model, tokens(3, 4), progress=False)
    with pytest.raises(HookError, match="3 prompts"):
        model.run_with_hooks(tokens(2, 4), fwd_hooks=follow_dense(records))
