"""What steering costs: `python benchmarks/steering_speed.py [hidden [repeats]]`

Default: hidden sizes 64 and 512, 12 repeats. An OLMoE of random weights (8 layers, 64 experts, 8 of them for
each token) writes 32 tokens after four prompts of 32. In turn, in one process: the bare Hugging Face model, a
RoutedModel without hooks, with a plan, with one plan a prompt, and with a hook that is no plan, and the
TransformerLens bridge without and with the plan. Then 64 prompts of 32 tokens, under one plan and under 64.
Prints medians of the ratio of CPU times, and how many operations of a steered forward wait for a value
(one: whether the last layer's weights are NaN); asserts nothing, since machines differ. Set OMP_NUM_THREADS
to fix the number of threads.
"""

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import OlmoeConfig, OlmoeForCausalLM

from moe_lens import HookedMoE, RoutedModel, SteeringPlan, hook_names, steer_hooks

WAITING = ("_local_scalar_dense", "nonzero", "equal")


def alternately(ways: dict[str, Callable[[], Any]], repeats: int) -> None:
    """Time each way in turn, so that a change of the machine's load meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run()  # not timed: the first run of each
    for _ in range(repeats):
        for name, run in ways.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    first = next(iter(ways))
    for name, values in seconds.items():
        ratios = [mine / its for mine, its in zip(values, seconds[first], strict=True)]
        print(
            f"  {name:34} {statistics.median(values):7.3f} s, {statistics.median(ratios):6.3f} × the first "
            f"(from {min(ratios):.2f} to {max(ratios):.2f})"
        )


class Waiting(TorchDispatchMode):
    """Counts operations that wait for a value on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counts[name] += name in WAITING
        return func(*args, **(kwargs or {}))


def random_plan(seed: int) -> SteeringPlan:
    """Two experts up and four down in each layer."""
    draw = torch.Generator().manual_seed(seed)
    experts = [(layer, torch.randperm(64, generator=draw).tolist()) for layer in range(8)]
    return SteeringPlan(
        [(layer, e) for layer, order in experts for e in order[:2]],
        [(layer, e) for layer, order in experts for e in order[2:6]],
    )


def main(hidden: int, repeats: int) -> None:
    """Time them at one hidden size."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=1000, hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=4, num_experts=64, num_experts_per_tok=8,
        max_position_embeddings=256,
    )  # fmt: skip
    bare: Any = OlmoeForCausalLM(config).eval()
    routed, bridge = RoutedModel(deepcopy(bare)), HookedMoE.from_hf(deepcopy(bare))
    given = torch.randint(0, 1000, (4, 32))
    options: dict[str, Any] = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None}
    options |= {"attention_mask": torch.ones_like(given), "pad_token_id": 0}
    plan, plans = steer_hooks(random_plan(0)), steer_hooks([random_plan(seed) for seed in range(4)])
    other: Any = [(hook_names.router_logits(layer), lambda logits, hook: logits * 1.0) for layer in range(8)]

    def write(model: Any, hooks: Any = ()) -> Callable[[], Any]:
        def run() -> None:
            hf_model = model if model is bare else model.original_model
            with nullcontext() if model is bare else model.hooks(list(hooks)):
                hf_model.generate(given, **options)

        return run

    print(f"hidden {hidden}: generate 32 tokens after 4 prompts of 32")
    ways = {"bare Hugging Face model": write(bare), "RoutedModel": write(routed)}
    ways |= {"RoutedModel, plan": write(routed, plan), "RoutedModel, a plan a prompt": write(routed, plans)}
    ways |= {"RoutedModel, a hook": write(routed, other), "bridge": write(bridge)}
    alternately(ways | {"bridge, plan": write(bridge, plan)}, repeats)
    many, batch = [random_plan(seed) for seed in range(64)], torch.randint(0, 1000, (64, 32))
    one, each = steer_hooks(many[0]), steer_hooks(many)
    print(f"hidden {hidden}: a forward of 64 prompts of 32 tokens")
    ways = {"one plan": lambda: routed.run_with_hooks(batch, fwd_hooks=one)}
    alternately(ways | {"64 plans": lambda: routed.run_with_hooks(batch, fwd_hooks=each)}, repeats)
    for name, hooks in {"no plan": [], "one plan": one, "64 plans": each}.items():
        with Waiting() as waiting, routed.hooks(hooks):
            routed.hf_model(batch)
        print(f"  operations that wait for a value, {name}: {sum(waiting.counts[name] for name in WAITING)}")


if __name__ == "__main__":
    numbers = [int(number) for number in sys.argv[1:]]
    with torch.no_grad():
        for size in numbers[:1] or (64, 512):
            main(size, *(numbers[1:] or [12]))
