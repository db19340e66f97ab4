"""Names: what is spelled is what TransformerLens finds, and what is parsed is what was spelled."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformer_lens.utilities.components_utils import get_act_name

from moe_lens import hook_names
from moe_lens.errors import DataError, HookError
from moe_lens.statistics.routes import RouteRecord
from moe_lens.statistics.routing_stats import RoutingStats

SPELLERS = [hook_names.router_logits, hook_names.topk_indices, hook_names.topk_weights]


def test_names_are_those_of_the_design() -> None:
    assert [spell(3) for spell in SPELLERS] == [
        "blocks.3.mlp.hook_router_logits",
        "blocks.3.mlp.hook_topk_indices",
        "blocks.3.mlp.hook_topk_weights",
    ]


def test_a_point_can_be_given_by_its_short_name() -> None:
    spelled = [hook_names.name(3, point) for point in (*hook_names.POINTS, hook_names.EXPERT_OUT)]
    assert spelled == [spell(3) for spell in (*SPELLERS, hook_names.expert_out)]


@settings(max_examples=30, deadline=None)
@given(layer=st.integers(0, 10_000), point=st.integers(0, 2))
def test_parse_undoes_spelling(layer: int, point: int) -> None:
    name = SPELLERS[point](layer)
    assert hook_names.parse(name) == (layer, hook_names.POINTS[point])
    assert hook_names.parse(name.replace("mlp.", "")) == (layer, hook_names.POINTS[point])
    assert hook_names.layer_of(name) == hook_names.layer_of(name.replace("mlp.", "")) == layer


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.mlp.hook_out",
        "blocks.0.attn.hook_router_logits",
        "blocks.0.mlp.gate.hook_router_logits",
        "blocks.x.mlp.hook_router_logits",
        "blocks.0.mlp.hook_router_logits.more",
        "encoder.blocks.0.mlp.hook_router_logits",
        "blocks.-1.mlp.hook_router_logits",
        "hook_router_logits",
        "",
    ],
)
def test_other_names_are_not_parsed(name: str) -> None:
    assert hook_names.parse(name) is None
    with pytest.raises(HookError, match="is not the name of a routing hook point"):
        hook_names.layer_of(name)


@pytest.mark.parametrize("spell", SPELLERS)
def test_the_alias_is_what_the_act_name_of_transformer_lens_gives(spell: Callable[[int], str]) -> None:
    parsed = hook_names.parse(spell(5))
    assert parsed is not None
    short = parsed[1].removeprefix("hook_")
    assert get_act_name(short, 5) == f"blocks.5.{parsed[1]}"
    assert f"blocks.5.{hook_names.block_aliases()[parsed[1]]}" == spell(5)


# What a cache holds


def test_points_are_sorted_by_layer_and_other_names_are_left_out() -> None:
    cache = {
        "blocks.10.mlp.hook_topk_indices": torch.tensor([3]),
        "blocks.2.mlp.hook_topk_indices": torch.tensor([1]),
        "blocks.2.mlp.hook_expert_out": torch.tensor([2]),
        "blocks.2.mlp.hook_out": torch.tensor([9]),
        "hook_embed": torch.tensor([9]),
        5: torch.tensor([9]),
        "blocks.2.mlp.hook_topk_weights": "no tensor",
    }
    points = hook_names.points_of(cache, [hook_names.TOPK_INDICES])
    assert list(points) == [2, 10]
    assert {name: value.tolist() for name, value in points[2].items()} == {
        "hook_topk_indices": [1],
        "hook_expert_out": [2],
    }


@pytest.mark.parametrize("turn", [False, True])
def test_a_full_name_goes_before_its_alias(turn: bool) -> None:
    names = ["blocks.0.mlp.hook_topk_indices", "blocks.0.hook_topk_indices"]
    cache = {name: torch.tensor([number]) for number, name in enumerate(names)}
    if turn:
        cache = dict(reversed(cache.items()))
    assert hook_names.points_of(cache, [hook_names.TOPK_INDICES])[0]["hook_topk_indices"].item() == 0
    alias_alone = {names[1]: torch.tensor([1])}
    assert hook_names.points_of(alias_alone, [hook_names.TOPK_INDICES])[0]["hook_topk_indices"].item() == 1


@pytest.mark.parametrize(
    "nothing", [None, {}, 3, "text", [1], (1, {}), {"hook_embed": torch.zeros(2)}], ids=repr
)
def test_what_holds_no_routing_is_refused(nothing: Any) -> None:
    with pytest.raises(DataError, match=r"The baseline holds no routing.*second of the two.*names_filter"):
        hook_names.points_of(nothing, what="The baseline")


def test_a_missing_point_is_named_with_its_remedy() -> None:
    cache = {
        "blocks.1.mlp.hook_router_logits": torch.zeros(1),
        "blocks.1.mlp.hook_topk_indices": torch.zeros(1),
    }
    with pytest.raises(DataError, match="The cache lacks hook_topk_weights of layer 1; let the names_filter"):
        hook_names.points_of(cache)
    with pytest.raises(DataError, match=r"lacks hook_expert_out of layer 1; call model.set_use_expert_out"):
        hook_names.points_of(cache, [hook_names.EXPERT_OUT])
    with pytest.raises(DataError, match="lacks hook_router_logits of layer 4"):
        hook_names.points_of(cache, [hook_names.ROUTER_LOGITS], layers=[1, 4])
    assert list(hook_names.points_of(cache, [hook_names.ROUTER_LOGITS], layers=[1])) == [1]


def routing(**changes: Any) -> dict[str, Any]:
    """Two layers' points of two prompts of three tokens, top 2 of 4 experts; some of them changed."""
    cache: dict[str, Any] = {}
    for layer in (0, 3):
        cache[hook_names.router_logits(layer)] = torch.zeros(2, 3, 4)
        cache[hook_names.topk_indices(layer)] = torch.tensor([0, 3]).expand(2, 3, 2)
        cache[hook_names.topk_weights(layer)] = torch.full((2, 3, 2), 0.5)
    return cache | {hook_names.name(3, f"hook_{name}"): value for name, value in changes.items()}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"topk_indices": torch.full((2, 3, 2), 35)},
            r"Layer 3: hook_topk_indices names expert 35, .*0 to 3",
        ),
        ({"topk_indices": torch.full((2, 3, 2), -1)}, r"Layer 3: hook_topk_indices names expert -1"),
        ({"topk_indices": torch.zeros(2, 3, 2)}, r"Layer 3: hook_topk_indices must be integers; got torch.f"),
        ({"topk_weights": torch.zeros(2, 3, 1)}, r"Layer 3: hook_topk_weights has shape \(2, 3, 1\)"),
        ({"topk_indices": torch.zeros(1, 3, 2, dtype=torch.int64)}, r"Layer 3: .*\(1, 3, 2\), .* one run"),
    ],
)
@pytest.mark.filterwarnings("ignore:This cache does not say")
@pytest.mark.parametrize("kind", [RoutingStats, RouteRecord])
def test_a_cache_that_no_run_gives_is_refused_by_layer(kind: Any, changes: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        kind.from_cache(routing(**changes))
    assert kind.from_cache(routing()).shape.layers == (0, 3)
