"""Labels of tokens: bytes put together, nothing invisible, no formulas, no missing letters."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from tokenizers import decoders

from moe_lens import plots
from moe_lens.plots import labels
from moe_lens.plots.labels import label_font, token_labels, wrapped
from moe_lens.text import token_texts
from tests.text.test_spans import model_with, trained

mpl.use("Agg")


@pytest.mark.parametrize("text", ["the cat", "é", "山水", "a 🙂b", "mat.\n\tsat"])
def test_texts_of_pieces_give_every_character_once(text: str) -> None:
    tokenizer = model_with("bytes").tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "\ufffd" not in "".join(texts)
    last = [t for t in texts if not t.endswith(")") or (n := t[-4:-1].split("/"))[0] == n[1]]
    assert "".join(t[:-5] if t.endswith(")") else t for t in last) == text


@pytest.mark.parametrize("text", ["the cat sat on the mat", "the  cat", "what is it? answer: 42"])
@pytest.mark.parametrize("kind", ["always", "prepended"])
def test_sentencepiece_texts_keep_their_spaces(kind: str, text: str) -> None:
    """Its decoders drop the space at the beginning, also where a single token is decoded."""
    tokenizer = trained(kind)
    llama = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.backend_tokenizer.decoder = (
        decoders.Metaspace() if kind == "always" else decoders.Sequence(llama)
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert not str(tokenizer.decode(ids[:1])).startswith(" ")
    assert "".join(token_texts(tokenizer, ids)) == f" {text}"


def test_bytes_that_are_no_character_are_written_out() -> None:
    tokenizer = model_with("bytes").tokenizer
    ids = tokenizer("山", add_special_tokens=False)["input_ids"]
    assert token_texts(tokenizer, ids[:2]) == ["<0xE5>", "<0xB1>"]
    assert token_texts(tokenizer, ids) == ["山(1/3)", "山(2/3)", "山(3/3)"]


def test_no_label_is_a_formula_or_lacks_a_letter() -> None:
    tokens = [r"$\x$", "\n", " sea", "山", "\x00", "🙂"]
    found = token_labels(tokens)
    assert found[0] == r"\$\x\$"
    assert found[1:3] == ["↵", "␣sea"]
    ax = plots.patching_map(torch.rand(2, len(tokens)), corrupted=0.0, columns=tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax.figure.canvas.draw()
    plt.close("all")
    assert label_font(["sea"]) == {}


@pytest.fixture
def cjk_font(tmp_path: Path) -> Iterator[str]:
    """A font with one Chinese letter, a full square, which matplotlib finds while the test runs."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(corner)
    pen.closePath()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "hill"])
    font.setupCharacterMap({0x5C71: "hill"})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "hill": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (1000, 0), "hill": (1000, 0)})
    font.setupHorizontalHeader(ascent=1000, descent=0)
    font.setupNameTable({"familyName": "Test CJK", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    path = tmp_path / "test.ttf"
    font.save(path)
    known = list(font_manager.fontManager.ttflist)
    font_manager.fontManager.addfont(path)
    labels._cjk_fonts.cache_clear()
    yield "Test CJK"
    font_manager.fontManager.ttflist[:] = known
    labels._cjk_fonts.cache_clear()


def test_letters_are_shown_where_a_font_has_them(cjk_font: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A letter that only that font has is drawn, without a warning; one that none has is its number."""
    only = tuple(font for font in labels._cjk_fonts() if font[0] == cjk_font)
    assert len(only) == 1
    monkeypatch.setattr(labels, "_cjk_fonts", lambda: only)
    assert token_labels(["山", "a山水"]) == ["山", "a山U+6C34"]
    assert cjk_font in label_font(["山"])["fontfamily"]
    figure = plt.figure(figsize=(1, 1), dpi=100)
    figure.text(0.2, 0.2, token_labels(["山"])[0], fontsize=40, **label_font(["山"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., 0]  # type: ignore[attr-defined]
    size = 40 * 100 / 72  # of the square, in pixels
    assert (pixels == 0).sum() == pytest.approx(size**2, rel=0.1)
    plt.close("all")


@pytest.mark.parametrize(("n", "width"), [(1, 40), (40, 40), (41, 40), (600, 80)])
def test_lines_hold_every_column_once(n: int, width: int) -> None:
    lines = wrapped(n, width)
    assert [column for line in lines for column in line] == list(range(n))
    assert max(map(len, lines)) <= width
