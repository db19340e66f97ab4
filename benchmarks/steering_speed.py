"""What steering costs: `python benchmarks/steering_speed.py [hidden [rounds]]`

Default: hidden sizes 64 and 512, 12 rounds. An OLMoE of random weights (8 layers, 64 experts, 8 of them for
each token) writes 32 tokens after four prompts of 32. In turn, in one process: the bare Hugging Face model, a
RoutedModel without hooks, with a plan, with one plan a prompt, and with a hook that is no plan, and the
TransformerLens bridge without and with the plan. Then 64 prompts of 32 tokens, under one plan and under 64.
Prints medians of the ratio of CPU times, and how many operations of a steered forward wait for a value
(one: whether the last layer's weights are NaN); asserts nothing, since machines differ. OMP_NUM_THREADS gives
it more threads than one.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from measuring import alternately, one_thread, print_table, print_timed, waits
from models import olmoe, sharing

from moe_lens import HookedMoE, RoutedModel, SteeringPlan, hook_names, steer_hooks


def random_plan(seed: int, layers: int = 8) -> SteeringPlan:
    """Two of 64 experts up and four down in each layer."""
    draw = torch.Generator().manual_seed(seed)
    experts = [(layer, torch.randperm(64, generator=draw).tolist()) for layer in range(layers)]
    return SteeringPlan(
        [(layer, e) for layer, order in experts for e in order[:2]],
        [(layer, e) for layer, order in experts for e in order[2:6]],
    )


def main(hidden: int, rounds: int = 12) -> None:
    """Time them at one hidden size."""
    bare = olmoe(hidden, vocabulary=1000, expert_width=hidden)
    routed, bridge = RoutedModel(sharing(bare)), HookedMoE.from_hf(sharing(bare))
    draw = torch.Generator().manual_seed(0)
    given, batch = (torch.randint(1000, (rows, 32), generator=draw) for rows in (4, 64))
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

    ways = {"bare Hugging Face model": write(bare), "RoutedModel": write(routed)}
    ways |= {"RoutedModel, plan": write(routed, plan), "RoutedModel, a plan a prompt": write(routed, plans)}
    ways |= {"RoutedModel, a hook": write(routed, other), "bridge": write(bridge)}
    timed = alternately(ways | {"bridge, plan": write(bridge, plan)}, rounds)
    print_timed(timed, f"hidden {hidden}: generate 32 tokens after 4 prompts of 32")
    many = [random_plan(seed) for seed in range(64)]
    one, each = steer_hooks(many[0]), steer_hooks(many)
    ways = {"one plan": lambda: routed.run_with_hooks(batch, fwd_hooks=one)}
    ways |= {"64 plans": lambda: routed.run_with_hooks(batch, fwd_hooks=each)}
    print_timed(alternately(ways, rounds), f"hidden {hidden}: a forward of 64 prompts of 32 tokens")
    rows = []
    for name, hooks in {"no plan": [], "one plan": one, "64 plans": each}.items():
        with routed.hooks(hooks):
            rows.append([name, str(waits(lambda: routed.hf_model(batch)))])
    print_table(["a forward", "operations that wait for a value"], rows)


if __name__ == "__main__":
    one_thread()
    numbers = [int(number) for number in sys.argv[1:]]
    with torch.no_grad():
        for size in numbers[:1] or (64, 512):
            main(size, *numbers[1:])
