"""Splits: exact where all experts run alike, fitted as least squares says, routed as Hugging Face routes."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from moe_lens.errors import DataError, MoELensError
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.routed_model import RoutedModel
from moe_lens.organisms import split_fit
from moe_lens.organisms.distilling import set_top_k
from moe_lens.organisms.splitting import groups, routed_activations, split
from tests.organisms.dense import SHAPE, llama, tokens


def qwen2() -> PreTrainedModel:
    """With biases on queries, keys and values, and a head of its own."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=False)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


DENSE = {
    "tied": llama,
    "wide heads": lambda: llama(head_dim=8),
    "rope, eps, gelu": lambda: llama(
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rms_norm_eps=0.1, hidden_act="gelu"
    ),
    "qwen2": qwen2,
}


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def even_routers(model: Any) -> None:
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.mlp.gate.weight)


def divergence(dense: Any, moe: Any, ids: torch.Tensor) -> float:
    wanted, given = (torch.distributions.Categorical(logits=logits_of(m, ids)) for m in (dense, moe))
    return torch.distributions.kl_divergence(wanted, given).mean().item()


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize(("n_experts", "n_shared"), [(2, 0), (4, 0), (8, 0), (4, 8), (8, 40)])
def test_all_experts_with_equal_logits_are_the_dense_model(kind: str, n_experts: int, n_shared: int) -> None:
    dense = DENSE[kind]()
    moe = split(dense, tokens(), n_experts=n_experts, top_k=1, n_shared=n_shared, refit=False, progress=False)
    even_routers(moe)
    set_top_k(moe, n_experts)
    wanted = logits_of(dense, tokens(5, seed=1))
    torch.testing.assert_close(logits_of(moe, tokens(5, seed=1)), wanted, rtol=1e-4, atol=1e-4)
    set_top_k(moe, n_experts - 1)  # the test can fail: one expert is missing
    assert (logits_of(moe, tokens(5, seed=1)) - wanted).abs().max() > 0.01


def test_the_refit_makes_up_for_experts_that_are_left_out() -> None:
    dense = llama(hidden_size=8, intermediate_size=96)  # more neurons than the width calls for
    held_out = tokens(20, seed=1)
    plain = split(dense, tokens(300), n_experts=4, top_k=2, refit=False, progress=False)
    refitted = split(dense, tokens(300), n_experts=4, top_k=2, progress=False)
    assert divergence(dense, refitted, held_out) < 0.8 * divergence(dense, plain, held_out)


def test_the_router_finds_the_experts_that_write_most() -> None:
    dense = llama(num_hidden_layers=1)
    ids = tokens(300)
    moe = split(dense, ids, n_experts=4, top_k=2, refit=False, progress=False)
    seen: list[torch.Tensor] = []
    block: Any = moe.model.layers[0].mlp
    block.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].flatten(0, 1)))
    logits_of(moe, tokens(20, seed=1))
    (hidden,) = seen
    written = [
        block.experts(hidden, torch.full((len(hidden), 1), e), torch.ones(len(hidden), 1)).norm(dim=-1)
        for e in range(4)
    ]
    largest = torch.stack(written, dim=-1).topk(2).indices.sort(dim=-1).values
    chosen = block.gate(hidden)[2].sort(dim=-1).values
    assert (largest == chosen).all(dim=-1).float().mean() > 2 * (1 / 6)  # 1 / 6: a random pair of four


@pytest.mark.parametrize("n_shared", [0, 16])
def test_the_fit_sees_what_the_block_computes(n_shared: int) -> None:
    moe: Any = split(llama(), tokens(), n_experts=4, top_k=2, n_shared=n_shared, progress=False)
    hidden = torch.randn(30, 16, generator=torch.Generator().manual_seed(2))
    block = moe.model.layers[1].mlp
    own, shared = block.experts, block.shared_expert
    gate, up = (part.flatten(0, 1) for part in own.gate_up_proj.chunk(2, dim=1))  # [neuron d_model]
    down = own.down_proj.transpose(1, 2).flatten(0, 1) / 4
    gate, up = torch.cat([gate, shared.gate_proj.weight]), torch.cat([up, shared.up_proj.weight])
    down = torch.cat([down, shared.down_proj.weight.T / 2])
    activations = torch.nn.functional.silu(hidden @ gate.T) * (hidden @ up.T)
    experts = torch.arange(48 - n_shared).view(4, -1)
    routed = routed_activations(activations, hidden @ block.gate.weight.T, experts, k=2)
    with torch.no_grad():
        torch.testing.assert_close(routed @ down, block(hidden[None])[0], rtol=1e-4, atol=1e-5)


def test_shared_neurons_are_those_that_write_most() -> None:
    activations, down = torch.randn(200, 12), torch.randn(3, 12)
    shared, experts = groups(activations, down, n_experts=2, n_shared=4, seed=0)
    written = [sum(abs(float(a[n])) for a in activations) * float(down[:, n].norm()) for n in range(12)]
    assert shared.tolist() == sorted(sorted(range(12), key=lambda n: -written[n])[:4])
    assert sorted([*shared.tolist(), *experts.flatten().tolist()]) == list(range(12))
    assert experts.shape == (2, 4)


def test_refitted_down_is_least_squares_toward_the_old_one() -> None:
    rng = torch.Generator().manual_seed(0)
    features = [torch.randn(50, 6, generator=rng) for _ in range(2)]
    targets, down = torch.randn(50, 3, generator=rng), torch.randn(3, 6, generator=rng)
    found = split_fit.refitted_down(features, targets, down, strength=0.3)
    rows = torch.cat(features).double().numpy()
    penalty = np.sqrt(0.3 * np.mean(np.sum(rows**2, axis=0)))
    augmented = np.vstack([rows, penalty * np.eye(6)])
    wanted = np.vstack([targets.numpy(), targets.numpy(), penalty * down.numpy().T])
    oracle = np.linalg.lstsq(augmented, wanted, rcond=None)[0].T
    np.testing.assert_allclose(found.numpy(), oracle, rtol=1e-4, atol=1e-5)


def test_refitting_where_nothing_is_left_out_changes_nothing() -> None:
    activations, down = torch.randn(50, 6), torch.randn(3, 6)
    same = split_fit.refitted_down([activations], activations @ down.T, down, strength=0.1)
    torch.testing.assert_close(same, down, rtol=1e-4, atol=1e-5)


def test_ridge_is_penalised_least_squares() -> None:
    inputs, targets = torch.randn(40, 5), torch.randn(40, 2)
    penalty = np.sqrt(0.2 * np.mean(np.sum(inputs.double().numpy() ** 2, axis=0)))
    augmented = np.vstack([inputs.numpy(), penalty * np.eye(5)])
    oracle = np.linalg.lstsq(augmented, np.vstack([targets.numpy(), np.zeros((5, 2))]), rcond=None)[0].T
    np.testing.assert_allclose(split_fit.ridge(inputs, targets, 0.2).numpy(), oracle, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_clusters_have_equal_sizes_and_find_planted_ones(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(20, 4, generator=rng))[0].T
    planted = torch.arange(4).repeat_interleave(5)[torch.randperm(20, generator=rng)]
    sizes = torch.rand(20, 1, generator=rng) + 0.5
    noise = 0.05 * torch.randn(20, 20, generator=rng)
    clusters = split_fit.balanced_clusters(sizes * directions[planted] + noise, 4, seed=seed)
    assert clusters.shape == (4, 5)
    assert clusters.flatten().sort().values.tolist() == list(range(20))
    assert all(len(set(planted[members].tolist())) == 1 for members in clusters)


def test_neurons_of_any_activation_make_clusters_of_equal_size() -> None:
    features = torch.zeros(12, 3)  # neurons that never fire have no direction
    clusters = split_fit.balanced_clusters(features, 3)
    assert clusters.flatten().sort().values.tolist() == list(range(12))


@pytest.mark.parametrize("wrapper", [HookedMoE, RoutedModel])
def test_both_wrappers_open_a_split(wrapper: Any, tmp_path: Any) -> None:
    moe = split(llama(), tokens(), n_experts=4, top_k=2, progress=False)
    moe.save_pretrained(tmp_path)
    opened = wrapper(moe) if wrapper is RoutedModel else wrapper.from_hf(moe, tokenizer=None)
    ids = tokens(3, seed=4)
    with torch.no_grad():
        logits, cache = opened.run_with_cache(ids)
    assert cache["topk_indices", 2].shape == (3, 12, 2)
    torch.testing.assert_close(logits_of(type(moe).from_pretrained(tmp_path).eval(), ids), logits)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_experts": 5}, "48 neurons a layer, 0 of them shared, do not make 5 experts"),
        ({"n_shared": 4}, "4 of them shared, do not make 8 experts"),
        ({"n_shared": 48}, "48 of them shared"),
        ({"n_shared": -8}, "-8 of them shared"),
        ({"n_experts": 1}, "do not make 1 experts"),
        ({"top_k": 9}, "must be 1 to 8"),
        ({"top_k": 4, "also": (0,)}, r"got \[4, 0\]"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        split(llama(), tokens(), progress=False, **changes)


def test_other_models_and_too_few_tokens_are_refused() -> None:
    with pytest.raises(DataError, match="fewer than the model's width"):
        split(llama(), tokens(1), progress=False)
    moe = split(llama(), tokens(), progress=False)
    with pytest.raises(MoELensError, match="Qwen2MoeForCausalLM is not a dense model"):
        split(moe, tokens(), progress=False)
    with pytest.raises(MoELensError, match="is a bias that Qwen2-MoE has no place for"):
        split(llama(mlp_bias=True), tokens(), progress=False)
