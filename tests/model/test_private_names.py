"""Names of other libraries that they do not document: each is there and does what moe_lens needs of it.

Where one fails, a new version of that library has changed it: `moe_lens/model/private_names.py` says what
depends on it.
"""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.supported_architectures.rwkv7 import RWKV7ArchitectureAdapter

import moe_lens
from moe_lens import hook_names
from moe_lens.model.hooked_moe import HookedMoE, attach, detach
from moe_lens.model.private_names import (
    CHECKPOINT,
    PointsOnly,
    adapters_are_off,
    add_points,
    attention_of,
    become,
    execution_device,
    foreign_hooks,
    has_hooks,
    hf_path,
    implementation_of,
    inside_compiled,
    is_compiled,
    n_forward_hooks,
    offloaded_weights,
    remove_points,
    stands_on,
    supports_padding,
    take_off,
)
from tests.tiny_models import plain_bridge, tiny_model, tokens

PACKAGE = Path(moe_lens.__file__).parent


class Fields:
    """Just attributes."""

    def __init__(self, **fields: Any):
        self.__dict__.update(fields)


def scan_again(bridge: Any) -> None:
    """TransformerLens builds its registry anew, as it does in compatibility mode."""
    bridge.clear_hook_registry()
    bridge._initialize_hook_registry()


# TransformerLens


def test_the_bridges_hook_registry_is_what_hook_dict_shows() -> None:
    bridge: Any = plain_bridge(tiny_model("olmoe"))
    assert isinstance(bridge._hook_registry, dict)
    point = HookPoint()
    bridge._hook_registry["blocks.0.my_point"] = point
    assert bridge.hook_dict["blocks.0.my_point"] is point
    del bridge._hook_registry["blocks.0.my_point"]
    assert "blocks.0.my_point" not in bridge.hook_dict


def test_a_block_sets_the_aliases_of_its_registry() -> None:
    bridge: Any = plain_bridge(tiny_model("olmoe"))
    block = bridge.blocks[0]
    block.mlp.my_point = HookPoint()
    assert not hasattr(block, "my_alias")
    block._hook_alias_registry.update({"my_alias": "mlp.my_point"})
    block._register_aliases()
    assert block.my_alias is block.mlp.my_point


def test_a_component_notes_every_point_that_is_set_on_it() -> None:
    bridge: Any = plain_bridge(tiny_model("olmoe"))
    mlp = bridge.blocks[0].mlp
    assert isinstance(mlp, GeneralizedComponent)
    mlp.my_point = point = HookPoint()
    assert mlp._hook_registry["my_point"] is point
    del mlp.my_point
    assert "my_point" in mlp._hook_registry  # so that it has to be taken out there


@pytest.mark.parametrize("recipe", ["olmoe", "jamba", "nemotron_h"])
def test_points_come_and_go_and_no_scan_brings_them_back(recipe: str) -> None:
    bridge: Any = plain_bridge(tiny_model(recipe))
    number = 1
    before, attributes = set(bridge.hook_dict), set(vars(bridge.blocks[number]))
    point = HookPoint()
    add_points(bridge, {number: {"hook_mine": point}})
    for name in ("hook_mine", "mlp.hook_mine"):
        assert bridge.hook_dict[f"blocks.{number}.{name}"] is point
    scan_again(bridge)
    assert bridge.hook_dict[f"blocks.{number}.mlp.hook_mine"] is point
    remove_points(bridge, number, ("hook_mine",))
    if isinstance(bridge.blocks[number].mlp, PointsOnly):
        del bridge.blocks[number].mlp
    scan_again(bridge)
    assert set(bridge.hook_dict) == before
    assert set(vars(bridge.blocks[number])) == attributes


def test_compatibility_mode_and_detach_leave_no_point_to_find() -> None:
    model: Any = HookedMoE.from_hf(tiny_model("olmoe"))
    model.enable_compatibility_mode(no_processing=True)
    assert hook_names.router_logits(0) in model.hook_dict
    detach(model)
    scan_again(model)
    assert not any(hook_names.parse(name) for name in model.hook_dict)


def test_wrapped_modules_are_named_after_their_wrapper() -> None:
    bridge = plain_bridge(tiny_model("olmoe"))
    inner = bridge.blocks[0].mlp.original_component
    [name] = [name for name, module in bridge.blocks.named_modules(prefix="blocks") if module is inner]
    assert "._original_component" in name
    assert hf_path(name) == "blocks.0.mlp"
    assert hf_path("blocks.0.mlp._original_component.gate") == "blocks.0.mlp.gate"


def test_hooks_that_libraries_leave_on_modules_are_nobodys_own() -> None:
    bridge: Any = plain_bridge(tiny_model("olmoe"))
    bridge.run_with_cache(torch.tensor([[1, 2]]))  # transformers captures outputs from now on
    modules = list(bridge.original_model.modules())
    assert any(module._forward_hooks for module in modules)
    assert not any(foreign_hooks(module) for module in modules)
    modules[-1].register_forward_hook(lambda *_: None)
    assert foreign_hooks(modules[-1])


def test_a_compiled_module_is_found_inside() -> None:
    linear = nn.Linear(2, 2)
    compiled: Any = torch.compile(linear)
    assert inside_compiled(compiled) is linear
    assert inside_compiled(linear) is linear


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompt_learning_says_when_it_is_off(kind: str) -> None:
    peft = pytest.importorskip("peft")
    learned = getattr(peft, kind)(num_virtual_tokens=2, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model("olmoe"), learned)
    assert not adapters_are_off(model)
    with model.disable_adapter():
        assert adapters_are_off(model)
    assert not adapters_are_off(model)


def test_adapters_say_whether_they_take_padding() -> None:
    assert ArchitectureAdapter.supports_batched_generation is True
    assert RWKV7ArchitectureAdapter.supports_batched_generation is False
    assert supports_padding(plain_bridge(tiny_model("olmoe")))
    assert not supports_padding(Fields(adapter=RWKV7ArchitectureAdapter))


def test_a_bridge_may_become_one_of_another_class() -> None:
    bridge = plain_bridge(tiny_model("olmoe"))
    before = bridge(tokens())
    attributes = set(vars(bridge))
    become(bridge, type("OtherBridge", (TransformerBridge,), {}))
    assert type(bridge).__name__ == "OtherBridge"
    assert torch.equal(bridge(tokens()), before)
    assert set(vars(bridge)) == attributes
    assert attach(bridge) is bridge


# torch


def gradient(*args: Any) -> None: ...


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "_forward_hooks": lambda module: module.register_forward_hook(gradient),
    "_forward_pre_hooks": lambda module: module.register_forward_pre_hook(gradient),
    "_backward_hooks": lambda module: module.register_full_backward_hook(gradient),
    "_backward_pre_hooks": lambda module: module.register_full_backward_pre_hook(gradient),
}


@pytest.mark.parametrize("name", HOOKS)
def test_torch_keeps_its_hooks_where_has_hooks_looks(name: str) -> None:
    module = nn.Identity()
    assert not getattr(module, name)
    assert not has_hooks(module)
    handle = HOOKS[name](module)
    assert len(getattr(module, name)) == 1
    assert has_hooks(module)
    handle.remove()
    assert not has_hooks(module)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_hooks_of_transformer_lens_are_among_them(direction: Any) -> None:
    point: Any = HookPoint()
    point.add_hook(lambda value, hook: None, dir=direction)
    assert has_hooks(point)
    point.remove_hooks(direction)
    assert not has_hooks(point)


# transformers, whose public method takes the place of a private field


def test_a_model_says_how_it_runs_its_experts() -> None:
    hf_model = tiny_model("olmoe")
    hf_model.set_experts_implementation("batched_mm")
    assert "batched_mm" in hf_model.get_experts_implementation().values()
    hf_model.set_experts_implementation("eager")
    assert set(hf_model.get_experts_implementation().values()) == {"eager"}


# transformers and accelerate


def test_a_checkpointed_block_calls_what_transformers_sets_on_it() -> None:
    model = tiny_model("olmoe").train()
    model.gradient_checkpointing_enable()
    block: Any = model.model.layers[0]
    calls, own = [], vars(block)[CHECKPOINT]
    vars(block)[CHECKPOINT] = lambda function, *args: calls.append(function) or own(function, *args)
    model(tokens())
    assert len(calls) == 1


@pytest.mark.parametrize("way", ["eager", "grouped_mm", "batched_mm"])
def test_how_experts_run_is_what_was_asked_for(way: str) -> None:
    model: Any = tiny_model("olmoe")
    model.set_experts_implementation(way)
    assert implementation_of(model.model.layers[0].mlp.experts) == way
    assert implementation_of(None) is None


def test_the_attention_of_a_config_is_what_was_asked_for() -> None:
    model = tiny_model("olmoe")
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert attention_of(model.config) == name
    assert attention_of(None) is None


def test_accelerate_says_where_it_runs_a_module_and_keeps_the_forward_that_it_found() -> None:
    class Stood:
        __name__ = "stood"

        def __call__(self, x: Any) -> Any:
            return x + 1

    linear: Any = nn.Linear(2, 2)
    own, stood = linear.forward, Stood()
    assert execution_device(linear) is None
    linear.forward = stood
    assert stands_on(linear, Stood) is stood
    add_hook_to_module(linear, AlignDevicesHook(execution_device="cpu"))
    assert execution_device(linear) == "cpu"
    assert stands_on(linear, Stood) is stood
    assert torch.equal(linear(torch.zeros(1, 2)), torch.ones(1, 2))
    take_off(linear, stood, own, False)
    assert stands_on(linear, Stood) is None
    assert torch.equal(linear(torch.zeros(1, 2)), linear.bias[None])


def test_accelerate_keeps_offloaded_weights_where_they_are_looked_for() -> None:
    linear = nn.Linear(2, 2)
    assert offloaded_weights(linear) is None
    kept = {"weight": linear.weight.detach().clone(), "bias": linear.bias.detach().clone()}
    add_hook_to_module(linear, AlignDevicesHook(execution_device="cpu", offload=True, weights_map=kept))
    found = offloaded_weights(linear)
    assert linear.weight.is_meta
    assert found is not None
    assert torch.equal(found["weight"], kept["weight"])


# torch


def test_a_compiled_module_says_so() -> None:
    linear = nn.Linear(2, 2)
    assert not is_compiled(linear)
    linear.compile(backend="eager")
    assert is_compiled(linear)


def test_hooks_before_and_after_a_forward_are_numbered() -> None:
    linear = nn.Linear(2, 2)
    assert n_forward_hooks(linear) == 0
    linear.register_forward_hook(lambda *_: None)
    linear.register_forward_pre_hook(lambda *_: None)
    linear.register_full_backward_hook(lambda *_: None)
    assert n_forward_hooks(linear) == 2


# The package


ENGINES: dict[str, set[str]] = {
    "engines/harness_model.py": {"_encode_pair"},
    "engines/harness_scores.py": {"_filters", "_instances", "__qualname__"},
}  # fmt: skip
"""What engines use of other programs, whose versions are pinned for it, and of Python."""


def files() -> Iterator[tuple[str, ast.Module]]:
    for path in PACKAGE.rglob("*.py"):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def names_of_ours() -> set[str]:
    """Whatever the package defines: functions, classes, fields, attributes."""
    names: set[str] = set()
    for _, tree in files():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    for part in ast.walk(target):
                        if isinstance(part, ast.Name):
                            names.add(part.id)
                        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                            names |= {part.attr} if part.value.id == "self" else set()
    return names


def foreign_private_names(tree: ast.Module, ours: set[str]) -> set[str]:
    """Underscored attributes that the package does not define, by `getattr` too, and `__class__ =`."""
    documented = {
        "_asdict",
        "_replace",
        "_fields",
        "_getframe",
        "_current_frames",
        "__array__",
        "__index__",
        "__name__",
        "__self__",
    }  # Python and numpy
    used: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            is_class = node.attr == "__class__" and isinstance(node.ctx, ast.Store)
            used |= {node.attr} if is_class or not node.attr.startswith("__") else set()
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            name = node.args[1]
            used |= {name.value} if isinstance(name, ast.Constant) and isinstance(name.value, str) else set()
    return {name for name in used if name.startswith("_")} - ours - documented


def test_one_file_uses_private_names_of_other_libraries() -> None:
    ours = names_of_ours()
    used = {path: foreign_private_names(tree, ours) for path, tree in files()}
    of_engines = {path: names for path, names in used.items() if names and path.startswith("engines/")}
    assert of_engines == ENGINES
    assert {path for path in used if used[path]} - set(ENGINES) == {"model/private_names.py"}
    assert used["model/private_names.py"] == {
        "_hook_registry", "_hook_alias_registry", "_register_aliases", "__class__", "__module__", *HOOKS,
        "_hf_hook", "_attn_implementation", "_experts_implementation", "_compiled_call_impl", "_orig_mod",
        "_adapters_disabled",
    }  # fmt: skip


def test_imports_are_of_public_modules() -> None:
    for path, tree in files():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("moe_lens"):
                parts = set((node.module or "").split(".")[1:]) - {"__main__"}  # a command, to be run
                assert not any(part.startswith("_") for part in parts), path
                assert not any(alias.name.startswith("_") for alias in node.names), path
