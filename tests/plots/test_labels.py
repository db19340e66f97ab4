"""Labels of tokens: bytes put together, nothing invisible, no formulas, no missing letters."""

import warnings

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch

from moe_lens import plots
from moe_lens.plots.labels import label_font, token_labels, wrapped
from moe_lens.text import token_texts
from tests.text.test_spans import model_with

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


def test_bytes_that_are_no_character_are_written_out() -> None:
    tokenizer = model_with("bytes").tokenizer
    ids = tokenizer("山", add_special_tokens=False)["input_ids"]
    assert token_texts(tokenizer, ids[:2]) == ["<0xE5>", "<0xB1>"]
    assert token_texts(tokenizer, ids) == ["山(1/3)", "山(2/3)", "山(3/3)"]


def test_no_label_is_a_formula_or_lacks_a_letter() -> None:
    tokens = [r"$\x$", "\n", " sea", "山", "\x00", "🙂"]
    labels = token_labels(tokens)
    assert labels[0] == r"\$\x\$"
    assert labels[1:3] == ["↵", "␣sea"]
    ax = plots.patching_map(torch.rand(2, len(tokens)), corrupted=0.0, columns=tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax.figure.canvas.draw()
    plt.close("all")
    assert label_font(["sea"]) == {}


@pytest.mark.parametrize(("n", "width"), [(1, 40), (40, 40), (41, 40), (600, 80)])
def test_lines_hold_every_column_once(n: int, width: int) -> None:
    lines = wrapped(n, width)
    assert [column for line in lines for column in line] == list(range(n))
    assert max(map(len, lines)) <= width
