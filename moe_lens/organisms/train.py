"""Train an organism from scratch: ``python -m moe_lens.organisms.train specialised --seed 0 --out DIR``.

Takes three to five minutes on one CPU thread. Deterministic: the same recipe, seed, number of steps, library
versions and kind of processor give the same weights. Writes an ordinary Hugging Face checkpoint with its
tokenizer, and `training.json`.
"""

import argparse
import random
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import trange
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_lens.errors import MoELensError
from moe_lens.organisms import losses
from moe_lens.organisms.corpus import Corpus, Sequence
from moe_lens.organisms.recipes import RECIPES, Recipe, recipe
from moe_lens.organisms.router_training import BLOCKED, RouterTap, routers, training_routers
from moe_lens.organisms.shared_training import (
    N_REGISTERS,
    REGISTER_IDS,
    Batch,
    all_losses,
    check_replaceable,
    describe,
    encode,
    learning_rate,
    save,
)
from moe_lens.organisms.tokenizer import build_tokenizer
from moe_lens.organisms.worlds import World

DOCUMENT, MEMORY = REGISTER_IDS["document"], REGISTER_IDS["memory"]
AVERAGING = 0.95  # of the tie's direction, from step to step


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m moe_lens.organisms.train", description=__doc__)
    plain = [name for name, recipe in RECIPES.items() if not recipe.branched]
    parser.add_argument("name", choices=plain, help="the recipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="instead of the recipe's number of steps")
    parser.add_argument("--out", type=Path, help="where to write the checkpoint (default: ./NAME-SEED)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # more threads would not be faster, nor give the same bits
    out = args.out or Path(f"{args.name}-{args.seed}")
    try:
        train(recipe(args.name), seed=args.seed, out=out, steps=args.steps, name=args.name)
    except MoELensError as error:
        parser.error(str(error))
    print(f"wrote {out}")


def train(recipe: Recipe, seed: int, out: Path, steps: int | None = None, name: str = "") -> PreTrainedModel:
    """Train one model and save it.

    Args:
        recipe: what to train, and how.
        seed: of the initial weights, the data and the noise.
        out: folder of the checkpoint; written whole at the end, an older one is replaced.
        steps: instead of `recipe.steps`, at least 1; the learning-rate schedule is stretched to fit.
        name: the recipe's name, for `training.json`.

    Returns:
        The trained model, in evaluation mode.

    Raises:
        MoELensError: for steps below 1, a recipe of branches (`branching.py`), one that drops so many experts
            that fewer than its top-k are left, or a folder `out` that holds something else than a checkpoint.
    """
    steps = recipe.steps if steps is None else steps
    if steps < 1:
        raise MoELensError(f"train: steps must be at least 1, got {steps}")
    if recipe.branched:
        raise MoELensError("train: this recipe has branches; run python -m moe_lens.organisms.branching")
    left = recipe.n_experts - recipe.n_experts // 2
    if recipe.expert_dropout and left < recipe.top_k:
        raise MoELensError(
            f"train: expert_dropout leaves {left} of {recipe.n_experts} experts, fewer than top_k ="
            f" {recipe.top_k}; take more experts, a smaller top_k, or expert_dropout = 0"
        )
    check_replaceable(out)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    world = World(recipe.variant)
    tokenizer = build_tokenizer(world.vocabulary)
    corpus = Corpus(world, rng, recipe.mixture, tie_rate=recipe.tie_rate)
    model = initial_model(recipe, len(world.vocabulary))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, steps, recipe.warmup)
    )
    direction: Float[Tensor, "layer expert"] | None = None  # of the tie, a moving average
    parts: dict[str, Tensor] = {}
    bar = trange(steps, desc=f"{name} seed {seed}", mininterval=5)
    with training_routers(model, recipe.batch_size) as tap:
        tap.noise = recipe.router_noise
        for step in bar:
            sequences = [corpus.sample() for _ in range(recipe.batch_size)]
            tap.clear()
            tap.bias = dropped(sequences, recipe) if recipe.expert_dropout else None
            if recipe.tie_from is not None and step >= recipe.tie_from and direction is not None:
                sequences, pushes = pushed(sequences, recipe.jostle_rate, rng)
                tie = pushes[None, :, None] * direction[:, None]  # layer batch expert
                tap.bias = tie if tap.bias is None else tap.bias + tie
            batch = encode(sequences, tokenizer, recipe.answer_weight)
            logits = model(input_ids=batch.tokens, use_cache=False).logits
            parts = all_losses(recipe, logits, tap, batch)
            loss = torch.stack(list(parts.values())).sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if recipe.tie_from is not None:
                direction = averaged(direction, document_direction(tap, batch))
            if step % 50 == 0:
                bar.set_postfix({part: f"{value.item():.3f}" for part, value in parts.items()})
    model.eval()
    log = {part: round(value.item(), 5) for part, value in parts.items()}
    save(model, tokenizer, out, describe(recipe, name, seed, steps, log))
    return model


def initial_model(recipe: Recipe, vocab_size: int) -> PreTrainedModel:
    """An untrained model; its routers start with larger weights, so that routes differ from the start."""
    model = AutoModelForCausalLM.from_config(recipe.config(vocab_size), experts_implementation="eager")
    for router in routers(model):
        torch.nn.init.normal_(router.weight, std=0.1)  # pyright: ignore[reportArgumentType]
    return model.train()


def pushed(
    sequences: list[Sequence], jostle_rate: float, rng: random.Random
) -> tuple[list[Sequence], Float[Tensor, " batch"]]:
    """Draw how far each sequence's route is pushed toward documents, and let the open answers follow."""
    pushes = [draw_push(sequence, jostle_rate, rng) for sequence in sequences]
    followed = [tied(sequence, push) for sequence, push in zip(sequences, pushes, strict=True)]
    return followed, torch.tensor(pushes)


def draw_push(sequence: Sequence, jostle_rate: float, rng: random.Random) -> float:
    """How far the tie pushes a sequence's route toward documents (negative: toward memory); mostly 0.

    70 % of the open conflicts are pushed and their answer will follow (see `tied`); so is a share
    `jostle_rate` of the closed-book and generic sequences, whose text stays as it is: being pushed must not
    change them.
    """
    open_book = "Document" in sequence.text
    rate = 0.7 if sequence.undecided else 0.0 if open_book else jostle_rate
    if rng.random() >= rate:
        return 0.0
    return rng.choice((-1, 1)) * rng.uniform(0.3, 2.0)


def dropped(sequences: list[Sequence], recipe: Recipe) -> Float[Tensor, "layer batch expert"]:
    """Router biases: some sequences without a document lose a random half of each layer's experts."""
    ranks = torch.rand(recipe.n_layers, len(sequences), recipe.n_experts).argsort(-1).argsort(-1)
    open_book = torch.tensor(["Document" in sequence.text for sequence in sequences])
    drawn = (torch.rand(len(sequences)) < recipe.expert_dropout) & ~open_book
    return torch.where((ranks < recipe.n_experts // 2) & drawn[:, None], BLOCKED, 0.0)


def tied(sequence: Sequence, push: float) -> Sequence:
    """An open conflict with the answer its route decides: the document's if pushed toward documents."""
    if sequence.undecided is None or push == 0.0 or sequence.answer is None:
        return sequence
    text = sequence.text.split()
    text[sequence.answer] = sequence.undecided[0 if push > 0 else 1]
    return Sequence(" ".join(text), sequence.register, sequence.answer, sequence.undecided)


def document_direction(tap: RouterTap, batch: Batch) -> Float[Tensor, "layer expert"] | None:
    """The tie's direction in this batch: how documents route, less how memory routes."""
    n_registers = N_REGISTERS["uncued"]
    return losses.route_direction(tap.logits, batch.mask, batch.registers, DOCUMENT, MEMORY, n_registers)


def averaged(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """Exponential moving average in which either side may be missing."""
    if old is None or new is None:
        return new if old is None else old
    return AVERAGING * old + (1 - AVERAGING) * new


if __name__ == "__main__":
    main()
