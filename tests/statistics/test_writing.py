"""generate_text against Hugging Face's own generate and one forward over what was written."""

import pytest
import torch

from moe_lens import hook_names, organisms
from moe_lens.errors import DataError
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.routed_model import RoutedModel
from moe_lens.statistics.generation import collect_generation
from moe_lens.statistics.writing import generate_text
from moe_lens.steering.hooks import steer_hooks
from moe_lens.steering.plan import SteeringPlan
from tests.tiny_models import prompt, tiny_model, tokenizer

TEMPLATE = (
    "<bos> {% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}w9 {% endif %}"
)
WRAPPERS = pytest.mark.parametrize("wrapper", [HookedMoE, RoutedModel])
PROMPTS = [prompt(3), [{"role": "user", "content": prompt(5, 1)}], prompt(1, 2), prompt(3, 3)]


def made(wrapper: type) -> tuple[HookedMoE | RoutedModel, list[list[int]]]:
    """A model, and the tokens of `PROMPTS`."""
    own = tokenizer()
    own.chat_template = TEMPLATE
    model = wrapper.from_hf(tiny_model(), own) if wrapper is HookedMoE else wrapper(tiny_model(), own)
    texts = [prompt(3), f"{prompt(5, 1)} w9", prompt(1, 2), prompt(3, 3)]
    return model, [own(text)["input_ids"] for text in texts]


@WRAPPERS
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_new_text_is_what_hugging_face_writes(wrapper: type, batch_size: int) -> None:
    model, ids = made(wrapper)
    found = generate_text(model, PROMPTS, 6, batch_size=batch_size, progress=False)
    bare = tiny_model()
    for row, text in zip(ids, found, strict=True):
        whole = bare.generate(torch.tensor([row]), max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert text == model.tokenizer.decode(whole[0, len(row) :], skip_special_tokens=True)
    assert generate_text(model, PROMPTS[1], 6, progress=False) == found[1:2]  # one chat


@WRAPPERS
def test_routes_are_those_of_a_forward_over_what_was_written(wrapper: type) -> None:
    model, ids = made(wrapper)
    plan = SteeringPlan(activate=[(2, 1)], deactivate=[(2, 0)])
    texts, records = generate_text(
        model, PROMPTS, 6, hooks=steer_hooks(plan), batch_size=3, routes=True, progress=False
    )
    assert texts == generate_text(model, PROMPTS, 6, hooks=steer_hooks(plan), progress=False)
    assert texts != generate_text(model, PROMPTS, 6, progress=False)
    for row, text, record in zip(ids, texts, records, strict=True):
        new = record.tokens[0].tolist()
        assert text.startswith(model.tokenizer.decode(new, skip_special_tokens=True))
        with model.hooks(steer_hooks(plan)):
            _, cache = model.run_with_cache(torch.tensor([row + new]))
        for number, layer in enumerate(model.moe_layers):
            for name, ours in (
                (hook_names.TOPK_INDICES, record.indices),
                (hook_names.TOPK_WEIGHTS, record.weights),
            ):
                whole = cache[hook_names.name(layer, name)][0, len(row) :]
                torch.testing.assert_close(ours[number, 0], whole.to(ours.dtype), atol=1e-5, rtol=1e-4)


def test_what_ends_at_once_has_no_route() -> None:
    model = HookedMoE.from_hf(tiny_model(), tokenizer())
    [token] = generate_text(model, [prompt(3)], 1, progress=False)
    _, records = generate_text(model, [prompt(3)], 1, routes=True, progress=False)
    assert records == [None]  # the last token is read by no step
    model.cfg.eos_token_id = model.to_single_token(token)
    texts, records = generate_text(model, [prompt(3)], 5, routes=True, progress=False)
    assert records == [None]
    assert texts == [token]


def test_options_reach_generate_and_one_text_a_prompt_comes_back() -> None:
    model = organisms.load("specialised")
    torch.manual_seed(0)
    drawn = generate_text(model, ["the"] * 8, 5, do_sample=True, temperature=5.0, progress=False)
    assert len(set(drawn)) > 1
    with pytest.raises(DataError, match="one text a prompt"):
        generate_text(model, "the", num_return_sequences=2, progress=False)
    with pytest.raises(DataError, match="needs a tokenizer"):
        generate_text(HookedMoE.from_hf(tiny_model()), [[4, 5]], progress=False)


@WRAPPERS
def test_a_plan_a_prompt_stays_with_its_prompt_beyond_the_first_batch(wrapper: type) -> None:
    model, _ = made(wrapper)
    plans = [SteeringPlan([(0, n)], [(1, (n + 1) % 6)]) if n != 1 else None for n in range(len(PROMPTS))]
    together = generate_text(model, PROMPTS, 6, batch_size=3, hooks=steer_hooks(plans), progress=False)
    counted = collect_generation(model, PROMPTS, 6, batch_size=3, hooks=steer_hooks(plans), progress=False)
    alone = [
        generate_text(model, [prompt], 6, hooks=[] if plan is None else steer_hooks(plan), progress=False)[0]
        for prompt, plan in zip(PROMPTS, plans, strict=True)
    ]
    assert together == alone == list(counted.texts or ())
