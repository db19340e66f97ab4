"""What a RoutedModel may be given, and what its residual stream reads as."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from moe_lens import RoutedModel, RoutingStats, SteeringPlan, hook_names, steer_hooks
from moe_lens.errors import DataError
from tests.families import some_kinds
from tests.tiny_models import tiny_model, tokenizer, tokens


@some_kinds
@torch.no_grad()
def test_the_last_residual_stream_reads_as_the_logits(recipe: str) -> None:
    model = RoutedModel(tiny_model(recipe))
    logits, cache = model.run_with_cache(tokens(2, 5))
    assert torch.equal(model.to_logits(cache["resid_post", model.cfg.n_layers - 1]), logits)
    assert torch.equal(model(tokens(2, 5)), logits)


@torch.no_grad()
def test_a_batch_encoding_keeps_its_mask() -> None:
    model, texts = RoutedModel(tiny_model("olmoe"), tokenizer()), ["w1 w2 w3", "w4"]
    given: Any = tokenizer()(texts, padding=True, return_tensors="pt")
    logits, cache = model.run_with_cache(given)
    expected, of_texts = model.run_with_cache(texts)
    assert torch.equal(logits, expected)
    assert torch.equal(cache.attention_mask, of_texts.attention_mask)
    assert RoutingStats.from_cache(cache).n_tokens == int(given["attention_mask"].sum())


@torch.no_grad()
def test_generation_takes_what_transformers_takes() -> None:
    model, given = RoutedModel(tiny_model("olmoe"), tokenizer()), tokens(1, 5)
    config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    expected = tiny_model("olmoe").generate(given, generation_config=config)
    assert torch.equal(model.generate(given, generation_config=config), expected)
    assert torch.equal(model.generate(input_ids=given, generation_config=config, use_cache=False), expected)


def test_what_is_no_residual_stream_is_refused() -> None:
    with pytest.raises(DataError, match="batch pos d_model"):
        RoutedModel(tiny_model("olmoe")).to_logits(torch.zeros(5, 32))


@torch.no_grad()
def test_a_plan_on_a_reordered_copy_steers_the_tokens_that_it_was_given() -> None:
    model, given = RoutedModel(tiny_model("deepseek_v3")), tokens(2, 6)
    layer = model.moe_layers[-1]
    plan = SteeringPlan(activate=[(layer, 1)], deactivate=[(layer, 2)])
    [(name, by_hand)] = steer_hooks(plan, positions=[0, 1])

    def backwards(logits: Any, hook: Any) -> Any:
        flat = logits.flatten(0, -2)
        order = torch.arange(len(flat) - 1, -1, -1)
        edited = flat.clone()
        edited[order] = by_hand(flat[order], hook).to(flat)
        return edited.reshape(logits.shape)

    assert name == hook_names.router_logits(layer)
    expected = model.run_with_hooks(given, fwd_hooks=[(name, by_hand)])
    torch.testing.assert_close(model.run_with_hooks(given, fwd_hooks=[(name, backwards)]), expected)
