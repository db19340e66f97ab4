"""Answers, losses and intervals against loops over one prompt at a time."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moe_lens import answer_task, collect_generation, collect_routing, generate_text
from moe_lens.errors import DataError
from moe_lens.evaluation.measures import answers_with, continuation_log_probs, text_loss
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.routed_model import RoutedModel
from moe_lens.resampling import cluster_weights, clustered_interval, tail_of
from moe_lens.steering.hooks import steer_hooks
from moe_lens.steering.plan import SteeringPlan
from tests.families import core_family
from tests.tiny_models import (
    MOE_LAYERS,
    SPECIAL,
    VOCAB_SIZE,
    WORDS,
    hook_census,
    prompt,
    tiny_model,
    tokenizer,
)

Hooked = Callable[..., HookedMoE]
PROMPTS = [prompt(length, length) for length in (4, 1, 7, 3, 5, 2)]
VOCABULARY = SPECIAL + WORDS


def logits_of_one(hf_model: Any, model: HookedMoE, text: str) -> torch.Tensor:
    """[pos vocab], from the bare Hugging Face model."""
    with torch.no_grad():
        return hf_model(model.to_tokens(text)).logits[0].double()


def says(recipe: str, model: HookedMoE) -> list[str]:
    hf_model = tiny_model(recipe)
    return [VOCABULARY[int(logits_of_one(hf_model, model, text)[-1].argmax())] for text in PROMPTS]


def loss_of_one(logits: torch.Tensor, tokens: list[int]) -> list[float]:
    """Cross-entropy of each token after the first, by hand."""
    return [
        float(torch.logsumexp(row, 0) - row[token]) for row, token in zip(logits, tokens[1:], strict=False)
    ]


@core_family
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_answers_are_those_of_one_prompt_at_a_time(hooked: Hooked, recipe: str, batch_size: int) -> None:
    model = hooked(recipe)
    answers = says(recipe, model)
    wrong = [VOCABULARY[(VOCABULARY.index(answer) + 1) % VOCAB_SIZE] for answer in answers]
    mixed = [answers[i] if i % 2 else wrong[i] for i in range(len(PROMPTS))]
    got = answers_with(model, PROMPTS, mixed, batch_size=batch_size)
    assert got.tolist() == [bool(i % 2) for i in range(len(PROMPTS))]


@core_family
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_loss_is_the_mean_over_all_tokens_of_all_texts(hooked: Hooked, recipe: str, batch_size: int) -> None:
    model, hf_model = hooked(recipe), tiny_model(recipe)
    losses: list[float] = []
    for text in PROMPTS:
        losses += loss_of_one(logits_of_one(hf_model, model, text), model.to_tokens(text)[0].tolist())
    assert len(losses) == sum(model.to_tokens(text).numel() - 1 for text in PROMPTS)
    assert text_loss(model, PROMPTS, batch_size=batch_size) == pytest.approx(np.mean(losses), rel=1e-5)


def test_both_run_under_the_hooks_and_leave_none(hooked: Hooked) -> None:
    model = hooked("olmoe")
    hooks = steer_hooks(SteeringPlan(activate=[(layer, 0) for layer in MOE_LAYERS["olmoe"]]))
    plain, before = says("olmoe", model), hook_census(model)
    unsteered = text_loss(model, PROMPTS)
    with model.hooks(hooks), torch.no_grad():
        steered = [VOCABULARY[int(model(text)[0, -1].argmax())] for text in PROMPTS]
        losses = [
            loss
            for text in PROMPTS
            for loss in loss_of_one(model(text)[0].double(), model.to_tokens(text)[0].tolist())
        ]
    assert steered != plain  # else this test could not fail
    assert answers_with(model, PROMPTS, steered, hooks=hooks).all()
    assert text_loss(model, PROMPTS, hooks=hooks) == pytest.approx(np.mean(losses), rel=1e-5)
    assert text_loss(model, PROMPTS) == unsteered
    assert hook_census(model) == before


@pytest.mark.parametrize("answers", [["w1"], ["w1", "w2", "w3"], []])
def test_another_number_of_answers_is_refused(hooked: Hooked, answers: list[str]) -> None:
    with pytest.raises(DataError, match="answers"):
        answers_with(hooked("olmoe"), ["w1", "w2"], answers)


@pytest.mark.parametrize("answer", ["w1 w2", ""])
def test_an_answer_must_be_a_single_token(hooked: Hooked, answer: str) -> None:
    with pytest.raises(DataError, match="tokens"):
        answers_with(hooked("olmoe"), ["w1"], [answer])


def test_without_prompts_there_is_nothing_to_say(hooked: Hooked) -> None:
    with pytest.raises(DataError, match="empty"):
        answers_with(hooked("olmoe"), [], [])
    with pytest.raises(DataError, match="empty"):
        text_loss(hooked("olmoe"), [])


def test_texts_of_one_token_have_no_loss() -> None:
    model = HookedMoE.from_hf(tiny_model("qwen2_moe"), tokenizer(), prepend_bos=False)
    with pytest.raises(DataError, match="two tokens"):
        text_loss(model, ["w1", "w2"])


# Continuations

CONTINUATIONS = [prompt(length, 50 + length) for length in (1, 3, 2, 5, 4, 1)]


def log_prob_of_one(model: Any, tokens: list[int], added: list[int]) -> float:
    """Mean log-probability a token, each from a forward of its own."""
    found = []
    for token in added:
        with torch.no_grad():
            logits = model(torch.tensor([tokens]))
        row = getattr(logits, "logits", logits)[0, -1].double()
        found.append(float(row[token] - torch.logsumexp(row, 0)))
        tokens = [*tokens, token]
    return sum(found) / len(found)


def log_probs_one_by_one(forward: Any, model: HookedMoE) -> list[float]:
    return [
        log_prob_of_one(
            forward, model.to_tokens(text)[0].tolist(), [VOCABULARY.index(word) for word in words.split()]
        )
        for text, words in zip(PROMPTS, CONTINUATIONS, strict=True)
    ]


@core_family
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_continuations_are_those_of_one_token_at_a_time(hooked: Hooked, recipe: str, batch_size: int) -> None:
    model = hooked(recipe)
    expected = log_probs_one_by_one(tiny_model(recipe), model)
    got = continuation_log_probs(model, PROMPTS, CONTINUATIONS, batch_size=batch_size)
    assert got.dtype == np.float64
    assert got.tolist() == pytest.approx(expected, rel=1e-4)


def test_continuations_run_under_the_hooks_and_leave_none(hooked: Hooked) -> None:
    model = hooked("olmoe")
    hooks = steer_hooks(SteeringPlan(activate=[(layer, 0) for layer in MOE_LAYERS["olmoe"]]))
    plain, before = continuation_log_probs(model, PROMPTS, CONTINUATIONS), hook_census(model)
    with model.hooks(hooks):
        expected = log_probs_one_by_one(model, model)
    got = continuation_log_probs(model, PROMPTS, CONTINUATIONS, hooks=hooks)
    assert not np.allclose(got, plain, rtol=1e-3)
    assert got.tolist() == pytest.approx(expected, rel=1e-4)
    assert continuation_log_probs(model, PROMPTS, CONTINUATIONS).tolist() == plain.tolist()
    assert hook_census(model) == before


def test_probabilities_of_all_single_tokens_sum_to_one(hooked: Hooked) -> None:
    found = continuation_log_probs(hooked("olmoe"), ["w1 w2"] * VOCAB_SIZE, list(VOCABULARY))
    assert np.exp(found).sum() == pytest.approx(1.0)


def test_prompts_may_be_tokens(hooked: Hooked) -> None:
    model = hooked("olmoe")
    sequences = [model.to_tokens(text)[0] for text in PROMPTS]
    from_tokens = continuation_log_probs(model, sequences, CONTINUATIONS)
    assert from_tokens.tolist() == continuation_log_probs(model, PROMPTS, CONTINUATIONS).tolist()


@pytest.mark.parametrize(
    ("prompts", "continuations", "says"),
    [
        (["w1", "w2"], ["w3"], "2 prompts need as many continuations; got 1"),
        (["w1"], ["w3", "w4"], "1 prompts need"),
        (["w1", "w2"], ["w3", ""], "has no tokens"),
        (["w1"], ["  "], "has no tokens"),
        (["w1"], [5], r"continuations\[0\] must be one text; got 5"),
        (["w1"], [None], r"continuations\[0\] must be one text; got None"),
        (["w1"], [["w3"]], r"continuations\[0\] must be one text"),
        (["w1"], ["\ud83d"], "half of a character"),
        ([], [], "empty"),
    ],
)
def test_what_has_no_continuation_is_refused(
    hooked: Hooked, prompts: list[str], continuations: list[Any], says: str
) -> None:
    unchecked: Any = inspect.unwrap(continuation_log_probs)
    with pytest.raises(DataError, match=says):
        unchecked(hooked("olmoe"), prompts, continuations)


def test_answers_are_texts_or_numbers_of_tokens(hooked: Hooked) -> None:
    model = hooked("olmoe")
    unchecked: Any = inspect.unwrap(answers_with)  # without the annotations, which tests check
    numbers = [VOCABULARY.index("w3"), np.int64(VOCABULARY.index("w4"))]
    by_text, by_number = (unchecked(model, PROMPTS[:2], given) for given in (["w3", "w4"], numbers))
    assert by_text.tolist() == by_number.tolist()
    for wrong in (True, 2.0, None, ["w3"]):
        with pytest.raises(DataError, match=r"answers\[1\] must be one text or the number of a token"):
            unchecked(model, ["w1"] * 2, ["w3", wrong])


def test_what_does_not_fit_into_the_context_is_refused(hooked: Hooked) -> None:
    """The model of 64 positions has no position for a 65th token; the last token of all is not run."""
    model, long, room = hooked("olmoe"), prompt(59), " ".join(["w3"] * 5)  # 60 tokens with BOS
    [fits] = continuation_log_probs(model, [long], [room], reduction="sum")
    logits = logits_of_one(tiny_model("olmoe"), model, f"{long} w3 w3 w3 w3")
    expected = logits.log_softmax(-1)[59:, VOCABULARY.index("w3")]
    assert len(expected) == 5
    assert fits == pytest.approx(float(expected.sum()), abs=1e-4)
    with pytest.raises(DataError, match=r"Prompt 1 has 60 tokens and 6 follow it, .* context is 64"):
        continuation_log_probs(model, ["w1", long], ["w3", f"{room} w3"])
    task = answer_task(["w1", long], [f"{room} w3"] * 2, measure="whole_answer")
    with pytest.raises(DataError, match="Prompt 1 has 60 tokens and 6 follow it"):
        task.values(model)
    for run in (
        lambda: text_loss(model, [prompt(64)]),
        lambda: answers_with(model, [prompt(64)], ["w3"]),
        lambda: collect_routing(model, [prompt(64)], progress=False),
        lambda: collect_generation(model, [prompt(60)], 4, progress=False),
        lambda: generate_text(model, [prompt(60)], 4, progress=False),
    ):
        with pytest.raises(DataError, match="context"):
            run()


def test_a_continuation_outside_the_vocabulary_is_refused(hooked: Hooked) -> None:
    with pytest.raises(DataError, match="vocabulary"):
        continuation_log_probs(hooked("olmoe"), ["w1"], ["w2 unheard"])


# Intervals


def simulate(seed: int, n_clusters: int = 40, size: int = 5) -> tuple[np.ndarray, list[str]]:
    """Values with mean 0.3: a normal effect a cluster, larger than the noise of its units."""
    rng = np.random.default_rng(seed)
    values = 0.3 + rng.normal(0, 1, n_clusters).repeat(size) + rng.normal(0, 0.3, n_clusters * size)
    return values, [f"c{i}" for i in range(n_clusters) for _ in range(size)]


def test_coverage_is_near_nominal_with_correlated_clusters() -> None:
    covers = []
    for seed in range(300):
        low, high = clustered_interval(*simulate(seed), n_resamples=300, seed=seed)
        covers.append(low <= 0.3 <= high)
    assert 0.9 <= np.mean(covers) <= 0.98


def test_coverage_follows_the_level() -> None:
    covers = []
    for seed in range(300):
        low, high = clustered_interval(*simulate(seed), level=0.8, n_resamples=200, seed=seed)
        covers.append(low <= 0.3 <= high)
    assert 0.72 <= np.mean(covers) <= 0.87


def test_taking_correlated_units_for_independent_ones_is_too_narrow() -> None:
    values, clusters = simulate(0)
    low, high = clustered_interval(values, clusters)
    naive_low, naive_high = clustered_interval(values, [str(i) for i in range(len(values))])
    assert high - low > 1.5 * (naive_high - naive_low)
    assert low < values.mean() < high


def test_single_units_as_clusters_give_the_standard_error() -> None:
    values = np.random.default_rng(0).normal(0, 1, 400)
    low, high = clustered_interval(values, [str(i) for i in range(400)])
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_the_seed_decides() -> None:
    values, clusters = simulate(0)
    assert clustered_interval(values, clusters, seed=3) == clustered_interval(values, clusters, seed=3)
    assert clustered_interval(values, clusters, seed=3) != clustered_interval(values, clusters, seed=4)


def test_the_order_of_the_units_is_of_no_account() -> None:
    values, clusters = simulate(0, n_clusters=8)
    order = np.random.default_rng(1).permutation(len(values))
    shuffled = clustered_interval(values[order], [clusters[i] for i in order], seed=0)
    assert shuffled == pytest.approx(clustered_interval(values, clusters, seed=0))


def test_clusters_of_different_sizes_are_drawn_whole() -> None:
    """Five clusters of 3 × 0, five of 1 × 1: a resampled mean is b / (30 − 2 b), b of ten the others."""
    values, clusters = np.array([0.0, 0.0, 0.0] * 5 + [1.0] * 5), [*np.repeat(list("abcde"), 3), *"fghij"]
    possible = [b / (30 - 2 * b) for b in range(11)]
    for level in (0.5, 0.9):
        for bound in clustered_interval(values, clusters, level=level):
            assert min(abs(bound - mean) for mean in possible) < 1e-12
    assert clustered_interval(values, clusters, level=0.01) == pytest.approx((0.25, 0.25))


@pytest.mark.parametrize(
    ("values", "clusters"), [([], []), ([1.0, 2.0], ["a"]), ([1.0], ["a", "b"]), ([1.0], [])]
)
def test_values_and_labels_must_match(values: list[float], clusters: list[str]) -> None:
    with pytest.raises(DataError, match="labels"):
        clustered_interval(np.array(values), clusters)


def test_cluster_weights_draw_whole_clusters_and_repeat_the_interval() -> None:
    labels = ["a", "b", "a", "c", "b", "b", *"defghij"]
    weights = cluster_weights(labels, 500, seed=3)
    assert np.array_equal(weights[:, 0], weights[:, 2])
    assert np.array_equal(weights[:, 1], weights[:, 5])
    assert (weights[:, [0, 1, 3, *range(6, 13)]].sum(1) == 10).all()  # as many clusters as there are
    assert weights[:, 3].mean() == pytest.approx(1, abs=0.15)
    values = np.array([0.0, 1.0, 0.0, 1.0, 0.5, 0.25, *np.linspace(0, 1, 7)])
    means = weights @ values / weights.sum(1)
    low, high = clustered_interval(values, labels, seed=4)
    tail = tail_of(10, 0.95)
    assert np.quantile(means, [tail, 1 - tail]) == pytest.approx([low, high], abs=0.05)


def test_what_is_no_list_of_answers_is_refused_and_any_prompts_will_do() -> None:
    model = RoutedModel(tiny_model("olmoe"), tokenizer())
    unchecked: Any = inspect.unwrap(answers_with)  # without the annotations, which tests check
    for bad in ("w1", 5, [["w1"]], [None]):
        with pytest.raises(DataError, match="answers"):
            unchecked(model, ["w1"], bad)
    expected = unchecked(model, ["w1 w2"], [5])
    same: list[tuple[Any, Any]] = [("w1 w2", [5]), (iter(["w1 w2"]), torch.tensor([5]))]
    for prompts, answers in same:
        assert torch.equal(unchecked(model, prompts, answers), expected)
