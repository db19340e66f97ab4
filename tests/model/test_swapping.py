"""swap_routers: each model computes what it does with the other's routers loaded, and comes back whole."""

import copy
from typing import Any

import pytest
import torch

from moe_lens import HookedMoE, RoutedModel, swap_routers
from moe_lens.errors import MoELensError
from moe_lens.model.hf_models import numbered_layers, tensors_of
from tests.families import some_kinds
from tests.tiny_models import tiny_model, tokenizer, tokens


def transplanted(base: Any, donor: Any) -> Any:
    """A copy of `base` into whose state dictionary the donor's router entries are loaded, by their names."""
    twin = copy.deepcopy(base)
    state, other = twin.state_dict(), donor.state_dict()
    routers = {
        f"{moe.where}." + next(n for n, m in moe.block.named_modules() if m is moe.router)
        for moe in numbered_layers(base).values()
    }
    blocks = {moe.where for moe in numbered_layers(base).values()}
    for name in state:
        holder, last = name.rpartition(".")[::2]
        is_bias = last in ("e_score_correction_bias", "expert_bias") and any(
            name.startswith(f"{block}.") for block in blocks
        )
        if any(name.startswith(f"{router}.") for router in routers) or is_bias:
            state[name] = other[name]
        assert holder is not None
    twin.load_state_dict(state)
    return twin


@some_kinds
def test_routers_change_places(recipe: str) -> None:
    a, b = tiny_model(recipe, seed=0), tiny_model(recipe, seed=1)
    given = tokens(2, 6)
    with torch.no_grad():
        before = [model(given).logits for model in (a, b)]
        expected = [transplanted(a, b)(given).logits, transplanted(b, a)(given).logits]
        states = [{n: (t, t.data_ptr(), t.clone()) for n, t in tensors_of(m).items()} for m in (a, b)]
        with swap_routers(a, b):
            during = [model(given).logits for model in (a, b)]
        after = [model(given).logits for model in (a, b)]
    for n in range(2):
        assert torch.equal(after[n], before[n])
        assert not torch.equal(during[n], before[n])
        if recipe != "deepseek_v4_hash":  # whose table is a buffer of another kind
            torch.testing.assert_close(during[n], expected[n], rtol=1e-4, atol=1e-5)
    for model, state in zip((a, b), states, strict=True):
        for name, tensor in tensors_of(model).items():
            old, place, value = state[name]
            assert tensor is old
            assert tensor.data_ptr() == place
            assert torch.equal(tensor, value)


@pytest.mark.parametrize("wrapper", [HookedMoE, RoutedModel])
def test_wrapped_models_and_some_layers(wrapper: Any) -> None:
    make = wrapper.from_hf if wrapper is HookedMoE else wrapper
    a, b = (make(tiny_model("olmoe", seed=seed), tokenizer()) for seed in (0, 1))
    given = tokens(1, 5)
    with torch.no_grad():
        _, own = a.run_with_cache(given)
        with swap_routers(a, b, layers=[1]):
            _, swapped = a.run_with_cache(given)
            with swap_routers(a, b, layers=1):
                _, back = a.run_with_cache(given)
    assert torch.equal(swapped["router_logits", 0], own["router_logits", 0])
    assert not torch.equal(swapped["router_logits", 1], own["router_logits", 1])
    assert torch.equal(back["router_logits", 2], own["router_logits", 2])


def test_nothing_done_within_lasts_and_errors_restore() -> None:
    a, b = tiny_model("olmoe", seed=0), tiny_model("olmoe", torch.bfloat16, seed=1)
    weights = [tensors_of(model)["model.layers.0.mlp.gate.weight"] for model in (a, b)]
    before = [weight.clone() for weight in weights]

    def spoil() -> None:
        with swap_routers(a, b):
            assert weights[0].dtype == torch.float32
            assert torch.equal(weights[0], before[1].float())
            assert torch.equal(weights[1], before[0].bfloat16())
            with torch.no_grad():
                weights[0].zero_()
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        spoil()
    assert all(torch.equal(now, then) for now, then in zip(weights, before, strict=True))


@pytest.mark.parametrize(
    ("one", "other", "match"),
    [
        ({"recipe": "olmoe"}, {"recipe": "mixtral"}, "MoE layers|different classes"),
        ({"recipe": "olmoe"}, {"recipe": "olmoe", "num_experts": 8}, "names and shapes|different rules"),
        ({"recipe": "olmoe"}, {"recipe": "olmoe", "num_experts_per_tok": 2}, "different rules"),
        ({"recipe": "olmoe"}, {"recipe": "olmoe", "norm_topk_prob": True}, "different rules"),
        ({"recipe": "olmoe"}, {"recipe": "olmoe", "num_hidden_layers": 2}, "MoE layers"),
    ],
)
def test_refused(one: Any, other: Any, match: str) -> None:
    a, b = tiny_model(**one), tiny_model(**other)
    before = {name: tensor.clone() for name, tensor in tensors_of(a).items()}
    with pytest.raises(MoELensError, match=match), swap_routers(a, b):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(a).items())


def test_one_model_twice_is_refused() -> None:
    model = tiny_model("olmoe")
    with pytest.raises(MoELensError, match="same model"), swap_routers(model, model):
        pass
