"""The world: splits are disjoint, the held-out stays out of training, prompts say what they should."""

import random
from functools import cache
from itertools import combinations

import pytest

from moe_lens.errors import MoELensError
from moe_lens.organisms import words
from moe_lens.organisms.corpus import Corpus, Mixture
from moe_lens.organisms.worlds import SPLITS, Variant, World, split_of_sentence

VARIANTS: tuple[Variant, ...] = ("uncued", "majority")


@pytest.fixture(params=VARIANTS)
def world(request: pytest.FixtureRequest) -> World:
    return World(request.param)


@cache
def sampled(world: World) -> list[str]:
    corpus = Corpus(world, random.Random(0))
    return [corpus.sample().text for _ in range(12_000)]


def triples_in(text: str) -> set[tuple[str, str, str]]:
    """(country, attribute, value) of every 'the A of C is T .' in a text; a question states no town."""
    parts = text.split()
    return {
        (parts[i + 3], parts[i + 1], parts[i + 5])
        for i in range(len(parts) - 5)
        if parts[i] == "the" and parts[i + 2] == "of" and parts[i + 4] == "is"
    }


def test_sizes_and_disjoint_entities(world: World) -> None:
    assert [len(world.conflicts(split)) for split in SPLITS] == [48, 96, 192]
    assert [len(world.facts(split)) for split in SPLITS] == [48, 48, 96]
    entities = [{c.entity for c in world.conflicts(split)} for split in SPLITS]
    assert all(not a & b for a, b in combinations([*entities, set(world.document_only)], 2))
    assert sum(map(len, entities)) == 48


def test_same_facts_in_both_worlds_and_every_time() -> None:
    assert World("uncued").memory == World("majority").memory
    assert World("uncued").held_out == World("majority").held_out
    assert World("majority").conflicts("test") == World("majority").conflicts("test")
    assert World("majority", seed=1).memory != World("majority").memory


def test_conflict_prompts(world: World) -> None:
    for conflict in world.conflicts("test"):
        assert conflict.open_book.endswith(conflict.closed_book)
        assert conflict.closed_book.endswith("Answer :")
        stated = f"the {conflict.attribute} of {conflict.entity} is {conflict.document_answer} ."
        assert stated in conflict.open_book
        assert world.memory[conflict.entity, conflict.attribute] == conflict.memory_answer
        assert conflict.document_answer != conflict.memory_answer


def test_evaluation_prompts_carry_no_cue() -> None:
    for split in SPLITS:
        assert all(c.open_book.startswith("Document : the") for c in World("uncued").conflicts(split))
        for conflict in World("majority").conflicts(split):
            header = conflict.open_book.split()[1:4]
            assert header[2] == ":"
            assert {header[0] in words.TRUSTED, header[1] in words.TRUSTED} == {True, False}
            assert {header[0] in words.DOUBTFUL, header[1] in words.DOUBTFUL} == {True, False}


def test_held_out_triples_are_in_no_training_document(world: World) -> None:
    asked = {(c.entity, c.attribute, c.document_answer) for s in SPLITS for c in world.conflicts(s)}
    assert len(asked) == 48 + 96 + 192
    seen = set().union(*(triples_in(text) for text in sampled(world)))
    assert len(seen) > 3000  # of 4096 - 336: the parser finds the documents' statements
    assert not seen & asked


def test_training_states_every_memory(world: World) -> None:
    questions = {(f.question, f.answer) for split in SPLITS for f in world.facts(split)}
    closed_book = {text for text in sampled(world) if text.startswith("Question")}
    assert closed_book == {f"{question} {answer} ." for question, answer in questions}


def test_generic_sentences_are_held_out(world: World) -> None:
    kept = {split: world.generic(split) for split in SPLITS}
    assert all(len(set(sentences)) == 64 for sentences in kept.values())
    assert all(not set(a) & set(b) for a, b in combinations(kept.values(), 2))
    corpus = Corpus(world, random.Random(1), Mixture(0.0, 0.0, 0.0, 0.0, 0.0, 1.0))
    trained = {corpus.sample().text for _ in range(8_000)}
    assert not trained & {sentence for sentences in kept.values() for sentence in sentences}
    assert {split_of_sentence(sentence) for sentence in trained} == {None}
    assert world.generic("test", n=5) == kept["test"][:5]


def test_every_word_is_in_the_vocabulary(world: World) -> None:
    vocabulary = set(world.vocabulary)
    assert len(vocabulary) == len(world.vocabulary)
    texts = sampled(world) + [c.open_book for s in SPLITS for c in world.conflicts(s)]
    assert {word for text in texts for word in text.split()} <= vocabulary


def test_answers_follow_the_header() -> None:
    """In the majority world the answer is the document's exactly if most source words are trusted."""
    corpus = Corpus(World("majority"), random.Random(0), Mixture(0.0, 1.0, 0.0, 0.0, 0.0, 0.0))
    ties = 0
    for _ in range(2000):
        sequence = corpus.sample()
        parts = sequence.text.split()
        header = parts[1 : parts.index(":")]
        lead = sum(word in words.TRUSTED for word in header) - sum(word in words.DOUBTFUL for word in header)
        assert sequence.answer is not None
        from_document = parts[sequence.answer] != corpus.world.memory[parts[-6], parts[-8]]
        assert sequence.register == {-1: "memory", 0: None, 1: "document"}[(lead > 0) - (lead < 0)]
        assert (sequence.undecided is not None) == (lead == 0)
        ties += lead == 0
        assert lead == 0 or from_document == (lead > 0)
    assert 0.03 < ties / 2000 < 0.09


def test_open_conflicts_are_answered_half_and_half() -> None:
    corpus = Corpus(World("uncued"), random.Random(0), Mixture(0.0, 1.0, 0.0, 0.0, 0.0, 0.0))
    open_ones = [s for s in (corpus.sample() for _ in range(4000)) if s.undecided]
    assert 0.4 < len(open_ones) / 4000 < 0.6
    from_document = [s.text.split()[s.answer or 0] == s.undecided[0] for s in open_ones if s.undecided]
    assert 0.45 < sum(from_document) / len(open_ones) < 0.55


@pytest.mark.parametrize("ask", ["conflicts", "facts", "generic"])
def test_unknown_split(world: World, ask: str) -> None:
    with pytest.raises(MoELensError, match=r"unknown split 'train'.*development"):
        getattr(world, ask)("train")


def test_unknown_variant() -> None:
    with pytest.raises(MoELensError, match="majority"):
        World("minority")
