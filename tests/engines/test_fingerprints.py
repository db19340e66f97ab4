"""The digest of a model: the same for the same, another for anything that computes otherwise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moe_lens import HookedMoE, RoutedModel, SteeringPlan, steer_hooks, with_top_k
from moe_lens.engines.fingerprints import weights_digest, what_computes
from moe_lens.errors import DataError
from moe_lens.files import digest_of
from tests.families import some_kinds
from tests.tiny_models import tiny_model, tokenizer, tokens


def digest(model: Any, **options: Any) -> str:
    return digest_of(what_computes(model, options.get("hooks", ()), options.get("about", "")))


class Weights(nn.Module):
    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


@some_kinds
def test_the_same_model_has_the_same_digest_before_and_after_it_ran(recipe: str) -> None:
    for wrap in (RoutedModel, HookedMoE.from_hf):
        one, other = (wrap(tiny_model(recipe), tokenizer()) for _ in range(2))
        before = digest(one)
        one.run_with_cache(tokens(2, 3))
        one(tokens(1, 7))
        assert digest(one) == before == digest(other)


OTHER = torch.full((7,), 0.5)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)


@settings(deadline=None)
@given(st.data())
def test_any_bit_of_any_tensor_counts(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=0, max_size=3))
    dtype = data.draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    values = torch.randint(0, 2, shape, generator=generator).to(dtype)
    network = Weights(a=values, b=OTHER)
    before = weights_digest(network)
    assert weights_digest(Weights(b=OTHER, a=values.clone())) == before
    changed = values.clone()
    flat = changed.reshape(-1).view(torch.uint8)
    place = data.draw(st.integers(0, len(flat) - 1))
    flat[place] ^= 1 if dtype == torch.bool else 1 << data.draw(st.integers(0, 7))
    assert weights_digest(Weights(a=changed, b=OTHER)) != before
    assert weights_digest(Weights(c=values, b=OTHER)) != before
    assert weights_digest(Weights(a=values[None], b=OTHER)) != before
    assert weights_digest(Weights(a=OTHER, b=values)) != before


def test_views_and_tied_weights_are_read_as_what_they_hold() -> None:
    table = torch.arange(12.0).reshape(3, 4)
    assert weights_digest(Weights(a=table.t())) == weights_digest(Weights(a=table.t().contiguous()))
    assert weights_digest(Weights(a=table[1:], b=table[1:])) == weights_digest(
        Weights(a=table[1:].clone(), b=table[1:].clone())
    )
    assert weights_digest(Weights(a=table[:1], b=table[1:2])) != weights_digest(
        Weights(a=table[1:2], b=table[:1])
    )


def changes() -> dict[str, Callable[[Any], object]]:
    def layer(model: Any) -> Any:
        return model.hf_model.model.layers[1]

    return {
        "one weight": lambda m: layer(m).mlp.experts.down_proj.data[0, 1, 2].add_(1e-3),
        "norm_topk_prob of one router": lambda m: setattr(
            layer(m).mlp.gate, "norm_topk_prob", not layer(m).mlp.gate.norm_topk_prob
        ),
        "config": lambda m: setattr(m.hf_model.config, "rms_norm_eps", 1e-2),
        "attention": lambda m: m.hf_model.set_attn_implementation("sdpa"),
        "a permanent plan": lambda m: m.add_hook(*steer_hooks(SteeringPlan(deactivate=[(0, 1)]))[0]),
        "dtype": lambda m: m.hf_model.to(torch.bfloat16),
    }


@pytest.mark.parametrize("what", changes())
def test_what_is_computed_otherwise_has_another_digest(what: str) -> None:
    model = RoutedModel(tiny_model("olmoe"), tokenizer())
    network: Any = model.hf_model
    network.set_attn_implementation("eager")
    before = digest(model)
    changes()[what](model)
    assert digest(model) != before


def test_settings_for_a_while_count_for_that_while() -> None:
    model = RoutedModel(tiny_model("olmoe"), tokenizer())
    plans = [SteeringPlan(deactivate=[(0, 1)]), SteeringPlan(deactivate=[(0, 2)])]
    found = [digest(model)]
    for plan in plans:
        found.append(digest(model, hooks=steer_hooks(plan)))
        with model.hooks(steer_hooks(plan)):
            found.append(digest(model))
            assert found[-1] == found[-2]  # it is the same, however it was set
            found.pop()
    with with_top_k(model, 1):
        found.append(digest(model))
    with torch.autocast("cpu", torch.bfloat16):
        found.append(digest(model))
    found.append(digest(model, about="otherwise"))
    assert len(set(found)) == len(found) == 6
    assert digest(model) == found[0]
    assert digest(HookedMoE.from_hf(tiny_model("olmoe"), tokenizer())) not in found


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload], ids=["cpu", "disk"])
def test_offloaded_weights_are_read_where_they_are(offload: Callable[..., Any], tmp_path: Path) -> None:
    expected = weights_digest(tiny_model("olmoe"))
    model = tiny_model("olmoe")
    arguments = (torch.device("cpu"),) if offload is cpu_offload else (str(tmp_path), torch.device("cpu"))
    offload(model, *arguments)
    assert next(model.parameters()).is_meta
    assert weights_digest(model) == expected


def test_weights_that_are_not_there_or_are_spread_are_refused() -> None:
    with pytest.raises(DataError, match="a has no values here"):
        weights_digest(Weights(a=torch.zeros(3, device="meta")))

    class DTensor(torch.Tensor):
        pass

    with pytest.raises(DataError, match="a is spread over processes"):
        weights_digest(Weights(a=torch.zeros(3).as_subclass(DTensor)))
