"""A plan at positions acts on the tokens that it names, however a forward is called, or is refused.

Oracle: an expert that the router never chooses by itself; it runs exactly where the plan activates it, which
plain hooks on Hugging Face's experts see.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from moe_lens import HookedMoE, RoutedModel, SteeringPlan, attach, detach, steer_hooks, steered
from moe_lens.errors import HookError
from tests.tiny_models import tiny_model, tokenizer, tokens

NEVER = 3
PLAN = SteeringPlan(activate=[(0, NEVER)])
GREEDY: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def model_without_expert() -> Any:
    """A model whose routers never choose one of the experts by themselves."""
    model = tiny_model("gpt_oss")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.router.bias[NEVER] = -1e4
    return model


@contextmanager
def seeing(model: Any) -> Iterator[list[list[int]]]:
    """Forward by forward, on which tokens, row after row, the expert runs in layer 0."""
    seen: list[list[int]] = []

    def see(experts: Any, args: Any, kwargs: Any) -> None:
        indices = next(each for each in (*args, *kwargs.values()) if not each.is_floating_point())
        seen.append((indices == NEVER).any(-1).flatten().long().tolist())

    handle = model.model.layers[0].mlp.experts.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def flat(*rows: list[int]) -> list[int]:
    return [token for row in rows for token in row]


def by_name(model: Any, given: Tensor, mask: Tensor) -> None:
    model(input_ids=given, attention_mask=mask)


def by_position(model: Any, given: Tensor, mask: Tensor) -> None:
    model(given, mask)


def decoder_alone(model: Any, given: Tensor, mask: Tensor) -> None:
    model.model(given, mask)


def itself(model: Any) -> Any:
    return model


def in_a_bridge(model: Any) -> Any:
    return HookedMoE.from_hf(model, tokenizer())


@pytest.mark.parametrize(
    ("call", "wrap"),
    [(by_name, itself), (by_position, itself), (decoder_alone, itself), (by_position, in_a_bridge)],
)
def test_arguments_count_however_they_are_given(
    call: Callable[..., None], wrap: Callable[[Any], Any]
) -> None:
    model = model_without_expert()
    target = wrap(model)
    with steered(target, PLAN, positions=0), seeing(model) as seen:
        call(model, tokens(2, 6), PADDED)
    assert seen == [flat([0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0])]


def test_a_cache_given_by_position_counts() -> None:
    model, given = model_without_expert(), tokens(1, 4)
    past = model(given, use_cache=True).past_key_values
    for positions, acts in (("generated", [1]), ("prompt", [0])):
        with steered(model, PLAN, positions=positions), seeing(model) as seen:
            model(given[:, :1], torch.ones(1, 5, dtype=torch.long), None, copy.deepcopy(past))
        assert seen == [acts]


def test_places_under_a_mask_of_another_form_are_refused() -> None:
    model, given = model_without_expert(), tokens(2, 6)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    mask = causal & PADDED.bool()[:, None, None, :]
    numbers = (PADDED.cumsum(1) - 1).clamp(min=0)
    with (
        steered(model, PLAN, positions=0),
        pytest.raises(HookError, match=r"mask .*not \[batch total\].*Pass"),
    ):
        model(given, attention_mask=mask, position_ids=numbers)
    columns = torch.tensor([[0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()
    for positions, acts in (("prompt", [1] * 12), (columns, columns.long().flatten().tolist())):
        with steered(model, PLAN, positions=positions), seeing(model) as seen:
            model(given, attention_mask=mask, position_ids=numbers)
        assert seen == [acts]


def test_new_tokens_after_a_cache_are_the_prompts() -> None:
    """`generate` takes the new columns alone, if the mask is over all of them."""
    model, given = model_without_expert(), tokens(1, 7)
    past, everywhere = model(given[:, :4], use_cache=True).past_key_values, torch.ones(1, 7, dtype=torch.long)
    expected: dict[Any, list[list[int]]] = {
        "prompt": [[1, 1, 1], [0], [0]],
        "generated": [[0, 0, 0], [1], [1]],
        -1: [[0, 0, 1], [0], [0]],
        8: [[0, 0, 0], [0], [1]],
    }
    for positions, acts in expected.items():
        for ids in (given, given[:, 4:]):
            with steered(model, PLAN, positions=positions), seeing(model) as seen:
                cached = copy.deepcopy(past)
                model.generate(ids, attention_mask=everywhere, past_key_values=cached, **GREEDY)
            assert seen == acts, (positions, ids.shape)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("said", ["in the call", "by the model", "in a config"])
def test_padding_that_transformers_infers_is_padding(cache: str, said: str) -> None:
    model, given = model_without_expert(), tokens(2, 5).clamp(min=4)
    given[0, :2] = 0
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": cache}
    pad: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": None}
    if said == "in the call":
        options |= pad
    elif said == "by the model":
        model.generation_config.update(**pad)
    else:
        options = {"generation_config": GenerationConfig(**pad, **options)}
    with steered(model, PLAN, positions=[0, 6]), seeing(model) as seen:
        model.generate(given, **options)
    assert seen == [flat([0, 0, 1, 0, 0], [1, 0, 0, 0, 0]), [0, 0], [0, 1]]


def test_no_padding_is_inferred_where_it_is_the_end() -> None:
    model, given = model_without_expert(), tokens(1, 5).clamp(min=4)
    given[0, 0] = 0
    options: dict[str, Any] = GREEDY | {"eos_token_id": [1, 0], "cache_implementation": "static"}
    with steered(model, PLAN, positions=0), seeing(model) as seen:
        model.generate(given, **options)
    assert seen[0] == [1, 0, 0, 0, 0]


def test_positions_are_refused_under_guidance() -> None:
    model, given = model_without_expert(), tokens(1, 5)
    guide = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, model)
    own = GenerationConfig(guidance_scale=1.5, **GREEDY)
    ways: list[dict[str, Any]] = [
        {"guidance_scale": 1.5, **GREEDY},
        {"logits_processor": [guide], **GREEDY},
        {"generation_config": own},
    ]
    for way in ways:
        with (
            steered(model, PLAN, positions="generated"),
            pytest.raises(HookError, match="guidance_scale out"),
        ):
            model.generate(given, **way)
        with steered(model, PLAN), seeing(model) as seen:
            model.generate(given, **way)
        assert all(all(tokens) for tokens in seen)
    with steered(model, PLAN, positions="generated"), seeing(model) as seen:
        model.generate(given, guidance_scale=1, **GREEDY)
    assert seen == [[0, 0, 0, 0, 0], [1], [1]]


def test_positions_are_refused_in_packed_rows() -> None:
    model, given = tiny_model("mixtral"), tokens(1, 5)
    config = GenerationConfig(**GREEDY | {"eos_token_id": -1})
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)  # or it takes most of the memory
    batch: Any = [[[5, 6, 7], [8, 9, 10, 11]], config, small]
    with steered(model, PLAN, positions="prompt"):
        answers = model.generate_batch(*batch)
        assert [each.generated_tokens for each in answers.values()] == [[], []]
        assert all("several prompts run in one row" in each.error for each in answers.values())
        with pytest.raises(HookError, match="several prompts run in one row"):
            model(given, position_ids=torch.tensor([[0, 1, 0, 1, 2]]))
        model(given, position_ids=torch.arange(3, 8)[None])
    with steered(model, PLAN), seeing(model) as seen:
        model.generate_batch(*batch)
        model(given, position_ids=torch.tensor([[0, 1, 0, 1, 2]]))
    assert sum(map(len, seen)) > 12
    assert all(all(tokens) for tokens in seen)
    columns = torch.tensor([[True, False, False, True, False]])
    with steered(model, PLAN, positions=columns), seeing(model) as seen:
        model(given, position_ids=torch.tensor([[0, 1, 0, 1, 2]]))
    plain = run_of(model, given)
    assert [after or before for after, before in zip(seen[0], plain, strict=True)] == seen[0]
    assert seen[0][0] == seen[0][3] == 1


def run_of(model: Any, given: Tensor) -> list[int]:
    """Where the expert runs, unsteered, in the packed rows of the test above."""
    with seeing(model) as seen:
        model(given, position_ids=torch.tensor([[0, 1, 0, 1, 2]]))
    return seen[0]


def test_masks_of_every_kind_of_attention_are_not_taken_for_padding_of_one_row() -> None:
    """Models with several kinds give them to the decoder, which may be all that is watched."""
    model, given = model_without_expert(), tokens(2, 5)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    masks: Any = {"full_attention": causal, "sliding_attention": causal}
    with steered(model, PLAN, positions=0), seeing(model) as seen:
        model.model(given[:1], attention_mask=masks)
    assert seen == [[1, 0, 0, 0, 0]]
    with steered(model, PLAN, positions=0), pytest.raises(HookError, match="padding"):
        model.model(given, attention_mask=masks)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_positions_are_refused_where_virtual_tokens_stand_before_the_prompt(kind: str) -> None:
    peft = pytest.importorskip("peft")
    model, given = model_without_expert(), tokens(1, 5)
    learned = getattr(peft, kind)(num_virtual_tokens=4, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, learned).eval()

    def forward() -> None:
        adapted(input_ids=given, attention_mask=torch.ones_like(given))

    def generation() -> None:
        adapted.generate(input_ids=given, attention_mask=torch.ones_like(given), **GREEDY)

    hooks = steer_hooks(PLAN, positions="prompt")
    for run in (forward, generation):
        with pytest.raises(HookError, match="virtual tokens"), steered(adapted, PLAN, positions="prompt"):
            run()
        routed = attach(adapted)
        with pytest.raises(HookError, match="virtual tokens"), routed.hooks(hooks):
            run()
        detach(adapted)
        with steered(adapted, PLAN), seeing(model) as seen:
            run()
        assert all(all(tokens) for tokens in seen)
    for run in (forward, generation):  # the hook points are on the model inside
        with steered(model, PLAN, positions="prompt"), pytest.raises(HookError, match="virtual tokens"):
            run()
    with adapted.disable_adapter(), steered(adapted, PLAN, positions=0), seeing(model) as seen:
        forward()
    assert seen == [[1, 0, 0, 0, 0]]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("first", ["decoder", "model"])
def test_generations_of_a_model_whose_decoder_has_the_points_are_noted(first: str, use_cache: bool) -> None:
    model, given = model_without_expert(), tokens(1, 4)
    routed = RoutedModel(model.model if first == "decoder" else model)
    for target in (model, RoutedModel(model)):
        with steered(target, PLAN, positions="generated"), seeing(model) as seen:
            output = model.generate(given, use_cache=use_cache, **GREEDY)
        assert output.shape == (1, 7)
        written = [[1], [1]] if use_cache else [[0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1]]
        assert seen == [[0, 0, 0, 0], *written]
    with steered(model.model, PLAN, positions=0), seeing(model) as seen:
        model.model(input_ids=given)
    assert seen == [[1, 0, 0, 0]]
    routed.detach()
    assert not any({"forward", "generate"} & vars(part).keys() for part in model.modules())
