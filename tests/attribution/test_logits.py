"""Expert logit attribution and the expert logit lens: what a user gets, on prompts of any lengths."""

from typing import Any

import pytest
import torch

from moe_lens import organisms, virtual_ablation, zero_ablate
from moe_lens.attribution.logits import expert_logit_attribution, expert_logit_lens
from moe_lens.errors import DataError, MoELensError
from tests.tiny_models import prompt, tokens

LENS_FAMILIES = ["qwen2_moe", "gemma4", "deepseek_v4", "llama4", "nemotron_h_latent"]


@pytest.fixture(scope="module")
def specialised():
    return organisms.load("specialised")


def test_sums_to_what_the_model_returns(specialised) -> None:
    facts = organisms.world("specialised").facts("test")[:5]
    answers = [fact.answer for fact in facts]
    found = expert_logit_attribution(specialised, [fact.question for fact in facts], answers)
    ids = [specialised.to_single_token(answer) for answer in answers]
    for row, fact in enumerate(facts):
        logit = specialised(fact.question)[0, -1, ids[row]].detach()
        torch.testing.assert_close(found.logit[row], logit, rtol=0, atol=1e-4)
    assert float(found.error.abs().max()) < 1e-4
    by_hand = found.logit - found.experts.sum((0, 2)) - found.parts.sum(0)
    torch.testing.assert_close(found.error, by_hand, rtol=0, atol=1e-5)
    assert found.layers == (0, 1, 2, 3)
    assert found.part_names[0] == "embed"
    assert len(set(found.part_names)) == len(found.part_names) == len(found.parts)


def test_by_expert_puts_shares_at_the_experts_that_were_chosen(specialised) -> None:
    text = "Question : what is the"
    found = expert_logit_attribution(specialised, text, 7)
    _, cache = specialised.run_with_cache(text)
    table = found.by_expert()
    for layer in range(4):
        chosen = cache["topk_indices", layer][0, -1].tolist()
        assert found.indices[layer, 0].tolist() == chosen
        for expert in range(8):
            wanted = found.experts[layer, 0, chosen.index(expert)] if expert in chosen else 0.0
            assert float(table[layer, 0, expert]) == float(wanted)


@pytest.mark.parametrize("family", ["olmoe", "gemma4", "granitemoehybrid", "deepseek_v4_hash", "jamba"])
def test_prompts_of_different_lengths_are_each_as_alone(hooked, family) -> None:
    model = hooked(family)
    prompts, answers = [prompt(5), prompt(3, seed=1), prompt(5, seed=2)], [9, 11, 13]
    together = expert_logit_attribution(model, prompts, answers, pos=[-1, 1, -2])
    for row, (each, answer, pos) in enumerate(zip(prompts, answers, (-1, 1, -2), strict=True)):
        alone = expert_logit_attribution(model, each, answer, pos=pos)
        torch.testing.assert_close(together.experts[:, row], alone.experts[:, 0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(together.parts[:, row], alone.parts[:, 0], rtol=1e-4, atol=1e-6)
        assert torch.equal(together.indices[:, row], alone.indices[:, 0])
        assert together.part_names == alone.part_names


def test_batch_size_changes_nothing(hooked) -> None:
    model, given = hooked("olmoe"), tokens(5, 4)
    one, many = (expert_logit_attribution(model, given, 9, batch_size=size) for size in (1, 8))
    torch.testing.assert_close(one.experts, many.experts, rtol=1e-4, atol=1e-6)


def test_a_difference_of_logits_is_the_difference_of_shares(hooked) -> None:
    model, given = hooked("phimoe"), tokens(2, 4)  # with biases in norms and unembedding
    both = expert_logit_attribution(model, given, ["w5", "w6"], "w7")
    right, wrong = (expert_logit_attribution(model, given, each) for each in ([9, 10], 11))
    torch.testing.assert_close(both.experts, right.experts - wrong.experts, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(both.parts, right.parts - wrong.parts, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(both.logit, right.logit - wrong.logit)
    assert both.part_names[-1] == "unembed.bias"
    assert [each.is_difference for each in (both, right)] == [True, False]
    assert [": logit difference " in repr(each) for each in (both, right)] == [True, False]


def test_parts_are_named_and_shared_experts_are_theirs(hooked) -> None:
    """Without the shared expert, that part of the logit is missing."""
    model, given = hooked("qwen2_moe"), tokens(1, 4)
    found = expert_logit_attribution(model, given, 9)
    parts = dict(zip(found.part_names, found.parts[:, 0].tolist(), strict=True))
    blocks = [f"blocks.{number}.{name}" for number in range(4) for name in ("attn", "mlp")]
    assert list(parts) == ["embed", *blocks, "unembed.bias"]
    layer = model.blocks[3]
    model.set_use_expert_out(True)
    try:
        _, cache = model.run_with_cache(given)
    finally:
        model.set_use_expert_out(False)
    routed = cache["expert_out", 3] * cache["topk_weights", 3].unsqueeze(-1)
    shared = cache["blocks.3.mlp.hook_out"].reshape(1, 4, -1) - routed.sum(2)
    assert layer.mlp.original_component.shared_expert is not None
    direction = model.ln_final.weight * model.unembed.weight[9] / cache["ln_final.hook_scale"][0, -1]
    assert parts["blocks.3.mlp"] == pytest.approx(
        float((shared[0, -1] @ direction).detach()), rel=1e-4, abs=1e-6
    )
    assert abs(parts["blocks.3.mlp"]) > 1e-3


def test_a_soft_cap_is_stated(hooked) -> None:
    model, given = hooked("gemma4"), tokens(2, 4)
    found = expert_logit_attribution(model, given, 9)
    assert found.soft_cap == 30.0
    torch.testing.assert_close(30 * torch.tanh(found.logit / 30), model(given)[:, -1, 9].detach())
    assert "before the soft cap" in repr(found)
    assert expert_logit_attribution(hooked("olmoe"), given, 9).soft_cap is None


@pytest.mark.parametrize("family", ["olmoe", "nemotron_h"])  # the latter returns float32 logits
def test_half_precision_states_its_error(hooked, family) -> None:
    found = expert_logit_attribution(hooked(family, torch.bfloat16), tokens(3, 5), 9)
    assert found.experts.dtype == torch.float32
    assert 0 < float(found.error.abs().max()) < 0.05


def test_hooks_on_routing_count(hooked) -> None:
    model, given = hooked("olmoe"), tokens(1, 4)

    def avoid(logits, hook):
        logits[..., 2] = -torch.inf
        return logits

    with model.hooks([(f"blocks.{layer}.mlp.hook_router_logits", avoid) for layer in range(3)]):
        found = expert_logit_attribution(model, given, 9)
        logit = model(given)[0, -1, 9].detach()
    assert not bool((found.indices == 2).any())
    torch.testing.assert_close(found.logit[0], logit)


def test_an_edited_residual_stream_is_refused(hooked) -> None:
    model, given = hooked("olmoe"), tokens(1, 4)
    steering = [("blocks.1.hook_resid_post", lambda resid, hook: resid + 1.0)]
    with model.hooks(steering), pytest.raises(MoELensError, match=r"do not add up .* residual stream"):
        expert_logit_attribution(model, given, 9)


def test_a_line_and_the_largest_experts(specialised) -> None:
    found = expert_logit_attribution(specialised, "Question : what is the", 7)
    largest = found.by_expert()[:, 0].abs().flatten().argmax()
    layer, expert = divmod(int(largest), 8)
    line, first, *_ = str(found).splitlines()
    assert first.startswith(f"  layer {layer} expert {expert}: ")
    assert line == repr(found)
    assert f"logit {float(found.logit):+.3f} = experts {float(found.experts.sum()):+.3f}" in line


@pytest.mark.parametrize("family", LENS_FAMILIES)
def test_the_lens_gives_the_attribution_of_every_token(hooked, family) -> None:
    model, given = hooked(family), tokens(2, 5)
    for layer in (model.moe_layers[0], model.moe_layers[-1]):
        lens = expert_logit_lens(model, given, layer)
        assert lens.shape == (2, 5, model.top_k, model.cfg.d_vocab)
        place = model.moe_layers.index(layer)
        for pos, answer in ((-1, 9), (1, 20)):
            found = expert_logit_attribution(model, given, answer, pos=pos)
            torch.testing.assert_close(lens[:, pos, :, answer], found.experts[place], rtol=1e-4, atol=1e-6)
        at = expert_logit_lens(model, given, layer, pos=[-1, 0])
        torch.testing.assert_close(at[:, 0], torch.stack([lens[0, -1], lens[1, 0]]), rtol=1e-4, atol=1e-6)


def test_the_lens_fills_shorter_prompts_with_nan(hooked) -> None:
    model = hooked("olmoe")
    lens = expert_logit_lens(model, [prompt(2), prompt(4)], 1)  # and a BOS each
    assert bool(torch.isnan(lens[0, :2]).all())
    torch.testing.assert_close(lens[0, 2:], expert_logit_lens(model, prompt(2), 1)[0])


def test_bad_input_is_refused(hooked, specialised) -> None:
    model, given = hooked("olmoe"), tokens(2, 4)
    for answer in (50, -1, 1.5, None, [9], [9, 10, 11], torch.tensor([9.0, 10.0]), "nonsense", "w1 w2", ""):
        with pytest.raises(DataError, match="answer_tokens"):
            expert_logit_attribution(model, given, answer)
    with pytest.raises(DataError, match=r"'what is' is 2 tokens, \['what', 'is'\]"):
        expert_logit_attribution(specialised, "Question", "what is")
    with pytest.raises(DataError, match="wrong_tokens"):
        expert_logit_attribution(model, given, 9, wrong_tokens=[1])
    for pos in (4, -5, True, 1.0, "x", None, [0], [0, 9]):
        with pytest.raises(DataError, match="pos must be"):
            expert_logit_attribution(model, given, 9, pos=pos)
    for wrong in ([], None, [[]], 7):
        with pytest.raises(DataError):
            expert_logit_attribution(model, wrong, 9)
    with pytest.raises(DataError, match="batch_size"):
        expert_logit_attribution(model, given, 9, batch_size=0)
    with pytest.raises(DataError, match="has no router"):
        expert_logit_lens(hooked("qwen2_moe"), given, 1)
    with pytest.raises(DataError, match="has no router"):
        expert_logit_lens(model, given, -1)


def test_hooks_are_the_hooks_around_it(hooked) -> None:
    model, given = hooked("olmoe"), tokens(2, 4)
    hooks = zero_ablate({0: [1, 2], 2: [3]})
    found = expert_logit_attribution(model, given, 9, hooks=hooks, progress=False)
    lens = expert_logit_lens(model, given, 1, hooks=hooks, progress=False)
    with model.hooks(hooks):
        around = expert_logit_attribution(model, given, 9, progress=False)
        assert torch.equal(lens, expert_logit_lens(model, given, 1, progress=False))
        torch.testing.assert_close(found.logit, model(given)[:, -1, 9].detach())
    assert torch.equal(found.experts, around.experts)
    assert torch.equal(found.parts, around.parts)
    plain = expert_logit_attribution(model, given, 9, progress=False)
    assert not torch.equal(found.logit, plain.logit)  # else this test could not fail


def test_the_table_holds_every_share(specialised) -> None:
    prompts = ["Question : what is the", "Document : the"]
    found = expert_logit_attribution(specialised, prompts, 7, progress=False)
    table: Any = found.to_dataframe()
    assert table["share"].sum() == pytest.approx(float(found.logit.mean()), abs=1e-4)
    assert table["share"].abs().is_monotonic_decreasing
    experts = table[table["part"] == "expert"]
    assert experts["n_prompts"].sum() == 2 * 4 * 2  # prompts, layers, k
    row = experts.iloc[0]
    place = found.layers.index(row["layer"])
    here = found.indices[place] == row["expert"]
    assert row["share"] == pytest.approx(float(found.experts[place][here].sum() / 2))
    parts = table[table["part"] != "expert"]
    assert set(parts["part"]) == set(found.part_names)
    assert parts[["layer", "expert"]].isna().all(axis=None)
    assert f"<td>{table['part'][0]}</td>" in found._repr_html_()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_are_switched_on_where_the_caller_has_them_off(hooked, context) -> None:
    model, given = hooked("olmoe"), tokens(2, 4)
    expected = expert_logit_attribution(model, given, 5, progress=False)
    lens = expert_logit_lens(model, given, 1, progress=False)
    with context():
        found = expert_logit_attribution(model, given, 5, progress=False)
        assert torch.equal(found.experts, expected.experts)
        assert torch.equal(expert_logit_lens(model, given, 1, progress=False), lens)
        virtual_ablation(model, given[:, :2].clone(), progress=False)  # of tokens made here
