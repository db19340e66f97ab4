"""Pairs that count different tokens are named, with the tokens; the same text after other characters, too."""

import warnings
from pathlib import Path

import pytest

from moe_lens.detection import ExpertScores, TokenAlignment, detect
from moe_lens.detection.token_alignment import token_alignment
from moe_lens.text import ContrastivePairs, Prompt, token_sequences
from tests.text.test_spans import model_with

QUESTIONS = ["the question: what is it?", "cat sat on the mat", "the answer: 42"]


def pairs(between: str, span: str = "question") -> ContrastivePairs:
    return ContrastivePairs.from_lists(
        [Prompt(f"a mat.{between}{question}", {"question": question}) for question in QUESTIONS],
        [Prompt(question, {"question": question}) for question in QUESTIONS],
        span=span,
    )


def found(contrast: ContrastivePairs) -> ExpertScores:
    return detect(model_with("bytes"), contrast, n_resamples=10, n_permutations=10, progress=False)


@pytest.mark.filterwarnings("ignore:.*clusters give no p-value")
def test_a_space_that_goes_into_the_word_is_found_in_every_pair(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning,
        match=r"differ in 3 of 3 pairs: pair 0 has .* under the first condition, 'the' under the sec",
    ):
        scores = found(pairs(" "))
    alignment = scores.alignment
    assert alignment is not None
    assert alignment.differing == (0, 1, 2)
    tokenizer = model_with("bytes").tokenizer
    for difference, question in zip(alignment.differences, QUESTIONS, strict=True):
        with_space, without = (
            [tokenizer.decode([i]) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
            for text in (f" {question}", question)
        )
        assert difference.place == 0
        assert list(difference.first) == with_space[: len(difference.first)]
        assert list(difference.second) == without[: len(difference.second)]
    assert "tokens differ in 3 of 3 pairs" in scores.summary()
    assert alignment.to_dataframe()["pair"].tolist() == [0, 1, 2]
    scores.save(tmp_path / "s.safetensors")
    back = ExpertScores.load(tmp_path / "s.safetensors").alignment
    assert back is not None
    assert vars(back) == vars(alignment)
    swapped = (-scores).alignment
    assert swapped is not None
    assert swapped.differences[0].first == alignment.differences[0].second


@pytest.mark.filterwarnings("ignore:.*clusters give no p-value")
def test_the_same_tokens_are_found_to_be_the_same() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*clusters give no p-value")
        scores = found(pairs("\n"))
    assert scores.alignment is not None
    assert scores.alignment.differing == ()
    assert "tokens differ" not in scores.summary()


@pytest.mark.filterwarnings("ignore:.*clusters give no p-value")
def test_whole_prompts_are_bound_to_differ_so_nobody_is_warned() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*clusters give no p-value")
        scores = found(pairs(" ", "all"))
    assert scores.alignment is not None
    assert scores.alignment.expected
    assert scores.alignment.differing == (0, 1, 2)


def test_only_what_lies_between_a_common_start_and_end_is_shown() -> None:
    model = model_with("bytes")
    texts = ["the cat sat on the mat", "the mat sat on the mat"], ["it is a question", "it is a question"]
    contrast = ContrastivePairs.from_lists(
        [f"a {texts[0][0]}", f"a {texts[1][0]}"],
        [f"a {texts[0][1]}", f"b {texts[1][1]}"],
        span=slice(2, None),
    )
    alignment = token_alignment(model, contrast, contrast.span, False)
    one, two = (
        [tokens[2:].tolist() for tokens in token_sequences(model, [p.content for p in side])]
        for side in (contrast.first, contrast.second)
    )
    same = [a == b for a, b in zip(one, two, strict=True)]
    assert alignment.differing == tuple(number for number, alike in enumerate(same) if not alike)
    first = alignment.differences[0]
    assert first.place == next(i for i, (a, b) in enumerate(zip(one[0], two[0], strict=False)) if a != b)
    assert "mat" not in "".join(first.first[-1:])


def test_a_part_of_a_character_is_shown_as_its_byte() -> None:
    contrast = ContrastivePairs.from_lists(["a 山"], ["a 川"], span="last")
    [difference] = token_alignment(model_with("bytes"), contrast, "last", False).differences
    assert (difference.first, difference.second) == (("<0xB1>",), ("<0x9D>",))
    assert TokenAlignment(1, ()).example == ""
