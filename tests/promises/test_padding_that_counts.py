"""DeepSeek-V4's numbers change where prompts are padded on the left: nothing that takes prompts pads them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import (
    HookedMoE,
    RoutedModel,
    SteeringPlan,
    answer_objective,
    collect_generation,
    collect_routing,
    generate_text,
    gradient_attribution,
    record_dense,
    steer_hooks,
    text_objective,
)
from moe_lens.errors import DataError
from moe_lens.evaluation import answers_with, continuation_log_probs, text_loss
from moe_lens.interventions import average_routes
from moe_lens.statistics import RouteRecord
from moe_lens.text.batching import Limits, pad_sequences
from tests.tiny_models import prompt, tiny_model, tokenizer

RECIPES = pytest.mark.parametrize("recipe", ["deepseek_v4", "deepseek_v4_hash"])
PROMPTS = [prompt(length, length) for length in (9, 3, 3, 6, 4)]
ANSWERS = ["w5", "w6 w7", "w7", "w8", "w9"]


def models(recipe: str) -> tuple[RoutedModel, HookedMoE]:
    return (
        RoutedModel(tiny_model(recipe), tokenizer()),
        HookedMoE.from_hf(tiny_model(recipe), tokenizer()),
    )


def hooks_of(model: Any, strength: float) -> Any:
    """A plan; of strength 0 it does nothing, but hooks wait, and under these padding is on the left."""
    layer = model.moe_layers[-1]
    return steer_hooks(SteeringPlan([(layer, 0)], [(layer, 1)]), strength=strength)


@RECIPES
def test_padding_on_the_left_does_change_these_models(recipe: str) -> None:
    """Else nothing of this were needed."""
    model = tiny_model(recipe)
    row = torch.tensor([tokenizer()(PROMPTS[0])["input_ids"]])
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.int64), row], dim=1)
    mask = (padded != 0).long()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = model(padded, attention_mask=mask, position_ids=places).logits[:, 5:]
        assert float((found - model(row).logits).abs().max()) > 1e-2


def counts(model: Any, prompts: Any, hooks: Any) -> Tensor:
    found = collect_routing(model, prompts, hooks=hooks, per_prompt=True, progress=False).per_prompt
    assert found is not None
    return found.counts


def objectives(model: Any, prompts: Any, hooks: Any) -> Tensor:
    """Sums: what each of the prompts alone adds up to, these together do."""
    answers = ["w1"] * len(prompts)
    given = [answer_objective(model, prompts, answers), text_objective(model, prompts)]
    n_read = [len(prompts), sum(len(tokenizer()(one)["input_ids"]) - 1 for one in prompts)]
    with torch.no_grad():
        return torch.tensor([[float(each(model, hooks)) * n for each, n in zip(given, n_read, strict=True)]])


MEASURES: dict[str, Callable[[Any, Any, Any], Tensor]] = {
    "counts": counts,
    "log-probabilities": lambda model, prompts, hooks: torch.tensor(
        continuation_log_probs(model, prompts, [ANSWERS[PROMPTS.index(one)] for one in prompts], hooks=hooks)
    ),
    "answers": lambda model, prompts, hooks: torch.tensor(
        answers_with(model, prompts, ["w1"] * len(prompts), hooks=hooks)
    ),
    "loss": lambda model, prompts, hooks: torch.tensor(
        [text_loss(model, [one], hooks=hooks) for one in prompts]
    ),
    "dense routes": lambda model, prompts, hooks: record_dense(
        model, prompts, hooks=hooks, batch_size=5, progress=False
    ).weights.transpose(0, 1),
    "what is written": lambda model, prompts, hooks: torch.tensor(
        [
            [tokenizer().convert_tokens_to_ids(word) for word in f"{text} w1 w1 w1 w1".split()[:4]]
            for text in generate_text(model, prompts, max_new_tokens=4, hooks=hooks, progress=False)
        ]
    ),
    "average of routes": lambda model, prompts, hooks: average_routes(
        model, prompts, n=1, temperature=1e-9, hooks=hooks, batch_size=5, progress=False
    ),
}


@pytest.mark.parametrize(
    ("recipe", "measure"),
    [
        *(("deepseek_v4", measure) for measure in MEASURES),
        *(("deepseek_v4_hash", measure) for measure in MEASURES if measure != "dense routes"),  # has none
    ],
)
@pytest.mark.parametrize("strength", [0.0, pytest.param(2.0, marks=pytest.mark.broad)])
def test_prompts_together_are_each_alone(recipe: str, measure: str, strength: float) -> None:
    for model in models(recipe):
        hooks, found = hooks_of(model, strength), MEASURES[measure]
        together = found(model, PROMPTS, hooks)
        alone = torch.cat([found(model, [one], hooks) for one in PROMPTS])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
        if strength == 0:
            torch.testing.assert_close(together, found(model, PROMPTS, ()), rtol=1e-5, atol=1e-5)


@RECIPES
def test_what_learning_minimises_is_of_each_prompt_alone(recipe: str) -> None:
    for model in models(recipe):
        together = objectives(model, PROMPTS, hooks_of(model, 0.0))
        alone = torch.cat([objectives(model, [one], hooks_of(model, 0.0)) for one in PROMPTS])
        torch.testing.assert_close(together[0], alone.sum(0), rtol=1e-5, atol=1e-5)


@RECIPES
def test_all_at_once_is_refused_where_nothing_else_is_possible(recipe: str) -> None:
    for model in models(recipe):
        with pytest.raises(DataError, match="different lengths"):
            gradient_attribution(model, PROMPTS[:2], lambda logits: logits[:, -1, 5].sum())
        with pytest.raises(DataError, match="different lengths"):
            RouteRecord.from_generation(model, PROMPTS[:2], max_new_tokens=2)
        with pytest.warns(UserWarning, match="change where prompts are padded"):
            pad_sequences(model, [torch.tensor([5, 6]), torch.tensor([7])])
        collect_generation(model, PROMPTS, max_new_tokens=2, progress=False)


def test_other_models_share_batches() -> None:
    for model in models("olmoe"):
        assert not Limits.of(None, None, model).one_length
    limits = Limits.of(3, None, models("deepseek_v4")[0])
    assert limits.batches([9, 3, 3, 6, 3, 3]) == [[1, 2, 4], [5], [3], [0]]
