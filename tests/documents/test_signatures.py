"""What a function takes is written out, so that help, completion and type checkers see it."""

import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest

ROOMS = [
    *("routers", "text", "model", "statistics", "attribution", "interventions", "detection", "steering"),
    *("evaluation", "plots", "organisms", "engines", "cli"),
]
PASSING_ON = {  # to a function of TransformerLens or transformers, with whatever that takes
    *("model.HookedMoE.from_pretrained", "model.HookedMoE.forward", "model.HookedMoE.generate"),
    *(
        "model.HookedMoE.hf_generate",
        "model.HookedMoE.save_pretrained",
        "model.HookedMoE.generate_stream",
        "model.HookedMoE.run_with_cache",
    ),
    *("model.HookedMoE.run_with_hooks", "model.HookedMoE.hooks", "model.HookedMoE.add_hook"),
    *("model.HookedMoE.enable_compatibility_mode", "organisms.load", "statistics.generate_text"),
    *("model.RoutedModel.from_pretrained", "model.RoutedModel.forward"),
    *("model.RoutedModel.run_with_hooks", "model.RoutedModel.run_with_cache"),
}


def public_callables() -> Iterator[tuple[str, Callable[..., Any]]]:
    """("room.name" or "room.Class.method", it) for everything the rooms show that is written here."""
    for room in ROOMS:
        face = import_module(f"moe_lens.{room}")
        for name in face.__all__:
            thing = getattr(face, name)
            if inspect.isfunction(thing):
                yield f"{room}.{name}", thing
            elif inspect.isclass(thing) or inspect.ismodule(thing):
                module = thing.__module__ if inspect.isclass(thing) else thing.__name__
                for member, value in vars(thing).items():
                    function = getattr(value, "__func__", value)  # of a class method
                    is_ours = inspect.isfunction(function) and function.__module__ == module
                    if is_ours and module.startswith("moe_lens.") and not member.startswith("_"):
                        yield f"{room}.{name}.{member}", function


FUNCTIONS = dict(public_callables())


def hidden_parameters(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [str(parameter) for parameter in parameters if parameter.kind is inspect.Parameter.VAR_KEYWORD]


def test_the_rooms_were_walked() -> None:
    expected = {"text.ContrastivePairs.from_jsonl", "text.contrasts.cited_against_uncited", "plots.volcano"}
    assert expected <= set(FUNCTIONS)
    assert {name.partition(".")[0] for name in FUNCTIONS} == set(ROOMS)

    def hidden(rows: Any, **options: Any) -> None: ...

    assert len(hidden_parameters(hidden)) == 1


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parameters_are_written_out(name: str) -> None:
    assert (not hidden_parameters(FUNCTIONS[name])) or name in PASSING_ON


def test_those_that_pass_on_are_still_there() -> None:
    assert set(FUNCTIONS) >= PASSING_ON
