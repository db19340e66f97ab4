"""Groups of prompts that make no pairs: who is in which, what is refused, what a split keeps apart."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.errors import DataError
from moe_lens.text import ContrastiveGroups, ContrastivePairs, Prompt


def texts(prompts: tuple[Prompt, ...]) -> list[Any]:
    return [prompt.content for prompt in prompts]


@pytest.mark.parametrize(
    ("outcomes", "options"),
    [
        ([True, False, True, False, False], {}),
        ([1, 0, 1, 0, 0], {}),
        (np.array([True, False, True, False, False]), {}),
        (["right", "wrong", "right", "wrong", "wrong"], {"first": "right"}),
        ([False, True, False, True, True], {"first": False}),
    ],
)
def test_outcomes_say_who_is_in_which_group(outcomes: Any, options: Any) -> None:
    groups = ContrastivePairs.from_outcomes(
        ["a", "b", "c", "d", "e"], outcomes, clusters=[1, 1, 2, 2, 3], span="last", **options
    )
    assert texts(groups.first) == ["a", "c"]
    assert texts(groups.second) == ["b", "d", "e"]
    assert (groups.clusters_1, groups.clusters_2, groups.span) == (("1", "2"), ("1", "2", "3"), "last")
    assert groups.swapped().swapped() == groups
    assert texts(groups.swapped().first) == ["b", "d", "e"]
    assert groups.to_dataframe()["cluster"].tolist() == ["1", "2", "1", "2", "3"]
    assert groups.to_dataframe()["group"].tolist() == [1, 1, 2, 2, 2]


def test_prompts_are_independent_unless_they_are_the_same() -> None:
    groups = ContrastiveGroups.from_lists(["a", "b", "a"], ["b", "c"])
    one, two = groups.clusters_1, groups.clusters_2
    assert one[0] == one[2]
    assert one[1] == two[0]
    assert len({*one, *two}) == 3


@pytest.mark.parametrize(
    ("outcomes", "options", "words"),
    [
        ([True, True, True], {}, "two kinds"),
        ([True, False, None], {}, "two kinds"),
        (["x", "y", "x"], {}, "first=True"),
        ([True, False], {}, "3 prompts, 2 outcomes"),
        ([True, False, True], {"clusters": ["k"]}, "1 labels"),
        ([True, False, True], {"span": ["all", "all", "all"]}, "one for all"),
    ],
)
def test_what_makes_no_two_groups_is_refused(outcomes: Any, options: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        ContrastiveGroups.from_outcomes(["a", "b", "c"], outcomes, **options)


def test_bad_lists_are_refused() -> None:
    for first, second, options, words in (
        ([], ["a"], {}, "first group has no prompts"),
        (["a"], [3], {}, "second, prompt 0"),
        (["a"], ["b"], {"clusters": ["k", "l", "m"]}, "two lists"),
        (
            ["a"],
            ["b"],
            {"clusters": (["k"], ["l", "m"])},
            "clusters_2 must hold one text for each of 1 prompts",
        ),
        (["a"], ["b"], {"clusters": "kl"}, "two lists"),
    ):
        with pytest.raises(DataError, match=words):
            ContrastiveGroups.from_lists(first, second, **options)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    one=st.lists(st.sampled_from("abcdef"), min_size=8, max_size=20),
    two=st.lists(st.sampled_from("abcdef"), min_size=8, max_size=20),
    seed=st.integers(0, 50),
)
def test_a_split_shares_no_cluster_and_loses_no_prompt(one: list[str], two: list[str], seed: int) -> None:
    groups = ContrastiveGroups.from_lists(
        [f"first {i}" for i in range(len(one))], [f"second {i}" for i in range(len(two))], clusters=(one, two)
    )
    try:
        parts = groups.split(0.5, seed)
    except DataError:
        return  # all clusters of a group may fall into one part
    labels = [{*part.clusters_1, *part.clusters_2} for part in parts]
    assert not labels[0] & labels[1]
    assert sorted(texts(parts[0].first) + texts(parts[1].first)) == sorted(texts(groups.first))
    assert sorted(texts(parts[0].second) + texts(parts[1].second)) == sorted(texts(groups.second))
