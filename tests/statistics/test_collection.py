"""collect_routing: streamed over many prompts, whatever the batches, the padding and the span."""

import dataclasses
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor
from transformers import OlmoeForCausalLM

from moe_lens.errors import DataError
from moe_lens.model.hooked_moe import attach
from moe_lens.statistics.collection import collect_routing
from moe_lens.statistics.counting import RoutingCounter
from moe_lens.steering.hooks import steer_hooks
from moe_lens.steering.plan import SteeringPlan
from moe_lens.text import batching
from tests.families import core_family
from tests.statistics.sums import Hooked, add_up, agrees, one_by_one, run_hf, same
from tests.tiny_models import (
    MOE_LAYERS,
    TOP_K,
    plain_bridge,
    prompt,
    tiny_model,
    tokens,
)


@core_family
@settings(max_examples=6, deadline=None)
@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=6), batch_size=st.integers(1, 7))
def test_batching_and_padding_change_nothing(
    hooked: Hooked, recipe: str, lengths: list[int], batch_size: int
) -> None:
    sequences = [tokens(1, length, seed)[0] for seed, length in enumerate(lengths)]
    stats = collect_routing(hooked(recipe), sequences, batch_size=batch_size, progress=False)
    assert stats.n_tokens == sum(lengths)
    assert same(stats, one_by_one(hooked(recipe), [sequence[None] for sequence in sequences]))


def test_every_kind_of_prompts_is_counted_alike(hooked: Hooked) -> None:
    model, texts = hooked("olmoe"), [prompt(4, seed) for seed in range(3)]
    expected = one_by_one(model, texts)
    batch = model.to_tokens(texts)
    for prompts in (texts, batch, batch.tolist(), list(batch), tuple(texts)):
        assert same(collect_routing(model, prompts, batch_size=2, progress=False), expected)
    assert same(collect_routing(model, texts[0], progress=False), one_by_one(model, texts[:1]))


def in_span(span: Any, sequence: Tensor) -> list[int]:
    positions = list(range(len(sequence)))
    if span is None or isinstance(span, slice):
        return positions[span or slice(None)]
    return [position for position in positions if bool(span(sequence)[position])]


@pytest.mark.parametrize(
    "span", [slice(-1, None), slice(None, 2), slice(1, None, 2), lambda t: t % 2 == t[0] % 2, None]
)
def test_a_span_counts_its_tokens_alone(hooked: Hooked, span: Any) -> None:
    model, sequences = hooked("qwen2_moe"), [tokens(1, n, n)[0] for n in (4, 2, 6)]
    expected = None
    for sequence in sequences:
        chosen = in_span(span, sequence)
        keep = [position in chosen for position in range(len(sequence))]
        captured = run_hf(tiny_model("qwen2_moe"), sequence[None])
        part = add_up(captured, "qwen2_moe", keep)
        expected = part if expected is None else _sum_of(expected, part)
    assert expected is not None
    stats = collect_routing(model, sequences, span=span, batch_size=2, progress=False)
    assert agrees(stats, expected, round(sum(expected["counts"][0])) // TOP_K["qwen2_moe"])


def _sum_of(a: dict[str, list[list[float]]], b: dict[str, list[list[float]]]) -> dict[str, list[list[float]]]:
    return {name: (torch.tensor(a[name]) + torch.tensor(b[name])).tolist() for name in a}


@pytest.mark.parametrize("span", [slice(3, None), lambda t: t > 6], ids=["slice", "callable"])
def test_a_span_that_misses_a_prompt_is_refused_by_its_number(hooked: Hooked, span: Any) -> None:
    with pytest.raises(DataError, match="prompt 1 "):
        collect_routing(hooked("olmoe"), [[4, 5, 6, 7], [4, 5]], span=span, progress=False)


def test_a_span_of_another_length_is_refused(hooked: Hooked) -> None:
    span: Any = lambda t: t[1:] > 0  # noqa: E731
    with pytest.raises(DataError, match="one bool a token"):
        collect_routing(hooked("olmoe"), [[4, 5, 6]], span=span, progress=False)


def test_no_layers_logits_outlive_the_layer(hooked: Hooked, monkeypatch: pytest.MonkeyPatch) -> None:
    original, alive, most = RoutingCounter.see, [], []

    def counting(self: RoutingCounter, layer: int, decision: Any, is_own: bool = False) -> None:
        most.append(sum(reference() is not None for reference in alive))
        alive.append(weakref.ref(decision.logits))
        original(self, layer, decision, is_own)

    monkeypatch.setattr(RoutingCounter, "see", counting)
    collect_routing(hooked("olmoe"), tokens(10, 3), batch_size=2, progress=False)
    assert len(most) == 5 * len(MOE_LAYERS["olmoe"])
    assert set(most) == {0}


def test_no_gradient_graph_is_built(hooked: Hooked) -> None:
    stats = collect_routing(hooked("olmoe"), tokens(), progress=False)
    assert not stats.probability_sums.requires_grad
    assert not stats.weight_sums.requires_grad


@core_family
def test_a_bridge_after_attach_is_counted_the_same(hooked: Hooked, recipe: str) -> None:
    sequences = [[5, 6, 7, 8], [9, 10]]
    stats = collect_routing(attach(plain_bridge(tiny_model(recipe))), sequences, progress=False)
    expected = collect_routing(hooked(recipe), sequences, progress=False)
    assert same(dataclasses.replace(stats, shape=expected.shape), expected, exact=True)


@core_family
def test_steered_routes_are_counted_under_steering_hooks(hooked: Hooked, recipe: str) -> None:
    model, layer = hooked(recipe), MOE_LAYERS[recipe][-1]
    plain = collect_routing(model, tokens(3, 6), progress=False)
    often, seldom = int(plain.counts[-1].argmax()), int(plain.counts[-1].argmin())
    with model.hooks(steer_hooks(SteeringPlan(activate=[(layer, seldom)], deactivate=[(layer, often)]))):
        steered = collect_routing(model, tokens(3, 6), progress=False)
    assert int(steered.counts[-1, seldom]) == steered.n_tokens
    assert int(steered.counts[-1, often]) == 0
    assert same(collect_routing(model, tokens(3, 6), progress=False), plain, exact=True)


def test_without_prompts_nothing_is_collected(hooked: Hooked) -> None:
    with pytest.raises(DataError, match="at least one prompt"):
        collect_routing(hooked("olmoe"), [])


def test_a_generator_of_prompts_is_read_window_by_window(
    hooked: Hooked, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, read = hooked("olmoe"), []
    seen: list[int] = []
    original = OlmoeForCausalLM.forward

    def prompts():
        for index in range(6):
            read.append(index)
            yield [4, 5 + index]

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(len(read))
        return original(*args, **kwargs)

    monkeypatch.setattr(batching, "WINDOW", 1)
    with mock.patch.object(OlmoeForCausalLM, "forward", forward):
        stats = collect_routing(model, prompts(), batch_size=2, progress=False)
    assert seen == [2, 4, 6]
    assert stats.n_tokens == 12


@pytest.mark.parametrize("bad", [[[4, 99999]], [[-1, 4]], [""], 7])
def test_prompts_that_cannot_be_run_are_refused(hooked: Hooked, bad: Any) -> None:
    with pytest.raises(DataError):
        collect_routing(hooked("olmoe"), bad, progress=False)


@pytest.mark.parametrize("span", ["question", slice(None, None, -1), lambda tokens: None])
def test_a_span_that_is_none_is_refused(hooked: Hooked, span: Any) -> None:
    with pytest.raises((DataError, TypeCheckError), match=r"span|collect_routing"):
        collect_routing(hooked("olmoe"), [[4, 5]], span=span, progress=False)
