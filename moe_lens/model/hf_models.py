"""The Hugging Face model inside whatever holds one, and its MoE layers by number.

hf_model = hf_model_of(model)              # a HookedMoE, a wrapper with `.hf_model`, or an HF model itself
layers = numbered_layers(hf_model)         # layer number -> MoE block and router
tensors_of(hf_model)                       # parameters and buffers by Hugging Face's own names
"""

import re
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from moe_lens.errors import MoELensError
from moe_lens.model.layers import MoELayer, find_moe_layers, no_moe
from moe_lens.model.private_names import execution_device, hf_path


def hf_model_of(model: Any) -> PreTrainedModel:
    """The Hugging Face model itself.

    Raises:
        MoELensError: there is none, such as in a PEFT wrapper.
    """
    inside = (
        model.original_model if isinstance(model, TransformerBridge) else getattr(model, "hf_model", model)
    )
    if not isinstance(inside, PreTrainedModel):
        raise MoELensError(
            f"A Hugging Face model or a HookedMoE is needed here; got {type(model).__name__}. Of a PEFT "
            "model, pass what model.merge_and_unload() gives."
        )
    return inside


def original_model(model: Any) -> Any:
    """What a HookedMoE or RoutedModel is around: a Hugging Face model, or one in adapters (PEFT)."""
    return model.original_model


def numbered_layers(hf_model: nn.Module) -> dict[int, MoELayer]:
    """Layer number -> MoE block and router, also of a model that a bridge wraps.

    Raises:
        UnsupportedRouterError: the model has no MoE layer, or a router without a rule.
    """
    layers = {}
    for moe in find_moe_layers(hf_model):
        number = re.search(r"\.(\d+)(?:\.|$)", moe.where)  # model.layers.3.mlp
        if number is None:
            raise no_moe(type(hf_model).__name__, elsewhere=[moe])
        layers[int(number[1])] = moe
    if not layers:
        raise no_moe(type(hf_model).__name__)
    return layers


def text_config(hf_model: nn.Module) -> Any:
    """The config of the language model, the live object."""
    return cast(Any, hf_model).config.get_text_config()


def device_of(hf_model: nn.Module) -> torch.device:
    """Where its inputs go: to its first parameter; where all are offloaded, to where accelerate runs it."""
    for parameter in hf_model.parameters():
        if not parameter.is_meta:
            return parameter.device
    for module in hf_model.modules():
        if (device := execution_device(module)) is not None:
            return torch.device(device)
    return torch.device("cpu")


def decoder_of(hf_model: nn.Module, layers: dict[int, MoELayer]) -> tuple[nn.Module | None, list[nn.Module]]:
    """The module that holds the model's blocks, and these: the list in which all MoE layers stand."""
    wanted = {id(moe.block) for moe in layers.values()}
    for module in hf_model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) > max(layers):
                inside = {id(part) for block in child for part in block.modules()}
                if wanted <= inside:
                    return module, list(child)
    return None, []


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by Hugging Face's own name; tied ones under each of their names."""
    parameters = module.named_parameters(remove_duplicate=False)
    buffers = module.named_buffers(remove_duplicate=False)
    return {hf_path(name): tensor for named in (parameters, buffers) for name, tensor in named}
