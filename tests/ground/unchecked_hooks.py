"""What every function with `hooks=` does about hooks that are none, as users run it: no types are checked.

python -m tests.ground.unchecked_hooks         # a line for each that does something else, "done" at the end
"""

import inspect
from typing import Any

import moe_lens
from moe_lens import RoutedModel, SteeringPlan, attribution, evaluation, interventions, statistics
from moe_lens.errors import HookError
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
        "objective": moe_lens.text_objective(model, [prompt(3)]),
        "development": moe_lens.text_objective(model, [prompt(4)]),
        "b": model,
    }
    given = inspect.signature(functions()[name]).parameters
    needed = [
        key
        for key, parameter in given.items()
        if (parameter.default is parameter.empty or key in ("max_new_tokens", "prompt"))
        and parameter.kind != parameter.VAR_KEYWORD
        and key not in ("model", "routed", "a")  # the first, which each gets
    ]
    return {key: known[key] for key in needed} | ({"progress": False} if "progress" in given else {})


def faults(model: Any, name: str) -> list[str]:
    """Where None is not no hooks, or what is no list of hooks is not refused with the remedy."""
    run, given, found = functions()[name], arguments(model, name), []

    def result(hooks: Any) -> Any:
        value = run(model, **given, hooks=hooks)
        return list(value) if inspect.isgenerator(value) else value

    if str(result(None)) != str(result([])):
        found.append(f"{name}: None is not no hooks")
    for wrong in (PLAN, [PLAN], 3, [("blocks.0.mlp.hook_router_logits", None)]):
        try:
            result(wrong)
            found.append(f"{name}: {wrong!r} is taken")
        except HookError as error:
            if "pass steer_hooks(plan)" not in str(error):
                found.append(f"{name}: {error}")
        except Exception as error:
            found.append(f"{name}: {wrong!r} gives {type(error).__name__}: {error}")
    return found


def main() -> None:
    model, n_functions = RoutedModel(tiny_model(), tokenizer()), 0
    for name in functions():
        if name not in ("collect_to_file", "detect"):
            n_functions += 1
            for fault in faults(model, name):
                print(fault)
    assert n_functions > 15
    print("done")


if __name__ == "__main__":
    main()
