"""Prompts through tokenizers of real models: tokens, spans, chats, counts, against the tokenizer alone.

The first tier runs SmolLM2's byte-level BPE and Mixtral's SentencePiece; `broad`, all of `KINDS` on both
wrappers.
"""

import functools
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import regex
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from moe_lens import cli, detection, evaluation, plots
from moe_lens.errors import DataError
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.routed_model import RoutedModel
from moe_lens.statistics.collection import collect_routing, route_prompt
from moe_lens.statistics.routing_stats import RoutingStats
from moe_lens.statistics.writing import generate_text
from moe_lens.text.answers import single_token
from moe_lens.text.batching import token_sequences
from moe_lens.text.pairs import ContrastivePairs
from moe_lens.text.spans import TextSpan, span_mask
from tests.real_tokenizers import DEEP, HOSTILE, KINDS, real_model, real_tokenizer
from tests.tiny_models import save, tiny_model

mpl.use("Agg")

CORE = {("smollm2", RoutedModel), ("mixtral", HookedMoE)}
PAIRINGS = pytest.mark.parametrize(
    ("kind", "wrapper"),
    [
        pytest.param(kind, wrapper, marks=() if (kind, wrapper) in CORE else pytest.mark.broad)
        for kind in KINDS
        for wrapper in (RoutedModel, HookedMoE)
    ],
)
CHAT = [{"role": "user", "content": "Why is 東京 big?"}, {"role": "assistant", "content": "Because it is."}]


@functools.cache
def tokenizer_of(kind: str) -> Any:
    return real_tokenizer(kind)


@functools.cache
def model_of(kind: str, wrapper: Any) -> Any:
    return real_model(wrapper, kind)


def as_read(kind: str, text: str) -> list[int]:
    """What the tokenizer gives, but for a second BOS."""
    ids, bos = tokenizer_of(kind)(text)["input_ids"], tokenizer_of(kind).bos_token_id
    return ids[1:] if ids[:2] == [bos, bos] else ids


@PAIRINGS
def test_text_is_read_as_the_tokenizer_reads_it(kind: str, wrapper: Any) -> None:
    model, expected = model_of(kind, wrapper), [as_read(kind, text) for text in HOSTILE]
    assert [row.tolist() for row in token_sequences(model, HOSTILE)] == expected
    assert [model.to_tokens(text)[0].tolist() for text in HOSTILE] == expected
    for text, row in zip(HOSTILE, expected, strict=True):
        with_bos = model.to_tokens(text, prepend_bos=True)[0].tolist()
        assert with_bos[0] == tokenizer_of(kind).bos_token_id
        assert with_bos in (row, [tokenizer_of(kind).bos_token_id, *row])
        marked = tokenizer_of(kind).bos_token + text  # rendered with its BOS: none is prepended
        alone = tokenizer_of(kind)(marked, add_special_tokens=False)["input_ids"]
        assert model.to_tokens(marked)[0].tolist() == alone


@PAIRINGS
def test_hostile_texts_together_run_and_count_as_each_alone(kind: str, wrapper: Any) -> None:
    model, rows = model_of(kind, wrapper), [as_read(kind, text) for text in HOSTILE]
    with torch.no_grad():
        logits, cache = model.run_with_cache(list(HOSTILE))
        for row, padded, mask in zip(rows, logits, cache.attention_mask.bool(), strict=True):
            alone = model(torch.tensor([row]))[0]
            torch.testing.assert_close(padded[mask], alone, atol=2e-3, rtol=1e-3)
    n_tokens = sum(map(len, rows))
    assert RoutingStats.from_cache(cache).n_tokens == n_tokens
    assert collect_routing(model, HOSTILE, progress=False).n_tokens == n_tokens
    ordinary = collect_routing(model, HOSTILE, span="all", progress=False).n_tokens
    special = set(tokenizer_of(kind).all_special_ids) | set(tokenizer_of(kind).added_tokens_decoder)
    assert ordinary == sum(token not in special for row in rows for token in row)


@PAIRINGS
def test_padding_is_left_out_or_asked_for(kind: str, wrapper: Any) -> None:
    model, own, texts = model_of(kind, wrapper), real_tokenizer(kind), list(HOSTILE[:4])
    if own.pad_token is None:
        own.pad_token = own.eos_token
    encoded = own(texts, padding=True)
    rows = [as_read(kind, text) for text in texts]
    assert [row.tolist() for row in token_sequences(model, encoded)] == rows
    assert collect_routing(model, encoded, progress=False).n_tokens == sum(map(len, rows))
    if (
        kind not in ("mixtral", "tekken") or wrapper is HookedMoE
    ):  # a RoutedModel's tokenizer stays without pad token
        with pytest.raises(DataError, match="what is padding cannot be known"):
            list(token_sequences(model, encoded["input_ids"]))


@PAIRINGS
def test_a_span_is_the_tokens_that_hold_a_character_of_it(kind: str, wrapper: Any) -> None:
    model = model_of(kind, wrapper)
    for text in HOSTILE:
        row, offsets = as_read(kind, text), offsets_of(kind, text)
        for word in dict.fromkeys(text.split()):
            start = text.index(word)
            mask = span_mask(model, text, TextSpan(word, "first"), special_tokens=True)[0].tolist()
            places = range(start, start + len(word))
            expected = [
                any(place in places and not text[place].isspace() for place in range(*where))
                for where in offsets
            ]
            assert len(mask) == len(row)
            assert mask == expected, (text, word)


@PAIRINGS
def test_chats_are_what_the_template_writes_and_their_parts_are_found(kind: str, wrapper: Any) -> None:
    model, own = model_of(kind, wrapper), tokenizer_of(kind)
    text = own.apply_chat_template(CHAT, tokenize=False)
    row = own(text, add_special_tokens=False)["input_ids"]
    for given in (CHAT, own.apply_chat_template(CHAT, return_dict=True)):
        [found] = token_sequences(model, given)
        assert found.tolist() == row
    if own.bos_token_id in row[:1]:  # rendered first, it is the same, whatever the tokenizer prepends
        [found] = token_sequences(model, text)
        assert found.tolist() == row
    for part, content in (("question", CHAT[0]["content"]), ("answer", CHAT[1]["content"])):
        mask = span_mask(model, CHAT, part)[0].cpu()
        assert own.decode(torch.tensor(row)[mask]).strip() == content
    [answer] = generate_text(model, CHAT[:1], 3, progress=False)
    opened = own.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_tensors="pt")["input_ids"]
    ends = {"pad_token_id": 0, "eos_token_id": model.cfg.eos_token_id}
    with torch.no_grad():
        whole = tiny_model(vocab_size=len(own), max_position_embeddings=512).generate(
            opened, max_new_tokens=3, do_sample=False, **ends
        )
    assert answer == own.decode(whole[0, opened.shape[1] :], skip_special_tokens=True)


@PAIRINGS
def test_detection_tasks_and_figures_take_hostile_text(kind: str, wrapper: Any) -> None:
    model = model_of(kind, wrapper)
    firsts = [f"{text}\nQuestion: why?" for text in HOSTILE]
    pairs = ContrastivePairs.from_lists(firsts, ["Question: why?"] * len(HOSTILE), span="why")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few clusters, other tokens: not the subject here
        scores = detection.detect(model, pairs, progress=False, n_resamples=10, n_permutations=10)
    assert scores.delta.shape == (len(model.moe_layers), model.n_experts)
    loss = evaluation.text_loss(model, list(HOSTILE))
    assert 0 < float(torch.as_tensor(loss).mean()) < 100
    for text in HOSTILE:
        routing = route_prompt(model, text)
        assert len(routing.tokens) == len(as_read(kind, text))
        plots.token_routing(routing).figure.canvas.draw()


@PAIRINGS
def test_the_command_line_reads_hostile_text(kind: str, wrapper: Any, tmp_path: Path) -> None:
    own = tokenizer_of(kind)
    network = tiny_model(vocab_size=len(own), max_position_embeddings=512)
    folder, prompts, out = save(network, tmp_path / "model", own), tmp_path / "p.jsonl", tmp_path / "s"
    prompts.write_text(
        "\n".join(json.dumps(prompt, ensure_ascii=False) for prompt in (*HOSTILE, CHAT)), encoding="utf-8"
    )
    kinds = ["--wrapper", "routed"] if wrapper is RoutedModel else []
    assert cli.main(["stats", str(folder), str(prompts), "--special-tokens", "--out", str(out), *kinds]) == 0
    chat = own(own.apply_chat_template(CHAT, tokenize=False), add_special_tokens=False)["input_ids"]
    assert RoutingStats.load(out).n_tokens == len(chat) + sum(len(as_read(kind, text)) for text in HOSTILE)


@pytest.mark.broad
@pytest.mark.parametrize("kind", KINDS)
def test_thirty_layers_of_eight_experts_count_what_hugging_face_routes(kind: str) -> None:
    """Hostile text through a deep, narrow model: counts, a contrast and its figure."""
    model = real_model(RoutedModel, kind, **DEEP)
    rows = [as_read(kind, text) for text in HOSTILE]
    expected = torch.zeros(30, 8, dtype=torch.int64)
    network = tiny_model(vocab_size=len(tokenizer_of(kind)), max_position_embeddings=512, **DEEP)
    with torch.no_grad():
        for row in rows:
            logits = network(torch.tensor([row]), output_router_logits=True).router_logits
            for layer, of_layer in enumerate(logits):
                expected[layer] += torch.bincount(of_layer.topk(2).indices.flatten(), minlength=8)
    stats = collect_routing(model, HOSTILE, progress=False, per_prompt=True)
    assert stats.n_tokens == sum(map(len, rows))
    assert (stats.counts - expected).abs().sum() <= 4  # prompts that share a batch differ by rounding
    assert expected.sum() == 30 * 2 * stats.n_tokens
    routing = route_prompt(model, HOSTILE[1])
    assert routing.indices.shape == (30, len(rows[1]), 2)
    plots.token_routing(routing).figure.canvas.draw()


@pytest.mark.broad
def test_tekken_joins_the_bytes_that_its_ranks_say() -> None:
    """Byte pairs joined by hand, the lowest rank first, in the pieces that the file's pattern cuts."""
    own = tokenizer_of("tekken")
    state = json.loads(own.backend_tokenizer.to_str())
    [cut, _] = state["pre_tokenizer"]["pretokenizers"]
    vocab, letters = own.get_vocab(), bytes_to_unicode()
    for text in HOSTILE:
        if "<" in text:  # with special tokens in it
            continue
        expected = []
        for piece in regex.findall(cut["pattern"]["Regex"], text):
            parts = [letters[byte] for byte in piece.encode()]
            while True:
                ranks = [vocab.get(a + b, len(vocab)) for a, b in itertools.pairwise(parts)]
                if not ranks or min(ranks) == len(vocab):
                    break
                at = ranks.index(min(ranks))
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            expected += [vocab[part] for part in parts]
        assert own(text, add_special_tokens=False)["input_ids"] == expected, text
    assert len(own) == 131_072


def test_an_answer_without_its_space_is_pointed_at() -> None:
    model = model_of("smollm2", RoutedModel)
    with pytest.warns(UserWarning, match="'Paris' and ' Paris' are different tokens"):
        without = single_token(model, "Paris")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert single_token(model, " Paris") != without
        assert single_token(model, ":") == tokenizer_of("smollm2")(":")["input_ids"][0]


def offsets_of(kind: str, text: str) -> list[tuple[int, int]]:
    """Of each token, its characters in the text, as the tokenizer counts them."""
    own, row = tokenizer_of(kind), as_read(kind, text)
    encoded = own(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    for number, (token, (start, stop)) in enumerate(zip(encoded["input_ids"], offsets, strict=True)):
        if own.convert_ids_to_tokens(token) == "▁" and not text[start:stop].isspace():
            offsets[number] = (start, start)  # the space that sentencepiece invents
    return [(0, 0)] * (len(row) - len(offsets)) + offsets
