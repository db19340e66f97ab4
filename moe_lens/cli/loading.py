"""The model that a command runs on, as its options name it.

model = load_model(options)                                # in the wrapper that --wrapper names
"""

import argparse
import hashlib
from pathlib import Path
from typing import Any

import moe_lens
from moe_lens import organisms
from moe_lens.errors import DataError, MoELensError

Options = argparse.Namespace


def load_model(options: Options) -> Any:
    """The model that --model or MODEL names, in its wrapper: a checkpoint's folder, an organism or a name on
    the hub, the first of them that there is.
    """
    model = _loaded(options)
    if options.prepend_bos is not None:
        model.prepend_bos = options.prepend_bos == "yes"
    return model


def _loaded(options: Options) -> Any:
    import torch

    wrapper = wrapper_of(options)
    kwargs: dict[str, Any] = {} if options.dtype is None else {"dtype": getattr(torch, options.dtype)}
    is_folder = (Path(str(options.model)) / "config.json").is_file()
    shipped = options.model in organisms.names() and not is_folder
    if shipped:
        one_thread()
    try:
        if shipped and options.device_map is None:
            return organisms.load(options.model, wrapper=wrapper, device=options.device, **kwargs)
        here = shipped or (options.model in organisms.BUILT and not is_folder)
        source = organisms.path(options.model) if here else options.model
        return wrapper.from_pretrained(source, **_place(options), **kwargs)
    except MoELensError:
        raise
    except Exception as error:  # transformers, the hub and torch raise all kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        known = "" if "/" in str(options.model) else f" (Shipped are {', '.join(organisms.names())}.)"
        raise DataError(f"The model {options.model} cannot be loaded: {reason}{known}") from error


def _place(options: Options) -> dict[str, Any]:
    """Where the weights are to lie, as the wrapper's `from_pretrained` takes it."""
    import torch

    if options.device_map is not None:
        return {"device_map": options.device_map}
    if options.wrapper == "bridge":
        return {} if options.device is None else {"device": options.device}
    device = options.device or ("cuda" if torch.cuda.is_available() else None)
    return {} if device is None else {"device_map": device}


def wrapper_of(options: Options) -> Any:
    """The class that --wrapper names."""
    return moe_lens.RoutedModel if options.wrapper == "routed" else moe_lens.HookedMoE


def one_thread() -> None:
    """Let torch use one thread: for models this small, threads mostly wait for each other."""
    import torch

    torch.set_num_threads(1)


def weights_digest(model: Any) -> str:
    """Of numbers all over every parameter and buffer: counts of other weights should not be continued."""
    digest = hashlib.sha256()
    network = model.original_model
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        numbers: Any = tensor.shape
        if not tensor.is_meta:  # offloaded weights are elsewhere
            flat = tensor.detach().flatten()
            numbers = flat[:: max(1, len(flat) // 4096)].tolist()
        digest.update(f"{name} {tensor.dtype} {numbers}".encode())
    return digest.hexdigest()
