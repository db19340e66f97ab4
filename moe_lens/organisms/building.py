"""Building the organisms that are too large to ship: `moe-lens organism build smollm2-split`.

The stages lie in a folder beside the result, and a build that was interrupted goes on there: texts that the
dense model writes, the split, the distillation, the measurement.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Qwen2MoeForCausalLM

from moe_lens.errors import MoELensError
from moe_lens.files import atomic_write
from moe_lens.organisms.built import BUILT, cache_folder
from moe_lens.organisms.distilling import Distillation, distill, in_dtype, quicker_dtype, set_top_k
from moe_lens.organisms.held_out import N_TEXTS, held_out_tokens, perplexities
from moe_lens.organisms.smollm2 import load_dense
from moe_lens.organisms.split_corpus import REGISTERS, Register, library_texts, sample, windows
from moe_lens.organisms.splitting import split


@dataclass(frozen=True)
class SplitRecipe:
    """What a build does.

    Attributes:
        n_experts: a layer.
        top_k: experts a token.
        n_shared: neurons a layer that run on every token.
        also: other numbers of experts that the model is to serve.
        seeds: of the texts that the dense model writes, by register; each gives one batch of texts.
        batch_size: texts a batch.
        new_tokens: that a text grows by, at most.
        window: tokens a sequence, in the fit and in the distillation.
        fit_windows: sequences of each of the five sources that the split is fitted on.
        distillation: how it goes on from there.
        refit: whether the split moves the down-projections, in closed form.
        dtype: of the passes that sample and distil; None: what this machine multiplies faster.
    """

    n_experts: int
    top_k: int
    n_shared: int
    also: tuple[int, ...]
    seeds: dict[Register, tuple[int, ...]]
    batch_size: int
    new_tokens: int
    window: int
    fit_windows: int
    distillation: Distillation
    refit: bool = True
    dtype: Literal["bfloat16", "float32"] | None = None


SMOLLM2: Final = SplitRecipe(
    n_experts=8,
    top_k=4,
    n_shared=896,
    also=(6,),
    seeds={"prose": (0, 3, 5, 8, 10, 13, 15), "code": (2, 7, 12), "chat": (1, 4, 6, 9, 11, 14, 16)},
    batch_size=48,
    new_tokens=160,
    window=256,
    fit_windows=12,
    distillation=Distillation(steps=150, batch_size=2, learning_rate=5e-4, warmup=10, top_k=(4, 4, 4, 6)),
    refit=False,  # fitted on 15,000 tokens, it costs more on other texts than it saves
)


def build(name: str, *, recipe: SplitRecipe | None = None, progress: bool = True) -> Path:
    """Build an organism in the cache folder, or go on with a build that was interrupted.

    >>> from moe_lens import RoutedModel, organisms
    >>> folder = organisms.build("smollm2-split")  # doctest: +SKIP
    >>> model = organisms.load("smollm2-split", wrapper=RoutedModel)  # doctest: +SKIP

    Args:
        name: one of `BUILT`.
        recipe: what is done (default: `SMOLLM2`).
        progress: whether to show bars.

    Returns:
        The checkpoint's folder: config, weights (bfloat16), tokenizer, model card, and `build.json` with the
        recipe and what was measured. Where it exists already, nothing is done.

    Raises:
        MoELensError: for another name, or without the package gguf.
    """
    if name not in BUILT:
        raise MoELensError(f"organisms: there is no build of {name!r}; there is one of {', '.join(BUILT)}.")
    out = cache_folder() / name
    if not (out / "config.json").is_file():
        dense, tokenizer = load_dense(cache_folder() / "smollm2")
        build_split(dense, tokenizer, out, recipe or SMOLLM2, progress=progress)
    return out


def build_split(
    dense: PreTrainedModel, tokenizer: Any, out: Path, recipe: SplitRecipe, *, progress: bool = True
) -> None:
    """Split and distil any dense model of Llama's kind, stage by stage, into the folder `out`.

    Args:
        dense: the model, float32, on the CPU.
        tokenizer: its tokenizer, with a chat template.
        out: the checkpoint's folder; stages lie in `out` with ".build" at its end until all is done.
        recipe: what is done.
        progress: whether to show bars.
    """
    recipe = recipe if recipe.dtype else replace(recipe, dtype=quicker_dtype())
    stages = out.with_name(out.name + ".build")
    stages.mkdir(parents=True, exist_ok=True)
    texts = _sampled(dense, tokenizer, stages / "texts", recipe, progress)
    fit, train = training_tokens(tokenizer, texts, recipe)
    first = stages / "split"
    if not first.exists():
        moe = split(
            dense,
            fit,
            n_experts=recipe.n_experts,
            top_k=recipe.top_k,
            n_shared=recipe.n_shared,
            also=recipe.also,
            refit=recipe.refit,
            progress=progress,
        )
        _whole_folder(first, moe.save_pretrained)
    moe: Any = Qwen2MoeForCausalLM.from_pretrained(first, dtype=torch.float32, experts_implementation="eager")
    distill(
        moe,
        dense,
        train,
        recipe.distillation,
        checkpoint=stages / "distillation.safetensors",
        dtype=_dtype(recipe),
        progress=progress,
    )
    moe = in_dtype(in_dtype(moe, torch.bfloat16), torch.float32)  # what is measured is what is saved
    measured = _measured(dense, moe, tokenizer, (recipe.top_k, *recipe.also))
    set_top_k(moe, recipe.top_k)

    def save(folder: Path) -> None:
        in_dtype(moe, torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        about = {"recipe": asdict(recipe), "perplexity": measured, "torch": torch.__version__}
        (folder / "build.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card(out.name, recipe, measured), encoding="utf-8")

    _whole_folder(out, save)
    shutil.rmtree(stages)


def training_tokens(
    tokenizer: Any, texts: dict[Register, list[str]], recipe: SplitRecipe
) -> tuple[Int[Tensor, "fit pos"], Int[Tensor, "train pos"]]:
    """Sequences to fit on and to train on: sampled texts and the standard library's, shuffled.

    All of the sampled text is trained on, and as much of the library's code and prose, each, as there is
    sampled prose.
    """
    sampled = {r: windows(tokenizer, texts[r], length=recipe.window, n=10**6, seed=0) for r in REGISTERS}
    n = len(sampled["prose"])
    library = [
        windows(tokenizer, library_texts(r), length=recipe.window, n=n, seed=0) for r in ("prose", "code")
    ]
    sources = [*sampled.values(), *library]
    fit = torch.cat([source[: recipe.fit_windows] for source in sources])
    train = torch.cat(sources)
    return fit, train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]


def card(name: str, recipe: SplitRecipe, measured: dict[str, dict[Register, float]]) -> str:
    """The model card: what the model is, what its routes are not, and what was measured."""
    head = "| | " + " | ".join(REGISTERS) + " |\n|---|" + "---|" * len(REGISTERS)
    rows = [
        f"| {kind} | " + " | ".join(_cell(numbers[r], measured["dense"][r]) for r in REGISTERS) + " |"
        for kind, numbers in measured.items()
    ]
    settings = recipe.distillation
    seen = settings.steps * settings.batch_size * recipe.window
    return f"""# {name}

A dense language model whose feed-forward layers were split (`moe_lens.organisms.split`) into
{recipe.n_experts} experts, {recipe.top_k} a token, and a shared expert of {recipe.n_shared} neurons, and
distilled on {seen:,} tokens (`moe_lens.organisms.distill`). It is made of the dense model's weights and
under the same licence (SmolLM2-135M-Instruct: Apache-2.0).

**Its routes are an artefact of the split, not learned specialisation.** The experts are groups of neurons
that were active together in the dense model, and the router was fitted to how much each group writes. What
steering or ablation does here shows that the tools work on real text; it says nothing about how mixtures of
experts that were trained as such divide their work.

Perplexity on {N_TEXTS} short held-out texts a register, in parentheses as a multiple of the dense model's:

{head}
{chr(10).join(rows)}
"""


def _cell(perplexity: float, dense: float) -> str:
    return f"{perplexity:.1f} ({perplexity / dense:.2f}×)"


def _sampled(
    dense: Any, tokenizer: Any, folder: Path, recipe: SplitRecipe, progress: bool
) -> dict[Register, list[str]]:
    """What the dense model writes, from files as far as there are any."""
    folder.mkdir(exist_ok=True)
    wanted: list[tuple[Register, int]] = [
        (register, seed) for register in REGISTERS for seed in recipe.seeds[register]
    ]
    texts: dict[Register, list[str]] = {register: [] for register in REGISTERS}
    writer: Any = None
    for register, seed in tqdm(wanted, desc="sampling texts", unit="batch", disable=not progress):
        file = folder / f"{register}-{seed}.json"
        if not file.exists():
            if writer is None:
                writer = in_dtype(dense, _dtype(recipe))
            written = sample(
                writer, tokenizer, register, recipe.batch_size, seed=seed, max_new_tokens=recipe.new_tokens
            )
            with atomic_write(file) as temporary:
                temporary.write_text(json.dumps(written, ensure_ascii=False), encoding="utf-8")
        texts[register] += json.loads(file.read_text(encoding="utf-8"))
    return texts


def _dtype(recipe: SplitRecipe) -> torch.dtype:
    return getattr(torch, recipe.dtype or quicker_dtype())


def _measured(
    dense: Any, moe: PreTrainedModel, tokenizer: Any, ks: tuple[int, ...]
) -> dict[str, dict[Register, float]]:
    """Held-out perplexities of the dense model and of the split one with each number of experts."""
    tokens = held_out_tokens(tokenizer)
    measured = {"dense": perplexities(dense, tokens)}
    for k in ks:
        set_top_k(moe, k)
        measured[f"k = {k}"] = perplexities(moe, tokens)
    return measured


def _whole_folder(folder: Path, write: Callable[[Any], Any]) -> None:
    """Write a folder whole or not at all."""
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    os.replace(temporary, folder)
