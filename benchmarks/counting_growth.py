"""How counting grows: `python benchmarks/counting_growth.py [most tokens]`

Default: 10³ to 10⁶ tokens, in prompts of 128 that a generator makes, through an OLMoE of random weights (2
layers, hidden size 64, 16 experts, 4 of them for each token); each run in a forked process, so that memory
is its own. Then 8 to 256 experts (8 layers, 8 experts for each token) at 4,096 tokens. Beside the bare model,
forward by forward on the same batches. Asserts nothing, since machines differ.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from measuring import alternately, in_child, one_thread, print_table
from models import olmoe, sharing
from torch import Tensor

from moe_lens import HookedMoE, RoutedModel, collect_routing

LENGTH = 128


def prompts(n_tokens: int, vocabulary: int) -> Iterator[Tensor]:
    """Random prompts, made when they are asked for."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(max(1, n_tokens // LENGTH)):
        yield torch.randint(vocabulary, (LENGTH,), generator=draw)


def ways(model: Any) -> dict[str, Callable[[int], Any]]:
    """Functions of a number of tokens."""
    vocabulary = model.config.vocab_size

    def bare(n_tokens: int) -> None:
        batch: list[Tensor] = []
        for prompt in prompts(n_tokens, vocabulary):
            batch.append(prompt)
            if len(batch) == 8:
                model(torch.stack(batch))
                batch.clear()
        if batch:
            model(torch.stack(batch))

    def counting(wrapper: Any) -> Callable[[int], None]:
        def count(n_tokens: int) -> None:
            stats = collect_routing(wrapper, prompts(n_tokens, vocabulary), progress=False)
            assert stats.n_tokens == max(1, n_tokens // LENGTH) * LENGTH

        return count

    routed, hooked = RoutedModel(sharing(model)), HookedMoE.from_hf(sharing(model))
    return {"bare": bare, "RoutedModel": counting(routed), "HookedMoE": counting(hooked)}


def by_tokens(most: int) -> None:
    """Time and memory, each a fresh fork."""
    runs = ways(olmoe(64, 1024, layers=2, experts=16, top_k=4))
    rows, n_tokens = [], 1000
    while n_tokens <= most:
        found = {
            name: in_child(lambda run=run, n=n_tokens: run(n), small=lambda run=run: run(1))
            for name, run in runs.items()
        }
        cells = [f"{seconds:.2f}; {megabytes:.0f}" for seconds, megabytes in found.values()]
        rows.append([f"{n_tokens:,}", *cells])
        n_tokens *= 10
    print("Growth with tokens: CPU time in s; peak memory in MB")
    print_table(["tokens", *runs], rows)


def by_experts(rounds: int = 5) -> None:
    """Time."""
    rows = []
    for experts in (8, 64, 128, 256):
        runs = ways(olmoe(64, 8192, experts=experts))
        timed = alternately({name: lambda run=run: run(4096) for name, run in runs.items()}, rounds)
        rows.append([str(experts), f"{timed['bare'].median:.2f}", *map(str, list(timed.values())[1:])])
    print("Growth with experts: CPU time of the bare forward in s, and of counting ÷ it")
    print_table(["experts", "bare", "RoutedModel", "HookedMoE"], rows)


if __name__ == "__main__":
    one_thread()
    with torch.no_grad():
        by_tokens(int(sys.argv[1]) if len(sys.argv) > 1 else 10**6)
        by_experts()
