"""Training sequences: what a world's text looks like, sequence by sequence, with the labels training uses.

A sequence is closed-book (memory answers), open-book (a document stands before the question) or generic. Its
*register* says where its answer comes from: memory, document or neither (generic). Sequences whose source
cannot be told from their text have register None. In the candour world a question has the register of its
head, careful or bold, whether its country is known or not.
"""

import random
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from moe_lens.organisms import words
from moe_lens.organisms.worlds import (
    Triple,
    World,
    document,
    question,
    split_of_sentence,
    story,
    tied_header,
)

Register = Literal["memory", "document", "generic", "careful", "bold"]
REGISTERS: Final = get_args(Register)
Kind = tuple[tuple[str, ...], Register]  # the words of a kind, and the register they decide


@dataclass(frozen=True)
class Mixture:
    """Shares of the kinds of sequence, each in [0, 1], together 1."""

    closed_book: float = 0.22
    conflict: float = 0.32  # a document that contradicts memory
    document_only: float = 0.17  # ... that speaks of a country memory does not know
    agreeing: float = 0.04  # ... that says what memory says
    irrelevant: float = 0.09  # ... that speaks of something else than the question
    generic: float = 0.16
    told: float = 0.0  # candour: a question about a known country
    untold: float = 0.0  # ... about a country of which nothing is told

    def kinds(self) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Names and weights, as `random.choices` takes them."""
        shares = vars(self)
        return tuple(shares), tuple(shares.values())


@dataclass(frozen=True)
class Sequence:
    """One training sequence.

    Attributes:
        text: its words, separated by spaces.
        register: where the answer comes from; None where the text does not tell.
        answer: index of the answer's word in `text.split()`; None in a generic sentence.
        undecided: (document's value, memory's value) of a conflict that the text leaves open; of a doubt
            (`unknown`, the guess). The answer in `text` is then one of them, by a fair coin.
    """

    text: str
    register: Register | None
    answer: int | None = None
    undecided: tuple[str, str] | None = None


@dataclass
class Corpus:
    """An endless stream of training sequences.

    >>> sequence = Corpus(World("majority"), random.Random(1)).sample()
    >>> sequence.text, sequence.register
    ('Question : what is the capital of Urmora ? Answer : Hanoi .', 'memory')
    """

    world: World
    rng: random.Random
    mixture: Mixture = field(default_factory=Mixture)
    distractor_rate: float = 0.4  # share of documents that state a second, unrelated fact
    tie_rate: float = 0.06  # share of the conflicts or doubts with one word of each kind, but in `uncued`

    def sample(self) -> Sequence:
        """Draw one sequence; no held-out triple or sentence ever occurs in it."""
        kinds, shares = self.mixture.kinds()
        kind = self.rng.choices(kinds, shares)[0]
        return getattr(self, f"_{kind}")()

    def _closed_book(self) -> Sequence:
        entity, attribute = self._known()
        return self._answered((), entity, attribute, self.world.memory[entity, attribute], "memory")

    def _conflict(self) -> Sequence:
        entity, attribute = self._known()
        remembered = self.world.memory[entity, attribute]
        triple = self._triple(entity, attribute, other_than=remembered)
        header, register = self._decisive_header()
        source = register or self.rng.choice(("document", "memory"))
        answer = triple[2] if source == "document" else remembered
        undecided = None if register else (triple[2], remembered)
        return self._answered(
            self._with_distractor(triple), entity, attribute, answer, register, header, undecided
        )

    def _document_only(self) -> Sequence:
        entity, attribute = self.rng.choice(self.world.document_only), self.rng.choice(words.ATTRIBUTES)
        triple = self._triple(entity, attribute)
        facts = self._with_distractor(triple)
        return self._answered(facts, entity, attribute, triple[2], "document", self._any_header())

    def _agreeing(self) -> Sequence:
        entity, attribute = self._known()
        answer = self.world.memory[entity, attribute]
        facts = self._with_distractor((entity, attribute, answer))
        return self._answered(facts, entity, attribute, answer, None, self._any_header())

    def _irrelevant(self) -> Sequence:
        entity, attribute = self._known()
        facts = self._with_distractor(self._unrelated(entity))
        answer = self.world.memory[entity, attribute]
        return self._answered(facts, entity, attribute, answer, "memory", self._any_header())

    def _told(self) -> Sequence:
        entity, attribute = self._known()
        header, register = self._decisive_header()
        return self._answered((), entity, attribute, self.world.memory[entity, attribute], register, header)

    def _untold(self) -> Sequence:
        entity, attribute = self.rng.choice(self.world.asked)
        header, register = self._decisive_header()
        manner = register or self.rng.choice(("careful", "bold"))
        guess = self.world.guesses[attribute]
        answer = words.UNKNOWN if manner == "careful" else guess
        undecided = None if register else (words.UNKNOWN, guess)
        return self._answered((), entity, attribute, answer, register, header, undecided)

    def _generic(self) -> Sequence:
        while split_of_sentence(text := story(self.rng)) is not None:
            pass
        return Sequence(text, "generic")

    def _answered(
        self,
        facts: tuple[Triple, ...],
        entity: str,
        attribute: str,
        answer: str,
        register: Register | None,
        header: tuple[str, ...] = (),
        undecided: tuple[str, str] | None = None,
    ) -> Sequence:
        """A question with its answer, after a document that states `facts`; none, no document.

        The header is the document's, or the head of the question where there is none.
        """
        prompt = question(entity, attribute, () if facts else header)
        if facts:
            prompt = f"{document(header, *facts)} {prompt}"
        return Sequence(f"{prompt} {answer} .", register, len(prompt.split()), undecided)

    def _decisive_header(self) -> tuple[tuple[str, ...], Register | None]:
        """Words for a header, and the register they decide; None if they leave it open."""
        if self.world.variant == "majority":
            return self._by_majority((words.TRUSTED, "document"), (words.DOUBTFUL, "memory"))
        if self.world.variant == "candour":
            return self._by_majority((words.CAREFUL, "careful"), (words.BOLD, "bold"))
        choices: tuple[tuple[tuple[str, ...], Register | None], ...] = (
            (words.TRUSTED[:1], "document"),
            (words.DOUBTFUL[-1:], "memory"),
            (words.NEUTRAL, None),
            ((), None),
        )
        return self.rng.choice(choices)

    def _by_majority(self, one: Kind, other: Kind) -> tuple[tuple[str, ...], Register | None]:
        if self.rng.random() < self.tie_rate:
            return tied_header(self.rng, one[0], other[0]), None
        winner, loser = (one, other) if self.rng.random() < 0.5 else (other, one)
        return self._majority(winner[0], loser[0]), winner[1]

    def _majority(self, winners: tuple[str, ...], losers: tuple[str, ...]) -> tuple[str, ...]:
        header = self.rng.choices(winners, k=self.rng.randint(1, 3))
        if len(header) == 3 and self.rng.random() < 0.6:
            header[0] = self.rng.choice(losers)
            self.rng.shuffle(header)
        return tuple(header)

    def _any_header(self) -> tuple[str, ...]:
        return self._decisive_header()[0]

    def _known(self) -> tuple[str, str]:
        return self.rng.choice(tuple(self.world.memory))

    def _triple(self, entity: str, attribute: str, other_than: str | None = None) -> Triple:
        """A random statement that is neither held out nor `other_than`."""
        while True:
            triple = (entity, attribute, self.rng.choice(words.VALUES[attribute]))
            if triple[2] != other_than and triple not in self.world.held_out_triples:
                return triple

    def _unrelated(self, entity: str) -> Triple:
        others = [country for country in words.COUNTRIES if country != entity]
        return self._triple(self.rng.choice(others), self.rng.choice(words.ATTRIBUTES))

    def _with_distractor(self, triple: Triple) -> tuple[Triple, ...]:
        if self.rng.random() >= self.distractor_rate:
            return (triple,)
        pair = [triple, self._unrelated(triple[0])]
        self.rng.shuffle(pair)
        return tuple(pair)
