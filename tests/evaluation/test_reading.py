"""What measures read, on every family: against single prompts with all logits, and in no more rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor

from moe_lens import HookedMoE, RoutedModel, SteeringPlan, scale_experts, steer_hooks
from moe_lens.evaluation import answers_with, continuation_log_probs, text_loss
from moe_lens.model.kept_logits import reading_logits
from tests.families import some_kinds
from tests.tiny_models import (
    SPECIAL,
    WORDS,
    plain_bridge,
    prompt,
    tiny_model,
    tokenizer,
    tokens,
)

VOCABULARY = SPECIAL + WORDS
SEQUENCES = [tokens(1, length, seed=length)[0].tolist() for length in (4, 9, 2, 5, 5, 7)]
ADDED = [[VOCABULARY.index(word) for word in prompt(n, 30 + n).split()] for n in (1, 3, 2, 1, 4, 2)]
TEXTS = [" ".join(VOCABULARY[token] for token in added) for added in ADDED]
TIED = ("glm_moe_dsa",)
"""Its indexer's scores are tied at 0 in so small a model, and which ones it takes depends on the width."""


class Found(NamedTuple):
    """What measures give of the sequences and what follows them."""

    largest: list[int]
    log_probs: list[list[float]]
    loss: float


def by_hand(logits_of: Callable[[list[int]], Tensor]) -> Found:
    """From the whole logits [pos vocab] of one sequence after the other."""
    largest = [int(logits_of(sequence)[-1].argmax()) for sequence in SEQUENCES]
    log_probs, losses = [], []
    for sequence, added in zip(SEQUENCES, ADDED, strict=True):
        rows = logits_of([*sequence, *added[:-1]])[len(sequence) - 1 :]
        log_probs.append(
            [float(row[token] - row.logsumexp(0)) for row, token in zip(rows, added, strict=True)]
        )
        rows = logits_of(sequence)
        losses += [float(row.logsumexp(0) - row[t]) for row, t in zip(rows, sequence[1:], strict=False)]
    return Found(largest, log_probs, sum(losses) / len(losses))


@cache
def bare(recipe: str) -> tuple[Any, Found]:
    hf_model = tiny_model(recipe)
    with torch.no_grad():
        return hf_model, by_hand(lambda sequence: hf_model(torch.tensor([sequence])).logits[0].double())


@cache
def wrapped(recipe: str) -> tuple[Any, ...]:
    return (
        RoutedModel(tiny_model(recipe), tokenizer()),
        HookedMoE.from_hf(tiny_model(recipe), tokenizer()),
    )


def agrees(model: Any, expected: Found, **options: Any) -> None:
    answers = [token if n % 2 else (token + 1) % 50 for n, token in enumerate(expected.largest)]
    assert answers_with(model, SEQUENCES, answers, **options).tolist() == [False, True] * 3
    reductions: list[tuple[Any, Any]] = [("mean", np.mean), ("sum", np.sum)]
    for reduction, of in reductions:
        found = continuation_log_probs(model, SEQUENCES, TEXTS, reduction=reduction, **options)
        assert found.tolist() == pytest.approx([float(of(row)) for row in expected.log_probs], rel=1e-4)
    assert text_loss(model, SEQUENCES, **options) == pytest.approx(expected.loss, rel=1e-5)


@some_kinds
def test_without_hooks_it_is_hugging_face_one_prompt_at_a_time(recipe: str) -> None:
    for model in wrapped(recipe):
        agrees(model, bare(recipe)[1], batch_size=1 if recipe in TIED else None)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 4}, {"batch_tokens": 11}], ids=str)
def test_batches_of_any_size_find_the_same(options: Any) -> None:
    for model in wrapped("olmoe"):
        agrees(model, bare("olmoe")[1], **options)


@some_kinds
def test_under_hooks_it_is_each_prompt_by_itself_under_them(recipe: str) -> None:
    size = 1 if recipe in TIED else None
    for model in wrapped(recipe):
        half = [(layer, expert) for layer in model.moe_layers for expert in range(model.n_experts // 2)]
        hooks = scale_experts(half, 3.0)
        with model.hooks(hooks), torch.no_grad():
            expected = by_hand(lambda sequence, m=model: m(torch.tensor([sequence]))[0].double())
        plain = bare(recipe)[1].log_probs[1]
        assert expected.log_probs[1] != pytest.approx(plain, rel=1e-2)  # else the hooks did nothing
        agrees(model, expected, hooks=hooks, batch_size=size)
        agrees(model, bare(recipe)[1], batch_size=size)  # and they are gone


def test_a_plain_bridge_will_do() -> None:
    agrees(plain_bridge(tiny_model("olmoe"), tokenizer()), bare("olmoe")[1])


def test_adapters_and_compatibility_mode_make_no_difference() -> None:
    adapted = get_peft_model(
        tiny_model("olmoe"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    folded = HookedMoE.from_hf(tiny_model("olmoe"), tokenizer())
    folded.enable_compatibility_mode()
    for model in (RoutedModel(adapted, tokenizer()), folded):
        with reading_logits(model) as read:
            assert read.keeps
        with torch.no_grad():
            agrees(model, by_hand(lambda sequence, m=model: m(torch.tensor([sequence]))[0].double()))


def test_virtual_tokens_are_not_counted_as_the_prompts_own() -> None:
    tuned: Any = get_peft_model(
        tiny_model("olmoe"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).eval()
    with torch.no_grad():
        expected = by_hand(lambda sequence: tuned(torch.tensor([sequence])).logits[0, 3:].double())
    agrees(RoutedModel(tuned, tokenizer()), expected)


def test_somebodys_own_torch_hook_on_a_block_finds_the_last_token_last() -> None:
    def turn(module: Any, args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, -1] *= -3
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    for model in (RoutedModel(tiny_model("olmoe")), HookedMoE.from_hf(tiny_model("olmoe"))):
        hf_model: Any = model.original_model
        hf_model.model.layers[1].register_forward_hook(turn)
        with torch.no_grad():
            largest = [int(model(torch.tensor([sequence]))[0, -1].argmax()) for sequence in SEQUENCES]
        assert largest != bare("olmoe")[1].largest
        assert answers_with(model, SEQUENCES, largest).tolist() == [True] * 6


# How much is computed


@contextmanager
def counting_rows(model: Any) -> Iterator[list[int]]:
    """How many vectors go through each product with the vocabulary's matrix."""
    head = model.original_model.get_output_embeddings()
    head = getattr(head, "original_component", head)
    rows: list[int] = []
    forward = head.forward

    def counted(hidden: Tensor) -> Tensor:
        rows.append(hidden[..., 0].numel())
        return forward(hidden)

    head.forward = counted
    try:
        yield rows
    finally:
        del head.forward


@some_kinds
def test_no_more_of_the_vocabulary_than_is_read(recipe: str) -> None:
    equal = [tokens(1, 6, seed=seed)[0].tolist() for seed in range(4)]
    for model in wrapped(recipe):
        plan = [(layer, 0) for layer in model.moe_layers]
        for hooks in ([], scale_experts(plan, 3.0)):
            with counting_rows(model) as rows:
                answers_with(model, equal, ["w1"] * 4, hooks=hooks)
                continuation_log_probs(model, equal, ["w1 w2 w3"] * 4, hooks=hooks)
                text_loss(model, equal, hooks=hooks)
            assert rows == [4, 4 * 3, 4 * 5]


def test_of_unequal_lengths_the_last_columns_only() -> None:
    for model in wrapped("olmoe"):
        with counting_rows(model) as rows:
            answers_with(model, SEQUENCES, ["w1"] * 6, hooks=scale_experts([(0, 0)], 3.0))
        assert rows == [6]  # padding on the left: one column
        with counting_rows(model) as rows:
            answers_with(model, SEQUENCES, ["w1"] * 6)
        assert rows == [6 * 5]  # five lengths, so five last columns
        with counting_rows(model) as rows:
            answers_with(model, SEQUENCES, ["w1"] * 6, batch_size=2)
        assert sum(rows) == 2 * (2 + 1 + 2)  # 2 and 4 tokens, 5 and 5, 7 and 9


def test_who_waits_at_the_unembedding_sees_all_columns() -> None:
    model = wrapped("olmoe")[1]
    seen: list[tuple[int, ...]] = []

    def see(value: Tensor, hook: Any) -> None:
        seen.append(tuple(value.shape[:2]))

    expected = bare("olmoe")[1]
    for name in ("unembed.hook_in", "unembed.hook_out", lambda name: name.startswith("unembed")):
        seen.clear()
        agrees(model, expected, hooks=[(name, see)])
        assert (6, 9) in seen
        assert min(n_pos for _, n_pos in seen) > 1
    with reading_logits(model) as read:
        assert read.keeps
        assert read.is_bare


def test_somebodys_own_torch_hook_sees_all_columns() -> None:
    for model in wrapped("olmoe"):
        seen: list[int] = []
        hf_model = model.original_model
        for module in (hf_model, hf_model.get_output_embeddings()):
            handle = module.register_forward_hook(
                lambda module, args, output, seen=seen: seen.append(
                    getattr(output, "logits", output).shape[1]
                )
            )
            try:
                agrees(model, bare("olmoe")[1])
            finally:
                handle.remove()
        assert min(seen) > 1


def test_a_model_without_the_argument_computes_all() -> None:
    hf_model = tiny_model("olmoe")
    forward = hf_model.forward
    seen: list[int] = []

    def without(input_ids: Any = None, attention_mask: Any = None, use_cache: Any = None) -> Any:
        output = forward(input_ids=input_ids, attention_mask=attention_mask)
        seen.append(output.logits.shape[1])
        return output

    hf_model.forward = without
    agrees(RoutedModel(hf_model, tokenizer()), bare("olmoe")[1])
    assert 9 in seen


# What hooks are told


def test_a_plan_a_prompt_goes_with_its_prompt() -> None:
    for model in wrapped("olmoe"):
        plans = [SteeringPlan(deactivate=[(0, n), (2, n)]) if n != 3 else None for n in range(6)]
        alone = [
            answers_with(model, [sequence], ["w1"], hooks=[] if plan is None else steer_hooks(plan))
            for sequence, plan in zip(SEQUENCES, plans, strict=True)
        ]
        log_probs = [
            float(continuation_log_probs(model, [s], [t], hooks=[] if plan is None else steer_hooks(plan))[0])
            for s, t, plan in zip(SEQUENCES, TEXTS, plans, strict=True)
        ]
        for size in (2, 4, None):
            options: Any = {"hooks": steer_hooks(plans), "batch_size": size}
            assert answers_with(model, SEQUENCES, ["w1"] * 6, **options).tolist() == [bool(a) for a in alone]
            together = continuation_log_probs(model, SEQUENCES, TEXTS, **options)
            assert together.tolist() == pytest.approx(log_probs, rel=1e-4)


@pytest.mark.parametrize("positions", ["prompt", "generated", -1])
def test_a_continuation_counts_as_written_by_the_model(positions: Any) -> None:
    """Token after token, as `generate` does: a hook is told what the prompt was."""
    for model in wrapped("olmoe"):
        everywhere = [(layer, 0) for layer in model.moe_layers]
        hooks = scale_experts(everywhere, 5.0, positions=positions)
        expected = []
        for sequence, added in zip(SEQUENCES, ADDED, strict=True):
            n_prompt, whole = len(sequence), torch.tensor([[*sequence, *added]])
            mask = torch.zeros(whole.shape[1], dtype=torch.bool)
            mask[
                {"prompt": slice(n_prompt), "generated": slice(n_prompt, None), -1: n_prompt - 1}[positions]
            ] = 1
            by_mask = scale_experts(everywhere, 5.0, positions=mask)
            with torch.no_grad():
                logits = model.run_with_hooks(whole, fwd_hooks=by_mask if mask.any() else [])[0].double()
            rows = logits[n_prompt - 1 : -1].log_softmax(-1)
            expected.append(float(sum(row[token] for row, token in zip(rows, added, strict=True))))
        found = continuation_log_probs(model, SEQUENCES, TEXTS, reduction="sum", hooks=hooks)
        assert found.tolist() == pytest.approx(expected, rel=1e-4)
        plain = continuation_log_probs(model, SEQUENCES, TEXTS, reduction="sum")
        assert not np.allclose(found, plain, rtol=1e-3)
