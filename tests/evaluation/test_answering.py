"""The measures of `answer_task`: on a vocabulary that cuts digits in two, against loops and `generate`."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from moe_lens import HookedMoE, RoutedModel, answer_task, evaluate_steering, load_task, scale_experts, sweep
from moe_lens.errors import DataError
from moe_lens.steering.plan import SteeringPlan
from tests.evaluation.test_evaluating import scores
from tests.tiny_models import FAMILIES, SPECIAL, WORDS, prompt, tiny_model

Hooked = Callable[..., HookedMoE]

# A byte-level vocabulary as real ones are: " eight" is a token, " 8" is " " and "8"

CONTEXTS = {":": (0.30, 0.20), ".": (0.15, 0.05), "?": (0.05, 0.30), "!": (0.20, 0.25)}
"""Last token of the prompt -> probabilities of " eight" and of " " after it."""
AFTER_SPACE = 0.97
"""Probability of "8" after " "."""


def byte_level() -> PreTrainedTokenizerFast:
    pieces = ["<pad>", "<bos>", "<eos>", *"eight89.:?!", "Ġ"]
    merged = ["ei", "ig", "eig", "eigh", "eight", "Ġeight"]
    vocab = {piece: n for n, piece in enumerate(dict.fromkeys([*pieces, *merged]))}
    merges = [("e", "i"), ("ei", "g"), ("eig", "h"), ("eigh", "t"), ("Ġ", "eight")]
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


@pytest.fixture(scope="module")
def bigrams() -> RoutedModel:
    """A model whose next token depends on the last one only, by the table above."""
    tokenizer, hf_model = byte_level(), tiny_model("olmoe", num_hidden_layers=1)
    n_vocab, size = hf_model.config.vocab_size, hf_model.config.hidden_size
    table = torch.full((n_vocab, n_vocab), 1e-4)  # [last next]
    number: Any = tokenizer.get_vocab()
    for last, (word, space) in CONTEXTS.items():
        table[number[last], number["Ġeight"]], table[number[last], number["Ġ"]] = word, space
    table[number["Ġ"], number["8"]] = AFTER_SPACE
    table[:, number["9"]] += 1 - table.sum(1)
    with torch.no_grad():
        for name, parameter in hf_model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.zero_()
        known = range(len(number))
        hf_model.model.embed_tokens.weight[known, known] = 1.0
        hf_model.lm_head.weight[:, known] = table[known].log().T / size**0.5  # after the norm a one is √size
    return RoutedModel(hf_model, tokenizer)


PROMPTS = [f"{dots}{last}" for dots in (".", "...") for last in CONTEXTS]
WORD, DIGIT = [" eight"] * 8, [" 8"] * 8


def by_loop(model: RoutedModel, text: str, answer: str) -> list[float]:
    """Probability of each token of the answer, from a forward of its own."""
    tokens, found = model.tokenizer(text)["input_ids"], []
    for token in model.tokenizer(answer)["input_ids"]:
        with torch.no_grad():
            logits = model.original_model(torch.tensor([tokens])).logits[0, -1]
        found.append(float(logits.double().softmax(0)[token]))
        tokens = [*tokens, token]
    return found


def test_the_vocabulary_and_the_model_are_what_is_said(bigrams: RoutedModel) -> None:
    assert [len(bigrams.tokenizer(text)["input_ids"]) for text in (" eight", " 8", "..:")] == [1, 2, 3]
    for text in PROMPTS:
        word, space = CONTEXTS[text[-1]]
        assert by_loop(bigrams, text, " eight") == pytest.approx([word], rel=1e-3)
        assert by_loop(bigrams, text, " 8") == pytest.approx([space, AFTER_SPACE], rel=1e-3)


def test_a_sum_sees_what_a_mean_does_not(bigrams: RoutedModel) -> None:
    """The digits lose in half of the contexts, by what the model gives them; by the mean they always win."""
    expected = [
        float(np.prod(by_loop(bigrams, text, " 8")) > by_loop(bigrams, text, " eight")[0]) for text in PROMPTS
    ]
    assert expected == [0, 0, 1, 1] * 2
    by_sum = answer_task(PROMPTS, DIGIT, alternatives=WORD)
    assert by_sum.values(bigrams).tolist() == expected
    by_mean = answer_task(PROMPTS, DIGIT, alternatives=WORD, measure="mean")
    with pytest.warns(UserWarning, match=r"8 of 8 prompts .* \(prompt 0: ' 8' is 2 tokens, ' eight' 1\)"):
        assert by_mean.values(bigrams).tolist() == [1.0] * 8
    assert [task.note.split(" ")[-3:] for task in (by_sum, by_mean)] == [
        ["sums", "of", "log-probabilities"],
        ["than", "its", "alternative"],
    ]
    assert str(by_sum).endswith(by_sum.note)


def test_the_first_difference_is_one_token_after_what_both_begin_with(bigrams: RoutedModel) -> None:
    first = answer_task(PROMPTS, DIGIT, alternatives=WORD, measure="first_difference").values(bigrams)
    assert first.tolist() == [float(space > word) for word, space in CONTEXTS.values()] * 2
    # " 9" and " 88" differ after the space, where "8" is the likelier; what follows it is not asked
    nine, eight = [" 9"] * 8, [" 88"] * 8
    late = answer_task(PROMPTS, eight, alternatives=nine, measure="first_difference").values(bigrams)
    assert late.tolist() == [1.0] * 8
    by_sum = answer_task(PROMPTS, eight, alternatives=nine).values(bigrams)
    assert by_sum.tolist() == [0.0] * 8
    assert np.prod(by_loop(bigrams, PROMPTS[0], " 88")) < np.prod(by_loop(bigrams, PROMPTS[0], " 9"))


@pytest.mark.parametrize("pair", [(" 8", " 89"), (" 89", " 8"), (" 8", " 8")])
def test_texts_that_begin_with_each_other_have_no_difference(
    bigrams: RoutedModel, pair: tuple[str, str]
) -> None:
    one, other = ([text] * 8 for text in pair)
    task = answer_task(PROMPTS, one, alternatives=other, measure="first_difference")
    with pytest.raises(DataError, match=r"prompt 0, .* differ in no token"):
        task.values(bigrams)
    by_sum = answer_task(PROMPTS, one, alternatives=other)
    if one == other:
        assert not by_sum.values(bigrams).any()
    else:
        with pytest.warns(UserWarning, match="begins with the other"):
            assert by_sum.values(bigrams).tolist() == [float(len(pair[0]) < len(pair[1]))] * 8


def test_equal_lengths_and_sums_give_no_warning(bigrams: RoutedModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer_task(PROMPTS, DIGIT, alternatives=WORD).values(bigrams)
        answer_task(PROMPTS, DIGIT, alternatives=[" 9"] * 8, measure="mean").values(bigrams)


def test_the_warning_comes_once_an_evaluation(hooked: Hooked) -> None:
    model = hooked("olmoe", num_experts=12)
    one, other = ["w1 w2"] * 4, ["w3"] * 4
    task = answer_task([prompt(3, n) for n in range(4)], one, alternatives=other, measure="mean")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        evaluate_steering(
            model, SteeringPlan(deactivate=[(0, 1)]), task, reverse=SteeringPlan(deactivate=[(0, 2)]),
            n_random=4, progress=False,
        )  # fmt: skip
    assert sum("mean a token" in str(each.message) for each in caught) == 1
    assert all(each.filename == __file__ for each in caught)


# Whole answers

TEXTS = [prompt(length, length) for length in (4, 1, 7, 3, 5, 2)]
VOCABULARY = SPECIAL + WORDS


def written(model: Any, text: str, n: int, hooks: Any = ()) -> str:
    """What the model writes after a text, greedily."""
    tokens = model.to_tokens(text)
    with model.hooks(list(hooks)), torch.no_grad():
        output: Any = model.generate(
            tokens, max_new_tokens=n, do_sample=False, stop_at_eos=False, verbose=False, return_type="tokens"
        )
    return " ".join(VOCABULARY[int(token)] for token in output[0, tokens.shape[1] :])


def other_end(text: str) -> str:
    return text[: text.rindex(" ") + 1] + ("w1" if not text.endswith(" w1") else "w2")


@pytest.mark.parametrize("recipe", FAMILIES)
def test_a_whole_answer_is_what_generate_writes(hooked: Hooked, recipe: str) -> None:
    model = hooked(recipe)
    right = [written(model, text, 2 + n % 3) for n, text in enumerate(TEXTS)]
    answers = [answer if n % 2 else other_end(answer) for n, answer in enumerate(right)]
    assert answer_task(TEXTS, answers, measure="whole_answer").values(model).tolist() == [0.0, 1.0] * 3
    aliases = [["w1 w2 w3", answer, right[n]] for n, answer in enumerate(answers)]
    assert answer_task(TEXTS, aliases, measure="whole_answer").values(model).tolist() == [1.0] * 6


@pytest.mark.parametrize("positions", [None, "prompt", "generated", -1])
def test_under_hooks_a_whole_answer_is_what_generate_writes_under_them(
    hooked: Hooked, positions: Any
) -> None:
    model = hooked("olmoe")
    hooks = scale_experts([(layer, 0) for layer in model.moe_layers], 20.0, positions=positions)
    right = [written(model, text, 3, hooks) for text in TEXTS]
    assert right != [written(model, text, 3) for text in TEXTS]  # else the hooks might do nothing
    task = answer_task(TEXTS, right, measure="whole_answer")
    assert task.values(model, hooks).all()
    assert not task.values(model).all()


# Settings


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"measure": "sum"}, "give alternatives"),
        ({"measure": "mean"}, "give alternatives"),
        ({"measure": "first_difference"}, "give alternatives"),
        ({"measure": "whole_answer", "alternatives": TEXTS}, "leave them out"),
        ({"measure": "product", "alternatives": TEXTS}, "must be one of"),
        ({"answers": [["w1", "w2"]] * 6}, "whole_answer"),
        ({"answers": [["w1", "w2"]] * 6, "alternatives": TEXTS}, "whole_answer"),
        ({"answers": [[]] * 6, "measure": "whole_answer"}, r"answers\[0\]"),
        ({"answers": ["w1", "", "w1", "w1", "w1", "w1"]}, r"answers\[1\]"),
    ],
)
def test_what_does_not_go_together_is_refused(options: Any, says: str) -> None:
    with pytest.raises((DataError, TypeCheckError), match=f"{says}|annotation"):
        answer_task(TEXTS, **{"answers": TEXTS, **options})


def test_a_file_says_its_measure_and_a_caller_may_say_another(bigrams: RoutedModel, tmp_path: Path) -> None:
    rows = [{"prompt": p, "answer": " 8", "alternative": " eight"} for p in PROMPTS]
    content: dict[str, Any] = {
        "kind": "moe_lens.SteeringTask",
        "prompts": rows,
        "measure": "first_difference",
    }
    path = tmp_path / "task.json"
    path.write_text(json.dumps(content))
    first = answer_task(PROMPTS, DIGIT, alternatives=WORD, measure="first_difference")
    task = load_task(path)
    assert (task.note, task.values(bigrams).tolist()) == (first.note, first.values(bigrams).tolist())
    assert load_task(path, measure="sum").note.endswith("log-probabilities")
    for wrong in ("product", "whole_answer", 3):
        path.write_text(json.dumps({**content, "measure": wrong}))
        with pytest.raises(DataError, match=r"task\.json: measure"):
            load_task(path)


# Texts are read once


@pytest.mark.parametrize("what", ["evaluate", "sweep"])
@pytest.mark.parametrize("alternatives", [None, ["w3 w4"] * 4])
def test_texts_become_tokens_once(hooked: Hooked, what: str, alternatives: Any) -> None:
    model = hooked("olmoe", num_experts=12)
    task = answer_task(
        [prompt(3, n) for n in range(4)], ["w1"] * 4, alternatives=alternatives,
        neutral_texts=["w5 w6", "w7 w8"], closed_book=[("w9", "w1")],
    )  # fmt: skip
    asked: list[str] = []
    to_tokens = model.to_tokens

    def counted(text: Any, *args: Any, **kwargs: Any) -> Tensor:
        asked.append(text)
        return to_tokens(text, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "to_tokens", counted)
        if what == "evaluate":
            plans = [SteeringPlan(deactivate=[(0, n)]) for n in (1, 2)]
            evaluate_steering(model, plans[0], task, reverse=plans[1], n_random=4, progress=False)
        else:
            sweep(model, scores(model), task, sizes=(1, 2), n_random=1, progress=False)
    assert sorted(asked) == sorted([*(prompt(3, n) for n in range(4)), "w5 w6", "w7 w8", "w9"])


def test_a_task_on_a_model_is_the_same_task(hooked: Hooked) -> None:
    model = hooked("olmoe")
    task = answer_task(TEXTS, ["w1 w2"] * 6, alternatives=["w3 w4"] * 6, neutral_texts=TEXTS)
    bound = task.on(model)
    assert (bound.name, bound.clusters, bound.note) == (task.name, task.clusters, task.note)
    hooks = scale_experts([(0, 0)], 3.0)
    for given in ([], hooks):
        assert bound.values(model, given).tolist() == task.values(model, given).tolist()
        for name, measure in task.collateral.items():
            assert bound.collateral[name].value(model, given) == measure.value(model, given)
    own = answer_task(TEXTS, ["w1"] * 6)
    assert own.on(model).on(model).values(model).tolist() == own.values(model).tolist()
