"""What tokens say: the text of each, and whose characters the pieces of a character belong to.

    token_texts(model.tokenizer, ids)              # [" sea", "山(1/2)", "山(2/2)"]

A tokenizer of bytes cuts rare characters into pieces, which say nothing by themselves.
"""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

_BYTE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How tokenizers that fall back to bytes write one."""
_SPACE: Final = "\u2581"
"""How SentencePiece writes a space."""


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token, with its spaces.

    >>> from moe_lens import organisms
    >>> tokenizer = organisms.load("specialised").tokenizer
    >>> token_texts(tokenizer, tokenizer("the capital")["input_ids"])[-1]
    'capital'

    Pieces that make one character together each bear that character, with their number ("山(2/3)"); bytes
    that make none are written out ("<0xE6>"); what has no text of its own is what the tokenizer calls it.

    Args:
        tokenizer: Hugging Face's.
        ids: token numbers, of one prompt in order.
    """
    texts = [_text(tokenizer, int(token)) for token in ids]
    pieces = [
        _bytes(tokenizer, int(token)) if "\ufffd" in text else None
        for token, text in zip(ids, texts, strict=True)
    ]
    place = 0
    while place < len(texts):
        stop = place
        while stop < len(texts) and pieces[stop] is not None:
            stop += 1
        if stop > place:
            texts[place:stop] = _joined([piece or b"" for piece in pieces[place:stop]])
        place = stop + 1
    return texts


def _text(tokenizer: Any, token: int) -> str:
    text = tokenizer.decode([token])
    name = str(tokenizer.convert_ids_to_tokens(token))
    if name.replace(_SPACE, " ") == f" {text}":
        return f" {text}"  # SentencePiece drops the space at the beginning of what it decodes
    if text and "\ufffd" not in text:
        return text
    return "\ufffd" if _bytes(tokenizer, token) is not None else name


def _bytes(tokenizer: Any, token: int) -> bytes | None:
    """The bytes of a piece; None if the tokenizer does not write bytes."""
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if found := _BYTE.fullmatch(piece):
        return bytes([int(found[1], 16)])
    letters = _byte_letters()
    return bytes(letters[letter] for letter in piece) if piece and set(piece) <= set(letters) else None


@cache
def _byte_letters() -> dict[str, int]:
    """The letters by which GPT-2 writes bytes: printable ones as they are, the rest from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + place): b for place, b in enumerate(rest)}


def _joined(pieces: list[bytes]) -> list[str]:
    """The texts of consecutive pieces, by the characters that they are parts of."""
    whole = b"".join(pieces)
    owner = [number for number, piece in enumerate(pieces) for _ in piece]
    texts = [""] * len(pieces)
    place = 0
    while place < len(whole):
        size = next((n for n in (1, 2, 3, 4) if _decodes(whole[place : place + n])), 0)
        holders = sorted(set(owner[place : place + max(size, 1)]))
        shown = whole[place : place + size].decode() if size else f"<0x{whole[place]:02X}>"
        for number, holder in enumerate(holders, start=1):
            texts[holder] += shown if len(holders) == 1 else f"{shown}({number}/{len(holders)})"
        place += max(size, 1)
    return texts


def _decodes(content: bytes) -> bool:
    try:
        return len(content.decode()) == 1
    except UnicodeDecodeError:
        return False
