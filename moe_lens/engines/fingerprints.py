"""What numbers depend on, as a digest: a model with all that is set on it, its weights, and what runs it.

    what_computes(model, hooks, about)                     # ready for JSON; digest_of gives a digest of it
    weights_digest(model)                                  # reads every bit of every weight

Two processes with equal digests compute the same, but for the rounding of different hardware and numbers of
threads. A digest that differs for no reason costs time, one that is equal for no reason gives wrong numbers:
so what cannot be read is refused.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Final

import torch
from torch import Tensor, nn

import moe_lens
from moe_lens.errors import DataError
from moe_lens.hook_names import Hooks
from moe_lens.model.hf_models import original_model
from moe_lens.model.private_names import (
    attention_of,
    experts_of,
    foreign_hooks,
    is_compiled,
    n_forward_hooks,
    offloaded_weights,
)
from moe_lens.model.wrapper import Model

CHUNK: Final = 2**26
"""Bytes that are fetched from a device at a time."""

_SPREAD: Final = ("DTensor", "FlatParameter")
"""Types of parameters of which each process has a part."""


_NO_MATTER: Final = ("_name_or_path", "transformers_version")
"""In a config: where its checkpoint lies, which machines may call otherwise, and what wrote it."""


def what_computes(model: Model, hooks: Hooks, about: str) -> dict[str, Any]:
    """All that numbers of a model depend on, but for prompts and what is counted; ready for JSON.

    Args:
        hooks: that are to be set beside those on the model.
        about: what hooks do that do not say it; "" if there are none.

    Raises:
        DataError: a hook that does not say what it does, with nothing in `about`; weights that cannot be
            read, or of which this process has a part.
    """
    network = original_model(model)
    return {
        "model": asdict(model.moe_shape),
        "wrapper": type(model).__name__,
        "weights": weights_digest(network),
        "modules": hashlib.sha256("\n".join(_module_settings(network)).encode()).hexdigest(),
        "hooks": hook_digests(model, hooks, about),
        "about": about,
        "runs": _runs(model),
    }


def hook_digests(model: Model, hooks: Hooks, about: str) -> list[str]:
    """What the hooks on a model and those given do, in the order in which they run.

    Raises:
        DataError: one that does not say it, by an attribute `digest` as plans do, with nothing in `about`.
    """
    points = {id(point): point for point in dict(getattr(model, "hook_dict")).values()}  # noqa: B009
    said: list[str | None] = []
    for point in points.values():
        waiting = [handle.user_hook for handle in point.fwd_hooks]
        said += [_said(point.name, hook) for hook in waiting]
        said += [None] * (n_forward_hooks(point) - len(waiting))
    said += [None for module in original_model(model).modules() if foreign_hooks(module)]
    said += [_said(name, hook) for name, hook in hooks or ()]
    if None in said and not about:
        raise DataError(
            f"{said.count(None)} of the hooks that the model would run under have no attribute `digest`, so "
            "that processes cannot know whether they count the same. Plans (steer_hooks) have one; otherwise "
            'say in about="..." what the hooks do, and say something else when that changes.'
        )
    return [one or "?" for one in said]


def _said(name: Any, hook: Any) -> str | None:
    digest = getattr(hook, "digest", None)
    return f"{name} {digest}" if isinstance(name, str) and isinstance(digest, str) else None


def _module_settings(network: nn.Module) -> Iterator[str]:
    """Plain settings of all modules, which may differ from the config, and which adapters are on."""
    config = getattr(network, "config", None)
    if config is not None:
        said = {key: value for key, value in config.to_dict().items() if key not in _NO_MATTER}
        yield json.dumps(said, sort_keys=True, default=str)
        for text in (config, config.get_text_config()):
            yield f"{attention_of(text)}"
            yield f"{experts_of(text)}"
    for name, module in network.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float) and not key.startswith("_")
        }
        adapters = {
            key: str(getattr(module, key))
            for key in ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
            if not isinstance(getattr(module, key, None), Tensor | nn.Module)
            and not callable(getattr(module, key, None))
            and hasattr(module, key)
        }
        kind = f"{type(module).__name__}{' compiled' if is_compiled(module) else ''}"
        yield f"{name} {kind} {sorted(plain.items())} {sorted(adapters.items())}"


def _runs(model: Model) -> dict[str, Any]:
    import transformers

    device = torch.device(model.cfg.device).type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return {
        "device": device,
        "autocast": str(cast),
        "precision": torch.get_float32_matmul_precision(),
        "versions": [moe_lens.__version__, torch.__version__, transformers.__version__],
    }


def weights_digest(network: nn.Module) -> str:
    """SHA-256, in hexadecimal, of all parameters, buffers and quantised states, wherever they lie.

    Every byte is read, at more than a gigabyte a second.

    >>> import torch
    >>> from torch import nn
    >>> one, other = nn.Linear(64, 64), nn.Linear(64, 64)
    >>> _ = other.load_state_dict(one.state_dict())
    >>> weights_digest(one) == weights_digest(other)
    True
    >>> other.weight.data[3, 5] += 1e-6
    >>> weights_digest(one) == weights_digest(other)
    False

    Raises:
        DataError: weights that cannot be read, or of which this process has a part.
    """
    digest = hashlib.sha256()
    read: dict[Any, str] = {}  # tied weights, and a bridge's, have several names
    for name, kept in sorted(_tensors(network).items()):
        tensor = _onloaded(network, name, kept)
        if type(tensor).__name__ in _SPREAD:
            raise DataError(
                f"{name} is spread over processes ({type(tensor).__name__}), so that none of them can count "
                "alone. Load the whole model in each process, without tensor parallelism (tp_plan) or FSDP."
            )
        try:
            place = name if kept.is_meta else (kept.data_ptr() or name, kept.dtype, kept.shape, kept.stride())
            if place not in read:
                read[place] = _bytes_digest(tensor)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise DataError(
                f"The bits of {name} ({tensor.dtype}, {type(tensor).__name__}, on {tensor.device}) cannot be "
                f"read: {error}. Load the model onto a device, in a plain dtype."
            ) from error
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {read[place]}\n".encode())
    return digest.hexdigest()


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor; shared ones once for each name."""
    found: dict[str, Tensor] = dict(network.named_parameters(remove_duplicate=False))
    found |= dict(network.named_buffers(remove_duplicate=False))
    for name, value in network.state_dict().items():  # quantisers put their scales there
        if isinstance(value, Tensor):
            found.setdefault(name, value)
    return found


def _onloaded(network: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """The weight itself, where accelerate keeps it elsewhere."""
    if not tensor.is_meta:
        return tensor
    path, _, own = name.rpartition(".")
    weights = offloaded_weights(network.get_submodule(path))
    if weights is not None:
        return torch.as_tensor(weights[own])
    raise DataError(f"{name} has no values here (device meta), so the model cannot run; load its weights.")


def _bytes_digest(tensor: Tensor) -> str:
    digest = hashlib.sha256()
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for part in flat.split(CHUNK):
        digest.update(part.cpu().numpy().data)
    return digest.hexdigest()
