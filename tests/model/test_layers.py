"""Finding MoE layers in every family; the self-check passes what Hugging Face computes, and nothing else."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from moe_lens.errors import RouterMismatchError, UnsupportedRouterError
from moe_lens.model.hooked_moe import HookedMoE, attach
from moe_lens.model.layers import MoELayer, find_moe_layers
from moe_lens.model.probing import closest_rules
from moe_lens.model.registration import routing_layers
from moe_lens.model.router_points import points_of
from moe_lens.model.self_check import check_router
from moe_lens.routers.table import RULES
from tests.families import every_family, every_recipe
from tests.tiny_models import (
    ALL_RECIPES,
    EVERY_FAMILY,
    MOE_LAYERS,
    N_EXPERTS,
    TOP_K,
    plain_bridge,
    randomised,
    router_of,
    sparse_blocks,
    tiny_model,
    tokens,
)

# Finding

FIRST_DENSE = "layers.1.mlp layers.2.mlp"
PLACES = {
    "olmoe": "layers.0.mlp layers.1.mlp layers.2.mlp",
    "mixtral": "layers.0.mlp layers.1.mlp",
    "qwen2_moe": "layers.0.mlp layers.2.mlp layers.3.mlp",
    "qwen3_moe": "layers.1.mlp layers.3.mlp",
    "afmoe": FIRST_DENSE,
    "deepseek_v2": FIRST_DENSE,
    "deepseek_v2_grouped": FIRST_DENSE,
    "deepseek_v3": FIRST_DENSE,
    "deepseek_v4": "layers.0.mlp layers.1.mlp layers.2.mlp",
    "deepseek_v4_hash": "layers.0.mlp layers.1.mlp layers.2.mlp",
    "ernie4_5_moe": FIRST_DENSE,
    "flex_olmo": "layers.0.mlp layers.1.mlp",
    "gemma4": "layers.0 layers.1 layers.2",
    "gemma4_vl": "language_model.layers.0 language_model.layers.1 language_model.layers.2",
    "glm4_moe": FIRST_DENSE,
    "glm4_moe_lite": FIRST_DENSE,
    "glm_moe_dsa": FIRST_DENSE,
    "gpt_oss": "layers.0.mlp layers.1.mlp",
    "granitemoe": "layers.0.block_sparse_moe layers.1.block_sparse_moe",
    "granitemoehybrid": "layers.0.block_sparse_moe layers.1.block_sparse_moe layers.2.block_sparse_moe",
    "jamba": "layers.1.feed_forward layers.3.feed_forward",
    "jetmoe": "layers.0.mlp layers.1.mlp",
    "laguna": FIRST_DENSE,
    "lfm2_moe": "layers.1.feed_forward layers.2.feed_forward",
    "llama4": "layers.1.feed_forward layers.3.feed_forward",
    "llama4_vl": "layers.1.feed_forward layers.3.feed_forward",
    "minimax_m2": "layers.0.mlp layers.1.mlp",
    "nemotron_h": "layers.1.mixer layers.4.mixer",
    "nemotron_h_latent": "layers.1.mixer layers.4.mixer",
    "phimoe": "layers.0.mlp layers.1.mlp",
    "qwen3_next": "layers.0.mlp layers.1.mlp",
    "qwen3_vl_moe": "language_model.layers.0.mlp language_model.layers.2.mlp",
    "qwen3_5_moe": "layers.0.mlp layers.1.mlp layers.2.mlp",
    "qwen3_5_moe_vl": "language_model.layers.0.mlp language_model.layers.1.mlp language_model.layers.2.mlp",
}
"""Where the recipe puts its MoE blocks, below `model.` (`language_model.model.` in Llama 4's big model)."""


def test_every_family_has_a_case() -> None:
    assert set(PLACES) == set(EVERY_FAMILY)


@every_family
def test_finds_every_router_and_no_dense_layer(recipe: str) -> None:
    found = list(find_moe_layers(tiny_model(recipe)))
    below = "language_model.model." if recipe == "llama4_vl" else "model."
    assert [moe.where for moe in found] == [below + place for place in PLACES[recipe].split()]
    for moe in found:
        assert type(moe.router).__name__ in RULES
        assert moe.router in list(moe.block.children())
        assert points_of(moe) is None


@every_recipe
def test_reads_the_number_of_experts_and_k(recipe: str) -> None:
    model = tiny_model(recipe)
    found = list(find_moe_layers(model))
    assert [moe.where for moe in found] == [f"model.layers.{number}.mlp" for number in MOE_LAYERS[recipe]]
    for moe, block in zip(found, sparse_blocks(model).values(), strict=True):
        assert moe.block is block
        assert moe.router is router_of(block)
        assert (moe.rule.n_experts, moe.rule.top_k) == (N_EXPERTS[recipe], TOP_K[recipe])


@every_family
def test_finds_the_same_modules_inside_a_bridge(recipe: str) -> None:
    model = tiny_model(recipe)
    bare = [(moe.block, moe.router) for moe in find_moe_layers(model)]
    bridge = plain_bridge(model)
    assert [(moe.block, moe.router) for moe in find_moe_layers(bridge)] == bare
    numbers = [int("".join(filter(str.isdigit, place))) for place in PLACES[recipe].split()]
    layers = routing_layers(bridge)
    assert list(layers) == numbers
    assert [(moe.block, moe.router) for moe in layers.values()] == bare


def test_a_dense_model_has_no_moe_layer() -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4
    )
    assert list(find_moe_layers(randomised(lambda: LlamaForCausalLM(config)))) == []


def test_a_block_with_two_routers_is_refused() -> None:
    model = tiny_model("olmoe")
    block = sparse_blocks(model)[1]
    block.second = copy.deepcopy(router_of(block))
    with pytest.raises(UnsupportedRouterError, match=r"model\.layers\.1\.mlp"):
        list(find_moe_layers(model))


# The self-check


@cache
def model_of(recipe: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model that no test changes."""
    return tiny_model(recipe, dtype)


@pytest.mark.parametrize("recipe", dict.fromkeys((*EVERY_FAMILY, *ALL_RECIPES)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_hf_routers_pass_the_check(recipe: str, dtype: torch.dtype) -> None:
    for moe in find_moe_layers(tiny_model(recipe, dtype)):
        check_router(moe)


@every_family
def test_the_check_leaves_torchs_generator_gradients_and_buffers_alone(recipe: str) -> None:
    model = model_of(recipe)
    state = torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for moe in find_moe_layers(model):
        check_router(moe)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def kinds(recipe: str) -> list[MoELayer]:
    """A copy of one MoE layer for each class of routers in the family."""
    found = {type(moe.router): moe for moe in find_moe_layers(model_of(recipe))}
    layers = []
    for moe in found.values():
        block = copy.deepcopy(moe.block)
        [copied] = find_moe_layers(block)
        layers.append(MoELayer(moe.where, block, copied.router))
    return layers


Decision = tuple[Tensor, Tensor, Tensor]
"""Logits [token expert], weights [token k] and indices [token k]."""
Alteration = Callable[[Tensor, Tensor, Tensor], Any]


def read(router: nn.Module, output: Any) -> Decision:
    """What a router's output says, whatever its layout: a formula of its own for each."""
    name = next(cls.__name__ for cls in type(router).__mro__ if cls.__name__ in RULES)
    if name == "Llama4Router":
        weights, logits = output
        indices = logits.topk(router.top_k, dim=-1).indices  # type: ignore[arg-type]
        return logits, weights.gather(-1, indices), indices
    if name == "JetMoeTopKGating":
        order, _, weights, sizes, logits = output
        place = order.argsort()
        experts = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        return logits, weights[place].view(len(logits), -1), experts[place].view(len(logits), -1)
    if name == "Gemma4TextRouter":
        return output[0].log(), output[1], output[2]
    return output


def write(router: nn.Module, output: Any, decision: Any) -> Any:
    """The other way; what is no decision is the output itself."""
    if not (isinstance(decision, tuple) and len(decision) == 3):
        return decision
    logits, weights, indices = decision
    name = next(cls.__name__ for cls in type(router).__mro__ if cls.__name__ in RULES)
    if name == "Llama4Router":
        return torch.zeros(logits.shape, dtype=weights.dtype).scatter(-1, indices, weights), logits
    if name == "JetMoeTopKGating":
        order = indices.flatten().sort(0).indices  # not stable, as in JetMoE
        sizes = [int((indices == expert).sum()) for expert in range(logits.shape[-1])]
        return order, order // indices.shape[-1], weights.flatten()[order], sizes, logits
    if name == "Gemma4TextRouter":
        return (output[0] if logits.shape == output[0].shape else logits), weights, indices
    return logits, weights, indices


def alter(router: nn.Module, alteration: Alteration, as_subclass: bool = False) -> None:
    """Give a router another forward: through a subclass of its class, or on the instance."""
    original: Any = type(router).forward

    def forward(self: Any, hidden_states: Tensor, *args: Any) -> Any:
        output = original(self, hidden_states, *args)
        return write(self, output, alteration(*read(self, output)))

    if as_subclass:
        router.__class__ = type(f"My{type(router).__name__}", (type(router),), {"forward": forward})
    else:
        router.forward = MethodType(forward, router)


def other_renormalisation(logits: Tensor, weights: Tensor, indices: Tensor) -> Decision:
    total = weights.float().sum(-1, keepdim=True)
    already = total.std() < 1e-3
    share = logits.float().softmax(-1).gather(-1, indices).sum(-1, keepdim=True)
    return logits, (weights * share if already else weights / total).to(weights.dtype), indices


def scaling(logits: Tensor, weights: Tensor, indices: Tensor) -> Decision:
    return logits, 1.01 * weights, indices


def other_dtype(logits: Tensor, weights: Tensor, indices: Tensor) -> Decision:
    return logits, weights.to(torch.float16), indices


def rounded_weights(logits: Tensor, weights: Tensor, indices: Tensor) -> Decision:
    return logits, weights.to(torch.bfloat16).to(weights.dtype), indices


def a_bias_in_the_selection(logits: Tensor, weights: Tensor, indices: Tensor) -> Decision:
    ramp = torch.linspace(0, 3, logits.shape[-1])
    chosen = (logits.float() + ramp).topk(indices.shape[-1]).indices
    return logits, weights.abs() + 0.1, chosen


def a_bias_in_the_weights(logits: Tensor, weights: Tensor, indices: Tensor) -> Decision:
    return logits, weights + torch.linspace(0.01, 0.1, logits.shape[-1])[indices].to(weights.dtype), indices


def one_expert_more(logits: Tensor, weights: Tensor, indices: Tensor) -> Decision:
    others = torch.ones(logits.shape).scatter(-1, indices, 0).argmax(-1, keepdim=True)
    return logits, torch.cat([weights, weights[:, :1]], -1), torch.cat([indices, others], -1)


def one_expert_fewer(logits: Tensor, weights: Tensor, indices: Tensor) -> Decision:
    return logits, weights[:, :-1], indices[:, :-1]


def other_order(logits: Tensor, weights: Tensor, indices: Tensor) -> Decision:
    return logits, weights.flip(-1), indices.flip(-1)


def soft_cap(logits: Tensor, weights: Tensor, indices: Tensor) -> Decision:
    return 2 * torch.tanh(logits / 2), weights, indices


def other_score(logits: Tensor, weights: Tensor, indices: Tensor) -> Decision:
    return logits, logits.float().atan().abs().gather(-1, indices).to(weights.dtype), indices


def four_outputs(logits: Tensor, weights: Tensor, indices: Tensor) -> Any:
    return logits, weights, indices, logits


def a_dictionary(logits: Tensor, weights: Tensor, indices: Tensor) -> Any:
    return {"logits": logits, "weights": weights, "indices": indices}


ALTERATIONS: dict[Alteration, str] = {
    other_renormalisation: "weights differ by up to",
    scaling: "weights differ by up to",
    other_dtype: r"weights are torch\.float16",
    rounded_weights: "weights differ by up to",
    a_bias_in_the_selection: "indices differ on",
    a_bias_in_the_weights: "weights differ by up to",
    one_expert_more: "indices have shape",
    one_expert_fewer: "indices have shape",
    other_order: "indices differ on",
    soft_cap: "(weights|indices) differ",
    other_score: "weights differ by up to",
    four_outputs: "returns no",
    a_dictionary: "returns no",
}
CANNOT = {
    ("Llama4Router", other_order),  # it gives the weights of all experts, in the experts' order
    ("Gemma4TextRouter", soft_cap),  # it gives no logits; test_soft_capped_probabilities_fail_the_check
}


@every_family
@pytest.mark.parametrize("alteration", ALTERATIONS, ids=lambda alteration: alteration.__name__)
def test_an_altered_router_fails_the_check(recipe: str, alteration: Alteration) -> None:
    for as_subclass in (False, True):
        for moe in kinds(recipe):
            parent = type(moe.router).__name__
            if (parent, alteration) in CANNOT:
                continue
            alter(moe.router, alteration, as_subclass)
            with pytest.raises(RouterMismatchError, match=ALTERATIONS[alteration]) as error:
                check_router(moe)
            name = f"My{parent}" if as_subclass else parent
            assert str(error.value).startswith(f"{moe.where}: {name} does not compute")


@every_family
def test_a_router_altered_in_nothing_passes_the_check(recipe: str) -> None:
    for as_subclass in (False, True):
        for moe in kinds(recipe):
            alter(moe.router, lambda *decision: decision, as_subclass)
            check_router(moe)


@pytest.mark.parametrize("recipe", ["gemma4", "gemma4_vl"])
def test_soft_capped_probabilities_fail_the_check(recipe: str) -> None:
    [moe] = kinds(recipe)
    original: Any = type(moe.router).forward

    def forward(self: Any, hidden_states: Tensor) -> Any:
        p, weights, indices = original(self, hidden_states)
        return (5 * torch.tanh(p.log() / 5)).softmax(-1), weights, indices

    moe.router.forward = MethodType(forward, moe.router)
    with pytest.raises(RouterMismatchError, match="part 0 of its output differs"):
        check_router(moe)


def at(place: int, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """One part of a router's output changed."""
    return lambda output: (*output[:place], change(output[place]), *output[place + 1 :])


def fail(output: Any) -> Any:
    raise RuntimeError("on purpose")


MALFORMED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "logits of fewer experts": ("olmoe", at(0, lambda x: x[:, 1:])),
    "logits of fewer tokens": ("olmoe", at(0, lambda x: x[1:])),
    "flat logits": ("olmoe", at(0, torch.flatten)),
    "weights of fewer tokens": ("olmoe", at(1, lambda x: x[1:])),
    "a scalar weight": ("olmoe", at(1, torch.sum)),
    "float indices": ("olmoe", at(2, Tensor.float)),
    "indices out of range": ("olmoe", at(2, lambda x: x + 100)),
    "a forward that raises": ("olmoe", fail),
    "weights alone": ("llama4", lambda output: output[:1]),
    "no expert chosen": ("llama4", at(0, torch.zeros_like)),
    "every expert chosen": ("llama4", at(0, lambda x: x + 1)),
    "weights of fewer experts": ("llama4", at(0, lambda x: x[:, 1:])),
    "probabilities of fewer experts": ("gemma4", at(0, lambda x: x[:, 1:])),
    "rounded probabilities": ("gemma4", at(0, Tensor.bfloat16)),
    "an order that is a list": ("jetmoe", at(0, Tensor.tolist)),
    "other tokens": ("jetmoe", at(1, lambda x: x + 1)),
    "weights of fewer slots": ("jetmoe", at(2, lambda x: x[1:])),
    "an expert that gets no token more": ("jetmoe", at(3, lambda sizes: [*sizes, 0])),
    "a token less": ("jetmoe", at(3, lambda sizes: [sizes[0] - 1, *sizes[1:]])),
}


@pytest.mark.parametrize(("recipe", "change"), MALFORMED.values(), ids=MALFORMED)
def test_an_output_that_cannot_be_read_fails_the_check(recipe: str, change: Callable[[Any], Any]) -> None:
    for as_subclass in (False, True):
        moe = kinds(recipe)[0]
        original: Any = type(moe.router).forward

        def forward(self: Any, hidden_states: Tensor, original: Any = original) -> Any:
            return change(original(self, hidden_states))

        if as_subclass:
            moe.router.__class__ = type("MyRouter", (type(moe.router),), {"forward": forward})
        else:
            moe.router.forward = MethodType(forward, moe.router)
        with pytest.raises(RouterMismatchError) as error:
            check_router(moe)
        assert str(error.value).startswith(f"{moe.where}: {type(moe.router).__name__} does not compute")


BIASED = (
    *("afmoe", "deepseek_v3", "deepseek_v4", "ernie4_5_moe", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"),
    *("laguna", "lfm2_moe", "minimax_m2", "nemotron_h", "nemotron_h_latent"),
)


def correction_bias(moe: MoELayer) -> Tensor:
    [bias] = [
        value
        for name, value in (*moe.block.named_buffers(), *moe.block.named_parameters())
        if name.rsplit(".", 1)[-1] in ("e_score_correction_bias", "expert_bias")
    ]
    return bias


def without(bias: Tensor, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` with the bias at zero while it runs."""

    def run(self: Any, hidden_states: Tensor, *args: Any) -> Any:
        kept = bias.detach().clone()
        with torch.no_grad():
            bias.zero_()
            try:
                return forward(self, hidden_states, *args)
            finally:
                bias.copy_(kept)

    return run


@pytest.mark.parametrize("recipe", BIASED)
@pytest.mark.parametrize("as_subclass", [False, True])
def test_a_correction_bias_that_is_left_out_fails_the_check(recipe: str, as_subclass: bool) -> None:
    [moe] = kinds(recipe)
    forward = without(correction_bias(moe), type(moe.router).forward)
    if as_subclass:
        moe.router.__class__ = type("MyRouter", (type(moe.router),), {"forward": forward})
    else:
        moe.router.forward = MethodType(forward, moe.router)
    with pytest.raises(RouterMismatchError, match="indices differ on") as error:
        check_router(moe)
    assert f"{moe.where}: {type(moe.router).__name__}" in str(error.value)


@pytest.mark.parametrize("recipe", BIASED)
def test_a_correction_bias_in_the_weights_fails_the_check(recipe: str) -> None:
    [moe] = kinds(recipe)
    bias = correction_bias(moe).detach().flatten()
    alter(moe.router, lambda z, w, i: (z, w + 0.1 * bias[i].to(w.dtype), i))
    with pytest.raises(RouterMismatchError, match="weights differ by up to"):
        check_router(moe)


@pytest.mark.parametrize("recipe", BIASED)
def test_an_edited_correction_bias_is_followed(recipe: str) -> None:
    [moe] = kinds(recipe)
    with torch.no_grad():
        correction_bias(moe).neg_()
    check_router(moe)


@pytest.mark.parametrize(
    "recipe", ["deepseek_v2_grouped", "deepseek_v3", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "nemotron_h"]
)
def test_a_rule_without_the_routers_groups_fails_the_check(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [moe] = kinds(recipe)
    rule: Any = moe.rule
    assert rule.groups is not None
    row = replace(moe.row, rule=lambda router, block: replace(rule, groups=None))
    monkeypatch.setitem(RULES, type(moe.router).__name__, row)
    with pytest.raises(RouterMismatchError, match="indices differ on"):
        check_router(moe)


@pytest.mark.parametrize("recipe", ["olmoe", "llama4", "jetmoe", "gemma4", "deepseek_v3"])
def test_from_hf_runs_the_check_and_refuses_untouched(recipe: str) -> None:
    model = tiny_model(recipe)
    *_, last = find_moe_layers(model)
    alter(last.router, scaling)
    with torch.no_grad():
        before = model(tokens()).logits
    with pytest.raises(RouterMismatchError) as error:
        HookedMoE.from_hf(model)
    assert str(error.value).startswith(f"{last.where}: {type(last.router).__name__}")
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, before)


# Routers that nobody knows


class MadeUpRouter(nn.Module):
    """What the made-up routers share; the names of its attributes are none that moe_lens reads."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.matrix = nn.Parameter(like.weight.detach().clone())
        self.k = like.top_k

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.matrix)


class SoftmaxRouter(MadeUpRouter):
    def forward(self, hidden: Tensor) -> Any:
        logits = self.logits(hidden)
        weights, indices = logits.softmax(-1, dtype=torch.float32).topk(self.k, dim=-1)
        return logits, weights.to(logits.dtype), indices


class RenormalisedRouter(SoftmaxRouter):
    def forward(self, hidden: Tensor) -> Any:
        logits, weights, indices = super().forward(hidden)
        return logits, weights / weights.sum(-1, keepdim=True), indices


class SigmoidRouter(MadeUpRouter):
    def forward(self, hidden: Tensor) -> Any:
        logits = self.logits(hidden)
        weights, indices = logits.sigmoid().topk(self.k, dim=-1)
        return logits, weights, indices


class OtherOrderRouter(RenormalisedRouter):
    def forward(self, hidden: Tensor) -> Any:
        logits, weights, indices = super().forward(hidden)
        return indices, weights, logits


class RaisingRouter(MadeUpRouter):
    def forward(self, hidden: Tensor) -> Any:
        raise KeyError("on purpose")


class EmptyRouter(nn.Module):
    def __init__(self, like: Any) -> None:
        super().__init__()

    def forward(self, hidden: Tensor) -> Any:
        return hidden[:, :6], hidden[:, :3], hidden[:, :3].long() % 6


class LonelyRouter(MadeUpRouter):
    def forward(self, hidden: Tensor) -> Any:
        return self.logits(hidden)


CLOSEST = {
    SoftmaxRouter: r"SoftmaxTopK(n_experts=6, top_k=3, renormalize=False",
    RenormalisedRouter: r"SoftmaxTopK(n_experts=6, top_k=3, renormalize=True",
    SigmoidRouter: r"TopKSigmoid(n_experts=6, top_k=3)",
    OtherOrderRouter: r"SoftmaxTopK(n_experts=6, top_k=3, renormalize=True",
    RaisingRouter: None,
    EmptyRouter: None,
    LonelyRouter: None,
}


@pytest.mark.parametrize(("made_up", "closest"), CLOSEST.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_an_unknown_router_is_refused_with_the_closest_rules(made_up: Any, closest: str | None) -> None:
    model = tiny_model("olmoe")
    for block in sparse_blocks(model).values():
        block.gate = made_up(router_of(block))
    with pytest.raises(UnsupportedRouterError) as error:
        HookedMoE.from_hf(model)
    message = str(error.value)
    assert message.startswith("model.layers.0.mlp: OlmoeSparseMoeBlock holds experts but no router")
    assert made_up.__name__ in message
    assert "moe_lens.register_rule" in message
    assert all(name in message for name in RULES)
    hint = message.partition("Closest rules: ")[2]
    if closest is None:
        assert not hint
    else:
        assert hint.startswith(closest), hint
        assert "the same experts on 100% of random tokens, weights off by 0 on average" in hint


def test_a_router_with_the_attributes_of_a_known_one_is_compared_with_that_ones_rule() -> None:
    moe = kinds("deepseek_v3")[0]
    moe.router.__class__ = type("BrandNewRouter", (nn.Module,), dict(vars(type(moe.router))))
    best, *_ = closest_rules(moe.router, moe.block)
    assert best.startswith("SigmoidTopK(n_experts=8, top_k=3, groups=GroupLimit(")
    assert "as in DeepseekV3TopkRouter, Glm4MoeLiteTopkRouter," in best  # once, with all that follow it
    assert "100%" in best


class Unknown(nn.Module):
    """A softmax top-2 router of six experts; `form` says what its forward gives."""

    def __init__(self, form: Callable[..., Any]):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
        self.norm = nn.BatchNorm1d(8, affine=False)
        self.form = form

    def forward(self, hidden: Tensor) -> Any:
        logits = nn.functional.linear(self.norm(hidden), self.weight)
        weights, indices = logits.softmax(-1).topk(2, dim=-1)
        return self.form(logits, weights / weights.sum(-1, keepdim=True), indices)


FORMS: dict[str, Callable[..., Any]] = {
    "with a loss": lambda logits, weights, indices: (logits, weights, indices, logits.mean()),
    "without logits": lambda logits, weights, indices: (weights, indices),
    "a dictionary": lambda logits, weights, indices: {"i": indices, "w": weights, "z": logits},
    "indices first": lambda logits, weights, indices: (indices, logits, weights),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_closest_rule_is_found_in_other_forms_of_output_and_the_router_is_left_alone(
    form: Callable[..., Any],
) -> None:
    router = Unknown(form).train()
    before = copy.deepcopy(router.state_dict())
    state = torch.get_rng_state()
    best, *_ = closest_rules(router, nn.Module())
    assert best.startswith("SoftmaxTopK(n_experts=6, top_k=2, renormalize=True")
    assert router.training
    assert all(torch.equal(before[name], value) for name, value in router.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_gate_that_decides_nothing_itself_has_no_closest_rule() -> None:
    assert closest_rules(nn.Linear(8, 6), nn.Module()) == []


def test_a_router_in_training_mode_is_checked_as_it_runs_in_eval_mode() -> None:
    model = tiny_model("phimoe").train()  # its router draws experts at random in training
    for moe in find_moe_layers(model):
        check_router(moe)
        assert moe.router.training


@pytest.mark.parametrize(
    ("recipe", "name"),
    [("deepseek_v3", "num_group"), ("olmoe", "norm_topk_prob"), ("ernie4_5_moe", "norm_min")],
)
def test_a_parameter_that_has_another_name_now_is_a_mismatch(recipe: str, name: str) -> None:
    model = tiny_model(recipe)
    for moe in find_moe_layers(model):
        delattr(moe.router, name)
    with pytest.raises(RouterMismatchError, match=f"cannot be read.*{name}"):
        HookedMoE.from_hf(model)


def test_an_unknown_router_inside_a_bridge_is_refused_by_its_layer() -> None:
    bridge = plain_bridge(tiny_model("olmoe"))
    router = router_of(bridge.blocks[2].mlp.original_component)
    router.__class__ = type("BrandNewRouter", (nn.Module,), {})
    with pytest.raises(UnsupportedRouterError, match=r"blocks\.2\.mlp.*BrandNewRouter"):
        attach(bridge)


def test_switch_transformers_is_refused_with_the_reason() -> None:
    model = tiny_model("switch")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(UnsupportedRouterError) as error:
        HookedMoE.from_hf(model)
    assert "SwitchTransformersTop1Router" in str(error.value)
    assert "drops the rest" in str(error.value)
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("recipe", ["deepseek_v3", "minimax_m2", "ernie4_5_moe"])
def test_a_correction_bias_that_is_not_finite_is_refused(recipe: str, value: float) -> None:
    model = tiny_model(recipe)
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        if name.endswith("e_score_correction_bias"):
            tensor.data.view(-1)[1] = value
    with pytest.raises(RouterMismatchError, match=r"NaN or infinity|weights differ|indices differ"):
        HookedMoE.from_hf(model)
