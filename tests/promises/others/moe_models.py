"""transformers' own tests of a model, on MoE models: copied into their `tests` package, and run there.

Their source distribution holds `tests/test_modeling_common.py`, and neither the testers of single models
nor the generation tests; so the small models are described here. The environment's MOE_LENS_FAMILY names one.
"""

import os
import unittest
from typing import Any

import transformers as T
from tests_of_others_attached import attach_all_of_classes

from .generation.test_utils import GenerationTesterMixin
from .test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask, torch_device

_COMMON = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 2}),
    "mixtral": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **{"n_routed_experts": 8, "num_experts_per_tok": 4, "n_group": 2, "topk_group": 1},
            **{"n_shared_experts": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 16},
            **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16},
            **{"v_head_dim": 32, "num_key_value_heads": 4, "routed_scaling_factor": 2.5},
        },
    ),
    "gpt_oss": ("GptOss", {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8}),
}
_NAME, _FIELDS = _FAMILIES[os.environ["MOE_LENS_FAMILY"]]
_CONFIG = getattr(T, f"{_NAME}Config")
_BASE, _CAUSAL = getattr(T, f"{_NAME}Model"), getattr(T, f"{_NAME}ForCausalLM")
attach_all_of_classes(_BASE, _CAUSAL)


class Tester:
    """What the tests ask of a model's tester."""

    batch_size, seq_length, is_training = 3, 7, True
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 32

    def get_config(self) -> Any:
        return _CONFIG(**{**_COMMON, **_FIELDS})

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        shape = [self.batch_size, self.seq_length]
        inputs = {"input_ids": ids_tensor(shape, 99), "attention_mask": random_attention_mask(shape)}
        return self.get_config(), {name: tensor.to(torch_device) for name, tensor in inputs.items()}


class MoEModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (_BASE, _CAUSAL)
    test_all_params_have_gradient = False

    def setUp(self) -> None:
        self.model_tester = Tester()
