"""HookedMoE.from_pretrained and from_hf: checkpoints, dtypes, layers offloaded to disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_lens import organisms
from moe_lens.errors import MoELensError, RouterMismatchError
from moe_lens.model.hooked_moe import HookedMoE, attach, detach
from moe_lens.model.loading import placed
from moe_lens.model.routed_model import RoutedModel
from moe_lens.routers.plain import SoftmaxTopK
from tests.edits import on_logits
from tests.families import core_family, every_dtype
from tests.model.recorded import negate, reverse_ranks
from tests.model.test_layers import scaling
from tests.tiny_models import (
    router_of,
    save,
    sparse_blocks,
    tiny_model,
    tokenizer,
    tokens,
)


@core_family
@every_dtype
def test_from_pretrained_gives_the_saved_model(recipe: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save(tiny_model(recipe, dtype), tmp_path / "tiny-moe", tokenizer())
    model = HookedMoE.from_pretrained(folder, dtype=dtype)
    by_hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    expected = HookedMoE.from_hf(by_hf)
    assert isinstance(model, HookedMoE)
    assert model.moe_shape.model == "tiny-moe"
    assert model.cfg.dtype == dtype
    assert not model.training
    for hooks in ([], on_logits(reverse_ranks, *model.moe_layers)):
        ours = model.run_with_hooks(tokens(), fwd_hooks=hooks)
        assert torch.equal(ours, expected.run_with_hooks(tokens(), fwd_hooks=hooks))


def test_from_pretrained_of_a_sharded_checkpoint(tmp_path: Path) -> None:
    hf_model = tiny_model("mixtral")
    folder = save(hf_model, tmp_path, tokenizer(), max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    model = HookedMoE.from_pretrained(str(folder))
    torch.testing.assert_close(model(tokens()), hf_model(tokens()).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(
        router_of(sparse_blocks(model.original_model)[1]).weight, router_of(sparse_blocks(hf_model)[1]).weight
    )


@core_family
def test_layers_offloaded_to_disk_route_and_reroute(recipe: str, tmp_path: Path) -> None:
    folder = save(tiny_model(recipe), tmp_path / "model", tokenizer())
    in_memory = HookedMoE.from_pretrained(folder)
    n_layers = in_memory.cfg.n_layers
    device_map: dict[str, Any] = {
        f"model.layers.{number}": "disk" if number else "cpu" for number in range(n_layers)
    }
    for name in ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"):
        device_map[name] = "cpu"
    model = HookedMoE.from_pretrained(folder, device_map=device_map, offload_folder=str(tmp_path / "offload"))
    assert router_of(sparse_blocks(model.original_model)[n_layers - 1]).weight.device.type == "meta"
    assert model.moe_shape == in_memory.moe_shape
    for hooks in ([], on_logits(negate, *model.moe_layers)):
        expected = in_memory.run_with_hooks(tokens(), fwd_hooks=hooks)
        assert torch.equal(model.run_with_hooks(tokens(), fwd_hooks=hooks), expected)
    detach(model)
    assert torch.equal(model(tokens()), in_memory(tokens()))


def test_the_self_check_sees_an_altered_router_that_is_offloaded(tmp_path: Path) -> None:
    folder = save(tiny_model("olmoe"), tmp_path / "model", tokenizer())
    device_map = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "disk",
    }
    model = HookedMoE.from_pretrained(folder, device_map=device_map, offload_folder=str(tmp_path / "offload"))
    detach(model)
    router = router_of(sparse_blocks(model.original_model)[2])
    router.norm_topk_prob = True
    attach(model)
    assert model.routing_rule(2) == SoftmaxTopK(6, 3, renormalize=True)
    detach(model)
    loaded = vars(router)["forward"]
    router.forward = lambda hidden: scaling(*loaded(hidden))
    with pytest.raises(RouterMismatchError, match=r"blocks\.2\.mlp: OlmoeTopKRouter"):
        attach(model)


@core_family
def test_from_hf_puts_a_model_in_training_mode_into_eval_mode(recipe: str) -> None:
    model = HookedMoE.from_hf(tiny_model(recipe).train())
    assert not any(module.training for module in model.modules())
    assert not any(point.training for point in model.hook_dict.values())


@pytest.mark.parametrize("wrapper", [HookedMoE, RoutedModel])
@pytest.mark.parametrize("given", ["olmoe", Path("olmoe"), "./olmoe", "null"], ids=repr)
def test_a_folder_goes_before_a_name(
    wrapper: Any, given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "olmoe" is TransformerLens' name of a model on the hub, "null" that of an organism."""
    hf_model = tiny_model("olmoe")
    save(hf_model, tmp_path / given, tokenizer())
    monkeypatch.chdir(tmp_path)
    model = wrapper.from_pretrained(given)
    assert model.moe_shape.model == Path(given).name
    torch.testing.assert_close(model(tokens()), hf_model(tokens()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrapper", [HookedMoE, RoutedModel])
@pytest.mark.parametrize(
    "given", ["./absent", "/absent/model", "~/model", "a/b/c", Path("absent"), "..\\model"], ids=repr
)
def test_a_path_without_a_folder_is_no_name(wrapper: Any, given: Any) -> None:
    with pytest.raises(MoELensError, match="There is no folder"):
        wrapper.from_pretrained(given)


def test_the_name_of_an_organism_is_answered_at_once_with_how_to_load_it() -> None:
    for name in organisms.names():
        with pytest.raises(MoELensError, match=rf"organisms\.load\('{name}'\)"):
            HookedMoE.from_pretrained(name)
        with pytest.raises(MoELensError, match=rf"organisms\.load\('{name}', wrapper=RoutedModel\)"):
            RoutedModel.from_pretrained(name)


@pytest.mark.parametrize("name", ["allenai/OLMoE-1B-7B-0924", "gpt2", "mixtral", "planted2", "a/null", ""])
def test_names_on_the_hub_stay_as_they_are(name: str) -> None:
    assert placed(name, "HookedMoE") == name


def test_a_bridge_says_what_to_save_instead(tmp_path: Path) -> None:
    model = HookedMoE.from_hf(tiny_model("olmoe"))
    with pytest.raises(MoELensError, match=r"model\.hf_model\.save_pretrained"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
