"""Speed of patching sweeps: `python benchmarks/patching_speed.py [organism [prompts [rounds]]]`

Default: the specialised organism, 1 prompt with a document, 5 rounds. Times ways to fill a map in turn, in
one process: resumed at layer and position, whole runs (as many patches a forward as memory allows), one whole
run a forward, and TransformerLens' `generic_activation_patch`; then sweeps over 30 layers of an OLMoE of
random weights, in both wrappers. Prints medians of the ratio of CPU times and the largest difference from
the first map; asserts nothing, since machines differ. OMP_NUM_THREADS gives it more threads than one.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from measuring import alternately, one_thread, print_table
from models import olmoe, sharing
from torch import Tensor
from transformer_lens import patching

from moe_lens import HookedMoE, RoutedModel, organisms
from moe_lens.interventions import patch_expert_outputs, patch_router


def prompts(organism: str, n_prompts: int) -> tuple[list[str], list[str]]:
    """Clean and corrupted prompts of one length: the same question under documents of different kinds."""
    world, pairs = organisms.world(organism), {}
    for conflict in world.conflicts("test"):
        pairs.setdefault(len(conflict.open_book.split()), []).append(conflict.open_book)
    same_length = max(pairs.values(), key=len)
    return same_length[:n_prompts], same_length[n_prompts : 2 * n_prompts]


def report(what: str, ways: dict[str, Callable[[], Any]], rounds: int) -> None:
    """Times, ratios to the first way, and how far maps are from the first way's."""
    maps = {name: run() for name, run in ways.items()}
    first = maps[next(iter(ways))]
    rows = [
        [name, f"{timed.median:.3f}", str(timed), _apart(maps[name], first)]
        for name, timed in alternately(ways, rounds).items()
    ]
    print_table([what, "CPU time, s", "× the first", "largest difference"], rows)


def _apart(found: Any, first: Tensor) -> str:
    return f"{float((found - first).abs().max()):.1e}" if isinstance(found, Tensor) else ""


def by_transformer_lens(model: Any, corrupted: Tensor, cache: Any, metric: Any) -> Tensor:
    """The map of `patch_router`, by TransformerLens' own sweep."""
    setter = patching.layer_pos_patch_setter
    found = patching.generic_activation_patch(
        model, corrupted, cache, metric, setter, "router_logits", ["layer", "pos"]
    )
    assert isinstance(found, Tensor)
    return found.cpu()


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1].log_softmax(-1)[:, 7].mean()


def organism_sweeps(organism: str = "specialised", n_prompts: int = 1, rounds: int = 5) -> None:
    """Time both sweeps on a shipped model."""
    model = organisms.load(organism)
    clean, corrupted = (model.to_tokens(texts) for texts in prompts(organism, n_prompts))
    model.set_use_expert_out(True)
    _, cache = model.run_with_cache(clean)
    model.set_use_expert_out(False)
    given = (model, cache, corrupted, metric)
    print(f"{organism}: {list(corrupted.shape)} tokens [batch pos]")
    report(
        f"patch_router, {len(model.moe_layers) * corrupted.shape[1]} patches",
        {
            "resumed": lambda: patch_router(*given, progress=False),
            "reuse=False": lambda: patch_router(*given, reuse=False, progress=False),
            "reuse=False, batch_size=1": lambda: patch_router(
                *given, batch_size=1, reuse=False, progress=False
            ),
            "generic_activation_patch": lambda: by_transformer_lens(model, corrupted, cache, metric),
        },
        rounds,
    )
    report(
        f"patch_expert_outputs, up to {len(model.moe_layers) * model.n_experts} patches",
        {
            "resumed": lambda: patch_expert_outputs(*given, progress=False),
            "reuse=False": lambda: patch_expert_outputs(*given, reuse=False, progress=False),
        },
        rounds,
    )


def deep_sweep(layers: int = 30, length: int = 24, rounds: int = 3) -> None:
    """Time sweeps over many layers."""
    bare = olmoe(64, layers=layers, experts=8, top_k=2)
    draw = torch.Generator().manual_seed(0)
    clean, corrupted = torch.randint(bare.config.vocab_size, (2, 1, length), generator=draw)
    for wrap in (RoutedModel, HookedMoE.from_hf):
        model = wrap(sharing(bare))
        given = (model, model.run_with_cache(clean)[1], corrupted, metric)
        report(
            f"patch_router, {type(model).__name__}, {layers} layers, {layers * length} patches",
            {
                "resumed": lambda given=given: patch_router(*given, progress=False),
                "reuse=False": lambda given=given: patch_router(*given, reuse=False, progress=False),
            },
            rounds,
        )


def main(*organism: Any) -> None:
    patching.__dict__["tqdm"] = lambda rows: rows  # no bar
    organism_sweeps(*organism)
    deep_sweep()


if __name__ == "__main__":
    one_thread()
    organism, *numbers = sys.argv[1:4] or ["specialised"]
    with torch.no_grad():
        main(organism, *(int(number) for number in numbers))
