"""The checkpoints that `replicate.py` knows, and what SteerMoE (arXiv 2509.09660) does to each of them."""

from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.utils.quantization_config import Mxfp4Config

from moe_lens import RoutedModel


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, and the size of the paper's plan for faithfulness (its table A.2).

    Attributes:
        name: on the hub.
        n_activate: experts that the paper activates toward the document.
        n_deactivate: experts that it deactivates.
        system: a system message that asks for the answer without a chain of thought, where one does.
    """

    name: str
    n_activate: int
    n_deactivate: int
    system: str | None = None


CHECKPOINTS: Final = {
    "olmoe": Checkpoint("allenai/OLMoE-1B-7B-0125-Instruct", 0, 50),
    "qwen3": Checkpoint("Qwen/Qwen3-30B-A3B", 0, 500, system="/no_think"),
    "gpt-oss": Checkpoint("openai/gpt-oss-20b", 10, 50),
}


def load(source: str, device: str) -> RoutedModel:
    """The model in bfloat16 on a GPU and in float32 on a CPU, where that is quicker; MXFP4 is dequantised."""
    settings: dict[str, Any] = {"dtype": torch.float32 if device == "cpu" else torch.bfloat16}
    stored = getattr(AutoConfig.from_pretrained(source), "quantization_config", None) or {}
    if stored.get("quant_method") == "mxfp4":
        settings["quantization_config"] = Mxfp4Config(dequantize=True)
    return RoutedModel.from_pretrained(source, device_map=device, **settings)


def experts_of(config: PretrainedConfig) -> int:
    """Experts a token: k of the config."""
    return int(getattr(config, "num_experts_per_tok", None) or config.experts_per_token)
