"""hooks=: None for none; whoever passes a plan is told what to pass, in every function that takes hooks."""

import inspect
from typing import Any

import pytest

import moe_lens
from moe_lens import RoutedModel, SteeringPlan, attribution, evaluation, interventions, statistics
from moe_lens.errors import HookError
from moe_lens.hook_names import hook_list
from tests.tiny_models import prompt, tiny_model, tokenizer

PLAN = SteeringPlan(deactivate=[(0, 1)])


def functions() -> dict[str, Any]:
    found = {}
    for room in (moe_lens, attribution, evaluation, interventions, statistics):
        for name in room.__all__:
            function = getattr(room, name)
            if inspect.isfunction(function) and "hooks" in inspect.signature(function).parameters:
                found[name] = function
    return found


@pytest.fixture(scope="module")
def model() -> Any:
    return RoutedModel(tiny_model(), tokenizer())


def arguments(model: Any, name: str) -> dict[str, Any]:
    """What a function needs beside the model."""
    model.set_use_expert_out(True)
    cache = model.run_with_cache(prompt(3))[1]
    model.set_use_expert_out(False)
    known: dict[str, Any] = {
        "prompts": [prompt(3)],
        "prompts_or_tokens": [prompt(3)],
        "prompt": prompt(3),
        "texts": [prompt(3)],
        "answers": ["w3"],
        "continuations": ["w3"],
        "answer_tokens": ["w3"],
        "max_new_tokens": 2,
        "layer": 0,
        "clean": [prompt(3)],
        "corrupted": [prompt(3)],
        "clean_cache": cache,
        "corrupted_tokens": prompt(3),
        "metric": lambda logits, tokens=None: logits[:, -1, 3].sum(),
    }
    given = inspect.signature(functions()[name]).parameters
    needed = [key for key, parameter in given.items() if parameter.default is parameter.empty]
    return {key: known[key] for key in needed if key not in ("model", "path", "about", "pairs")}


@pytest.mark.parametrize("name", [name for name in functions() if name not in ("collect_to_file", "detect")])
def test_none_is_no_hooks_and_a_plan_is_refused_with_the_remedy(model: Any, name: str) -> None:
    run, given = functions()[name], arguments(model, name)

    def result(hooks: Any) -> Any:
        found = run(model, **given, hooks=hooks)
        return list(found) if inspect.isgenerator(found) else found

    assert str(result(None)) == str(result([]))
    for wrong in (PLAN, [PLAN], 3, [("blocks.0.mlp.hook_router_logits", None)]):
        with pytest.raises(HookError, match=r"pass steer_hooks\(plan\)"):
            result(wrong)


def test_wrappers_take_none_too(model: Any) -> None:
    assert model.run_with_hooks(prompt(3), fwd_hooks=None).equal(model(prompt(3)))
    with pytest.raises(HookError, match=r"steer_hooks\(plan\)"):
        model.run_with_hooks(prompt(3), fwd_hooks=PLAN)


def test_pairs_are_kept_in_order() -> None:
    pairs = [("a", print), (str.isupper, len), ["b", repr]]
    assert hook_list(iter(pairs)) == [tuple(pair) for pair in pairs]
