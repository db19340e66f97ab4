"""What counting costs, six ways: `python benchmarks/counting_speed.py [hidden ...]`

Default: hidden sizes 64, 256 and 512 (8 layers, 64 experts, 8 of them for each token), each with 8,192 and
49,152 tokens in the vocabulary. All ways count the same integers, or the benchmark fails. 16 prompts in
batches of 8: of 64 tokens each, beside the bare model's forward; and of natural lengths (8 to 600), beside
the bare decoder on one prompt after the other, which pads nothing and has no logits of the vocabulary.
Prints medians of the ratio of CPU times with their range, then peak memory and waits of one batch; asserts
nothing of them, since machines differ.
"""

import sys
from collections.abc import Sequence

import torch
from counting_ways import BARE, HEADLESS, Way, Ways, assert_same_counts
from measuring import Timed, alternately, in_child, one_thread, print_table, waits
from models import clear_prompts, natural_lengths, olmoe
from torch import Tensor

VOCABULARIES = (8192, 49152)
ROUNDS = {64: 7, 256: 3, 512: 2}
EQUAL, NATURAL = [64] * 16, natural_lengths(16)
GOAL = 0.85
"""Largest ratio that counting should have to either reference."""


def timed(ways: dict[str, Way], prompts: Sequence[Tensor], rounds: int, reference: str) -> dict[str, Timed]:
    """Each way on the same prompts, after a check that they count the same."""
    assert_same_counts(ways, prompts)
    runs = {name: lambda way=way: way(prompts) for name, way in ways.items()}
    return alternately(runs, rounds, reference, warm=True)


def main(sizes: Sequence[int]) -> None:
    """Time all ways at each size, then print one table for each kind of lengths, and one of memory."""
    equal: dict[str, dict[str, Timed]] = {}
    natural: dict[str, dict[str, Timed]] = {}
    memory: dict[str, dict[str, tuple[float, int]]] = {}
    for hidden in sizes:
        for vocabulary in VOCABULARIES:
            setting, rounds = f"{hidden}, {vocabulary // 1000}k", ROUNDS.get(hidden, 2)
            model = olmoe(hidden, vocabulary)
            ways = Ways(model).all()
            prompts = clear_prompts(model, EQUAL)
            memory[setting] = {name: memory_and_waits(way, prompts[:8]) for name, way in ways.items()}
            equal[setting] = timed(ways, prompts, rounds, BARE)
            natural[setting] = timed(ways, clear_prompts(model, NATURAL), rounds, HEADLESS)
            print(f"measured: hidden, vocabulary {setting}", file=sys.stderr)
    print(f"Equal lengths ({len(EQUAL)} prompts of {EQUAL[0]}): CPU time ÷ bare forward; hidden, vocabulary")
    _print_ratios(equal)
    print(f"Natural lengths ({len(NATURAL)} prompts, {sum(NATURAL)} tokens): CPU time ÷ {HEADLESS}")
    _print_ratios(natural)
    print("One batch of 8 prompts of 64: peak memory in MB; operations that wait for a value")
    print_table(
        ["way", *memory],
        [
            [way, *(f"{found[way][0]:.0f}; {found[way][1]}" for found in memory.values())]
            for way in next(iter(memory.values()))
        ],
    )
    _print_goals({"equal": equal, "natural": natural})


def memory_and_waits(way: Way, prompts: Sequence[Tensor]) -> tuple[float, int]:
    """(MB, operations that wait) of one batch."""
    _, megabytes = in_child(lambda: way(prompts), small=lambda: way([prompts[0][:4]]))
    return megabytes, waits(lambda: way(prompts))


def _print_ratios(found: dict[str, dict[str, Timed]]) -> None:
    ways = list(next(iter(found.values())))
    print_table(["way", *found], [[way, *(str(at[way]) for at in found.values())] for way in ways])


def _print_goals(found: dict[str, dict[str, dict[str, Timed]]]) -> None:
    rows = [
        [f"{lengths} lengths, {way}", f"≤ {GOAL:.2f}", *(f"{at[way].ratio:.2f}" for at in settings.values())]
        for lengths, settings in found.items()
        for way in ("RoutedModel", "HookedMoE")
    ]
    with_outputs = "RoutedModel, `outputs=True`"
    if with_outputs in next(iter(found["equal"].values())):
        ratios = [f"{at[with_outputs].ratio:.2f}" for at in found["equal"].values()]
        rows.append([f"equal lengths, {with_outputs}", "≤ 1.10", *ratios])
    print_table(["goal", "", *next(iter(found.values()))], rows)


if __name__ == "__main__":
    one_thread()
    with torch.no_grad():
        main([int(argument) for argument in sys.argv[1:]] or list(ROUNDS))
