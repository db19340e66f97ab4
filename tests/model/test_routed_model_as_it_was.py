"""A model with hook points stays a Hugging Face model: saved, resized, dispatched, compiled, detached.

Oracle: a model with the same weights that never had points.
"""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moe_lens import RoutedModel, SteeringPlan, attach, detach, hook_names, steered
from tests.families import first_of, some_kinds
from tests.tiny_models import EVERY_FAMILY, tiny_model, tokens

core = pytest.mark.parametrize("recipe", ["olmoe", "deepseek_v3", "gpt_oss"])


def lower_expert_0(logits: Tensor, hook: Any) -> Tensor:
    return torch.cat([logits[..., :1] - 3, logits[..., 1:]], dim=-1)


def hooks_of(model: RoutedModel) -> list[tuple[str, Any]]:
    return [(hook_names.router_logits(layer), lower_expert_0) for layer in model.moe_layers]


def traces(model: Any) -> dict[str, Any]:
    """What stands on each module, and its hooks."""
    return {
        name: (type(part), set(vars(part)), [len(table) for table in tables(part)])
        for name, part in model.named_modules()
    }


def tables(part: Any) -> list[Any]:
    return [
        part._forward_hooks,
        part._forward_pre_hooks,
        part._backward_hooks,
        part._backward_pre_hooks,
        part._forward_hooks_with_kwargs,
        part._forward_hooks_always_called,
        part._forward_pre_hooks_with_kwargs,
        part._state_dict_hooks,
        part._load_state_dict_pre_hooks,
    ]


# Saved and loaded


@some_kinds
def test_it_is_saved_as_without_points(recipe: str, tmp_path: Path) -> None:
    plain, model = tiny_model(recipe), tiny_model(recipe)
    routed = attach(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    with routed.hooks(hooks_of(routed)):
        model.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    configs = [(tmp_path / name / "config.json").read_text() for name in ("ours", "theirs")]
    assert configs[0] == configs[1]
    loaded = type(model).from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(loaded(tokens()).logits, plain(tokens()).logits)


@core
def test_weights_are_loaded_into_it(recipe: str) -> None:
    model, other = tiny_model(recipe), tiny_model(recipe, seed=1)
    attach(model)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(tokens()).logits, other(tokens()).logits)


@core
def test_it_may_be_pickled_whole(recipe: str) -> None:
    model = tiny_model(recipe)
    attach(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(tokens()).logits, tiny_model(recipe)(tokens()).logits)
    plan = SteeringPlan(deactivate=[(1, 0)])
    with steered(loaded, plan):
        ours = loaded(tokens()).logits
    with steered(model, plan):
        assert torch.equal(ours, model(tokens()).logits)


@core
def test_embeddings_are_resized(recipe: str) -> None:
    plain, model = tiny_model(recipe), tiny_model(recipe)
    routed = attach(model)
    for each in (plain, model):
        torch.manual_seed(0)
        each.resize_token_embeddings(60)
    assert torch.equal(model(tokens()).logits, plain(tokens()).logits)
    assert routed.cfg.d_vocab == 60
    assert routed.run_with_hooks(tokens(), fwd_hooks=hooks_of(routed)).shape[-1] == 60


# What it reports


@some_kinds
def test_it_reports_the_router_logits_that_ran(recipe: str) -> None:
    model = tiny_model(recipe)
    plain = getattr(model(tokens(), output_router_logits=True), "router_logits", ())
    routed, edited = attach(model), {}

    def edit(logits: Tensor, hook: Any) -> Tensor:
        edited[hook.name] = lower_expert_0(logits, hook).flatten(0, -2)
        return edited[hook.name].view_as(logits)

    with routed.hooks([(hook_names.router_logits(layer), edit) for layer in routed.moe_layers]):
        reported = model(tokens(), output_router_logits=True).router_logits
    again = model(tokens(), output_router_logits=True).router_logits
    assert [entry.shape for entry in reported] == [entry.shape for entry in plain]
    assert all(torch.equal(entry, before) for entry, before in zip(again, plain, strict=True))
    wanted = list(edited.values())
    if recipe.startswith("gemma4"):  # its routers report probabilities
        wanted = [logits.softmax(-1) for logits in wanted]
    if recipe == "jetmoe":  # and those of its attention's experts
        reported = [entry for entry in reported if any(torch.equal(entry, logits) for logits in wanted)]
    if recipe == "deepseek_v4_hash":  # not of layers without a choice
        wanted = wanted[-len(reported) :]
    assert len(reported) >= len(wanted)
    for entry, logits in zip(reported, wanted, strict=False):
        torch.testing.assert_close(entry.float(), logits.float())


# Compiled


@pytest.mark.parametrize("recipe", first_of(["olmoe"], ["mixtral", "deepseek_v3", "gpt_oss"]))
def test_unhooked_it_compiles_whole(recipe: str) -> None:
    model = tiny_model(recipe)
    expected = model(tokens()).logits
    attach(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, expected)


@core
def test_unhooked_it_is_exported(recipe: str) -> None:
    model = tiny_model(recipe)
    model.set_experts_implementation("batched_mm")
    expected = model(tokens()).logits
    attach(model)
    exported = torch.export.export(model, (tokens(),), {"use_cache": False}, strict=False)
    torch.testing.assert_close(exported.module()(tokens(), use_cache=False).logits, expected)


# On several devices


def offloaded(model: Any, how: str, folder: Path) -> Any:
    if how == "cpu_offload":
        return cpu_offload(model, torch.device("cpu"))
    if how == "disk_offload":
        return disk_offload(model, str(folder), torch.device("cpu"))
    if how == "dispatch_model":
        placed: dict[str, Any] = {name: "cpu" for name, _ in model.named_children()} | {"model": "disk"}
        return dispatch_model(model, placed, main_device=torch.device("cpu"), offload_dir=str(folder))
    for part in model.modules():
        add_hook_to_module(part, AlignDevicesHook(io_same_device=True))
    return model


HOW = ("cpu_offload", "disk_offload", "dispatch_model", "a hook on each module")


@pytest.mark.parametrize("order", ["dispatched first", "points first"])
@pytest.mark.parametrize("how", HOW)
@core
def test_it_is_dispatched_before_or_after(recipe: str, how: str, order: str, tmp_path: Path) -> None:
    oracle = RoutedModel(tiny_model(recipe))
    plain = oracle(tokens())
    edited = oracle.run_with_hooks(tokens(), fwd_hooks=hooks_of(oracle))
    model = tiny_model(recipe)
    routed = RoutedModel(model) if order == "points first" else None
    model = offloaded(model, how, tmp_path)
    before = traces(model)
    routed = routed or RoutedModel(model)
    assert torch.equal(routed(tokens()), plain)
    assert torch.equal(routed.run_with_hooks(tokens(), fwd_hooks=hooks_of(routed)), edited)
    assert not torch.equal(edited, plain)
    with steered(model, SteeringPlan(deactivate=[(1, 0)])):
        ours = model(tokens()).logits
    with steered(oracle, SteeringPlan(deactivate=[(1, 0)])):
        assert torch.equal(ours, oracle(tokens()))
    detach(routed)
    assert torch.equal(model(tokens()).logits, plain)
    if order == "dispatched first":
        assert traces(model) == before


@core
def test_points_stay_when_accelerate_goes(recipe: str) -> None:
    """accelerate puts the forward back that it found: the one with points, or the one before them."""
    for points_first in (True, False):
        model = tiny_model(recipe)
        routed = RoutedModel(model) if points_first else None
        for part in model.modules():
            add_hook_to_module(part, AlignDevicesHook(io_same_device=True))
        routed = routed or RoutedModel(model)
        expected = routed.run_with_hooks(tokens(), fwd_hooks=hooks_of(routed))
        if points_first:
            remove_hook_from_module(model, recurse=True)
            assert torch.equal(routed.run_with_hooks(tokens(), fwd_hooks=hooks_of(routed)), expected)
            detach(routed)
        else:
            detach(routed)
            remove_hook_from_module(model, recurse=True)
        assert torch.equal(model(tokens()).logits, tiny_model(recipe)(tokens()).logits)


def test_from_pretrained_passes_everything_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("olmoe").save_pretrained(tmp_path)
    seen: dict[str, Any] = {}
    own = AutoModelForCausalLM.from_pretrained

    def note(name: str, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return own(name, **{key: value for key, value in kwargs.items() if key != "quantization_config"})

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", note)
    quantization = object()
    model = RoutedModel.from_pretrained(
        tmp_path,
        tokenizer=object(),
        quantization_config=quantization,
        dtype="bfloat16",
        device_map="cpu",
        attn_implementation="eager",
    )
    assert seen["quantization_config"] is quantization
    assert {key: seen[key] for key in ("dtype", "device_map", "attn_implementation")} == {
        "dtype": "bfloat16",
        "device_map": "cpu",
        "attn_implementation": "eager",
    }
    assert model.cfg.dtype == torch.bfloat16


# Without a trace


@pytest.mark.parametrize("recipe", EVERY_FAMILY)
def test_detaching_leaves_no_trace(recipe: str) -> None:
    model = tiny_model(recipe)
    plain = model(tokens()).logits  # transformers puts hooks of its own at some first runs
    model(tokens(), output_router_logits=True)
    before, keys = traces(model), list(model.state_dict())
    routed = RoutedModel(model)
    routed.set_use_expert_out(True)
    routed.run_with_cache(tokens())
    routed.add_hook(hook_names.router_logits(routed.moe_layers[0]), lower_expert_0)
    model(tokens())
    copied = copy.deepcopy(model)
    for each in (model, copied):
        assert detach(each) is each
        assert traces(each) == before
        assert list(each.state_dict()) == keys
        assert torch.equal(each(tokens()).logits, plain)
