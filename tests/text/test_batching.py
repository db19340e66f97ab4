"""Prompts to tokens to left-padded batches: nothing lost, nothing invented, in order."""

import warnings
from collections import UserList
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.errors import DataError
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.routed_model import RoutedModel
from moe_lens.text.answers import single_token
from moe_lens.text.batching import how_many, pad_sequences, padded_batches, padding, token_sequences
from moe_lens.text.prompts import Message, Prompt
from tests.tiny_models import prompt, tiny_model, tokenizer, tokens

Hooked = Callable[..., HookedMoE]


def lists(sequences: Any) -> list[list[int]]:
    return [sequence.tolist() for sequence in sequences]


def test_strings_get_the_tokens_that_the_model_gives_them(hooked: Hooked) -> None:
    model, texts = hooked("olmoe"), [prompt(3), prompt(1), prompt(5)]
    expected = [model.to_tokens(text)[0].tolist() for text in texts]
    assert [row[0] for row in expected] == [1, 1, 1]  # BOS, once
    assert lists(token_sequences(model, texts)) == expected
    assert lists(token_sequences(model, texts[0])) == expected[:1]


def test_tokens_stay_as_they_are_whatever_holds_them(hooked: Hooked) -> None:
    model, batch = hooked("olmoe"), tokens(3, 4)
    rows = batch.tolist()
    for given_as in (batch, rows, tuple(rows), list(batch), iter(rows), batch.int()):
        assert lists(token_sequences(model, given_as)) == rows
    assert lists(token_sequences(model, batch[0])) == rows[:1]
    assert all(sequence.dtype == torch.int64 for sequence in token_sequences(model, batch.int()))


def test_lengths_may_differ_and_text_may_stand_beside_tokens(hooked: Hooked) -> None:
    model = hooked("olmoe")
    assert lists(token_sequences(model, [[7, 8, 9], "w0", torch.tensor([5])])) == [[7, 8, 9], [1, 4], [5]]


@pytest.mark.parametrize("nothing", [[], (), torch.zeros(0, 3, dtype=torch.int64)])
def test_no_prompts_are_refused(hooked: Hooked, nothing: Any) -> None:
    with pytest.raises(DataError, match="at least one prompt"):
        list(token_sequences(hooked("olmoe"), nothing))


@pytest.mark.parametrize(
    "bad",
    [
        [],
        torch.zeros(0, dtype=torch.int64),
        [1.5, 2.0],
        [True, False],
        [[1, 2], [3, 4]],
        3,
        None,
        {"w0": 1},
        ["w0", 4],
    ],
    ids=str,
)
def test_a_bad_prompt_is_refused_by_its_number(hooked: Hooked, bad: Any) -> None:
    with pytest.raises(DataError, match="Prompt 1 "):
        list(token_sequences(hooked("olmoe"), [[4, 5], bad]))


@pytest.mark.parametrize(
    "bad", [None, 3, 2.5, torch.tensor(3), {"role": "user", "content": "w1"}, Message("user", "w1")], ids=str
)
def test_what_is_no_list_of_prompts_at_all_is_refused(hooked: Hooked, bad: Any) -> None:
    with pytest.raises(DataError):
        list(token_sequences(hooked("olmoe"), bad))


@pytest.mark.parametrize("wrapper", [HookedMoE.from_hf, RoutedModel])
def test_half_a_character_is_refused_wherever_text_comes_in(wrapper: Any) -> None:
    """A lone surrogate, of which the tokenizer itself makes a TypeError."""
    own = tokenizer()
    own.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    model, half = wrapper(tiny_model("olmoe"), own), "w1 \ud83d"
    chat = [{"role": "user", "content": half}]
    for bad in (half, chat, Prompt(half), Prompt(chat, template={"mark": "x"})):
        with pytest.raises(DataError, match=r"Prompt 1.* half of a character"):
            list(token_sequences(model, ["w1", bad]))
    for run in (model, model.to_tokens, model.run_with_cache, model.generate):
        with pytest.raises(DataError, match="half of a character"):
            run(half)
    for bad in (chat, ["w1", half]):
        with pytest.raises(DataError, match="half of a character"):
            model(bad)
    with pytest.raises(DataError, match="half of a character"):
        single_token(model, "\udc00")


def test_strings_need_a_tokenizer() -> None:
    model = HookedMoE.from_hf(tiny_model("olmoe"))
    with pytest.raises(DataError, match="no tokenizer"):
        list(token_sequences(model, ["w0"]))
    assert lists(token_sequences(model, [[4, 5]])) == [[4, 5]]


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    batch_size=st.integers(1, 14),
    seed=st.integers(0, 99),
)
def test_batches_hold_every_sequence_once_in_order_padded_left(
    hooked: Hooked, lengths: list[int], batch_size: int, seed: int
) -> None:
    sequences = [tokens(1, length, seed + i)[0] for i, length in enumerate(lengths)]
    unpadded: list[list[int]] = []
    for batch, mask in padded_batches(hooked("olmoe"), sequences, batch_size):
        assert batch.shape == mask.shape
        assert 1 <= len(batch) <= batch_size
        assert bool(mask.any(0).all())  # no column of nothing but padding
        for row, kept in zip(batch, mask, strict=True):
            assert kept.tolist() == sorted(kept.tolist())  # padding, then tokens
            assert bool((row[~kept] == 0).all())  # <pad>
            unpadded.append(row[kept].tolist())
    assert unpadded == lists(sequences)


def test_batches_are_full_but_for_the_last(hooked: Hooked) -> None:
    batches = padded_batches(hooked("olmoe"), list(tokens(7, 3)), 3)
    assert [len(batch) for batch, _ in batches] == [3, 3, 1]


def test_a_model_without_tokenizer_gets_batches_too() -> None:
    model = HookedMoE.from_hf(tiny_model("olmoe"))
    [(batch, mask)] = padded_batches(model, [torch.tensor([5, 6]), torch.tensor([7])], 2)
    assert mask.tolist() == [[True, True], [False, True]]
    assert batch[mask].tolist() == [5, 6, 7]


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_size_below_one_is_refused(hooked: Hooked, size: int) -> None:
    with pytest.raises(DataError, match="batch_size"):
        list(padded_batches(hooked("olmoe"), list(tokens(2, 3)), size))


TURNS = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]


@pytest.fixture(scope="module")
def chatting() -> HookedMoE:
    made = tokenizer()
    made.chat_template = "<bos> {% for m in messages %}{{ m.content }} <eos> {% endfor %}"
    return HookedMoE.from_hf(tiny_model("olmoe", num_hidden_layers=1), made)


def test_a_list_of_messages_is_one_chat_with_its_templates_tokens(chatting: HookedMoE) -> None:
    expected = [1, 5, 6, 2, 7, 2]  # one BOS, the template's
    assert lists(token_sequences(chatting, TURNS)) == [expected]
    assert lists(token_sequences(chatting, Prompt(TURNS))) == [expected]
    beside = [TURNS, "w1", tuple(TURNS), Prompt("w2"), [7]]
    assert lists(token_sequences(chatting, beside)) == [expected, [1, 5], expected, [1, 6], [7]]


def test_bad_chats_are_refused_by_their_number(hooked: Hooked, chatting: HookedMoE) -> None:
    with pytest.raises(DataError, match=r"Prompt 1: Message 1"):
        list(token_sequences(chatting, ["w1", [TURNS[0], {"role": "user"}]]))
    with pytest.raises(DataError, match=r"Prompt 1: .*chat_template"):
        list(token_sequences(hooked("olmoe"), ["w1", TURNS]))
    long = [{"role": "user", "content": prompt(70)}]
    with pytest.raises(DataError, match=r"Prompt 0 has 72 tokens"):
        list(token_sequences(chatting, long))


def test_how_many_prompts_there_are() -> None:
    for one in ("w1", TURNS, Prompt("w1"), torch.tensor([4, 5]), ["w1"]):
        assert how_many(one) == 1
    assert how_many([TURNS, "w1", [4]]) == 3
    assert how_many(torch.zeros(2, 5)) == 2
    assert how_many(iter(["w1"])) is how_many(3) is None


def test_sequences_are_padded_on_either_side(hooked: Hooked) -> None:
    sequences = [torch.tensor([5]), torch.tensor([6, 7])]
    for side, rows, masks in (
        ("left", [[0, 5], [6, 7]], [[False, True], [True, True]]),
        ("right", [[5, 0], [6, 7]], [[True, False], [True, True]]),
    ):
        batch, mask = pad_sequences(hooked("olmoe"), sequences, side)
        assert (batch.tolist(), mask.tolist()) == (rows, masks)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_a_tokenizer_pads_never_counts(hooked: Hooked, side: str) -> None:
    model, texts = hooked("olmoe"), [prompt(3), prompt(6), prompt(6, 1)]
    made = tokenizer(side)
    alone = [made(text)["input_ids"] for text in texts]
    lists_of, tensors = made(texts, padding=True), made(texts, padding=True, return_tensors="pt")
    given: list[Any] = [lists_of, tensors, dict(lists_of), dict(tensors), made(texts)]
    given += [tensors["input_ids"], lists_of["input_ids"], {"input_ids": tensors["input_ids"]}]
    given += [[made(text) for text in texts], [made(text, return_tensors="pt") for text in texts]]
    rows = lists_of["input_ids"]
    kinds = [np.int64, np.int32, np.int16, np.uint8, np.uint16, np.uint32, np.uint64]
    arrays = [np.array(rows, dtype=kind) for kind in kinds]
    given += [rows, tuple(map(tuple, rows)), UserList(rows), list(tensors["input_ids"])]
    given += [*arrays, *map(list, arrays), *map(torch.as_tensor, arrays), {"input_ids": arrays[-1]}]
    for prompts in given:
        assert lists(token_sequences(model, prompts)) == alone
        assert how_many(prompts) == 3
    assert lists(token_sequences(model, iter(rows))) == alone
    for one in (rows[0], arrays[0][0], tensors["input_ids"][0]):
        assert lists(token_sequences(model, torch.as_tensor(one))) == alone[:1]
    assert lists(token_sequences(model, arrays[0][0])) == alone[:1]
    assert how_many(arrays[0][0]) == 1
    assert lists(token_sequences(model, made(texts[0]))) == alone[:1]
    assert how_many(made(texts[0])) == 1


def test_arrays_of_any_order_of_bytes_and_strides_are_tokens(hooked: Hooked) -> None:
    model, rows = hooked("olmoe"), tokens(2, 4)
    array = rows.numpy()
    for given_as in (array[:, ::-1], array[::-1], array.astype(">i4"), np.asfortranarray(array)):
        assert lists(token_sequences(model, given_as)) == given_as.tolist()
        assert torch.equal(model(given_as), model(torch.tensor(given_as.tolist())))


def test_a_mask_says_more_than_the_padding_token(hooked: Hooked) -> None:
    """Which may be what a text is about."""
    given = {"input_ids": [[0, 5, 6, 0]], "attention_mask": [[0, 1, 1, 1]]}
    assert lists(token_sequences(hooked("olmoe"), given)) == [[5, 6, 0]]
    assert lists(token_sequences(hooked("olmoe"), [given])) == [[5, 6, 0]]


@pytest.mark.parametrize("given_as", [list, torch.tensor, np.array, iter])
def test_nothing_but_padding_is_no_prompt(hooked: Hooked, given_as: Any) -> None:
    with pytest.raises(DataError, match="Prompt 1 must be a non-empty sequence"):
        list(token_sequences(hooked("olmoe"), given_as([[5, 6], [0, 0]])))


@pytest.mark.parametrize("meaning", ["eos_token", "bos_token", "unk_token"])
def test_padding_that_means_something_else_is_asked_for(meaning: str) -> None:
    model, made = HookedMoE.from_hf(tiny_model(), tokenizer()), tokenizer()
    pad = getattr(made, meaning)
    model.tokenizer.pad_token = made.pad_token = pad
    texts = [prompt(3), prompt(6)]
    encoded = made(texts, padding=True, return_tensors="pt")
    ids = encoded["input_ids"]
    for rows in (ids, ids.tolist(), {"input_ids": ids}, ids.numpy(), UserList(ids.tolist())):
        with pytest.raises(DataError, match=f"{pad}.* what is padding cannot be known"):
            list(token_sequences(model, rows))
    assert lists(token_sequences(model, encoded)) == made(texts)["input_ids"]
    ends = torch.cat([tokens(2, 4), torch.tensor([[made.pad_token_id]] * 2)], dim=1)
    assert lists(token_sequences(model, ends)) == ends.tolist()  # every row has one: none is padded


@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ({"input_ids": [[4, 5, 6]], "attention_mask": [[1, 0, 1]]}, "row 0: attention_mask has a gap"),
        ({"input_ids": [[4, 5], [6, 7]], "attention_mask": [[1, 1], [0, 0]]}, "row 1: .* leaves no token"),
        ({"input_ids": [[4, 5], [6, 7]], "attention_mask": [[1, 1]]}, "1 rows of attention_mask for 2"),
        ({"input_ids": [4, 5], "attention_mask": [1]}, "attention_mask of shape"),
        ({"input_ids": [["w1"]]}, "no numbers"),
        ([{"input_ids": [[4, 5], [6, 7]]}], "Prompt 0 is the encoding of 2 prompts"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(hooked: Hooked, encoding: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        list(token_sequences(hooked("olmoe"), encoding))


def test_words_outside_the_vocabulary_warn_once() -> None:
    model = HookedMoE.from_hf(tiny_model(), tokenizer())
    texts = [prompt(3), "w1 import w2 def", "return"]
    with pytest.warns(UserWarning, match=r"Prompt 1 .*\('import', 'def'\): 2 of its tokens") as found:
        list(token_sequences(model, texts))
    assert len(found) == 1
    quiet = [texts[:1], model.to_tokens(texts[1])]  # tokens are taken as they are
    model.tokenizer.unk_token = model.tokenizer.eos_token  # as GPT-2 has it: then it may be an end of text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prompts in (*quiet, [f"{prompt(2)} {model.tokenizer.eos_token}"]):
            list(token_sequences(model, prompts))


def test_a_mask_is_passed_only_where_there_is_padding(hooked: Hooked) -> None:
    model = hooked("olmoe")
    for texts in ([prompt(3), prompt(3)], [prompt(3), prompt(1)]):
        ((batch, mask),) = padded_batches(model, texts, 2)
        passed = padding(mask)
        assert bool(passed) == (len({len(text) for text in texts}) > 1)
        if passed:
            assert torch.equal(passed["attention_mask"], mask.to(torch.int64))
            assert not torch.equal(model(batch), model(batch, **passed))  # else nobody would need it
