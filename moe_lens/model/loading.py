"""TransformerLens' bridges around Hugging Face models: from a name or folder, or from a model in memory.

bridge = boot("allenai/OLMoE-1B-7B-0125-Instruct", dtype=torch.bfloat16)
bridge = wrap(hf_model, tokenizer)
"""

from tempfile import TemporaryDirectory
from typing import Any, Final

from torch import nn
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moe_lens.errors import MoELensError
from moe_lens.model.layers import has_adapters

TRANSFORMER_LENS_NAMES: Final = {"PhimoeForCausalLM": "PhiMoEForCausalLM"}
"""Architectures that transformers and TransformerLens spell differently: transformers' name -> the other."""


def boot(name_or_path: str, **kwargs: Any) -> TransformerBridge:
    """`TransformerBridge.boot_transformers`, also for architectures that TransformerLens spells differently.

    Raises:
        MoELensError: TransformerLens has no adapter for the architecture.
    """
    try:
        return TransformerBridge.boot_transformers(name_or_path, **kwargs)
    except ValueError as error:  # raised before any weight is loaded
        names = TRANSFORMER_LENS_NAMES.items()
        spelling = next((theirs for hf, theirs in names if repr(hf) in str(error)), None)
        if spelling is None:
            if "Could not determine supported architecture" not in str(error):
                raise
            raise MoELensError(
                f"TransformerLens has no adapter for the architecture of {name_or_path}. "
                "moe_lens.supported_models() lists what can be loaded."
            ) from error
    overrides = {**(kwargs.pop("hf_config_overrides", None) or {}), "original_architecture": spelling}
    return TransformerBridge.boot_transformers(name_or_path, hf_config_overrides=overrides, **kwargs)


def wrap(hf_model: nn.Module, tokenizer: Any) -> TransformerBridge:
    """A bridge around a model that `check_wrappable` let pass, in eval mode."""
    architecture = _architecture(hf_model)
    config: Any = hf_model.config
    with TemporaryDirectory() as folder:
        bridge = build_bridge_from_module(
            hf_model,
            architecture,
            hf_config=config,
            tokenizer=_reloadable(tokenizer, folder),
            model_name=config.name_or_path or architecture,
        )
    return bridge.eval()


def check_wrappable(hf_model: Any, tokenizer: Any) -> None:
    """Raise MoELensError unless it is a bare Hugging Face model with an adapter, and a tokenizer if any."""
    if not isinstance(hf_model, nn.Module):
        raise MoELensError(
            f"from_hf needs a Hugging Face model in memory, got {type(hf_model).__name__}; for a name or "
            "a folder use HookedMoE.from_pretrained."
        )
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise MoELensError(
            f"from_hf needs a tokenizer object, got {type(tokenizer).__name__}; load it with "
            "AutoTokenizer.from_pretrained."
        )
    if any(hasattr(module, "original_component") for module in hf_model.modules()):
        raise MoELensError(
            f"{type(hf_model).__name__} is wrapped by a TransformerBridge already. "
            "Use moe_lens.attach(bridge) on that bridge, or wrap a freshly loaded model."
        )
    if any(has_adapters(part) for part in hf_model.modules()):
        raise MoELensError(
            f"{type(hf_model).__name__} has adapters (PEFT), around which TransformerLens' bridge cannot be "
            "built. Use moe_lens.RoutedModel(model), or pass what model.merge_and_unload() gives."
        )
    _architecture(hf_model)


def hf_architecture(bridge: TransformerBridge) -> str:
    """The architecture of the model inside a bridge, by transformers' name."""
    names = {theirs: hf for hf, theirs in TRANSFORMER_LENS_NAMES.items()}
    name = str(bridge.cfg.architecture)
    return names.get(name, name)


def _architecture(hf_model: nn.Module) -> str:
    """TransformerLens' name for the model's class, or for the nearest parent class that it knows."""
    names = [TRANSFORMER_LENS_NAMES.get(cls.__name__, cls.__name__) for cls in type(hf_model).__mro__]
    known = next((name for name in names if name in SUPPORTED_ARCHITECTURES), None)
    if known is None:
        raise MoELensError(
            f"TransformerLens has no adapter for {names[0]}. Pass a causal language model such as "
            "OlmoeForCausalLM or MixtralForCausalLM, not its headless base."
        )
    return known


def _reloadable(tokenizer: Any, folder: str) -> Any:
    """A tokenizer that was built in memory, as one loaded from a folder.

    To switch the BOS on, TransformerLens loads a tokenizer that has one a second time, from where it came
    from; that fails for a tokenizer that came from nowhere.
    """
    if tokenizer is None or tokenizer.init_kwargs.get("name_or_path"):
        return tokenizer
    tokenizer.save_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    loaded.padding_side = tokenizer.padding_side
    return loaded
