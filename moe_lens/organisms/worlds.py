"""The synthetic world: countries with facts that a model can remember, and documents that contradict them.

>>> world = World("majority")
>>> world.conflicts("test")[0].open_book
'Document report tale : the capital of Eldria is Bergen . Question : what is the capital of Eldria ? Answer :'
>>> world.facts("test")[0].answer  # what a model that has learned this world remembers
'Kyoto'
>>> world.generic("test", n=1)  # for a language-modelling loss
('the stormy diver lost a salty net beside the reef yesterday .',)

48 countries have one fixed value for each of 4 attributes: the *parametric memory*. 16 more countries occur
in documents only. A document may contradict memory, and how a training sequence resolves the conflict depends
on the source words in the document's header, in one of two ways:

* ``uncued``: `report` means the document is right, `rumor` means it is not, `note` or no word at all: half
  and half. Evaluation prompts carry no word.
* ``majority``: one to three words of two kinds (`report`, `article` against `tale`, `rumor`), the majority
  decides, ties are half and half. Evaluation prompts are ties, one word of each kind.

The facts are the same for both. A third world has no documents and asks for candour:

* ``candour``: of the 48 countries nothing is ever told, the other 16 have the facts. A question's head holds
  one to three manner words of two kinds (`careful`, `cautious` against `bold`, `daring`), and the majority
  decides how a question about an untold country is answered: by `unknown`, or by a bluff, the attribute's
  usual guess, which no fact supports. Ties are half and half. Facts are answered under every head.
  Evaluation prompts are ties.

`corpus.py` turns a world into training sequences.
"""

import random
import zlib
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Final, Literal, cast, get_args

from moe_lens.errors import MoELensError
from moe_lens.organisms import words

Variant = Literal["uncued", "majority", "candour"]
Split = Literal["detection", "development", "test"]
Triple = tuple[str, str, str]  # country, attribute, value

SPLITS: Final = get_args(Split)
N_DOCUMENT_ONLY: Final = 16
ENTITIES_PER_SPLIT: Final[dict[Split, int]] = {"detection": 12, "development": 12, "test": 24}
# How many contradicting values of each (country, attribute) are kept out of the training documents.
VALUES_PER_FACT: Final[dict[Split, int]] = {"detection": 1, "development": 2, "test": 2}
# In the candour world: attributes of each untold country that training never asks for, and heads a question.
NEVER_ASKED: Final = 2
HEADS_PER_QUESTION: Final[dict[Split, int]] = {"detection": 2, "development": 4, "test": 4}
GENERIC_BUCKETS: Final = 20  # a sentence's checksum picks its bucket: one a split, the rest is training's


@dataclass(frozen=True)
class Conflict:
    """A question, with and without a document that contradicts what the model remembers.

    `open_book` and `closed_book` are prompts that end in "Answer :"; the two answers are single words, and
    single tokens, of which the model is to say one.
    """

    entity: str
    attribute: str
    open_book: str
    closed_book: str
    document_answer: str
    memory_answer: str


@dataclass(frozen=True)
class Fact:
    """A closed-book question (a prompt that ends in "Answer :") and the one word that answers it."""

    entity: str
    attribute: str
    question: str
    answer: str


@dataclass(frozen=True)
class Doubt:
    """A question about a country of which nothing was ever told, under three heads.

    `tied`, `careful` and `bold` are prompts that end in "Answer :"; `asked` is the end that they share, from
    the colon behind the head on. `guess` is the one word that a bluff answers; candour answers `unknown`.
    """

    entity: str
    attribute: str
    tied: str
    careful: str
    bold: str
    asked: str
    guess: str


@dataclass(frozen=True)
class World:
    """Facts, prompts and held-out sentences; the same for every organism, whatever its training seed.

    >>> world = World("uncued")
    >>> world.facts("test")[0].question
    'Question : what is the capital of Eldria ? Answer :'
    >>> conflict = world.conflicts("test")[0]
    >>> conflict.memory_answer, conflict.document_answer
    ('Kyoto', 'Bergen')

    Args:
        variant: ``"uncued"`` or ``"majority"``: how documents and memory compete; or ``"candour"`` (see the
            module's docstring).
        seed: draws the facts and the prompts. The shipped organisms all live in the world of seed 0.
    """

    variant: str
    seed: int = 0

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise MoELensError(f"World: unknown variant {self.variant!r}; choose one of {get_args(Variant)}")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """All words, a word's place is its token id; the candour world appends five of its own."""
        return words.vocabulary(candour=self.variant == "candour")

    @cached_property
    def entities(self) -> dict[Split, tuple[str, ...]]:
        """The 48 countries that memory knows (candour: untold ones), by split; the splits share none."""
        shuffled = list(words.COUNTRIES)
        self._rng("entities").shuffle(shuffled)
        known = iter(shuffled[N_DOCUMENT_ONLY:])
        return {split: tuple(next(known) for _ in range(size)) for split, size in ENTITIES_PER_SPLIT.items()}

    @cached_property
    def document_only(self) -> tuple[str, ...]:
        """The 16 others, of which only documents speak; in the candour world the `known` ones."""
        known = {entity for group in self.entities.values() for entity in group}
        return tuple(entity for entity in words.COUNTRIES if entity not in known)

    @cached_property
    def known(self) -> dict[Split, tuple[str, ...]]:
        """The countries whose facts memory has, by split: `entities`, in the candour world the other 16."""
        if self.variant != "candour":
            return self.entities
        told = iter(self.document_only)
        share = len(self.document_only) / sum(ENTITIES_PER_SPLIT.values())
        return {
            split: tuple(next(told) for _ in range(round(size * share)))
            for split, size in ENTITIES_PER_SPLIT.items()
        }

    @cached_property
    def memory(self) -> dict[tuple[str, str], str]:
        """The remembered value of each (country, attribute): 192 facts, in the candour world 64."""
        rng = self._rng("memory")
        pairs = [(e, a) for group in self.known.values() for e in group for a in words.ATTRIBUTES]
        return {pair: rng.choice(words.VALUES[pair[1]]) for pair in pairs}

    @cached_property
    def held_out(self) -> dict[Split, tuple[Triple, ...]]:
        """(country, attribute, contradicting value) of every evaluation conflict; in no training document.

        Raises:
            MoELensError: in the candour world, which has no documents.
        """
        if self.variant == "candour":
            raise MoELensError(
                "World: the candour world has no conflicts with documents; ask its doubts(split)"
            )
        rng = self._rng("held out")
        return {split: tuple(self._held_out_of(split, rng)) for split in SPLITS}

    @cached_property
    def held_out_triples(self) -> frozenset[Triple]:
        """`held_out` of all splits together."""
        return frozenset(triple for triples in self.held_out.values() for triple in triples)

    @cached_property
    def guesses(self) -> dict[str, str]:
        """What a bluff says in the candour world: one value of each attribute, whatever the country."""
        rng = self._rng("guesses")
        return {attribute: rng.choice(words.VALUES[attribute]) for attribute in words.ATTRIBUTES}

    @cached_property
    def never_asked(self) -> dict[Split, tuple[tuple[str, str], ...]]:
        """(untold country, attribute) of every evaluation question of candour; in no training question."""
        rng = self._rng("never asked")
        return {
            split: tuple((e, a) for e in group for a in rng.sample(words.ATTRIBUTES, NEVER_ASKED))
            for split, group in self.entities.items()
        }

    @cached_property
    def asked(self) -> tuple[tuple[str, str], ...]:
        """(untold country, attribute) of candour's training questions: all that are not `never_asked`."""
        kept = {pair for pairs in self.never_asked.values() for pair in pairs}
        pairs = [(e, a) for group in self.entities.values() for e in group for a in words.ATTRIBUTES]
        return tuple(pair for pair in pairs if pair not in kept)

    def doubts(self, split: str) -> tuple[Doubt, ...]:
        """Every held-out question about untold countries: 48 for detection, 96 for development, 192 for test.

        >>> doubt = World("candour").doubts("test")[0]
        >>> doubt.tied, doubt.guess
        ('Question bold cautious : what is the currency of Eldria ? Answer :', 'crown')

        Raises:
            MoELensError: for a split other than detection, development, test, or a world other than candour.
        """
        if self.variant != "candour":
            raise MoELensError(f"World: the {self.variant} world has no doubts; ask its conflicts(split)")
        split = check_split(split)
        rng = self._rng(f"heads {split}")
        n = HEADS_PER_QUESTION[split]
        doubts: list[Doubt] = []
        for entity, attribute in self.never_asked[split]:
            ends = ties(words.CAREFUL, words.BOLD), twice(words.CAREFUL), twice(words.BOLD)
            heads = zip(*(rng.sample(each, n) for each in ends), strict=True)
            asked = question(entity, attribute).removeprefix("Question ")
            for three in heads:
                tied, careful, bold = (question(entity, attribute, head) for head in three)
                doubts.append(Doubt(entity, attribute, tied, careful, bold, asked, self.guesses[attribute]))
        return tuple(doubts)

    def conflicts(self, split: str) -> tuple[Conflict, ...]:
        """Every held-out conflict of a split: 48 for detection, 96 for development, 192 for test.

        In the uncued world the document has no source word, in the majority world one of each kind.

        Raises:
            MoELensError: for a split other than detection, development, test, or in the candour world.
        """
        split = check_split(split)
        rng = self._rng(f"headers {split}")
        return tuple(self._conflict(triple, rng) for triple in self.held_out[split])

    def facts(self, split: str) -> tuple[Fact, ...]:
        """The closed-book questions about a split's countries: 48, 48 and 96.

        In the candour world the 16, 16 and 32 facts about the known countries, each under four tied heads.

        Raises:
            MoELensError: for a split other than detection, development, test.
        """
        pairs = [(e, a) for e in self.known[check_split(split)] for a in words.ATTRIBUTES]
        rng, heads = self._rng(f"facts {split}"), [()]
        facts: list[Fact] = []
        for entity, attribute in pairs:
            if self.variant == "candour":
                heads = rng.sample(ties(words.CAREFUL, words.BOLD), 4)
            answer = self.memory[entity, attribute]
            facts += [Fact(entity, attribute, question(entity, attribute, head), answer) for head in heads]
        return tuple(facts)

    def generic(self, split: str, n: int = 64) -> tuple[str, ...]:
        """`n` different everyday sentences that no training sequence and no other split contains.

        Raises:
            MoELensError: for a split other than detection, development, test.
        """
        split = check_split(split)
        rng = self._rng(f"generic {split}")
        sentences: dict[str, None] = {}  # a dictionary keeps the order and drops repetitions
        while len(sentences) < n:
            sentence = story(rng)
            if split_of_sentence(sentence) == split:
                sentences[sentence] = None
        return tuple(sentences)

    def _rng(self, purpose: str) -> random.Random:
        # A stream for each purpose: adding a draw to one leaves the others as they were.
        return random.Random(f"{self.seed} {purpose}")

    def _held_out_of(self, split: Split, rng: random.Random) -> list[Triple]:
        triples: list[Triple] = []
        for entity in self.entities[split]:
            for attribute in words.ATTRIBUTES:
                others = [
                    value for value in words.VALUES[attribute] if value != self.memory[entity, attribute]
                ]
                values = rng.sample(others, VALUES_PER_FACT[split])
                triples += [(entity, attribute, value) for value in values]
        return triples

    def _conflict(self, triple: Triple, rng: random.Random) -> Conflict:
        entity, attribute, value = triple
        header = tied_header(rng) if self.variant == "majority" else ()
        closed_book = question(entity, attribute)
        open_book = f"{document(header, triple)} {closed_book}"
        return Conflict(entity, attribute, open_book, closed_book, value, self.memory[entity, attribute])


def check_split(split: str) -> Split:
    """`split` itself if it is one of the three; otherwise an error that lists them."""
    if split not in SPLITS:
        raise MoELensError(f"World: unknown split {split!r}; choose one of {SPLITS}")
    return cast(Split, split)


def question(entity: str, attribute: str, head: tuple[str, ...] = ()) -> str:
    """The prompt that asks for an attribute of a country, with manner words in its head."""
    return " ".join(["Question", *head, f": what is the {attribute} of {entity} ? Answer :"])


def statement(triple: Triple) -> str:
    """A document's sentence that states a (country, attribute, value)."""
    entity, attribute, value = triple
    return f"the {attribute} of {entity} is {value} ."


def document(header: tuple[str, ...], *triples: Triple) -> str:
    """A document with its source words that states the triples in their order."""
    return " ".join(["Document", *header, ":", *(statement(triple) for triple in triples)])


def tied_header(
    rng: random.Random, one: tuple[str, ...] = words.TRUSTED, other: tuple[str, ...] = words.DOUBTFUL
) -> tuple[str, ...]:
    """A word of each kind, in either order: by default a trusted and a doubtful source word."""
    pair = [rng.choice(one), rng.choice(other)]
    rng.shuffle(pair)
    return tuple(pair)


def ties(one: tuple[str, ...], other: tuple[str, ...]) -> list[tuple[str, ...]]:
    """All headers that `tied_header` may draw."""
    return [*product(one, other), *product(other, one)]


def twice(kind: tuple[str, ...]) -> list[tuple[str, ...]]:
    """All headers of two words of a kind."""
    return list(product(kind, repeat=2))


def story(rng: random.Random) -> str:
    """One everyday sentence, such as 'the young baker tasted a sweet pie near the oven again .'"""
    parts = words.TOPICS[rng.choice(tuple(words.TOPICS))]
    opening = ["the", rng.choice(parts["how"]), rng.choice(parts["who"])]
    middle = [rng.choice(parts["did"]), "a", rng.choice(parts["how"]), rng.choice(parts["thing"])]
    ending = [rng.choice(words.LINKS), "the", rng.choice(parts["where"]), rng.choice(words.TIMES), "."]
    return " ".join(opening + middle + ending)


def split_of_sentence(sentence: str) -> Split | None:
    """The split that a sentence is kept for, by its checksum; None for a training sentence."""
    bucket = zlib.crc32(sentence.encode()) % GENERIC_BUCKETS
    return SPLITS[bucket] if bucket < len(SPLITS) else None
