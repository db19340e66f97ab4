"""The direct path: every family's logits are the sum of what its parts wrote."""

import pytest
import torch

from moe_lens.attribution.direct_paths import direct_path, logit_cap
from moe_lens.errors import MoELensError
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.layers import unwrap
from tests.families import first_of
from tests.tiny_models import EVERY_FAMILY, SOME_KINDS, hook_census, tiny_model, tokenizer, tokens

TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Of the sum of the sizes of all shares."""


def _shares(model, given):
    """(target, its shares by experts and parts) for a token of each row at another place."""
    path = direct_path(model, given)
    rows = torch.arange(len(given))
    target = path.logits[rows, -1 - rows, 5 + rows]
    return path, target.detach(), *path.shares(target)


def _relative_error(target, experts, parts) -> float:
    total = experts.sum((0, 2, 3)) + parts.sum(0)
    size = experts.abs().sum((0, 2, 3)) + parts.abs().sum(0)
    return float(((total - target.float()).abs() / size).max())


@pytest.mark.parametrize("family", first_of(SOME_KINDS, EVERY_FAMILY))
def test_shares_add_up_to_the_logit(hooked, family) -> None:
    model, given = hooked(family), tokens(2, 6)
    with torch.no_grad():
        logits = model(given)
    path, target, experts, parts = _shares(model, given)
    assert _relative_error(target, experts, parts) < TOLERANCE[torch.float32]
    assert experts.abs().max() > 1e-4
    assert int((parts.abs().amax(1) > 0).sum()) >= 3  # embedding, attention...
    seen = path.logits.detach()
    if (cap := logit_cap(model)) is not None:
        seen = cap * torch.tanh(seen / cap)
    torch.testing.assert_close(seen, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma4", "deepseek_v4", "phimoe", "granitemoe", "nemotron_h_latent"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shares_add_up_in_half_precision(hooked, family, dtype) -> None:
    _, target, experts, parts = _shares(hooked(family, dtype), tokens(2, 6))
    assert _relative_error(target, experts, parts) < TOLERANCE[dtype]


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "flex_olmo", "llama4", "granitemoe"])
def test_experts_shares_by_hand(hooked, family) -> None:
    """Weight × output, through the norms' cached scales and the unembedding, written out."""
    model, given = hooked(family), tokens(2, 6)
    model.set_use_expert_out(True)
    try:
        with torch.no_grad():
            _, cache = model.run_with_cache(given)
    finally:
        model.set_use_expert_out(False)
    _, _, shares, _ = _shares(model, given)
    config, unembed = model.original_model.config, model.unembed.weight  # [d_vocab d_model]
    scale = cache["ln_final.hook_scale"]
    for place, layer in enumerate(model.moe_layers):
        written = cache[f"blocks.{layer}.mlp.hook_expert_out"]
        if family != "llama4":  # it weights what experts read
            written = written * cache[f"blocks.{layer}.mlp.hook_topk_weights"].unsqueeze(-1)
        if family == "flex_olmo":  # a norm after the experts
            norm = model.blocks[layer].ln2_post if hasattr(model.blocks[layer], "ln2_post") else None
            norm = norm if norm is not None else model.blocks[layer].ln2
            post = norm.original_component
            x = cache[f"blocks.{layer}.mlp.hook_out"]
            rms = (x.pow(2).mean(-1, keepdim=True) + post.variance_epsilon).sqrt()
            written = written / rms.unsqueeze(-2) * post.weight
        if family == "granitemoe":
            written = written * config.residual_multiplier / config.logits_scaling
        for row in range(2):
            x = written[row, -1 - row] / scale[row, -1 - row] * model.ln_final.weight
            torch.testing.assert_close(
                shares[place, row, -1 - row], x @ unembed[5 + row], rtol=1e-4, atol=1e-6
            )
        elsewhere = shares[place].clone()
        elsewhere[torch.arange(2), -1 - torch.arange(2)] = 0
        assert not bool(elsewhere.any())


def test_removing_a_last_layer_expert_changes_the_logit_by_its_share(hooked) -> None:
    """Causally, with the final norm's scale held where it was."""
    model, given = hooked("mixtral"), tokens(1, 5)
    layer = model.moe_layers[-1]
    _, target, shares, _ = _shares(model, given)
    model.set_use_expert_out(True)
    try:
        _, cache = model.run_with_cache(given)
        scale = cache["ln_final.hook_scale"]

        def remove(outputs, hook):
            outputs[0, -1, 1] = 0
            return outputs

        with pytest.warns(UserWarning, match="hook_scale"):
            edited = model.run_with_hooks(
                given,
                fwd_hooks=[
                    (f"blocks.{layer}.mlp.hook_expert_out", remove),
                    ("ln_final.hook_scale", lambda value, hook: scale.clone()),
                ],
            )
    finally:
        model.set_use_expert_out(False)
    torch.testing.assert_close(target[0] - edited[0, -1, 5], shares[-1, 0, -1, 1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["olmoe", "gemma4", "deepseek_v4"])
def test_leaves_the_model_as_it_was(hooked, family) -> None:
    model, given = hooked(family), tokens(2, 5)
    census, names = hook_census(model), set(model.hook_dict)
    needs = [parameter.requires_grad for parameter in model.parameters()]
    before = model(given).detach()
    direct_path(model, given)
    assert hook_census(model) == census
    assert set(model.hook_dict) == names
    assert [parameter.requires_grad for parameter in model.parameters()] == needs
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model(given), before)
    model.set_use_expert_out(True)
    try:
        direct_path(model, given)
        assert model.use_expert_out
    finally:
        model.set_use_expert_out(False)


def test_hooks_are_gone_after_an_exception(hooked) -> None:
    model = hooked("olmoe")
    census = hook_census(model)

    def fail(value, hook):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), model.hooks([("blocks.1.hook_out", fail)]):
        direct_path(model, tokens(1, 4))
    assert hook_census(model) == census
    assert not model.use_expert_out


def test_the_callers_gradient_mode_does_not_matter(hooked) -> None:
    model, given = hooked("olmoe"), tokens(2, 5)
    plain = _shares(model, given)[2]
    frozen = HookedMoE.from_hf(tiny_model("olmoe"), tokenizer())
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        path = direct_path(frozen, given)
    rows = torch.arange(2)
    assert torch.allclose(path.shares(path.logits[rows, -1 - rows, 5 + rows])[0], plain, atol=1e-7)
    with torch.inference_mode():
        path = direct_path(model, given)
    assert torch.allclose(path.shares(path.logits[rows, -1 - rows, 5 + rows])[0], plain, atol=1e-7)


def test_an_unknown_norm_is_refused(hooked, monkeypatch) -> None:
    model = HookedMoE.from_hf(tiny_model("olmoe"), tokenizer())
    norm = unwrap(model.ln_final)
    monkeypatch.setattr(norm, "forward", lambda x: torch.tanh(x) * norm.weight)
    with pytest.raises(MoELensError, match=r"ln_final: OlmoeRMSNorm is neither an RMSNorm nor a LayerNorm"):
        direct_path(model, tokens(1, 4))
