"""The table of supported models against both packages, the rules, the recipes and the page."""

import inspect
import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import nn
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

import moe_lens
from moe_lens.errors import MoELensError
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.layers import find_moe_layers
from moe_lens.model.loading import TRANSFORMER_LENS_NAMES
from moe_lens.routers.models import SupportedModel, markdown_table, supported_models
from moe_lens.routers.plain import SoftmaxTopK, TopKSoftmax
from moe_lens.routers.rule import RoutingRule
from moe_lens.routers.table import REFUSED_ROUTERS, RULES, Family, register_rule, rule_for
from tests.tiny_models import EVERY_FAMILY, tiny_model

MODELS = {model.architecture: model for model in supported_models()}
every_model = pytest.mark.parametrize("model", supported_models(), ids=lambda model: model.architecture)
ROUTER = re.compile(r"(Router|Gating|Gate)$")
EXPERTS = re.compile(r"Experts$")
CHOOSES = re.compile(r"top_?k|argmax|\.max\(", re.IGNORECASE)


@cache
def recipes() -> dict[str, list[str]]:
    """Architecture -> its recipes."""
    found: dict[str, list[str]] = {}
    for recipe in EVERY_FAMILY:
        found.setdefault(type(tiny_model(recipe)).__name__, []).append(recipe)
    return found


@cache
def native_routers(architecture: str) -> tuple[str, ...] | None:
    """Router classes in the modeling file of an architecture; None where transformers does not have it.

    A module counts whose class name ends as a router's does and whose code chooses among something; of a file
    that has experts and no such class, the experts.
    """
    cls = getattr(transformers, architecture, None)
    if not inspect.isclass(cls):
        return None
    modules = {
        name: module
        for name, module in vars(sys.modules[cls.__module__]).items()
        if inspect.isclass(module) and issubclass(module, nn.Module)
    }
    routers = [
        name
        for name, module in modules.items()
        if ROUTER.search(name) and CHOOSES.search(inspect.getsource(module))
    ]
    return tuple(routers or (name for name in modules if EXPERTS.search(name)))


def by_transformers_name(architecture: str) -> str:
    names = {ours: hf for hf, ours in TRANSFORMER_LENS_NAMES.items()}
    return names.get(architecture, architecture)


# Both packages


def test_every_architecture_of_both_packages_with_a_native_router_is_supported_or_refused() -> None:
    missing = {}
    for name in map(by_transformers_name, SUPPORTED_ARCHITECTURES):
        routers = native_routers(name)
        if routers and name not in MODELS and not set(routers) <= set(REFUSED_ROUTERS):
            missing[name] = routers
    assert missing == {}


def test_the_search_finds_what_is_known_and_only_moe_models() -> None:
    """So that the test above can fail."""
    assert native_routers("OlmoeForCausalLM") == ("OlmoeTopKRouter",)
    assert native_routers("SwitchTransformersForConditionalGeneration") == ("SwitchTransformersTop1Router",)
    assert native_routers("DbrxForCausalLM")
    assert native_routers("LlamaForCausalLM") == ()
    assert native_routers("NoSuchForCausalLM") is None


@every_model
def test_a_supported_model_is_in_both_packages(model: SupportedModel) -> None:
    assert model.architecture in set(map(by_transformers_name, SUPPORTED_ARCHITECTURES))
    assert set(native_routers(model.architecture) or ()) == set(model.router.split(", "))


def test_refused_routers_exist_and_have_no_rule() -> None:
    native = {
        router
        for name in map(by_transformers_name, SUPPORTED_ARCHITECTURES)
        for router in native_routers(name) or ()
    }
    assert set(REFUSED_ROUTERS) <= native
    assert not set(REFUSED_ROUTERS) & set(RULES)
    assert native == set(RULES) | set(REFUSED_ROUTERS)


# Rules and recipes


def test_the_table_is_sorted_without_doubles() -> None:
    names = [model.architecture for model in supported_models()]
    assert len(set(names)) == len(names)
    assert names == sorted(names)


@every_model
def test_every_row_has_a_recipe(model: SupportedModel) -> None:
    assert recipes().get(model.architecture)


def test_every_recipe_has_a_row_and_every_rule_is_used() -> None:
    assert set(recipes()) == set(MODELS)
    assert {router for model in supported_models() for router in model.router.split(", ")} == set(RULES)


@every_model
def test_router_and_rule_are_those_of_the_tiny_models(model: SupportedModel) -> None:
    layers = [moe for recipe in recipes()[model.architecture] for moe in find_moe_layers(tiny_model(recipe))]
    assert {type(moe.router).__name__ for moe in layers} == set(model.router.split(", "))
    assert {type(moe.rule).__name__ for moe in layers} == set(re.split(", | or ", model.rule))


@every_model
def test_the_config_field_says_k(model: SupportedModel) -> None:
    for recipe in recipes()[model.architecture]:
        hf_model = tiny_model(recipe)
        config: Any = hf_model.config.get_text_config()
        k = int(model.top_k) if model.top_k.isdigit() else getattr(config, model.top_k)
        assert {moe.rule.top_k for moe in find_moe_layers(hf_model)} == {k}
        assert k < min(moe.rule.n_experts for moe in find_moe_layers(hf_model))


@every_model
def test_another_k_in_the_config_is_the_rules_k(model: SupportedModel) -> None:
    if model.top_k.isdigit():
        return
    recipe = recipes()[model.architecture][0]
    config: Any = tiny_model(recipe).config
    nested = config is not config.get_text_config()
    fields = config.get_text_config().to_dict() if nested else {}
    changed: dict[str, Any] = {"text_config": {**fields, model.top_k: 1}} if nested else {model.top_k: 1}
    assert {moe.rule.top_k for moe in find_moe_layers(tiny_model(recipe, **changed))} == {1}


# One row


class NewRouter(nn.Linear):
    """The router of a family that nobody supports yet."""


def read_new_router(router: Any, block: Any) -> TopKSoftmax | SoftmaxTopK:
    return TopKSoftmax(router.out_features, 2)


def test_a_new_family_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    before = markdown_table().splitlines()
    row = Family(
        read_new_router,
        architectures={"NewMoeForCausalLM": "a dense first layer"},
        top_k="n_active",
        refused="steering of even layers: they are odd",
        wrong_in_compatibility_mode=("fold_ln",),
    )
    monkeypatch.setitem(RULES, "NewRouter", row)
    assert rule_for(NewRouter(3, 5)) == TopKSoftmax(5, 2)
    [model] = [model for model in supported_models() if model not in MODELS.values()]
    assert model == SupportedModel(
        "NewMoeForCausalLM",
        "NewRouter",
        "TopKSoftmax or SoftmaxTopK",
        "n_active",
        "a dense first layer",
        "steering of even layers: they are odd",
        ("fold_ln",),
    )
    [line] = [line for line in markdown_table().splitlines() if line not in before]
    assert line == (
        "| `NewMoeForCausalLM` | NewRouter | TopKSoftmax or SoftmaxTopK | `n_active` | a dense first layer | "
        "steering of even layers: they are odd; compatibility mode with `fold_ln`, if a shared expert is "
        "exactly as wide as the model |"
    )


def test_a_second_row_for_an_architecture_adds_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Family(
        read_new_router,
        architectures={"OlmoeForCausalLM": "new routers in odd layers"},
        wrong_in_compatibility_mode=("fold_ln",),
    )
    monkeypatch.setitem(RULES, "NewRouter", row)
    [model] = [model for model in supported_models() if model.architecture == "OlmoeForCausalLM"]
    assert model.router == "OlmoeTopKRouter, NewRouter"
    assert model.rule == "SoftmaxTopK, TopKSoftmax or SoftmaxTopK"
    assert (model.special, model.refused) == ("new routers in odd layers", "")
    assert model.wrong_in_compatibility_mode == ("fold_ln",)


def test_compatibility_mode_refuses_what_the_row_names(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HookedMoE.from_hf(tiny_model("olmoe"))
    row = replace(RULES["OlmoeTopKRouter"], wrong_in_compatibility_mode=("center_unembed",))
    monkeypatch.setitem(RULES, "OlmoeTopKRouter", row)
    with pytest.raises(MoELensError, match=r"center_unembed.*OlmoeForCausalLM.*center_unembed=False"):
        model.enable_compatibility_mode()
    assert not model.compatibility_mode


def test_a_registered_rule_names_no_model_and_a_replaced_one_keeps_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("NewRouter", "LagunaTopKRouter"):  # so that the test leaves the table as it was
        monkeypatch.setitem(RULES, name, RULES["LagunaTopKRouter"])
    register_rule("NewRouter", lambda router: TopKSoftmax(5, 2), replace=True)
    monkeypatch.delitem(RULES, "NewRouter")
    register_rule("NewRouter", lambda router: TopKSoftmax(5, 2))
    register_rule("LagunaTopKRouter", lambda router: TopKSoftmax(5, 2), replace=True)
    assert {model.architecture for model in supported_models()} == set(MODELS)
    [laguna] = [model for model in supported_models() if model.router == "LagunaTopKRouter"]
    assert laguna == replace(MODELS["LagunaForCausalLM"], rule=RoutingRule.__name__)


# What it says elsewhere


def test_the_documentation_has_the_table() -> None:
    page = Path(moe_lens.__file__).parents[1] / "docs" / "reference" / "supported-models.md"
    text = page.read_text(encoding="utf-8")
    [table] = re.findall(r"<!-- supported models -->\n(.*?)<!-- /supported models -->", text, re.DOTALL)
    assert table.strip() == markdown_table().strip()


def test_the_markdown_has_a_line_for_each_model() -> None:
    header, rule, *lines = markdown_table().splitlines()
    assert header.count("|") == rule.count("|") == 7
    for line, model in zip(lines, supported_models(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:4] == [
            f"`{model.architecture}`",
            model.router,
            model.rule,
            "2" if model.architecture == "PhimoeForCausalLM" else f"`{model.top_k}`",
        ]
        assert cells[4] == model.special
        assert model.refused in cells[5]
        assert all(f"`{option}`" in cells[5] for option in model.wrong_in_compatibility_mode)
