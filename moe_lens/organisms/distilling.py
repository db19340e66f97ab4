"""Distilling a split model: routers and experts learn to give the dense model's logits and hidden states.

The loss is the divergence of the dense model's next-token distribution from the split model's, plus the
squared relative error of its hidden states (Hinton et al. 2015, arXiv:1503.02531; Jiao et al. 2020, TinyBERT,
arXiv:1909.10351). The number of experts changes from step to step, so that the model serves several.
"""

import copy
import itertools
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from moe_lens.errors import DataError
from moe_lens.files import atomic_write


@dataclass(frozen=True)
class Distillation:
    """How to distil.

    >>> from moe_lens.organisms import Distillation
    >>> Distillation(steps=100, batch_size=2).learning_rate
    0.002

    Attributes:
        steps: of the optimiser (AdamW without decay), at least 1.
        batch_size: sequences a step.
        learning_rate: relative to a tensor's root mean square, since experts' down-projections are larger.
        warmup: steps until the full rate; from the middle of the run on it falls to 0.
        top_k: numbers of experts a token, of which each step draws one; repeat one to draw it more often.
        hidden_weight: of the hidden states' error in the loss.
        seed: of the order of sequences and of the draws.
    """

    steps: int
    batch_size: int = 4
    learning_rate: float = 2e-3
    warmup: int = 10
    top_k: tuple[int, ...] = (4, 4, 4, 6, 8)
    hidden_weight: float = 1.0
    seed: int = 0


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokens: Int[Tensor, "sequence pos"],
    settings: Distillation,
    *,
    checkpoint: Path | None = None,
    save_every: int = 50,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> None:
    """Train a split model's routers and experts, in place, on what the dense model makes of `tokens`.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from moe_lens import organisms
    >>> shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> dense = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape)).eval()
    >>> tokens = torch.randint(50, (20, 16))
    >>> moe = organisms.split(dense, tokens, n_experts=4, top_k=2, progress=False)
    >>> organisms.distill(moe, dense, tokens, organisms.Distillation(steps=3, top_k=(2, 4)), progress=False)
    >>> moe.config.num_experts_per_tok  # unchanged, as all in the model but routers and experts
    2

    The same arguments and the same number of threads give the same weights, interrupted or not.

    Args:
        student: from `split`, in float32; all else in it (attention, embeddings, norms) stays as it is.
        teacher: the dense model.
        tokens: sequences of real tokens (no padding); used again when all have been.
        settings: how.
        checkpoint: file (safetensors) that is written every `save_every` steps and at the end, and from which
            the same call goes on; it holds weights and the optimiser's moments.
        save_every: steps.
        dtype: of the forward and backward passes; weights and moments are float32. bfloat16 is two to four
            times as fast on processors that have it.
        progress: whether to show a bar with the losses.

    Raises:
        DataError: for a checkpoint of another distillation, or no steps.
    """
    if settings.steps < 1 or len(tokens) < settings.batch_size:
        raise DataError(
            f"distill: needs at least one step and one batch; got {settings.steps} steps, {len(tokens)} "
            f"sequences, batches of {settings.batch_size}."
        )
    names, weights = zip(*trained_parameters(student), strict=True)
    scales = [float(weight.detach().square().mean().sqrt()) for weight in weights]
    groups = [{"params": [weight]} for weight in weights]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    about = _about(settings, tokens)
    done = 0 if checkpoint is None else _restore(checkpoint, about, names, weights, optimizer)
    network, guide = (in_dtype(model, dtype) for model in (student, teacher))
    network.requires_grad_(False)
    copies = [parameter.requires_grad_(True) for _, parameter in trained_parameters(network)]
    bar = tqdm(total=settings.steps, initial=done, desc="distilling", unit="step", disable=not progress)
    plan = itertools.islice(batches(len(tokens), settings), done, settings.steps)
    for step, (rows, k) in enumerate(plan, start=done + 1):
        set_top_k(network, k)
        divergence, hidden = losses(network, guide, tokens[rows])
        (divergence + settings.hidden_weight * hidden).backward()
        for weight, parameter in zip(weights, copies, strict=True):
            weight.grad = torch.zeros_like(weight) if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = settings.learning_rate * scale * rate(step - 1, settings)
        optimizer.step()
        with torch.no_grad():
            for weight, parameter in zip(weights, copies, strict=True):
                parameter.copy_(weight)
                weight.grad = None
        bar.set_postfix(k=k, divergence=f"{divergence.item():.3f}", hidden=f"{hidden.item():.3f}")
        bar.update()
        if checkpoint is not None and (step % save_every == 0 or step == settings.steps):
            _save(checkpoint, about, step, names, weights, optimizer)
    bar.close()


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy with parameters in another dtype; buffers stay: rounded frequencies would turn positions."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def quicker_dtype() -> Literal["bfloat16", "float32"]:
    """bfloat16 where this machine's processor multiplies it faster than float32, else float32.

    Processors without units for bfloat16 emulate it, two to three times slower than float32.
    """
    narrow, wide = _seconds_of_products(torch.bfloat16), _seconds_of_products(torch.float32)
    return "bfloat16" if narrow < wide else "float32"


def _seconds_of_products(dtype: torch.dtype) -> float:
    """CPU time of ten products of 512 × 512 matrices, the least of three."""
    matrix = torch.ones(512, 512, dtype=dtype)
    least = math.inf
    for _ in range(3):
        start = time.process_time()
        for _ in range(10):
            torch.mm(matrix, matrix)
        least = min(least, time.process_time() - start)
    return least


def trained_parameters(model: PreTrainedModel) -> list[tuple[str, torch.nn.Parameter]]:
    """Routers and experts, the shared one too: what a distillation moves."""
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if any(part in name for part in (".mlp.gate.weight", ".mlp.experts.", ".mlp.shared_expert."))
    ]


def set_top_k(model: PreTrainedModel, k: int) -> None:
    """Let every router of a split model choose k experts."""
    for layer in cast(Any, model).model.layers:
        layer.mlp.gate.top_k = k


def rate(step: int, settings: Distillation) -> float:
    """Share of the full learning rate: up over `warmup` steps, flat until half of the run, then down to 0."""
    left = (settings.steps - step) / (0.5 * settings.steps)
    return max(0.0, min((step + 1) / settings.warmup, 1.0, left))


def batches(n_sequences: int, settings: Distillation) -> Iterator[tuple[list[int], int]]:
    """Rows and number of experts of each step, without end: each sequence once before any is used again."""
    rng = random.Random(settings.seed)
    rows: list[int] = []
    while True:
        while len(rows) < settings.batch_size:
            rows += rng.sample(range(n_sequences), n_sequences)
        yield rows[: settings.batch_size], rng.choice(settings.top_k)
        rows = rows[settings.batch_size :]


def losses(
    student: PreTrainedModel, teacher: PreTrainedModel, tokens: Int[Tensor, "sequence pos"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Of a batch: the mean divergence KL(teacher ‖ student) in nats a token, and the hidden states' error.

    The error is |student − teacher|² / |teacher|², the mean over tokens and layers' outputs.
    """
    with torch.no_grad():
        wanted = teacher(input_ids=tokens, use_cache=False, output_hidden_states=True)
    given = student(input_ids=tokens, use_cache=False, output_hidden_states=True)
    errors = [
        ((own - their).float().square().sum(-1) / their.float().square().sum(-1).clamp(min=1e-9)).mean()
        for own, their in zip(given.hidden_states[1:], wanted.hidden_states[1:], strict=True)
    ]
    divergence = torch.nn.functional.kl_div(
        given.logits.float().log_softmax(-1).flatten(0, 1),
        wanted.logits.float().log_softmax(-1).flatten(0, 1),
        reduction="batchmean",
        log_target=True,
    )
    return divergence, torch.stack(errors).mean()


def _about(settings: Distillation, tokens: Tensor) -> str:
    """What has to be the same for a checkpoint to be gone on with."""
    position = torch.arange(1, tokens.numel() + 1)
    return json.dumps([asdict(settings), list(tokens.shape), int((tokens.flatten() * position).sum())])


def _save(
    file: Path,
    about: str,
    step: int,
    names: Sequence[str],
    weights: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    tensors: dict[str, Tensor] = {}
    for name, weight in zip(names, weights, strict=True):
        state = optimizer.state[weight]
        tensors |= {
            f"weight {name}": weight.detach(),
            f"mean {name}": state["exp_avg"],
            f"square {name}": state["exp_avg_sq"],
        }
    with atomic_write(file) as temporary:
        save_file(tensors, temporary, metadata={"about": about, "step": str(step)})


def _restore(
    file: Path,
    about: str,
    names: Sequence[str],
    weights: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
) -> int:
    """The steps that a checkpoint has behind it, after its state has been put in place; 0 without a file."""
    if not file.exists():
        return 0
    with safe_open(file, framework="pt") as saved:
        metadata = saved.metadata() or {}
        if metadata.get("about") != about:
            raise DataError(
                f"{file} is the checkpoint of another distillation (other settings or tokens); delete it to "
                "start again."
            )
        step = int(metadata["step"])
        for name, weight in zip(names, weights, strict=True):
            with torch.no_grad():
                weight.copy_(saved.get_tensor(f"weight {name}"))
            optimizer.state[weight] = {
                "step": torch.tensor(float(step)),
                "exp_avg": saved.get_tensor(f"mean {name}"),
                "exp_avg_sq": saved.get_tensor(f"square {name}"),
            }
    return step
