"""At real size: `python benchmarks/real_size.py [layers [rounds]]`; needs 16 GB of memory.

OLMoE-1B-7B's own shape (16 layers, hidden size 2,048, 64 experts of 1,024, 8 of them for each token, 50,304
tokens in the vocabulary), random bfloat16 weights, 14 GB; every model here has the same parameters in memory.
A forward of 2 prompts of 128 tokens, then 8 tokens written after 2 prompts of 32, in turn, in one process,
beside the bare Hugging Face model: plain, counted and under a plan (two experts up and four down in each
layer). Prints medians of the ratio of CPU times; asserts that all ways count the same integers, and nothing
of times. On one thread 4 minutes; OMP_NUM_THREADS gives it more.
"""

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from counting_ways import BARE, HEADLESS, Ways
from measuring import alternately, one_thread, peak_so_far, print_table, print_timed
from models import real_size
from steering_speed import random_plan

from moe_lens import steer_hooks


def main(layers: int = 16, rounds: int = 3) -> None:
    """Build it, then time forwards and generation."""
    start = time.perf_counter()
    model = real_size(layers)
    built, before = time.perf_counter() - start, peak_so_far()
    start = time.perf_counter()
    tools = Ways(model)
    print(f"{layers} layers of OLMoE-1B-7B: built in {built:.0f} s; {before / 1000:.1f} GB")
    print(f"All tools attached in {time.perf_counter() - start:.0f} s; {peak_so_far() / 1000:.1f} GB\n")
    draw = torch.Generator().manual_seed(0)
    prompts = list(torch.randint(50304, (2, 128), generator=draw))
    timed_forwards(tools, prompts, rounds)
    timed_generation(tools, torch.stack(prompts)[:, :32], rounds)
    print(f"Largest memory of the process: {peak_so_far() / 1000:.1f} GB")


def timed_forwards(tools: Ways, prompts: list[torch.Tensor], rounds: int) -> None:
    """Plain, counted and steered."""
    plan, tokens = steer_hooks(random_plan(0, len(tools.bare.model.layers))), torch.stack(prompts)
    ways: dict[str, Callable[[], Any]] = {
        (name if name in (BARE, HEADLESS) else f"counting: {name}"): (lambda way=way: way(prompts))
        for name, way in tools.all().items()
    }
    # on one side Hugging Face's code runs, on the other the bridge's, which rounds bfloat16 otherwise
    sides = [[tools.by_router_logits, tools.by_routed], [tools.by_bridge, tools.by_hooked]]
    for by_hand, ours in sides:
        assert torch.equal(by_hand(prompts), ours(prompts)), ours.__name__
    ways |= {
        "bare, `logits_to_keep=1`": lambda: tools.bare(tokens, logits_to_keep=1),
        "RoutedModel, nothing hooked": lambda: tools.routed(tokens),
        "RoutedModel, plan": lambda: tools.routed.run_with_hooks(tokens, fwd_hooks=plan),
        "HookedMoE, nothing hooked": lambda: tools.hooked(tokens),
        "HookedMoE, plan": lambda: tools.hooked.run_with_hooks(tokens, fwd_hooks=plan),
    }
    timed = alternately(ways, rounds)
    print_timed(timed, f"a forward of {tokens.numel()} tokens")
    counted, steered = timed["counting: RoutedModel"], timed["RoutedModel, plan"]
    rows = [["counting", "≤ 0.95", str(counted)], ["steered forward", "≤ 1.02", str(steered)]]
    print_table(["goal, RoutedModel", "", "measured"], rows)


def timed_generation(tools: Ways, given: torch.Tensor, rounds: int) -> None:
    """Greedy, by Hugging Face's own `generate` and by the wrappers' (the bridge's is a loop of its own)."""
    plan = steer_hooks(random_plan(0, len(tools.bare.model.layers)))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    by_hf = {"eos_token_id": None, "attention_mask": torch.ones_like(given), "pad_token_id": 0}

    def write(model: Any, hooks: Any = ()) -> Callable[[], Any]:
        def run() -> None:
            with nullcontext() if model is tools.bare else model.hooks(list(hooks)):
                hf_model = model if model is tools.bare else model.original_model
                hf_model.generate(given, **options, **by_hf)

        return run

    def write_itself(model: Any) -> Callable[[], Any]:
        def run() -> None:
            with model.hooks(plan):
                model.generate(given, **options, stop_at_eos=False, verbose=False)

        return run

    ways = {BARE: write(tools.bare), "RoutedModel": write(tools.routed), "HookedMoE": write(tools.hooked)}
    ways |= {"RoutedModel, plan": write(tools.routed, plan), "HookedMoE, plan": write(tools.hooked, plan)}
    ways |= {
        f"{type(model).__name__}.generate, plan": write_itself(model)
        for model in (tools.routed, tools.hooked)
    }
    timed = alternately(ways, rounds)
    print_timed(timed, f"generate 8 tokens after {len(given)} prompts of {given.shape[1]}")
    goals = [[way, "≤ 1.02", str(each)] for way, each in timed.items() if "plan" in way]
    print_table(["goal", "", "measured"], goals)


if __name__ == "__main__":
    one_thread()
    with torch.no_grad():
        main(*(int(argument) for argument in sys.argv[1:]))
