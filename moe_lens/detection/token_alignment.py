"""Whether the two prompts of a pair count the same tokens, and what differs where they do not.

scores = detect(model, pairs)
scores.alignment.differing                     # numbers of the pairs
scores.alignment.to_dataframe()                # where, and which tokens stand there under each condition

A tokenizer that works with parts of words cuts a text by what stands before it: "doc " + "What" counts "
What", the bare question "What". Such a pair compares two tokens, beside the two conditions.
"""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from moe_lens.errors import warn
from moe_lens.results import Result
from moe_lens.text.batching import DEFAULT_TOKENS, Limits, TextModel
from moe_lens.text.pairs import ContrastivePairs
from moe_lens.text.pieces import token_texts
from moe_lens.text.prompts import Prompt
from moe_lens.text.spans import Span, batches_by_length

if TYPE_CHECKING:
    import pandas

_MOST: Final = 6
"""Tokens of a difference that are kept."""


class TokenDifference(NamedTuple):
    """Where the counted tokens of a pair begin to differ, and what stands there.

    Attributes:
        pair: the number of the pair.
        place: how many counted tokens before it are the same.
        first, second: the tokens of each condition from there on, at most 6, without a common end.
    """

    pair: int
    place: int
    first: tuple[str, ...]
    second: tuple[str, ...]


@dataclass(frozen=True, eq=False, repr=False)
class TokenAlignment(Result):
    """Which pairs count different tokens under the two conditions.

    >>> from moe_lens import ContrastivePairs, detect, organisms
    >>> first, second = ["Document : the", "the capital"], ["Question : the", "capital"]
    >>> pairs = ContrastivePairs.from_lists(first, second, span="last")
    >>> scores = detect(organisms.load("null"), pairs, n_resamples=20, progress=False)
    >>> scores.alignment
    TokenAlignment(the counted tokens are the same in 2 of 2 pairs)

    Attributes:
        n_pairs: how many pairs there are.
        differences: of each pair whose counted tokens differ.
        expected: whether they were bound to differ: whole prompts are counted (the spans "all" and None).
    """

    n_pairs: int
    differences: tuple[TokenDifference, ...]
    expected: bool = False

    @property
    def differing(self) -> tuple[int, ...]:
        """The numbers of the pairs whose counted tokens differ."""
        return tuple(difference.pair for difference in self.differences)

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row a differing pair: pair, place, first, second."""
        import pandas

        return pandas.DataFrame(self.differences, columns=list(TokenDifference._fields))

    def to_json(self) -> dict[str, Any]:
        """What a file keeps."""
        return {**vars(self), "differences": [difference._asdict() for difference in self.differences]}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "TokenAlignment":
        """The inverse of `to_json`."""
        differences = tuple(
            TokenDifference(d["pair"], d["place"], tuple(d["first"]), tuple(d["second"]))
            for d in content["differences"]
        )
        return cls(content["n_pairs"], differences, content["expected"])

    def swapped(self) -> "TokenAlignment":
        """That of the opposite contrast."""
        differences = tuple(TokenDifference(d.pair, d.place, d.second, d.first) for d in self.differences)
        return TokenAlignment(self.n_pairs, differences, self.expected)

    def summary(self) -> str:
        """In how many pairs the tokens differ, with the first example."""
        if not self.differences:
            return f"the counted tokens are the same in {self.n_pairs} of {self.n_pairs} pairs"
        return f"the counted tokens differ in {len(self.differences)} of {self.n_pairs} pairs: {self.example}"

    @property
    def example(self) -> str:
        """The first difference in words; empty if there is none."""
        if not self.differences:
            return ""
        one = self.differences[0]
        first, second = (" ".join(map(repr, side)) or "nothing" for side in (one.first, one.second))
        return f"pair {one.pair} has {first} under the first condition, {second} under the second"


def token_alignment(
    model: TextModel, pairs: ContrastivePairs, span: Span, special_tokens: bool
) -> TokenAlignment:
    """Compare the counted tokens of each pair; no model runs.

    Raises:
        DataError: as in `moe_lens.text.span_mask`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unknown words: counting says it, too
        first, second = (
            _counted_tokens(model, prompts, span, special_tokens) for prompts in (pairs.first, pairs.second)
        )
    differences = tuple(
        _difference(model, number, one, two)
        for number, (one, two) in enumerate(zip(first, second, strict=True))
        if one != two
    )
    return TokenAlignment(len(first), differences, span is None or (isinstance(span, str) and span == "all"))


def warn_of_differences(alignment: TokenAlignment) -> None:
    """A warning where a span that should hold the same tokens does not."""
    if alignment.expected or not alignment.differences:
        return
    warn(
        f"{alignment.summary()}. Scores then hold what these tokens change, beside the two conditions. If "
        "the same text is meant, let the same characters stand before it under both conditions (a space or a "
        "new line: tokenizers put it into the word), or count a later part. All of them: scores.alignment."
    )


def _counted_tokens(
    model: TextModel, prompts: tuple[Prompt, ...], span: Span, special_tokens: bool
) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in prompts]
    limits = Limits.of(None, DEFAULT_TOKENS["cpu"])
    for batch in batches_by_length(model, prompts, span, limits, special_tokens=special_tokens):
        for row, tokens, chosen in zip(*batch, strict=True):
            found[row] = tokens[chosen].tolist()
    return found


def _difference(model: TextModel, pair: int, one: list[int], two: list[int]) -> TokenDifference:
    shorter = min(len(one), len(two))
    place = next((i for i in range(shorter) if one[i] != two[i]), shorter)
    end = next((i for i in range(shorter - place) if one[-1 - i] != two[-1 - i]), shorter - place)
    sides = (tokens[place : len(tokens) - end][:_MOST] for tokens in (one, two))
    first, second = (tuple(_shown(model, side)) for side in sides)
    return TokenDifference(pair, place, first, second)


def _shown(model: TextModel, tokens: list[int]) -> list[str]:
    """The tokens' texts, with their spaces; their numbers without a tokenizer."""
    return (
        [str(token) for token in tokens] if model.tokenizer is None else token_texts(model.tokenizer, tokens)
    )
