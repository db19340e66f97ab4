"""Each wrapper's rule for a BOS holds in whatever reads text: what runs are the tokens of `to_tokens`."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moe_lens import HookedMoE, RoutedModel, collect_generation, collect_routing, route_prompt, span_mask
from moe_lens.evaluation import answers_with, text_loss
from moe_lens.text.answers import single_token
from tests.tiny_models import prompt, tiny_model, tokenizer

TEXTS = [prompt(length, seed=length) for length in (3, 6, 5)]


def without_bos() -> Any:
    """A tokenizer that has a BOS token and does not add it."""
    found = tokenizer()
    found.backend_tokenizer.post_processor = None  # type: ignore[assignment]
    return found


def with_eos() -> Any:
    """A tokenizer that ends each text."""
    from tokenizers import processors

    found = tokenizer()
    found.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return found


def models(recipe: str, made: Any) -> list[Any]:
    return [RoutedModel(tiny_model(recipe), made()), HookedMoE.from_hf(tiny_model(recipe), made())]


@pytest.mark.parametrize("made", [tokenizer, without_bos, with_eos])
@pytest.mark.parametrize("recipe", ["olmoe", "phimoe"])
def test_text_is_read_as_to_tokens_reads_it(recipe: str, made: Any) -> None:
    for model in models(recipe, made):
        rows: Any = [model.to_tokens(text)[0] for text in TEXTS]
        if isinstance(model, RoutedModel):  # the tokenizer's own
            assert [row.tolist() for row in rows] == [made()(text)["input_ids"] for text in TEXTS]
        options: Any = {"batch_size": 3, "progress": False}
        by_text, by_tokens = (
            collect_routing(model, given, vocabulary=True, **options) for given in (TEXTS, rows)
        )
        assert by_text.n_tokens == sum(map(len, rows))
        assert all(torch.equal(found, by_tokens.tensors()[name]) for name, found in by_text.tensors().items())
        assert route_prompt(model, TEXTS[1]).indices.shape[1] == len(rows[1])
        written = [
            collect_generation(model, given, max_new_tokens=3, **options).tokens for given in (TEXTS, rows)
        ]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*written, strict=True))
        with torch.no_grad():
            logits = [model(row[None])[0] for row in rows]
        assert answers_with(model, TEXTS, ["w1"] * 3).tolist() == [
            int(best) == 5 for best in (each[-1].argmax() for each in logits)
        ]
        losses = [
            F.cross_entropy(each[:-1], row[1:], reduction="sum")
            for each, row in zip(logits, rows, strict=True)
        ]
        n_predicted = sum(len(row) - 1 for row in rows)
        assert text_loss(model, TEXTS) == pytest.approx(float(sum(losses)) / n_predicted, rel=1e-5)


@pytest.mark.parametrize("made", [tokenizer, without_bos, with_eos])
@pytest.mark.parametrize("side", ["left", "right"])
def test_spans_are_found_among_these_tokens(made: Any, side: str) -> None:
    words = [text.split() for text in TEXTS]
    for model in models("olmoe", made):
        mask = span_mask(model, TEXTS, [text[1] for text in words], padding_side=side)
        tokens = model.to_tokens(TEXTS, padding_side=side)
        assert mask.shape == tokens.shape
        for row, chosen, text in zip(tokens, mask, words, strict=True):
            last = max(place for place, word in enumerate(text) if word == text[1])
            own = [place for place, token in enumerate(row.tolist()) if token > 3]
            assert chosen.nonzero().flatten().tolist() == [own[last]]


@pytest.mark.parametrize("made", [tokenizer, without_bos, with_eos])
def test_an_answer_is_a_word_without_special_tokens(made: Any) -> None:
    for model in models("olmoe", made):
        assert single_token(model, "w3") == 7
