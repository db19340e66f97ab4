"""What answers, losses and mediation cost: `python benchmarks/measures_speed.py [hidden [words [rounds]]]`

Default: an OLMoE of random weights of hidden size 256 (8 layers of 64 experts) with 49,152 tokens, 5 rounds.
64 prompts of natural lengths (8 to 600 tokens): which answers they get, and the loss on them, by what their
users would write (batches of 8 in the order given, all logits, `argmax` or `cross_entropy`) and by moe_lens,
with and without a plan. Then mediation over 24 layers, with and without what routes share. All ways find the
same, or the benchmark fails. Prints medians of the ratio of CPU times with their range, and by how many MB
memory grows; asserts nothing of them, since machines differ.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from measuring import alternately, in_child, one_thread, print_table, print_timed
from models import natural_lengths, olmoe, padded, sharing
from torch import Tensor
from torch.nn import functional as F

from moe_lens import HookedMoE, RoutedModel, SteeringPlan, mediation, steer_hooks
from moe_lens.evaluation import answers_with, text_loss

BATCH = 8


def by_hand(model: Any, prompts: list[Tensor], hooks: Any = ()) -> tuple[list[int], float]:
    """The most probable next tokens and the loss, from all logits."""
    answers, total, n_tokens = [], 0.0, 0
    for tokens, mask in padded(prompts, BATCH):
        mask = torch.ones_like(tokens) if mask is None else mask
        logits = model.run_with_hooks(tokens, fwd_hooks=list(hooks), attention_mask=mask)
        answers += logits[:, -1].argmax(-1).tolist()
        target = tokens[:, 1:].masked_fill(mask[:, :-1] == 0, -100)
        total += float(F.cross_entropy(logits[:, :-1].transpose(1, 2), target, reduction="sum"))
        n_tokens += int((target >= 0).sum())
    return answers, total / n_tokens


def ways(
    what: str, models: dict[str, Any], prompts: list[Tensor], hooks: Any
) -> dict[str, Callable[[], Any]]:
    """Each model with all logits, and as it is done here."""
    answers, loss = by_hand(next(iter(models.values())), prompts, hooks)
    found: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        found[f"{name}, all logits"] = lambda model=model: by_hand(model, prompts, hooks)
        if what == "answers":
            found[name] = lambda model=model: answers_with(model, prompts, answers, hooks=hooks)
            assert found[name]().double().mean() > 0.9  # rounding may decide between two tokens
        else:
            found[name] = lambda model=model: text_loss(model, prompts, hooks=hooks)
            assert abs(found[name]() - loss) < 1e-4
    return found


def measures(hidden: int, vocabulary: int, rounds: int) -> None:
    """Time both ways of answers and losses."""
    bare = olmoe(hidden, vocabulary)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(vocabulary, (length,), generator=draw) for length in natural_lengths(64)]
    models = {"RoutedModel": RoutedModel(sharing(bare)), "HookedMoE": HookedMoE.from_hf(sharing(bare))}
    plan = steer_hooks(SteeringPlan(activate=[(0, 1), (4, 2)], deactivate=[(2, 3), (6, 5)]))
    print(
        f"hidden {hidden}, vocabulary {vocabulary}, {len(prompts)} prompts, {sum(map(len, prompts))} tokens"
    )
    rows = []
    for what in ("answers", "loss"):
        for hooks in ([], plan):
            both = ways(what, models, prompts, hooks)
            for name, each in alternately(both, rounds).items():
                _, megabytes = in_child(both[name], small=lambda: models["RoutedModel"](prompts[0][None, :4]))
                kind = f"{what}{', a plan' if hooks else ''}"
                rows.append([f"{kind}: {name}", f"{each.median:.2f}", str(each), f"{megabytes:.0f}"])
    print_table(["way", "CPU time, s", "× the first of its kind", "memory, MB"], rows)


def mediations(layers: int = 24, length: int = 24, rounds: int = 3) -> None:
    """Time mediation with and without what routes share."""
    bare = olmoe(64, layers=layers, experts=8, top_k=2)
    draw = torch.Generator().manual_seed(0)
    clean, corrupted = torch.randint(bare.config.vocab_size, (2, 8, length), generator=draw)
    model = RoutedModel(bare)

    def run(reuse: bool) -> Any:
        metric = lambda logits: logits[:, -1, 7]  # noqa: E731
        return mediation(model, clean, corrupted, metric, reuse=reuse, progress=False)

    assert torch.equal(run(True).clean_route_in, run(False).clean_route_in)
    both = {"whole runs": lambda: run(False), "what routes share, once": lambda: run(True)}
    print_timed(alternately(both, rounds), f"mediation, {layers} layers, 8 pairs of {length} tokens")


def main(hidden: int = 256, vocabulary: int = 49152, rounds: int = 5) -> None:
    """Both tables."""
    measures(hidden, vocabulary, rounds)
    mediations()


if __name__ == "__main__":
    one_thread()
    with torch.no_grad():
        main(*(int(argument) for argument in sys.argv[1:4]))
