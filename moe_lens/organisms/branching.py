"""Branch-Train-Mix: an organism whose experts are branches, and no router signal in its training.

    python -m moe_lens.organisms.branching natural --seed 71 --out DIR     # three minutes on one core

A dense seed model is trained on everything, copies of it on one register's sequences each, and the copies'
feed-forward layers become the experts of one mixture (arXiv 2403.07816; FlexOlmo, arXiv 2507.07024), whose
router is trained by language modelling and load balancing alone. Register labels decide which sequences a
branch sees, and where the router's rows start, and nothing else. Deterministic as `train.py` is. How the
recipe was found: docs/explanation/natural.md; what else was tried: benchmarks/natural_trials.py.
"""

import argparse
import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_lens.errors import MoELensError
from moe_lens.organisms.corpus import Corpus, Register
from moe_lens.organisms.corpus import Sequence as Text
from moe_lens.organisms.recipes import RECIPES, Recipe
from moe_lens.organisms.router_training import BLOCKED, RouterTap, routers, training_routers
from moe_lens.organisms.shared_training import (
    all_losses,
    check_replaceable,
    describe,
    encode,
    learning_rate,
    save,
)
from moe_lens.organisms.tokenizer import build_tokenizer
from moe_lens.organisms.worlds import World, question

NATURAL: Final = "natural"
WORLD: Final = World("majority")
BRANCHES: Final[tuple[Register, ...]] = ("memory", "document", "generic")
BASE: Final = Recipe("majority", mixture=RECIPES[NATURAL].mixture)
QUESTION_WORDS: Final = len(question("", "").split()) + 2  # with attribute and entity

Part = Literal["experts", "router", "common"]  # common: attention, norms and embeddings
EVERYTHING: Final[tuple[Part, ...]] = ("experts", "router", "common")


@dataclass(frozen=True)
class SeedModel:
    """The dense model that every branch starts from.

    `ties`: share of its conflicts that have one source word of each kind, and so either answer.
    """

    steps: int = 800
    ties: float = 0.06


@dataclass(frozen=True)
class Branches:
    """Copies of the seed model, one a register.

    `closed_book`, `generic`: share of such sequences that the other registers' branches see, too.
    """

    seed_model: SeedModel = SeedModel()
    steps: int = 500
    trained: tuple[Part, ...] = ("experts",)
    closed_book: float = 0.0
    generic: float = 0.0
    learning_rate: float = 3e-3


@dataclass(frozen=True)
class Stage:
    """A part of the mixture's training, with a learning-rate schedule of its own."""

    steps: int
    trained: tuple[Part, ...]
    learning_rate: float


@dataclass(frozen=True)
class BranchTrainMix:
    """A recipe of Branch-Train-Mix.

    Attributes:
        branches: what the experts are.
        stages: how the mixture is trained.
        experts: how many copies of each branch's feed-forward layers: memory, document, generic.
        balancing: weight of the load-balancing loss, or rate of the loss-free bias.
        loss_free: balance by a bias on the router's logits (arXiv 2408.15664) in place of the loss. The bias
            fades out over the end of each stage, since an OLMoE checkpoint has no place for it.
        domain_router: a router's row starts as the mean hidden state of its branch's sequences (FlexOlmo), of
            this length, plus a random part.
        on_question: take these means over the question's tokens only, which both registers share.
        dropout: chance that a sequence does without a random expert of a layer, while the mixture trains.
    """

    branches: Branches = Branches()
    stages: tuple[Stage, ...] = (Stage(400, ("router",), 5e-3),)
    experts: tuple[int, int, int] = (2, 2, 2)
    top_k: int = 2
    balancing: float = 0.01
    loss_free: bool = False
    domain_router: float = 0.0
    on_question: bool = False
    dropout: float = 0.0
    noise: float = 0.3

    def recipe(self) -> Recipe:
        """The mixture as `moe_lens.organisms` describes models."""
        return replace(
            BASE,
            n_experts=sum(self.experts),
            top_k=self.top_k,
            router_noise=self.noise,
            balancing=self.balancing,
        )


DENSE: Final = replace(BASE, n_experts=1, top_k=1, balancing=0.0, router_noise=0.0)
# The seed model has seen no conflict that its source words decide, so no branch starts with a rule for them.
TWO: Final = Branches(SeedModel(800, ties=1.0), steps=250, closed_book=0.1, generic=1.0)
COMMON: Final = Stage(400, ("router", "common"), 1e-3)
SLOW: Final = (Stage(150, ("router",), 1e-3), COMMON)
RECIPE: Final = BranchTrainMix(TWO, SLOW, experts=(3, 3, 0), domain_router=2.0, on_question=True)
"""Of *natural*: two branches, three experts of each, the router started on the question's tokens."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m moe_lens.organisms.branching", description=__doc__)
    parser.add_argument("name", choices=[NATURAL], help="the recipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write the checkpoint (default: ./natural-SEED)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # more threads would not be faster, nor give the same bits
    out = args.out or Path(f"{args.name}-{args.seed}")
    try:
        train_branches(args.seed, out)
    except MoELensError as error:
        parser.error(str(error))
    print(f"wrote {out}")


def train_branches(seed: int, out: Path, trial: BranchTrainMix = RECIPE) -> None:
    """Train *natural* and save it; seed model and branches are not kept.

    Args:
        seed: of the initial weights, the data and the noise.
        out: folder of the checkpoint; written whole at the end, an older one is replaced.
        trial: another recipe than the one that ships.

    Raises:
        MoELensError: a folder `out` that holds something else than a checkpoint.
    """
    check_replaceable(out)
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = mixture(trial, seed, Path(scratch))
        steps = sum(stage.steps for stage in trial.stages)
        about = describe(RECIPES[NATURAL], NATURAL, seed, steps, {}) | {"branch_train_mix": asdict(trial)}
        (folder / "training.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)


def seed_model(settings: SeedModel, seed: int, out: Path) -> Path:
    """The folder of a dense model trained on everything."""

    def make() -> PreTrainedModel:
        model = AutoModelForCausalLM.from_config(
            DENSE.config(len(WORLD.vocabulary)), experts_implementation="eager"
        )
        rng = random.Random(f"{seed} seed model")
        sample = Corpus(WORLD, rng, DENSE.mixture, tie_rate=settings.ties).sample
        stage = Stage(settings.steps, EVERYTHING, DENSE.learning_rate)
        return trained(model, DENSE, stage, sample)

    return kept("seed", settings, seed, out, make)


def branch(settings: Branches, register: Register, seed: int, out: Path) -> Path:
    """The folder of a copy of the seed model that was trained on a register's sequences."""
    start = seed_model(settings.seed_model, seed, out)

    def make() -> PreTrainedModel:
        sample = partial(branch_sequence, register, settings, random.Random(f"{seed} {register}"))
        stage = Stage(settings.steps, settings.trained, settings.learning_rate)
        return trained(opened(start), DENSE, stage, sample)

    return kept(register, settings, seed, out, make)


def branch_sequence(register: Register, settings: Branches, rng: random.Random) -> Text:
    """A sequence that the branch sees: of its register, shared, or a document that agrees with memory."""
    corpus = Corpus(WORLD, rng, BASE.mixture)
    while True:
        text = corpus.sample()
        if text.register == register:
            return text
        if text.register is None:
            share = float(text.undecided is None)
        elif "Document" in text.text:
            share = 0.0
        else:
            share = settings.generic if text.register == "generic" else settings.closed_book
        if rng.random() < share:
            return text


def mixture(trial: BranchTrainMix, seed: int, out: Path) -> Path:
    """The folder of the trained mixture."""

    *before, stage = trial.stages

    def make() -> PreTrainedModel:
        if before:
            model = opened(mixture(replace(trial, stages=tuple(before)), seed, out))
        else:
            used = _used(trial)
            branches = [opened(branch(trial.branches, register, seed, out)) for register in used]
            model = put_together(trial, branches, seed)
        rng = random.Random(f"{seed} mixture {len(before)}")
        return trained(model, trial.recipe(), stage, Corpus(WORLD, rng, BASE.mixture).sample, trial)

    return kept("mixture", trial, seed, out, make)


def _used(trial: BranchTrainMix) -> list[Register]:
    """The branches of which there are experts."""
    pairs: list[tuple[Register, int]] = [*zip(BRANCHES, trial.experts, strict=True)]
    return [register for register, copies in pairs if copies]


def kept(kind: str, settings: Any, seed: int, out: Path, make: Callable[[], PreTrainedModel]) -> Path:
    """A folder that the kind, the settings and the seed name; made if it is not there."""
    made_by = {"kind": kind, "seed": seed, **asdict(settings)}
    key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:10]
    folder = out / f"{kind}-{seed}-{key}"
    if not (folder / "training.json").exists():
        torch.manual_seed(int(key, 16))
        save(make(), build_tokenizer(WORLD.vocabulary), folder, made_by)
        print(f"{folder.name}: done", flush=True)
    return folder


def opened(folder: Path) -> PreTrainedModel:
    """A kept model, to go on with."""
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")


def part_of(parameter: str) -> Part:
    """The part that a parameter belongs to, by its name."""
    if ".mlp.experts." in parameter:
        return "experts"
    return "router" if ".mlp.gate." in parameter else "common"


def put_together(trial: BranchTrainMix, branches: Sequence[PreTrainedModel], seed: int) -> PreTrainedModel:
    """The untrained mixture: the branches' feed-forward layers as experts, everything else averaged."""
    model = AutoModelForCausalLM.from_config(
        trial.recipe().config(len(WORLD.vocabulary)), experts_implementation="eager"
    )
    owners = [which for which, copies in enumerate(filter(None, trial.experts)) for _ in range(copies)]
    parameters = [dict(each.named_parameters()) for each in branches]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part_of(name) == "experts":
                parameter.copy_(torch.cat([parameters[owner][name] for owner in owners]))
            elif part_of(name) == "common":
                parameter.copy_(torch.stack([each[name] for each in parameters]).mean(0))
            else:
                torch.nn.init.normal_(parameter, std=0.1)
        if trial.domain_router:
            used = _used(trial)
            starts = domain_means(model, used, seed, trial.on_question)
            for router, means in zip(routers(model), starts, strict=True):
                router.weight += trial.domain_router * means[owners]  # pyright: ignore[reportOperatorIssue]
    return model


def domain_means(
    model: PreTrainedModel, used: Sequence[Register], seed: int, on_question: bool
) -> list[Float[Tensor, "register d_model"]]:
    """By layer: where the tokens of the registers lie at the router's input, from their mean; norm 1."""
    seen: list[Tensor] = []
    hooks = [
        router.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for router in routers(model)
    ]
    by_register: list[list[Tensor]] = []
    for register in used:
        rng = random.Random(f"{seed} router {register}")
        texts = [branch_sequence(register, Branches(), rng) for _ in range(256)]
        batch = encode(texts, build_tokenizer(WORLD.vocabulary), 1.0)
        counted = batch.mask.clone()
        for row, text in zip(counted, texts, strict=True):
            if on_question and text.answer is not None:
                row[: text.answer + 1 - QUESTION_WORDS] = False  # + 1 for <bos>
                row[text.answer + 1 :] = False
        seen.clear()
        with torch.no_grad():
            model(input_ids=batch.tokens, use_cache=False)
        by_register.append([hidden.reshape(*counted.shape, -1)[counted].mean(0) for hidden in seen])
    for hook in hooks:
        hook.remove()
    layers = [torch.stack(means) for means in zip(*by_register, strict=True)]
    return [torch.nn.functional.normalize(means - means.mean(0), dim=-1) for means in layers]


def trained(
    model: PreTrainedModel,
    recipe: Recipe,
    stage: Stage,
    sample: Callable[[], Text],
    trial: BranchTrainMix | None = None,
) -> PreTrainedModel:
    """The model after a stage: language modelling and load balancing, on the parts that the stage trains."""
    tokenizer = build_tokenizer(WORLD.vocabulary)
    balanced = replace(recipe, balancing=0.0) if trial and trial.loss_free else recipe
    chosen = [parameter for name, parameter in model.named_parameters() if part_of(name) in stage.trained]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is each for each in chosen))
    optimizer = torch.optim.AdamW(
        chosen, lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    warmup = min(recipe.warmup, max(1, stage.steps // 8))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, stage.steps, warmup)
    )
    load_bias = torch.zeros(recipe.n_layers, recipe.n_experts)
    with training_routers(model.train(), recipe.batch_size) as tap:
        tap.noise = recipe.router_noise
        for step in range(stage.steps):
            batch = encode([sample() for _ in range(recipe.batch_size)], tokenizer, recipe.answer_weight)
            tap.clear()
            if trial and (trial.loss_free or trial.dropout):
                fading = load_bias * learning_rate(step, stage.steps, 1)
                tap.bias = fading[:, None] + blocked(trial, recipe)
            logits = model(input_ids=batch.tokens, use_cache=False).logits
            loss = torch.stack(list(all_losses(balanced, logits, tap, batch).values())).sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(chosen, 1.0)
            optimizer.step()
            schedule.step()
            if trial and trial.loss_free:
                load_bias = rebalanced(load_bias, tap, batch.mask, recipe.top_k, trial.balancing)
            if step % 100 == 0 or step == stage.steps - 1:
                print(f"  {'+'.join(stage.trained)} {step}: {loss.item():.3f}", flush=True)
    return model.eval().requires_grad_(True)


def blocked(trial: BranchTrainMix, recipe: Recipe) -> Float[Tensor, "layer batch expert"]:
    """A bias that takes one random expert of a layer from a share `dropout` of the sequences."""
    shape = (recipe.n_layers, recipe.batch_size)
    victims = torch.nn.functional.one_hot(torch.randint(recipe.n_experts, shape), recipe.n_experts)
    return BLOCKED * victims * (torch.rand(shape) < trial.dropout).unsqueeze(-1)


def rebalanced(
    bias: Float[Tensor, "layer expert"], tap: RouterTap, mask: Tensor, k: int, rate: float
) -> Float[Tensor, "layer expert"]:
    """The loss-free bias after a step: up for experts with less than their share of choices, else down."""
    rows = []
    for row, logits in zip(bias, tap.logits, strict=True):
        chosen = (logits.detach()[mask] + row).topk(k, dim=-1).indices
        load = torch.bincount(chosen.flatten(), minlength=len(row)).float()
        rows.append(row + rate * torch.sign(load.mean() - load))
    return torch.stack(rows)


if __name__ == "__main__":
    main()
