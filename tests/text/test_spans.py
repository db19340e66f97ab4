"""Spans against oracles that never ask the tokenizer for offsets: the bytes and pieces of its tokens."""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from moe_lens.errors import DataError
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.statistics.collection import collect_routing
from moe_lens.statistics.routing_stats import RoutingStats
from moe_lens.text.batching import padded_batches, token_sequences
from moe_lens.text.prompts import Prompt
from moe_lens.text.spans import TextSpan, counted_batches, span_mask, special_ids
from tests.text.test_prompts import CHATML, LLAMA, TEMPLATES, chat
from tests.tiny_models import SPECIAL, prompt, tiny_model, tokenizer, tokens

Hooked = Callable[..., HookedMoE]
MARKS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CORPUS = [
    "the cat sat on the mat",
    "the question: what is it? answer: 42",
    "user assistant system a\nb\n\nc",
    "[w] (obey: x)",
] * 8
KINDS = ("bytes", "bytes_trimmed", "bytes_no_bos", "metaspace", "metaspace_first", "prepended")


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of some hundred pieces, as byte-level or sentencepiece models have them."""
    backend = Tokenizer(models.BPE(unk_token=None if kind.startswith("bytes") else "<unk>"))
    if kind.startswith("bytes"):
        backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = ByteLevel.alphabet()
    elif kind == "prepended":  # Llama 2: by the normalizer, no pre-tokenizer
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        alphabet = []
    else:
        scheme = "first" if kind.endswith("first") else "always"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        alphabet = []
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=[*SPECIAL, *MARKS], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    start = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    if kind == "bytes_trimmed":
        backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), start])
    elif kind != "bytes_no_bos":
        backend.post_processor = start
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **names, add_bos_token=kind != "bytes_no_bos", padding_side="left"
    )


@cache
def model_with(kind: str, template: str = CHATML) -> HookedMoE:
    made = trained(kind)
    made.chat_template = template
    return HookedMoE.from_hf(
        tiny_model("olmoe", vocab_size=400, num_hidden_layers=1, max_position_embeddings=256), made
    )


def byte_values() -> dict[str, int]:
    """GPT-2's letters for bytes, as its paper's code lists them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(rest)}}


def characters(kind: str, model: Any, ids: list[int], text: str) -> list[set[int]]:
    """Which characters of `text` each token stands for, by laying the tokens' pieces end to end."""
    made, special = model.tokenizer, set(range(len(SPECIAL) + len(MARKS)))
    owner: list[int] = []
    if kind.startswith("bytes"):
        for i, char in enumerate(text):
            owner += [i] * len(char.encode())
    found, at = [], 0
    for number, token in enumerate(ids):
        piece = made.convert_ids_to_tokens(token)
        if token in special:
            here = text.startswith(piece, at) if not kind.startswith("bytes") else piece in MARKS
            size = len(piece) if here else 0
            found.append(
                {*range(at, at + size)} if not kind.startswith("bytes") else set(owner[at : at + size])
            )
            at += size
            continue
        if kind.startswith("bytes"):
            size = len([byte_values()[char] for char in piece])
            found.append(set(owner[at : at + size]))
        else:
            size = len(piece)
            if (
                piece[0] == "▁"
                and (at == 0 or number == 0 or ids[number - 1] in special)
                and text[at : at + 1] != " "
            ):
                size -= 1  # a space that the tokenizer put there
            found.append({*range(at, at + size)})
        at += size
    assert at == (len(owner) if kind.startswith("bytes") else len(text))
    return found


def expected(owned: list[set[int]], text: str, ids: list[int], first: int, last: int) -> list[bool]:
    """A token counts if one of its characters, white space at its ends aside, is in [first, last)."""
    out = []
    for chars, token in zip(owned, ids, strict=True):
        solid = {i for i in chars if not text[i].isspace()}
        if solid and text[first:last].strip():
            chars = {*range(min(solid), max(solid) + 1)}
        out.append(token >= len(SPECIAL) + len(MARKS) and bool(chars & {*range(first, last)}))
    return out


def words(kind: str, model: Any, ids: list[int], kept: list[bool]) -> str:
    """The text of the kept tokens."""
    pieces = [token for token, here in zip(ids, kept, strict=True) if here]
    if kind.startswith("bytes"):
        return model.tokenizer.decode(pieces).strip()
    return "".join(model.tokenizer.convert_ids_to_tokens(pieces)).replace("▁", " ").strip()


def chosen(model: Any, one: Any, span: Any, **options: Any) -> list[bool]:
    return span_mask(model, [one], span, **options)[0].tolist()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_characters_choose_their_tokens(kind: str, data: Any) -> None:
    letters = "acehinostu ?:\n" + ("é🙂漢" if kind.startswith("bytes") else "")
    text = data.draw(st.text(letters, min_size=1, max_size=25).filter(str.strip))
    first = data.draw(st.integers(0, len(text) - 1))
    last = data.draw(st.integers(first + 1, len(text)))
    model = model_with(kind)
    ids = model.to_tokens(text)[0].tolist()
    if 3 in ids or (kind == "prepended" and text[0] == " "):  # pieces from which the oracle cannot tell
        return
    wanted = expected(characters(kind, model, ids, text), text, ids, first, last)
    given_as = Prompt(text, {"part": (first, last)})
    if any(wanted):
        assert chosen(model, given_as, "part") == wanted
    else:  # white space that no token is made of
        with pytest.raises(DataError, match="selects no token of prompt 0"):
            span_mask(model, given_as, "part")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_parts_of_chats_choose_their_tokens(kind: str, template: str) -> None:
    model = model_with(kind, TEMPLATES[template])
    turns = chat("system: the cat", "user: what is the mat?", "assistant: the cat sat on it")
    [ids] = [sequence.tolist() for sequence in token_sequences(model, turns)]
    text = model.tokenizer.apply_chat_template(turns, tokenize=False)
    assert 3 not in ids  # the oracle needs known pieces
    owned = characters(kind, model, ids, text) if not text.startswith("<bos>") else None
    for name, content in (("question", "what is the mat?"), ("answer", "the cat sat on it")):
        got = chosen(model, turns, name)
        assert words(kind, model, ids, got) == content
        if owned is not None:
            start = text.index(content)
            assert got == expected(owned, text, ids, start, start + len(content))


def test_emoji_of_many_tokens_are_chosen_whole() -> None:
    model = model_with("bytes")
    text = "a 🙂 b"
    ids = model.to_tokens(text)[0].tolist()
    got = chosen(model, text, "🙂")
    assert sum(got) >= 3
    assert model.tokenizer.decode([t for t, here in zip(ids, got, strict=True) if here]).strip() == "🙂"


def test_a_trailing_space_does_not_bring_in_the_next_word() -> None:
    for kind in KINDS[:-1]:  # the last has tokens of several words
        model = model_with(kind)
        ids = model.to_tokens("on the mat")[0].tolist()
        got = chosen(model, "on the mat", "the ")
        assert words(kind, model, ids, got) == "the"


def test_a_normalizer_that_lowers_and_decomposes_keeps_the_places() -> None:
    vocab = {word: i for i, word in enumerate([*SPECIAL, "straße", "und", "ele", "café"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>", add_bos_token=False
    )
    model = HookedMoE.from_hf(tiny_model("olmoe", num_hidden_layers=1), made)
    text = "Cafe\u0301 UND Stra\u00dfe"
    got = chosen(model, text, "UND")
    assert [made.decode([t]) for t, x in zip(model.to_tokens(text)[0].tolist(), got, strict=True) if x] == [
        "und"
    ]


# The word-level tokenizer: every word is one token, so positions can be counted by hand.


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    batch_size=st.integers(1, 8),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 99),
)
def test_spans_of_words_by_hand(
    hooked: Hooked, lengths: list[int], batch_size: int, side: str, seed: int
) -> None:
    model = hooked("olmoe")
    texts = [prompt(length, seed + i) for i, length in enumerate(lengths)]
    words = [text.split() for text in texts]
    target = words[0][-1]
    targets: list[Any] = [target if target in row else TextSpan(row[0], "all") for row in words]
    by_hand = [
        [
            position == max(i for i, word in enumerate(row) if word == target)
            if target in row
            else word == row[0]
            for position, word in enumerate(row)
        ]
        for row in words
    ]
    # "w1" is found in "w12" too: keep to targets whose last occurrence is a word
    targets = [span if not isinstance(span, str) else TextSpan(span) for span in targets]
    for row, span in zip(words, targets, strict=True):
        if sum(span.text in word for word in row) != sum(span.text == word for word in row):
            return
    cases = [(targets, by_hand)]
    cases += [("all", [[True] * len(row) for row in words])]
    cases += [("last", [[False] * (len(row) - 1) + [True] for row in words])]
    longest = max(lengths) + 1
    for span, rows in cases:
        mask = span_mask(model, texts, span, padding_side=side)
        assert mask.shape == model.to_tokens(texts, padding_side=side).shape
        for got, row in zip(mask.tolist(), rows, strict=True):
            padding = [False] * (longest - len(row) - 1)
            assert got == ([*padding, False, *row] if side == "left" else [False, *row, *padding])
        done = 0
        for (batch, real, counted), (plain, plain_mask) in zip(
            counted_batches(model, texts, span, batch_size),
            padded_batches(model, texts, batch_size),
            strict=True,
        ):
            assert torch.equal(batch, plain)
            assert torch.equal(real, plain_mask)
            for here, kept in zip(counted, real, strict=True):
                assert here[kept].tolist() == [False, *rows[done]]
                assert not bool(here[~kept].any())
                done += 1
        assert done == len(texts)


def test_occurrences(hooked: Hooked) -> None:
    model, text = hooked("olmoe"), "w1 w2 w1 w3 w1"
    for span, positions in (
        ("w1", [5]),
        (TextSpan("w1"), [5]),
        (TextSpan("w1", "first"), [1]),
        (TextSpan("w1", "all"), [1, 3, 5]),
        ("w2 w1", [2, 3]),
        ("3 w", [4, 5]),
    ):
        assert [i for i, x in enumerate(chosen(model, text, span)) if x] == positions, span


def test_text_spans_find_overlapping_occurrences() -> None:
    assert TextSpan("aa", "all").find("aaab") == ((0, 2), (1, 3))
    assert TextSpan("aa").find("aaab") == ((1, 3),)
    assert TextSpan("x").find("aaab") == ()


def test_a_name_goes_before_the_text_and_a_text_span_before_the_name(hooked: Hooked) -> None:
    model = hooked("olmoe")
    one = Prompt("w1 w2 w3", {"w3": (0, 2)})
    assert chosen(model, one, "w3") == [False, True, False, False]
    assert chosen(model, one, TextSpan("w3")) == [False, False, False, True]


def test_special_tokens_count_when_asked(hooked: Hooked) -> None:
    model, text = hooked("olmoe"), "w1 unheard <eos>"  # an unknown word is a word
    assert model.to_tokens(text).tolist() == [[1, 5, 3, 2]]
    assert chosen(model, text, "all") == [False, True, True, False]
    assert chosen(model, text, "last") == [False, False, True, False]
    assert chosen(model, text, "all", special_tokens=True) == [True] * 4
    assert chosen(model, text, "last", special_tokens=True) == [False, False, False, True]
    assert chosen(model, text, "<eos>", special_tokens=True) == [False, False, False, True]
    with pytest.raises(DataError, match="special_tokens=True"):
        span_mask(model, text, "<eos>")
    for span in (None, slice(None), lambda tokens: tokens >= 0):  # these mean just what they say
        assert chosen(model, text, span) == [True] * 4


def test_special_ids_are_what_stands_for_no_text() -> None:
    assert special_ids(tokenizer()) == {0, 1, 2}
    assert special_ids(None) == frozenset()
    marks = trained("bytes")
    assert special_ids(marks) == {*range(len(SPECIAL) + len(MARKS))} - {3}
    marks.unk_token = marks.eos_token  # GPT-2
    assert marks.eos_token_id in special_ids(marks)
    padded = tokenizer()
    padded.pad_token = padded.unk_token  # as people do where there is none; <unk> still stands for words
    assert 3 not in special_ids(padded)


def test_chat_spans_exclude_the_templates_marks() -> None:
    for template in (CHATML, LLAMA):
        model = model_with("bytes_trimmed", template)
        [ids] = [s.tolist() for s in token_sequences(model, chat("user: what is it?", "assistant: 42"))]
        got = chosen(model, chat("user: what is it?", "assistant: 42"), "all")
        assert got == [token >= len(SPECIAL) + len(MARKS) for token in ids]
        assert not all(got)
        last = chosen(model, chat("user: what is it?"), "last")
        assert sum(last) == 1


def test_a_bare_chat_is_one_prompt_and_lists_of_chats_are_many(hooked: Hooked) -> None:
    model = model_with("bytes")
    one, two = chat("user: the cat"), chat("user: what?", "assistant: a mat")
    assert len(list(token_sequences(model, one))) == 1
    together = list(token_sequences(model, [one, two, "the cat", Prompt(two)]))
    assert len(together) == 4
    assert torch.equal(together[1], together[3])
    assert torch.equal(together[0], next(iter(token_sequences(model, one))))
    assert span_mask(model, [one, two], "question").shape[0] == 2


def test_streams_are_read_batch_by_batch(hooked: Hooked) -> None:
    taken = []

    def stream() -> Any:
        for i in range(6):
            taken.append(i)
            yield f"w{i} w9"

    batches = counted_batches(hooked("olmoe"), stream(), "w9", 2)
    _, _, counted = next(batches)
    assert taken == [0, 1]
    assert counted.tolist() == [[False, False, True]] * 2
    assert sum(len(batch) for batch, _, _ in batches) == 4
    assert span_mask(hooked("olmoe"), (f"w{i}" for i in range(3)), "all").sum() == 3


def test_tokens_take_all_and_last_but_no_text(hooked: Hooked) -> None:
    model = hooked("olmoe")
    assert chosen(model, [1, 5, 6, 2], "all") == [False, True, True, False]
    assert chosen(model, [1, 5, 6, 2], "last") == [False, False, True, False]
    assert span_mask(model, tokens(3, 4), "all").tolist() == [[True] * 4] * 3
    for span in ("w1", "question", TextSpan("w1")):
        with pytest.raises(DataError, match=r"prompt 1 was given as tokens"):
            span_mask(model, ["w1", [4, 5]], ["w1", span])
    bare = HookedMoE.from_hf(tiny_model("olmoe", num_hidden_layers=1))
    assert chosen(bare, [1, 5], "all", padding_side="left") == [True, True]


@pytest.mark.parametrize("name", ["question", "answer", "document", "user", "assistant"])
def test_a_part_that_a_prompt_lacks_is_never_searched_as_a_word(hooked: Hooked, name: str) -> None:
    with pytest.raises(DataError, match=rf"[Pp]rompt 1, .*has no part '{name}'.*TextSpan"):
        span_mask(hooked("olmoe"), [Prompt("w1 w2", {name: "w2"}), f"w1 {name} w2"], name)
    with pytest.raises(DataError, match="no part 'answer'"):
        span_mask(model_with("bytes"), chat("user: what answer?"), "answer")


def test_a_text_that_is_not_there_is_refused_with_its_prompt(hooked: Hooked) -> None:
    with pytest.raises(DataError, match=r"'w7' does not occur in prompt 2, 'w3 w4'"):
        list(counted_batches(hooked("olmoe"), ["w7", "w7 w1", "w3 w4"], "w7", 2))
    with pytest.raises(DataError, match=r"prompt 0"):
        span_mask(hooked("olmoe"), "w1", "")


@pytest.mark.parametrize("spans", [["w1"], ["w1", "w2", "all"], []])
def test_a_list_holds_one_span_a_prompt(hooked: Hooked, spans: list[Any]) -> None:
    assert span_mask(hooked("olmoe"), ["w1 w2", "w1 w2"], ["w1", slice(-1, None)]).long().tolist() == [
        [0, 1, 0],
        [0, 0, 1],
    ]
    with pytest.raises(DataError, match="one span a prompt"):
        span_mask(hooked("olmoe"), ["w1 w2", "w1 w2"], spans)
    with pytest.raises(DataError, match="one span a prompt"):
        list(counted_batches(hooked("olmoe"), iter(["w1 w2", "w1 w2"]), spans, 1))


@pytest.mark.parametrize(
    "bad", [3, 2.5, {"w1"}, ["w1"], slice(None, None, -1), lambda t: None, lambda t: t[1:] > 0]
)
def test_what_is_no_span_is_refused(hooked: Hooked, bad: Any) -> None:
    with pytest.raises(DataError, match=r"span .*prompt 0"):
        span_mask(hooked("olmoe"), ["w1 w2"], [bad])


@pytest.mark.parametrize(("text", "occurrence"), [("", "last"), ("a", "second")])
def test_a_text_span_is_checked(text: str, occurrence: str) -> None:
    with pytest.raises(DataError, match="TextSpan"):
        TextSpan(text, occurrence)


def test_a_slow_tokenizer_is_refused(hooked: Hooked, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hooked("olmoe")
    monkeypatch.setattr(type(model.tokenizer), "is_fast", property(lambda self: False))
    with pytest.raises(DataError, match="fast tokenizer"):
        span_mask(model, "w1", "w1")
    assert chosen(model, "w1", "all") == [False, True]


def test_offsets_of_other_tokens_are_refused(hooked: Hooked, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hooked("olmoe")
    monkeypatch.setattr(model, "to_tokens", lambda *args, **kwargs: torch.tensor([[1, 6, 5]]))
    with pytest.raises(DataError, match="offsets of prompt 0"):
        span_mask(model, "w1 w2", "w1")


def test_no_bos_in_front() -> None:
    for kind in ("bytes", "metaspace", "bytes_no_bos"):
        model = model_with(kind)
        assert model.prepend_bos == (kind != "bytes_no_bos")  # as the tokenizer does by itself
        model.prepend_bos = True
        with_bos = chosen(model, "the cat sat", "cat")
        model.prepend_bos = False
        assert chosen(model, "the cat sat", "cat") == with_bos[1:]


def test_a_bos_that_is_written_into_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with("bytes_no_bos")
    monkeypatch.setattr(model.cfg, "default_prepend_bos", True)
    monkeypatch.setattr(model.cfg, "tokenizer_prepends_bos", False)
    ids = model.to_tokens("the cat sat")[0].tolist()
    assert ids[0] == model.tokenizer.bos_token_id
    for target in ("the", "cat", "sat"):
        assert words("bytes", model, ids, chosen(model, "the cat sat", target)) == target
    assert not chosen(model, "the cat sat", "all")[0]


def test_an_eos_that_the_tokenizer_appends_does_not_shift_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    model = HookedMoE.from_hf(tiny_model("olmoe", num_hidden_layers=1), made)
    monkeypatch.setattr(model.cfg, "tokenizer_appends_eos", True)
    for side in ("left", "right"):
        for texts in (["w1 w2", "w3"], ["w1", "w2"]):
            whole = model.to_tokens(texts, padding_side=side)
            mask = span_mask(model, texts, "all", padding_side=side)
            assert mask.tolist() == (whole > 3).tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_counts_in_a_cache_what_batches_count(side: str) -> None:
    """Left or right padding in run_with_cache, and one prompt at a time: the same counts."""
    model = HookedMoE.from_hf(tiny_model("olmoe"), tokenizer(side))
    texts = ["w1 w2 w3", "w9 w2", "w4 w5 w6 w2 w7"]
    _, cache = model.run_with_cache(texts)
    together = RoutingStats.from_cache(cache, span_mask(model, texts, "w2"))
    alone = [
        collect_routing(model, [text], span=slice(position, position + 1), progress=False)
        for text, position in zip(texts, (2, 2, 4), strict=True)
    ]
    assert torch.equal(together.counts, torch.stack([stats.counts for stats in alone]).sum(0))
    assert together.n_tokens == 3


def test_padding_sides_are_checked(hooked: Hooked) -> None:
    with pytest.raises(DataError, match="padding_side"):
        span_mask(hooked("olmoe"), "w1", "all", padding_side="middle")
    with pytest.raises(DataError, match="batch_size"):
        list(counted_batches(hooked("olmoe"), "w1", "all", 0))


def test_the_words_of_a_text_are_the_words_counted(hooked: Hooked) -> None:
    """Per-character words: any range of characters of a text of single words."""
    model, text = hooked("olmoe"), "w1  w22 w3\nw4"
    places = [(found.start(), found.end()) for found in re.finditer(r"\S+", text)]
    for first in range(len(text)):
        for last in range(first + 1, len(text) + 1):
            wanted = [False, *(bool({*range(*place)} & {*range(first, last)}) for place in places)]
            if any(wanted):
                assert chosen(model, Prompt(text, {"x": (first, last)}), "x") == wanted
            else:
                with pytest.raises(DataError, match="selects no token"):
                    span_mask(model, Prompt(text, {"x": (first, last)}), "x")


@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_of_a_tokenizers_output_and_of_arrays(hooked: Hooked, side: str) -> None:
    model, texts = hooked("olmoe"), ["w1 w2 w3 w4", "w5"]
    made = tokenizer(side)
    expected = span_mask(model, texts, slice(1, 2), padding_side=side)
    encoded = made(texts, padding=True)
    arrays = made(texts, padding=True, return_tensors="np")
    tensors = made(texts, padding=True, return_tensors="pt")
    for given_as in (encoded, dict(encoded), arrays["input_ids"], tensors):
        assert torch.equal(span_mask(model, given_as, slice(1, 2), padding_side=side), expected)
    one = np.array(made("w1 w2")["input_ids"])
    assert span_mask(model, one, slice(1, 2)).long().tolist() == [[0, 1, 0]]
