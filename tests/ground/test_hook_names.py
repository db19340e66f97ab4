"""Names: what is spelled is what TransformerLens finds, and what is parsed is what was spelled."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformer_lens.utilities.components_utils import get_act_name

from moe_lens import hook_names
from moe_lens.errors import HookError

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
