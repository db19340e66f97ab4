"""Quantised checkpoints: transformers loads them, and RoutedModel hooks them as they are.

bitsandbytes and torchao quantise linear layers as they load; routers and batched experts stay as they are. Of
FP8 (DeepSeek-V3's layout) and MXFP4 (GPT-OSS's) the checkpoint itself is quantised, written here by formulas
of our own, and dequantised on loading, which a CPU can do.

torchao is no part of the dev extra, for transformers imports it with every model, which takes half a second
and is not quiet: install it by hand (`pip install torchao`) to run its tests.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    TorchAoConfig,
)
from transformers.utils.quantization_config import Mxfp4Config

from moe_lens import RoutedModel, SteeringPlan, hook_names, steer_hooks
from tests.tiny_models import save, tiny_model, tokenizer, tokens

WIDE = {"hidden_size": 64, "intermediate_size": 64}  # bitsandbytes packs 4 bit weights by 32 rows on a CPU
MLA = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 32, "moe_intermediate_size": 32}
WITHOUT_KV_B = ["lm_head", "kv_b_proj"]
BLOCK = 32
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def int8_weights() -> TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


def bits(**options: Any) -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**options)


def plain(recipe: str, folder: Path, **config: Any) -> Path:
    return save(tiny_model(recipe, **{**WIDE, **config}), folder, tokenizer())


def in_fp8(folder: Path) -> Path:
    """DeepSeek-V3's layout: float8 weights, and one factor for each block of them."""
    plain("deepseek_v3", folder, dtype=torch.bfloat16, **MLA)
    parts = load_file(folder / "model.safetensors")
    for name in [name for name, weight in parts.items() if "_proj" in name and weight.ndim == 2]:
        factors = (
            parts[name].float().unfold(0, BLOCK, BLOCK).unfold(1, BLOCK, BLOCK).abs().amax((-1, -2)) / 448
        )
        scaled = parts[name].float() / factors.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        parts[name] = scaled.to(torch.float8_e4m3fn)
        parts[f"{name}_scale_inv"] = factors
    how = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    return rewritten(folder, parts, how)


def in_mxfp4(folder: Path) -> Path:
    """GPT-OSS's layout: of each expert's rows, 32 numbers of 4 bits share a power of two."""
    plain("gpt_oss", folder, dtype=torch.bfloat16)
    parts = load_file(folder / "model.safetensors")
    draw = torch.Generator().manual_seed(0)
    for name in [name for name in parts if name.endswith(("gate_up_proj", "down_proj"))]:
        n_experts, n_in, n_out = parts.pop(name).shape
        shape = (n_experts, n_out, n_in // 32)
        parts[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=draw, dtype=torch.uint8)
        parts[f"{name}_scales"] = torch.randint(122, 125, shape, generator=draw, dtype=torch.uint8)
    return rewritten(
        folder, parts, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    )


def rewritten(folder: Path, parts: dict[str, Tensor], how: dict[str, Any]) -> Path:
    save_file(parts, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": how}))
    return folder


CASES: dict[str, tuple[Callable[[Path], Path], Callable[[], Any]]] = {
    "bitsandbytes 4 bit": (lambda folder: plain("olmoe", folder), lambda: bits(load_in_4bit=True)),
    "bitsandbytes 8 bit": (lambda folder: plain("qwen3_moe", folder), lambda: bits(load_in_8bit=True)),
    "bitsandbytes 8 bit, MLA": (
        lambda folder: plain("deepseek_v3", folder, **MLA),
        lambda: bits(load_in_8bit=True, llm_int8_skip_modules=WITHOUT_KV_B),
    ),
    "torchao int8": (lambda folder: plain("deepseek_v3", folder, **MLA), int8_weights),
    "FP8, dequantised": (in_fp8, lambda: FineGrainedFP8Config(dequantize=True)),
    "MXFP4, dequantised": (in_mxfp4, lambda: Mxfp4Config(dequantize=True)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Callable[[], Any]]:
    write, how = CASES[request.param]
    how()  # skips before anything is written
    return write(tmp_path), how


def plan_for(model: RoutedModel) -> SteeringPlan:
    layers = model.moe_shape.layers
    return SteeringPlan([(layer, 1) for layer in layers], [(layer, 0) for layer in layers])


@torch.no_grad()
def test_hooks_leave_a_quantised_model_as_it_is_and_a_plan_holds_on_every_token(
    case: tuple[Path, Callable[[], Any]],
) -> None:
    folder, how = case
    hf_model: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how()).eval()
    model = RoutedModel.from_pretrained(folder, quantization_config=how())
    given = tokens(2, 9)
    expected = hf_model(given).logits
    assert expected.isfinite().all()
    assert torch.equal(model(given), expected)

    steer = steer_hooks(plan_for(model))
    steered = model.run_with_hooks(given, fwd_hooks=steer)
    assert not torch.equal(steered, expected)
    point = hook_names.topk_weights(model.moe_shape.layers[0])
    beside = model.run_with_hooks(given, fwd_hooks=[*steer, (point, lambda weights, hook: weights)])
    assert torch.equal(steered, beside)

    inside: Any = model.hf_model
    seen: list[Tensor] = []
    looks: Any = [
        (hook_names.topk_indices(layer), lambda indices, hook: seen.append(indices.flatten(0, 1)))
        for layer in model.moe_shape.layers
    ]
    with model.hooks([*steer, *looks]):
        written = inside.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=4, do_sample=False, eos_token_id=None
        )
    assert written.shape == (2, 13)
    indices = torch.cat(seen)
    assert len(indices) == len(model.moe_shape.layers) * 2 * (9 + 3)
    assert (indices == 1).any(-1).all()
    assert not (indices == 0).any()
    with model.hooks(steer):
        again = inside.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=4, do_sample=False, eos_token_id=None
        )
    assert torch.equal(again, written)


@pytest.mark.parametrize("name", ["bitsandbytes 4 bit", "bitsandbytes 8 bit", "torchao int8"])
def test_what_is_loaded_is_quantised(name: str, tmp_path: Path) -> None:
    write, how = CASES[name]
    config = how()
    model = RoutedModel.from_pretrained(write(tmp_path), quantization_config=config)
    kinds = {type(weight).__name__ for weight in model.hf_model.parameters()}
    assert kinds & {"Params4bit", "Int8Params", "Int8Tensor", "LinearActivationQuantizedTensor"}, kinds


@torch.no_grad()
def test_fp8_weights_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    in_fp8(tmp_path)
    parts = load_file(tmp_path / "model.safetensors")
    model = RoutedModel.from_pretrained(tmp_path, quantization_config=FineGrainedFP8Config(dequantize=True))
    weight: Any = model.hf_model.get_parameter("model.layers.1.mlp.experts.down_proj")
    for expert, loaded in enumerate(weight):
        name = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
        for row in (0, 31, 32, 63):
            factor = parts[f"{name}_scale_inv"][row // BLOCK, 0]
            assert torch.equal(loaded[row].float(), (parts[name][row].float() * factor).bfloat16().float())


@torch.no_grad()
def test_mxfp4_weights_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    in_mxfp4(tmp_path)
    parts = load_file(tmp_path / "model.safetensors")
    model = RoutedModel.from_pretrained(tmp_path, quantization_config=Mxfp4Config(dequantize=True))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    blocks, scales = parts[f"{name}_blocks"], parts[f"{name}_scales"]
    weight = model.hf_model.get_parameter(name)  # [expert in out]
    for expert, row, column in ((0, 0, 0), (2, 5, 33), (5, 17, 62), (3, 127, 31)):
        byte = int(blocks[expert, row, column // 32, column % 32 // 2])
        bits4 = byte >> 4 if column % 2 else byte & 15
        number = (
            (-1 if bits4 & 8 else 1) * FP4[bits4 & 7] * 2.0 ** (int(scales[expert, row, column // 32]) - 127)
        )
        assert float(weight[expert, column, row]) == number


@torch.no_grad()
def test_bitsandbytes_itself_cannot_run_mla_in_8_bit(tmp_path: Path) -> None:
    """Hence `llm_int8_skip_modules` above and in docs/wrappers.md: MLA gives it four dimensions."""
    folder = plain("deepseek_v3", tmp_path, **MLA)
    hf_model: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=bits(load_in_8bit=True))
    with pytest.raises(RuntimeError, match="must match the size of tensor"):
        hf_model.eval()(tokens(2, 9))
