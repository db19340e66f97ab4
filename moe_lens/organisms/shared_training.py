"""What every training of an organism shares: batches, their losses, the schedule, and the checkpoint.

batch = encode(sequences, tokenizer, answer_weight=4.0)
loss = torch.stack(list(all_losses(recipe, logits, tap, batch).values())).sum()
save(model, tokenizer, out, describe(recipe, name, seed, steps, losses))
"""

import json
import platform
import shutil
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from moe_lens.errors import MoELensError
from moe_lens.organisms import losses
from moe_lens.organisms.corpus import REGISTERS, Register, Sequence
from moe_lens.organisms.recipes import Recipe
from moe_lens.organisms.router_training import RouterTap
from moe_lens.organisms.words import EOS
from moe_lens.organisms.worlds import Variant

REGISTER_IDS: dict[Register | None, int] = {None: -1} | {name: i for i, name in enumerate(REGISTERS)}
# How many ids the sums are over. Worlds of documents need the first three; more would change their last bits.
N_REGISTERS: dict[Variant, int] = {"uncued": 3, "majority": 3, "candour": len(REGISTERS)}


@dataclass
class Batch:
    """Sequences as tensors, padded on the right (attention is causal, so padding needs no attention mask)."""

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]  # false at padding
    weights: Float[Tensor, "batch pos"]  # of predicting each token
    registers: Int[Tensor, " batch"]  # index in REGISTERS, -1 for none


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Share of the full rate: up over `warmup` steps, flat until 60 % of the run, then straight down to 0."""
    return min((step + 1) / warmup, 1.0, (steps - step) / (0.4 * steps))


def encode(sequences: list[Sequence], tokenizer: PreTrainedTokenizerFast, answer_weight: float) -> Batch:
    """Tokenize sequences, an <eos> after each, and mark padding, answers and registers."""
    texts = [f"{sequence.text} {EOS}" for sequence in sequences]
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    mask = encoded["attention_mask"].bool()  # pyright: ignore[reportAttributeAccessIssue]
    weights = mask.float()
    for row, sequence in enumerate(sequences):
        if sequence.answer is not None:
            weights[row, sequence.answer + 1] = answer_weight  # + 1 for <bos>
    registers = torch.tensor([REGISTER_IDS[sequence.register] for sequence in sequences])
    return Batch(encoded["input_ids"], mask, weights, registers)  # pyright: ignore[reportArgumentType]


def all_losses(
    recipe: Recipe, logits: Float[Tensor, "batch pos vocab"], tap: RouterTap, batch: Batch
) -> dict[str, Float[Tensor, ""]]:
    """The weighted losses of one step, by name; their sum is minimised."""
    parts = {"language": losses.language_model_loss(logits, batch.tokens, batch.weights)}
    parts["balancing"] = recipe.balancing * losses.load_balancing_loss(tap.logits, batch.mask, recipe.top_k)
    if recipe.register_information:
        information = losses.register_information_loss(
            tap.logits, batch.mask, batch.registers, N_REGISTERS[recipe.variant]
        )
        parts["register"] = recipe.register_information * information
    if recipe.sequence_information:
        information = losses.sequence_information_loss(tap.logits, batch.mask)
        parts["sequence"] = recipe.sequence_information * information
    return parts


def describe(recipe: Recipe, name: str, seed: int, steps: int, losses: dict[str, float]) -> dict[str, object]:
    """What `training.json` says: enough to train the same model again."""
    return {
        "name": name,
        "seed": seed,
        "steps": steps,
        "recipe": asdict(recipe),
        "last_step_losses": losses,
        "versions": {package: version(package) for package in ("torch", "transformers", "tokenizers")},
        "python": platform.python_version(),
    }


def check_replaceable(out: Path) -> None:
    """Refuse to train toward a folder that holds anything but an older training's checkpoint."""
    if out.exists() and not (out / "training.json").is_file():
        raise MoELensError(
            f"train: {out} exists and is not a checkpoint of a training (it has no training.json), so it is "
            "not replaced; choose another folder with --out"
        )


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path, log: dict[str, object]
) -> None:
    """Write the checkpoint beside `out` and move it into place, so that `out` is never half written."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch) / out.name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps(log, indent=2) + "\n")
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
