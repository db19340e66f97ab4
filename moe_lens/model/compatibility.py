"""What `enable_compatibility_mode` must not do: options that change what a model computes are refused.

refuse_wrong_options(bridge, options)      # by the model's row in `RULES`, and by a look at the model
"""

from collections.abc import Mapping
from typing import Any, Final

from torch import nn
from transformer_lens.model_bridge import TransformerBridge

from moe_lens.errors import MoELensError
from moe_lens.model.layers import unwrap
from moe_lens.model.loading import hf_architecture
from moe_lens.model.registration import routing_layers
from moe_lens.routers.models import supported_models

_WHY: Final = {
    "fold_ln": "its shared experts are as wide as the model, and their down projections get scaled, too",
    "fold_value_biases": "its attention has value biases, which get folded into the wrong places",
}


def refuse_wrong_options(bridge: TransformerBridge, options: Mapping[str, Any]) -> None:
    """Raise MoELensError, with what to pass instead, where options of that mode are wrong for a model.

    Args:
        options: every option of `enable_compatibility_mode` -> its value.
    """
    architecture, has_biases = hf_architecture(bridge), _has_value_biases(bridge.original_model)
    harmless = set() if has_biases else {"fold_value_biases"}
    if not _has_square_shared_experts(bridge):
        harmless.add("fold_ln")
    models = {model.architecture: model for model in supported_models()}
    named = models[architecture].wrong_in_compatibility_mode if architecture in models else ()
    wrong = [option for option in named if options[option] and option not in harmless]
    if not wrong or options["no_processing"]:
        return
    off = list(wrong)
    if has_biases and "fold_value_biases" not in off:
        off.append("fold_value_biases")  # TransformerLens can fail to fold these where other folds are off
    raise MoELensError(
        f"enable_compatibility_mode with {' and '.join(wrong)} changes what this {architecture} computes in "
        f"TransformerLens 4.3{''.join(f'; {_WHY[option]}' for option in wrong if option in _WHY)}. "
        f"Pass {', '.join(f'{option}=False' for option in off)} or no_processing=True."
    )


def _has_value_biases(model: nn.Module) -> bool:
    return any("v_proj" in name and name.endswith("bias") for name, _ in model.named_parameters())


def _has_square_shared_experts(bridge: TransformerBridge) -> bool:
    """Whether a shared expert has a down projection [d_model d_model].

    TransformerLens takes every Linear from d_model in a MoE block for one that reads the norm's output.
    """
    square = (bridge.cfg.d_model, bridge.cfg.d_model)
    for moe in routing_layers(bridge).values():
        beside = [child for child in map(unwrap, moe.block.children()) if child is not moe.router]
        linears = (part for child in beside if child is not moe.experts for part in child.modules())
        if any(isinstance(part, nn.Linear) and part.weight.shape == square for part in linears):
            return True
    return False
