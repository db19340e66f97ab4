"""Prefill and decode against one teacher-forced forward over each prompt with what was generated."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lens.errors import DataError
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.statistics.collection import collect_routing
from moe_lens.statistics.generation import GenerationRouting, collect_generation
from moe_lens.statistics.routing_stats import RoutingStats
from moe_lens.steering.hooks import steer_hooks
from moe_lens.steering.plan import SteeringPlan
from tests.tiny_models import prompt, tiny_model, tokenizer, tokens

Hooked = Callable[..., HookedMoE]
FAMILIES = ("olmoe", "mixtral", "qwen2_moe", "deepseek_v3")
EOS = 2


def prompts(lengths: tuple[int, ...] = (3, 6, 1, 4)) -> list[Tensor]:
    return [tokens(1, length, seed)[0] for seed, length in enumerate(lengths)]


def taught(model: HookedMoE, found: GenerationRouting, sequences: list[Tensor], hooks: Any = ()) -> list[Any]:
    """Statistics of prefill and decode from forwards over whole sequences; None without such tokens."""
    phases: list[Any] = [None, None]
    for sequence, new in zip(sequences, found.tokens, strict=True):
        whole = torch.cat([sequence, new])
        with model.hooks(list(hooks)):
            _, cache = model.run_with_cache(whole[None])
        inside = torch.arange(len(whole)) < len(sequence)
        routed = ~inside & (
            torch.arange(len(whole)) < len(whole) - 1
        )  # the last is an end, or read by no step
        for phase, mask in enumerate((inside, routed)):
            if bool(mask.any()):
                stats = RoutingStats.from_cache(cache, mask[None])
                phases[phase] = stats if phases[phase] is None else phases[phase] + stats
    return phases


def assert_same(ours: RoutingStats | None, expected: RoutingStats | None) -> None:
    assert (ours is None) == (expected is None)
    if ours is None or expected is None:
        return
    assert ours.shape == expected.shape
    assert ours.n_tokens == expected.n_tokens
    for name, tensor in ours.tensors().items():
        if tensor.is_floating_point():
            np.testing.assert_allclose(tensor, expected.tensors()[name], rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(tensor, expected.tensors()[name]), name


@pytest.mark.parametrize("recipe", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_both_phases_are_those_of_a_teacher_forced_forward(
    hooked: Hooked, recipe: str, batch_size: int
) -> None:
    model = hooked(recipe)
    found = collect_generation(model, prompts(), 5, batch_size=batch_size, progress=False)
    prefill, decode = taught(model, found, prompts())
    assert_same(found.prefill, prefill)
    assert_same(found.decode, decode)
    for sequence, new in zip(prompts(), found.tokens, strict=True):
        logits = model(torch.cat([sequence, new])[None])[0]
        assert logits[len(sequence) - 1 : -1].argmax(-1).tolist() == new.tolist()  # greedy


def test_prefill_is_what_collect_routing_counts(hooked: Hooked) -> None:
    model = hooked("qwen2_moe")
    found = collect_generation(model, prompts(), 2, batch_size=2, progress=False)
    assert_same(found.prefill, collect_routing(model, prompts(), batch_size=2, progress=False))


@pytest.mark.parametrize("recipe", ["olmoe", "deepseek_v3"])
def test_the_counts_are_those_under_the_hooks(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    layer = model.moe_layers[-1]
    hooks = steer_hooks(SteeringPlan(activate=[(layer, 1)], deactivate=[(layer, 0)]))
    found = collect_generation(model, prompts(), 4, hooks=hooks, progress=False)
    prefill, decode = taught(model, found, prompts(), hooks)
    assert found.decode is not None
    for ours, expected in ((found.prefill, prefill), (found.decode, decode)):
        assert ours.counts.tolist() == expected.counts.tolist()
        assert float(ours.rates[-1, 1]) == 1
        assert float(ours.rates[-1, 0]) == 0
    assert all(not point.fwd_hooks for point in model.hook_dict.values())


def ending(at: dict[int, int]) -> HookedMoE:
    """A model that writes the end-of-sequence token as row's n-th new token, for row -> n."""
    model = HookedMoE.from_hf(tiny_model("olmoe"), tokenizer())
    step = {"now": 0}

    def end(logits: Tensor, hook: Any) -> Tensor:
        logits = logits.clone()
        logits[..., EOS] = -torch.inf
        for row, when in at.items():
            if step["now"] == when and row < len(logits):
                logits[row, -1, EOS] = torch.inf
        step["now"] += 1
        return logits

    model.add_hook("unembed.hook_out", end, is_permanent=True)
    return model


def test_after_the_end_nothing_counts() -> None:
    """Prompt 0 ends with its third token, prompt 1 at once; prompts 2 and 3 go on."""
    model, sequences = ending({0: 2, 1: 0}), prompts()
    found = collect_generation(model, sequences, 5, batch_size=4, progress=False)
    assert [len(new) for new in found.tokens] == [3, 1, 5, 5]
    assert [int(new[-1]) for new in found.tokens[:2]] == [EOS, EOS]
    assert found.decode is not None
    assert found.decode.n_tokens == 2 + 0 + 4 + 4
    plain = HookedMoE.from_hf(tiny_model("olmoe"), tokenizer())
    prefill, decode = taught(plain, found, sequences)
    assert_same(found.prefill, prefill)
    assert_same(found.decode, decode)


def test_the_batch_a_prompt_ends_in_does_not_matter() -> None:
    alone = collect_generation(ending({0: 2}), prompts((3,)), 5, batch_size=1, progress=False)
    beside = collect_generation(ending({0: 2}), prompts((3, 6)), 5, batch_size=2, progress=False)
    assert alone.decode is not None
    assert beside.decode is not None
    assert alone.tokens[0].tolist() == beside.tokens[0].tolist()
    assert beside.decode.n_tokens - alone.decode.n_tokens == 4


def test_without_routed_tokens_there_is_no_decode(hooked: Hooked) -> None:
    found = collect_generation(hooked("olmoe"), prompts(), 1, progress=False)
    assert found.decode is None
    assert found.prefill.n_tokens == 14
    assert [len(new) for new in found.tokens] == [1] * 4
    assert "4 prompts" in repr(found)
    assert collect_generation(ending({0: 0}), prompts((3,)), 4, progress=False).decode is None


def test_texts_are_those_of_model_generate(hooked: Hooked) -> None:
    model, text = hooked("mixtral"), prompt(4)
    found = collect_generation(model, text, 4, progress=False)
    whole: Any = model.generate(text, max_new_tokens=4, do_sample=False, verbose=False, return_type="tokens")
    assert found.texts == (model.tokenizer.decode(whole[0, 5:], skip_special_tokens=True),)
    assert (
        collect_generation(HookedMoE.from_hf(tiny_model("olmoe")), prompts((3,)), 2, progress=False).texts
        is None
    )


def test_what_cannot_be_generated_is_refused(hooked: Hooked) -> None:
    model = hooked("olmoe")
    for wrong in (0, -1, 1.5, "3"):
        with pytest.raises((DataError, TypeError), match="max_new_tokens"):
            collect_generation(model, prompts(), wrong, progress=False)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="context"):
        collect_generation(model, prompts(), model.cfg.n_ctx, progress=False)
    with pytest.raises(DataError, match="at least one prompt"):
        collect_generation(model, [], 3, progress=False)
