"""The text that a split is fitted on: what Python carries with it, and what the dense model itself writes.

Nothing is fetched. Code and plain English come from the standard library (its sources, its docstrings, the
reference manual in `pydoc_data`); stories, essays and conversations are sampled from the dense model, whose
own text is the text that its split has to follow.
"""

import ast
import itertools
import random
import sysconfig
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from moe_lens.errors import DataError

Register = Literal["prose", "code", "chat"]
REGISTERS: Final[tuple[Register, ...]] = ("prose", "code", "chat")

_TOPICS = """
rivers; bees; the moon; bread; an old lighthouse; friendship; the French Revolution; electricity;
volcanoes; chess; a lost dog; the human heart; trains; winter; money; the ocean; ancient Rome; vaccines;
a haunted house; music; gardens; the city of Lisbon; dreams; glass; whales; the printing press; a young
inventor; rain; gravity; honesty; tea; deserts; a school in the mountains; languages; the brain; birds; a
broken clock; democracy; coffee; forests; bicycles; the stars; a kind giant; cooking; maps; fear; the
internet; horses; a shipwreck; numbers; paper; sleep; elephants; the Silk Road; a talented painter;
weather; plastic; memory; a secret garden; soil; football; time; atoms; a market in Cairo; bridges;
learning; the common cold; islands; a robot; poetry; salt; climate; trust; dinosaurs; a train journey;
oil; the eye; a letter; architecture; spiders; exercise; fire; a small village; law
"""
TOPICS: Final = tuple(topic.strip() for topic in _TOPICS.replace("\n", " ").split(";"))

_REQUESTS = (
    "Write a short story about {}.",
    "Tell me about {}.",
    "Explain {} to a child.",
    "Why does {} matter?",
    "Give me three interesting facts about {}.",
    "Write a short poem about {}.",
    "I want to learn more about {}. Where do I start?",
    "Summarize what people believe about {} in two sentences.",
    "Can you write an email to a friend about {}?",
    "What questions should I ask an expert on {}?",
)
_OPENINGS = (
    "Once upon a time there was a story about {}. It began",
    "Few things have changed our lives as much as {}.",
    "The history of {} is longer than most people think.",
    "It was late in the evening when Anna first thought about {}. She",
    "In this chapter we look at {}, and at what it",
    "My grandfather used to talk about {} for hours.",
    "Scientists who study {} have found that",
    "The newspaper had a long article about {} that morning.",
    "There are two common mistakes about {}. The first",
    "{} — an introduction.\n\n",
)
_STUBS = (
    'def count_words(text):\n    """Count how often each word occurs."""\n',
    "import json\nimport sys\n\n\ndef load_config(path):\n",
    "class Stack:\n    def __init__(self):\n",
    "def is_prime(n):\n",
    "Here is a Python function that sorts a list of dictionaries by a key:\n\n```python\n",
    "class BankAccount:\n",
    "import numpy as np\n\n\ndef moving_average(values, window):\n",
    "# Read a CSV file and print the average of each column\nimport csv\n",
    'def merge(left, right):\n    """Merge two sorted lists."""\n',
    "function fetchUsers(url) {\n",
    "SELECT name, COUNT(*) AS orders\nFROM",
    "#include <stdio.h>\n\nint main(void) {\n",
    "def test_",
    "from dataclasses import dataclass\n\n\n@dataclass\nclass",
    "import argparse\n\n\ndef main():\n    parser =",
    "<html>\n<head>\n",
)


def openings(register: Register, n: int, tokenizer: Any, seed: int) -> list[str]:
    """The beginnings of n texts of one register, as the dense model is to read and continue them.

    >>> from moe_lens.organisms.split_corpus import openings
    >>> openings("prose", 1, None, seed=0)
    ['It was late in the evening when Anna first thought about coffee. She']

    Args:
        register: "prose", "code" or "chat".
        n: how many.
        tokenizer: its chat template is used for chats, and only for them.
        seed: of the draw.
    """
    rng = random.Random(f"{register} {seed}")
    if register == "code":
        return [rng.choice(_STUBS) for _ in range(n)]
    frames = _REQUESTS if register == "chat" else _OPENINGS
    texts = [rng.choice(frames).format(rng.choice(TOPICS)) for _ in range(n)]
    if register == "prose":
        return [text[0].upper() + text[1:] for text in texts]
    chats = ([{"role": "user", "content": text}] for text in texts)
    return [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]


def sample(
    model: Any,
    tokenizer: Any,
    register: Register,
    n: int,
    *,
    seed: int,
    max_new_tokens: int = 160,
    temperature: float = 0.9,
) -> list[str]:
    """n texts of one register, opened by `openings` and written on by the model.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        register: "prose", "code" or "chat".
        n: how many texts; they are one batch.
        seed: of the openings and of the sampling.
        max_new_tokens: a text, at most; an end of text ends it earlier.
        temperature: of the sampling, above 0.
    """
    encoded = tokenizer(
        openings(register, n, tokenizer, seed), padding=True, padding_side="left", return_tensors="pt"
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        written = model.generate(
            **encoded.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            pad_token_id=tokenizer.pad_token_id,
        )
    start = encoded["input_ids"].shape[1]
    texts = []
    for row, mask in zip(written, encoded["attention_mask"], strict=True):
        new = row[start:].tolist()
        if tokenizer.eos_token_id in new:
            new = new[: new.index(tokenizer.eos_token_id) + 1]
        texts.append(tokenizer.decode(row[:start][mask.bool()].tolist() + new))
    return texts


@cache
def library_texts(register: Literal["prose", "code"]) -> tuple[str, ...]:
    """What the standard library holds: the reference manual and long docstrings, or the modules' sources.

    >>> from moe_lens.organisms.split_corpus import library_texts
    >>> any("def dedent(text):" in source for source in library_texts("code"))
    True

    The texts depend on the version of Python.
    """
    sources = [_read(path) for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]
    if register == "code":
        return tuple(source for source in sources if source)
    from pydoc_data.topics import topics

    manual = [text.strip() for _, text in sorted(topics.items())]
    return (*manual, *(doc for source in sources for doc in _docstrings(source)))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _docstrings(source: str, shortest: int = 200) -> Iterable[str]:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node) or ""
            if len(text) >= shortest:
                yield text


def windows(
    tokenizer: Any, texts: Sequence[str], *, length: int, n: int, seed: int
) -> Int[Tensor, "window {length}"]:
    """Up to n windows of `length` tokens: the texts in random order, the unknown token between them, cut up.

    Args:
        tokenizer: of a Hugging Face model.
        texts: what to cut.
        length: tokens a window.
        n: windows, at most.
        seed: of the order.

    Raises:
        DataError: if the texts do not fill one window.
    """
    order = list(texts)
    random.Random(seed).shuffle(order)
    between = [tokenizer.unk_token_id] if tokenizer.unk_token_id is not None else []
    stream: list[int] = []
    for text in order:
        stream += tokenizer(text, add_special_tokens=False)["input_ids"] + between
        if len(stream) >= n * length:
            break
    filled = min(n, len(stream) // length)
    if not filled:
        raise DataError(f"The texts hold {len(stream)} tokens, less than one window of {length}; give more.")
    return torch.tensor(list(itertools.islice(stream, filled * length))).view(filled, length)
