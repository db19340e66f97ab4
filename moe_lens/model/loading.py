"""TransformerLens' bridges around Hugging Face models: from a name or folder, or from a model in memory.

bridge, adds_bos = boot("allenai/OLMoE-1B-7B-0125-Instruct", dtype=torch.bfloat16)
bridge = wrap(hf_model, tokenizer)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from moe_lens.encoding import adds_bos
from moe_lens.errors import MoELensError
from moe_lens.model.layers import has_adapters

TRANSFORMER_LENS_NAMES: Final = {"PhimoeForCausalLM": "PhiMoEForCausalLM"}
"""Architectures that transformers and TransformerLens spell differently: transformers' name -> the other."""
_SHIPPED: Final = Path(__file__).parents[1] / "organisms" / "weights"
"""The checkpoints that ship; the room above gives them out, and is not imported from here."""


def placed(name_or_path: str | Path, wrapper: str) -> str:
    """A model's place as transformers and TransformerLens take it: a name on the hub, or a folder's path.

    >>> placed("allenai/OLMoE-1B-7B-0924", "HookedMoE")
    'allenai/OLMoE-1B-7B-0924'

    An existing folder goes before a name on the hub, and before TransformerLens' short names for some there
    ("olmoe", "mixtral"): it is given as an absolute path, which no name is.

    Args:
        name_or_path: what a user gave; a `Path` means a folder.
        wrapper: the class to load with, for the error.

    Raises:
        MoELensError: a path where there is no folder, or the name of an organism that ships.
    """
    name = str(name_or_path)
    if name and Path(name).is_dir():
        return name if Path(name).is_absolute() else str(Path.cwd() / name)
    if name and Path(name).name == name and (_SHIPPED / name / "config.json").is_file():
        how = "" if wrapper == "HookedMoE" else f", wrapper={wrapper}"
        raise MoELensError(
            f"{name} is neither a folder here nor a name on the hub, but an organism that ships with "
            f"moe_lens: organisms.load({name!r}{how})."
        )
    is_path = isinstance(name_or_path, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path or "\\" in name:
        raise MoELensError(
            f"There is no folder {name} (looked for in {Path.cwd()}). Give a checkpoint's folder, or a "
            'name on the Hugging Face hub as a string ("allenai/OLMoE-1B-7B-0125-Instruct").'
        )
    return name


def boot(
    name_or_path: str, *, dtype: Any = None, tokenizer: Any = None, **kwargs: Any
) -> tuple[TransformerBridge, bool | None]:
    """`TransformerBridge.boot_transformers`, also for architectures that TransformerLens spells differently.

    Args:
        dtype: a torch.dtype or its name; "auto" or None: the checkpoint's.
        tokenizer: from a checkpoint or made in memory; None: the checkpoint's.

    Returns: the bridge, and whether its tokenizer prepends a BOS by itself; None where it has none.

    Raises:
        MoELensError: TransformerLens has no adapter for the architecture, or an argument that only
            transformers knows.
    """
    _refuse_quantised(kwargs)
    named = kwargs.pop("torch_dtype", None)  # transformers' older name
    dtype = named if dtype is None else dtype
    if kwargs.get("hf_model") is None:
        kwargs["dtype"] = dtype_of(name_or_path, dtype, kwargs)
    elif dtype is not None:
        kwargs["dtype"] = dtype
    if tokenizer is None:
        tokenizer = own_tokenizer(name_or_path, kwargs)
    adds = None if tokenizer is None else adds_bos(tokenizer)
    with _as_it_is(tokenizer):
        return _booted(name_or_path, tokenizer=tokenizer, **kwargs), adds


def _booted(name_or_path: str, **kwargs: Any) -> TransformerBridge:
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


def dtype_of(name_or_path: str, dtype: Any, kwargs: dict[str, Any]) -> torch.dtype:
    """A dtype that a user gives as such or by name; for None and "auto" the checkpoint's, as its config says.

    A config that does not say: float32. Raises MoELensError for anything else.
    """
    if dtype is None or dtype == "auto":
        config: Any = AutoConfig.from_pretrained(name_or_path, **_shared(kwargs))
        dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
        dtype = torch.float32 if dtype is None else dtype
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise MoELensError(f"dtype must be a torch.dtype, its name or 'auto'; got {dtype!r}.")
    return found


def own_tokenizer(name_or_path: str, kwargs: dict[str, Any], **options: Any) -> Any:
    """The checkpoint's tokenizer; None where it has none that can be loaded."""
    try:
        return AutoTokenizer.from_pretrained(name_or_path, **_shared(kwargs), **options)
    except (OSError, ValueError):
        return None


def _shared(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of a user's arguments that every part of a checkpoint is loaded with."""
    names = ("revision", "token", "trust_remote_code", "cache_dir", "local_files_only", "subfolder")
    return {name: kwargs[name] for name in names if name in kwargs}


def with_quantisation(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A user's arguments, with `load_in_4bit=True` as the `quantization_config` that it has become."""
    given = {name: kwargs[name] for name in QUANTISED if kwargs.get(name)}
    rest = {name: value for name, value in kwargs.items() if name not in QUANTISED}
    if not given:
        return rest
    if "quantization_config" in rest:
        raise MoELensError(f"{next(iter(given))} and quantization_config say the same; give one of them.")
    return {**rest, "quantization_config": BitsAndBytesConfig(**given)}


def _refuse_quantised(kwargs: dict[str, Any]) -> None:
    named = [name for name in ("quantization_config", *QUANTISED) if kwargs.get(name)]
    if named:
        raise MoELensError(
            f"{named[0]}: TransformerLens' bridge loads no quantised weights. Use "
            f"RoutedModel.from_pretrained(..., {named[0]}=...), whose routing has the same hook points."
        )
    for name in ("quantization_config", *QUANTISED):
        kwargs.pop(name, None)


QUANTISED: Final = ("load_in_4bit", "load_in_8bit")
"""Arguments of older transformers, which have become `quantization_config=BitsAndBytesConfig(...)`."""


def wrap(hf_model: nn.Module, tokenizer: Any) -> TransformerBridge:
    """A bridge around a model that `check_wrappable` let pass, in eval mode."""
    architecture = _architecture(hf_model)
    config: Any = hf_model.config
    with _as_it_is(tokenizer):
        bridge = build_bridge_from_module(
            hf_model,
            architecture,
            hf_config=config,
            tokenizer=tokenizer,
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


@contextmanager
def _as_it_is(tokenizer: Any) -> Iterator[None]:
    """Within the context, TransformerLens takes a tokenizer as it is.

    Otherwise it loads one that adds no BOS a second time, from where it came from, to switch the BOS on: what
    was set on it in memory (a chat template, added words) would be lost, and one made in memory cannot be
    loaded. BOS before text is `BridgeReading`'s business.
    """
    if tokenizer is None:
        yield
        return
    before = dict(tokenizer.init_kwargs)
    tokenizer.init_kwargs |= {"add_bos_token": True, "name_or_path": before.get("name_or_path", "")}
    try:
        yield
    finally:
        tokenizer.init_kwargs.clear()
        tokenizer.init_kwargs |= before
