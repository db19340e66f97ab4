"""Speed of patching sweeps: `python benchmarks/patching_speed.py [organism [prompts [repeats]]]`

Default: the specialised organism, 1 prompt with a document, 5 repeats. Times ways to fill a map in turn, in
one process: resumed at layer and position, whole runs (as many patches a forward as memory allows), one whole
run a forward, and TransformerLens' `generic_activation_patch`. `deep [tokens [repeats]]` times the first two
on a random OLMoE of 30 layers, in both wrappers. Prints medians, ratios and the largest difference; asserts
nothing, since machines differ. Set OMP_NUM_THREADS to fix the number of threads.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformer_lens import patching
from transformers import OlmoeConfig, OlmoeForCausalLM

from moe_lens import HookedMoE, RoutedModel, organisms
from moe_lens.interventions import patch_expert_outputs, patch_router


def prompts(organism: str, n_prompts: int) -> tuple[list[str], list[str]]:
    """Clean and corrupted prompts of one length: the same question under documents of different kinds."""
    world, pairs = organisms.world(organism), {}
    for conflict in world.conflicts("test"):
        pairs.setdefault(len(conflict.open_book.split()), []).append(conflict.open_book)
    same_length = max(pairs.values(), key=len)
    return same_length[:n_prompts], same_length[n_prompts : 2 * n_prompts]


def alternately(ways: dict[str, Callable[[], Tensor]], repeats: int) -> None:
    """Time each way in turn, so that a change of the machine's load meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    maps = {name: run() for name, run in ways.items()}  # not timed: the first run of each
    for _ in range(repeats):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    stacked = next(iter(ways))
    for name, values in seconds.items():
        ratios = [slow / fast for slow, fast in zip(values, seconds[stacked], strict=True)]
        apart = float((maps[name] - maps[stacked]).abs().max())
        print(
            f"  {name:36} {statistics.median(values):7.3f} s, {statistics.median(ratios):6.1f} × the first "
            f"(from {min(ratios):.1f} to {max(ratios):.1f}); largest difference {apart:.1e}"
        )


def main(organism: str = "specialised", n_prompts: int = 1, repeats: int = 5) -> None:
    """Time both sweeps."""
    model = organisms.load(organism)
    clean, corrupted = (model.to_tokens(texts) for texts in prompts(organism, n_prompts))
    model.set_use_expert_out(True)
    _, cache = model.run_with_cache(clean)
    model.set_use_expert_out(False)
    patching.__dict__["tqdm"] = lambda rows: rows  # no bar

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1].log_softmax(-1)[:, 7].mean()

    def by_transformer_lens() -> Tensor:
        setter = patching.layer_pos_patch_setter
        found = patching.generic_activation_patch(
            model, corrupted, cache, metric, setter, "router_logits", ["layer", "pos"]
        )
        assert isinstance(found, Tensor)
        return found.cpu()

    whole: Any = {"reuse": False, "progress": False}
    print(f"{organism}: {list(corrupted.shape)} tokens [batch pos], {torch.get_num_threads()} thread(s)")
    with torch.no_grad():
        print(f"patch_router: {len(model.moe_layers) * corrupted.shape[1]} patches")
        alternately(
            {
                "resumed": lambda: patch_router(model, cache, corrupted, metric, progress=False),
                "reuse=False": lambda: patch_router(model, cache, corrupted, metric, **whole),
                "reuse=False, batch_size=1": lambda: patch_router(
                    model, cache, corrupted, metric, batch_size=1, **whole
                ),
                "generic_activation_patch": by_transformer_lens,
            },
            repeats,
        )
        print(f"patch_expert_outputs: up to {len(model.moe_layers) * model.n_experts} patches")
        alternately(
            {
                "resumed": lambda: patch_expert_outputs(model, cache, corrupted, metric, progress=False),
                "reuse=False": lambda: patch_expert_outputs(model, cache, corrupted, metric, **whole),
            },
            repeats,
        )


def deep(n_tokens: int = 24, repeats: int = 5) -> None:
    """Time resumed and whole runs on 30 layers."""
    config = OlmoeConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=30,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    clean, corrupted = torch.randint(3, 256, (2, 1, n_tokens), generator=torch.Generator().manual_seed(0))

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1].log_softmax(-1)[:, 7].mean()

    for wrap in (RoutedModel, HookedMoE.from_hf):
        torch.manual_seed(0)
        model = wrap(OlmoeForCausalLM(config).eval())
        _, cache = model.run_with_cache(clean)
        print(f"{type(model).__name__}, 30 layers, {n_tokens} tokens, {torch.get_num_threads()} thread(s)")
        alternately(
            {
                "resumed": lambda m=model, c=cache: patch_router(m, c, corrupted, metric, progress=False),
                "reuse=False": lambda m=model, c=cache: patch_router(
                    m, c, corrupted, metric, reuse=False, progress=False
                ),
            },
            repeats,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["deep"]:
        deep(*(int(number) for number in sys.argv[2:4]))
        sys.exit()
    organism, *numbers = sys.argv[1:4] or ["specialised"]
    main(organism, *(int(number) for number in numbers))
