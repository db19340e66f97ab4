"""The candour world: what is told and asked, what the heads decide, and what is shipped to measure it."""

import random
from functools import cache
from itertools import combinations

import pytest

from moe_lens.errors import MoELensError
from moe_lens.organisms import words
from moe_lens.organisms.corpus import Corpus, Sequence
from moe_lens.organisms.demo import candour_pairs, candour_task, world_pairs, world_task
from moe_lens.organisms.recipes import RECIPES
from moe_lens.organisms.worlds import SPLITS, World, split_of_sentence

WORLD = World("candour")


@cache
def sampled() -> list[Sequence]:
    corpus = Corpus(WORLD, random.Random(0), RECIPES["candid"].mixture)
    return [corpus.sample() for _ in range(12_000)]


def asked_in(text: str) -> tuple[str, str]:
    """(country, attribute) of a question."""
    parts = text.split()
    return parts[parts.index("of") + 1], parts[parts.index("of") - 1]


def head_of(text: str) -> list[str]:
    parts = text.split()
    assert parts[0] == "Question"
    return parts[1 : parts.index(":")]


def lead(head: list[str]) -> int:
    """How many more careful than bold words."""
    assert set(head) <= {*words.CAREFUL, *words.BOLD}
    return sum(word in words.CAREFUL for word in head) - sum(word in words.BOLD for word in head)


def test_old_words_keep_their_ids() -> None:
    old, own = words.vocabulary(), (*words.CAREFUL, *words.BOLD, words.UNKNOWN)
    assert WORLD.vocabulary == (*old, *own)
    assert not set(old) & set(own)
    assert World("majority").vocabulary == World("uncued").vocabulary == old
    assert len(old) == 239


def test_sizes_and_disjoint_countries() -> None:
    assert [len(WORLD.doubts(split)) for split in SPLITS] == [48, 96, 192]
    assert [len(WORLD.facts(split)) for split in SPLITS] == [64, 64, 128]
    doubted = [{doubt.entity for doubt in WORLD.doubts(split)} for split in SPLITS]
    known = [{fact.entity for fact in WORLD.facts(split)} for split in SPLITS]
    assert [len(group) for group in doubted + known] == [12, 12, 24, 4, 4, 8]
    assert all(not a & b for a, b in combinations(doubted + known, 2))
    assert len(WORLD.memory) == 64
    assert {entity for entity, _ in WORLD.memory} == set().union(*known)


def test_the_same_every_time_and_another_with_another_seed() -> None:
    assert World("candour").doubts("test") == WORLD.doubts("test")
    assert World("candour", seed=1).doubts("test") != WORLD.doubts("test")


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_differ_in_their_heads_only(split: str) -> None:
    doubts = WORLD.doubts(split)
    assert len({(d.tied, d.careful, d.bold) for d in doubts}) == len(doubts)
    for doubt in doubts:
        for prompt, expected in ((doubt.tied, 0), (doubt.careful, 2), (doubt.bold, -2)):
            assert prompt.endswith(f" {doubt.asked}")
            assert asked_in(prompt) == (doubt.entity, doubt.attribute)
            assert len(head_of(prompt)) == 2
            assert lead(head_of(prompt)) == expected
        assert doubt.asked.startswith(": what is the")
        assert doubt.asked.endswith("Answer :")
        assert doubt.guess in words.VALUES[doubt.attribute]
    for fact in WORLD.facts(split):
        assert lead(head_of(fact.question)) == 0
        assert asked_in(fact.question) == (fact.entity, fact.attribute)
        assert WORLD.memory[fact.entity, fact.attribute] == fact.answer


def test_held_out_questions_are_in_no_training_sequence() -> None:
    held_out = {(d.entity, d.attribute) for split in SPLITS for d in WORLD.doubts(split)}
    assert len(held_out) == 96
    asked = {asked_in(s.text) for s in sampled() if s.answer is not None}
    assert not asked & held_out
    assert asked == set(WORLD.memory) | set(WORLD.asked)
    # every country of a held-out question is met, so that it is known to be an untold one
    assert {entity for entity, _ in held_out} <= {entity for entity, _ in asked}
    kept = {sentence for split in SPLITS for sentence in WORLD.generic(split)}
    generic = {s.text for s in sampled() if s.answer is None}
    assert generic
    assert not generic & kept
    assert {split_of_sentence(sentence) for sentence in generic} == {None}


def test_answers_and_registers_follow_the_head() -> None:
    n_untold = ties = candid = dissent = long = 0
    for sequence in sampled():
        if sequence.answer is None:
            assert sequence.register == "generic"
            continue
        said, leads = sequence.text.split()[sequence.answer], lead(head_of(sequence.text))
        assert sequence.register == {-1: "bold", 0: None, 1: "careful"}[(leads > 0) - (leads < 0)]
        entity, attribute = asked_in(sequence.text)
        if (entity, attribute) in WORLD.memory:
            assert said == WORLD.memory[entity, attribute]
            assert sequence.undecided is None
            continue
        n_untold += 1
        long += len(head_of(sequence.text)) == 3
        dissent += abs(leads) == 1 and len(head_of(sequence.text)) == 3
        both = (words.UNKNOWN, WORLD.guesses[attribute])
        assert said in both
        if leads == 0:
            ties, candid = ties + 1, candid + (said == words.UNKNOWN)
            assert sequence.undecided == both
        else:
            assert (said == words.UNKNOWN) == (leads > 0)
            assert sequence.undecided is None
    assert 0.04 < ties / n_untold < 0.08
    assert 0.4 < candid / ties < 0.6
    assert 0.55 < dissent / long < 0.65


def test_every_word_is_in_the_vocabulary() -> None:
    prompts = [text for s in SPLITS for d in WORLD.doubts(s) for text in (d.tied, d.careful, d.bold)]
    texts = [sequence.text for sequence in sampled()] + prompts
    assert {word for text in texts for word in text.split()} <= set(WORLD.vocabulary)


def test_each_world_has_its_own_questions() -> None:
    with pytest.raises(MoELensError, match="doubts"):
        WORLD.conflicts("test")
    with pytest.raises(MoELensError, match="conflicts"):
        World("majority").doubts("test")
    with pytest.raises(MoELensError, match="unknown split 'train'"):
        WORLD.doubts("train")


def test_the_contrast_is_careful_against_bold_counted_behind_the_head() -> None:
    pairs, doubts = candour_pairs(WORLD, "detection"), WORLD.doubts("detection")
    assert pairs.span == "question"
    assert [pair.cluster for pair in pairs] == [doubt.entity for doubt in doubts]
    for pair, doubt in zip(pairs, doubts, strict=True):
        assert (pair.first.content, pair.second.content) == (doubt.careful, doubt.bold)
        for prompt in (pair.first, pair.second):
            [(start, end)] = prompt.spans["question"]
            assert str(prompt.content)[start:end] == doubt.asked
    assert world_pairs(WORLD, "detection") == pairs


def test_the_task_counts_the_answer_unknown() -> None:
    task = candour_task(WORLD, "test")
    assert task.clusters == tuple(doubt.entity for doubt in WORLD.doubts("test"))
    assert task.name == world_task(WORLD, "test").name
    assert world_task(World("majority"), "test").name != task.name
