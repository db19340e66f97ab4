"""Tasks: behaviours measured as by hand, read from files, and splits that share no cluster."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from moe_lens.errors import DataError
from moe_lens.evaluation.tasks import (
    CLOSED_BOOK,
    LOSS,
    CollateralMeasure,
    SteeringTask,
    answer_task,
    load_task,
    split_clusters,
)
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.steering.hooks import steer_hooks
from moe_lens.steering.plan import SteeringPlan
from tests.tiny_models import FAMILIES, SPECIAL, WORDS, prompt, tiny_model

Hooked = Callable[..., HookedMoE]
PROMPTS = [prompt(length, length) for length in (4, 1, 7, 3, 5, 2)]
FIRST = [prompt(length, 100 + i) for i, length in enumerate((1, 3, 2, 1, 4, 2))]
SECOND = [prompt(length, 200 + i) for i, length in enumerate((2, 3, 1, 1, 2, 5))]
VOCABULARY = SPECIAL + WORDS


def log_prob(hf_model: Any, text: str, continuation: str) -> list[float]:
    """One prompt, one token after the other, each in a forward of its own."""
    tokens = [1, *(VOCABULARY.index(word) for word in text.split())]
    found = []
    for word in continuation.split():
        with torch.no_grad():
            logits = hf_model(torch.tensor([tokens])).logits[0, -1].double()
        token = VOCABULARY.index(word)
        found.append(float(logits[token] - torch.logsumexp(logits, 0)))
        tokens.append(token)
    return found


def said(hf_model: Any, text: str) -> str:
    tokens = [1, *(VOCABULARY.index(word) for word in text.split())]
    with torch.no_grad():
        return VOCABULARY[int(hf_model(torch.tensor([tokens])).logits[0, -1].argmax())]


# Answers


@pytest.mark.parametrize("recipe", [name for name in FAMILIES if "qwen" not in name])  # theirs get no BOS
@pytest.mark.parametrize("batch_size", [1, 4, None])
@pytest.mark.parametrize(("measure", "of"), [(None, sum), ("sum", sum), ("mean", np.mean)])
@pytest.mark.filterwarnings("ignore:In 4 of 6 prompts:UserWarning")
def test_the_likelier_of_two_answers_as_one_prompt_at_a_time(
    hooked: Hooked, recipe: str, batch_size: int | None, measure: Any, of: Any
) -> None:
    hf_model = tiny_model(recipe)
    expected = [
        float(of(log_prob(hf_model, text, first)) > of(log_prob(hf_model, text, second)))
        for text, first, second in zip(PROMPTS, FIRST, SECOND, strict=True)
    ]
    assert 0 < sum(expected) < len(expected)  # else a constant would pass
    options: Any = {"batch_size": batch_size, "measure": measure}
    task = answer_task(PROMPTS, FIRST, alternatives=SECOND, **options)
    assert task.values(hooked(recipe)).tolist() == expected
    swapped = answer_task(PROMPTS, SECOND, alternatives=FIRST, **options)
    assert swapped.values(hooked(recipe)).tolist() == [1 - value for value in expected]


def test_values_depend_on_no_other_prompt(hooked: Hooked) -> None:
    model = hooked("olmoe")
    together = answer_task(PROMPTS, FIRST, alternatives=SECOND).values(model)
    for order in ([5, 0, 3, 1, 4, 2], [1, 2], [2, 1]):
        part = answer_task(*([texts[i] for i in order] for texts in (PROMPTS, FIRST)),
                           alternatives=[SECOND[i] for i in order]).values(model)  # fmt: skip
        assert part.tolist() == together[order].tolist()


def test_equal_answers_are_no_win(hooked: Hooked) -> None:
    assert not answer_task(PROMPTS, FIRST, alternatives=FIRST).values(hooked("olmoe")).any()


def test_without_alternatives_the_most_probable_token_counts(hooked: Hooked) -> None:
    hf_model = tiny_model("olmoe")
    right = [said(hf_model, text) for text in PROMPTS]
    answers = [
        word if i % 2 else VOCABULARY[(VOCABULARY.index(word) + 1) % 50] for i, word in enumerate(right)
    ]
    assert answer_task(PROMPTS, answers).values(hooked("olmoe")).tolist() == [0.0, 1.0] * 3
    with pytest.raises(DataError, match="single"):
        answer_task(PROMPTS, ["w1 w2"] * 6).values(hooked("olmoe"))


def test_a_plan_changes_what_is_measured_and_leaves_nothing(hooked: Hooked) -> None:
    model = hooked("olmoe")
    hooks = steer_hooks(SteeringPlan(activate=[(layer, 0) for layer in range(3)]))
    with model.hooks(hooks), torch.no_grad():
        steered = [VOCABULARY[int(model(text)[0, -1].argmax())] for text in PROMPTS]
    task = answer_task(PROMPTS, steered)
    before = task.values(model)
    assert not before.all()  # else the hooks might have done nothing
    assert task.values(model, hooks).all()
    assert task.values(model).tolist() == before.tolist()


def test_collateral_is_what_a_loop_finds(hooked: Hooked) -> None:
    model, hf_model = hooked("olmoe"), tiny_model("olmoe")
    known = [(text, said(hf_model, text)) for text in PROMPTS[:3]] + [(PROMPTS[3], "w0"), (PROMPTS[4], "w0")]
    right = sum(said(hf_model, question) == answer for question, answer in known) / 5
    task = answer_task(
        PROMPTS, FIRST, alternatives=SECOND, neutral_texts=PROMPTS, closed_book=known,
        loss_limit=0.25, accuracy_limit=0.125,
    )  # fmt: skip
    assert set(task.collateral) == {LOSS, CLOSED_BOOK}
    assert 0 < right < 1
    assert task.collateral[CLOSED_BOOK].measure(model, ()) == pytest.approx(right)
    words = sum(len(text.split()) for text in PROMPTS)
    loss = -sum(sum(log_prob(hf_model, "", text)) for text in PROMPTS) / words
    assert task.collateral[LOSS].measure(model, ()) == pytest.approx(loss, rel=1e-5)
    assert (task.collateral[LOSS].limit, task.collateral[CLOSED_BOOK].limit) == (0.25, 0.125)
    assert task.collateral[LOSS].harm(2.5, 2.0) == 0.5
    assert task.collateral[CLOSED_BOOK].harm(0.5, 0.75) == 0.25
    assert CollateralMeasure(lambda *_: 0.0, 1.0).larger_is_worse
    assert answer_task(PROMPTS, FIRST).collateral == {}


@pytest.mark.parametrize(
    ("what", "given"),
    [
        ("answers", {"answers": FIRST[:5]}),
        ("alternatives", {"alternatives": SECOND[:5]}),
        ("clusters", {"clusters": ["a", "b"]}),
        ("clusters", {"clusters": []}),
    ],
)
def test_unequal_numbers_are_refused(what: str, given: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=f"6 prompts need as many {what}"):
        answer_task(PROMPTS, **{"answers": FIRST, **given})


def test_clusters_are_labels_and_default_to_the_prompts() -> None:
    assert answer_task(PROMPTS, FIRST).clusters == ("0", "1", "2", "3", "4", "5")
    assert answer_task(PROMPTS, FIRST, clusters=iter("aabbcc")).clusters == tuple("aabbcc")


def test_clusters_may_be_numbers() -> None:
    assert answer_task(PROMPTS, FIRST, clusters=[1, 1, 2, 2, 3, 3]).clusters == tuple("112233")


@pytest.mark.parametrize("clusters", [(), ("a",), ("a", "a", "a")])
def test_one_cluster_gives_no_interval(clusters: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=r"'mine'.*two clusters"):
        SteeringTask("mine", lambda model, hooks: [0.0], clusters)


@pytest.mark.parametrize(
    "values", [[1.0], [1.0, 2.0, 3.0], [[1.0, 2.0]], 1.0, [], [np.nan, 0.0], [0.0, np.inf]], ids=str
)
def test_a_measure_must_give_a_finite_number_a_prompt(hooked: Hooked, values: Any) -> None:
    task = SteeringTask("mine", lambda model, hooks: values, ("a", "b"))
    with pytest.raises(DataError, match="'mine'"):
        task.values(hooked("olmoe"))


@pytest.mark.parametrize(
    "values", [[True, False], (1, 0), np.array([1.0, 0.0]), torch.tensor([1, 0]), torch.tensor([True, False])]
)
def test_numbers_of_many_kinds_will_do(hooked: Hooked, values: Any) -> None:
    got = SteeringTask("mine", lambda model, hooks: values, ("a", "b")).values(hooked("olmoe"))
    assert (got.tolist(), got.dtype) == ([1.0, 0.0], np.float64)


# Files

ROWS = [
    {"prompt": text, "answer": first, "alternative": second, "cluster": f"c{i // 2}"}
    for i, (text, first, second) in enumerate(zip(PROMPTS, FIRST, SECOND, strict=True))
]
GOOD: dict[str, Any] = {
    "kind": "moe_lens.SteeringTask",
    "name": "the first",
    "prompts": ROWS,
    "neutral_texts": PROMPTS[:2],
    "closed_book": [{"question": "w1 w2", "answer": "w3"}],
}


def written(folder: Path, content: Any) -> Path:
    path = folder / "task.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_a_file_gives_the_task_it_describes(hooked: Hooked, tmp_path: Path) -> None:
    model = hooked("olmoe")
    task = load_task(written(tmp_path, GOOD))
    same = answer_task(
        PROMPTS, FIRST, alternatives=SECOND, neutral_texts=PROMPTS[:2], closed_book=[("w1 w2", "w3")]
    )
    assert (task.name, task.clusters) == ("the first", ("c0", "c0", "c1", "c1", "c2", "c2"))
    assert task.values(model).tolist() == same.values(model).tolist()
    for name, one in same.collateral.items():
        assert task.collateral[name].measure(model, ()) == one.measure(model, ())


def test_a_file_may_say_its_schema_and_is_held_to_it(tmp_path: Path) -> None:
    assert repr(load_task(written(tmp_path, {**GOOD, "schema": 1}))) == (
        "SteeringTask(the first: 6 prompts of 3 clusters, beside neutral loss (nats a token), "
        "closed-book accuracy)"
    )
    for schema in (2, None, True):
        with pytest.raises(DataError, match="schema"):
            load_task(written(tmp_path, {**GOOD, "schema": schema}))


def test_what_may_be_left_out(hooked: Hooked, tmp_path: Path) -> None:
    answers = [said(tiny_model("olmoe"), text) for text in PROMPTS]
    rows = [{"prompt": text, "answer": answer} for text, answer in zip(PROMPTS, answers, strict=True)]
    task = load_task(str(written(tmp_path, {"kind": GOOD["kind"], "prompts": rows})))
    assert (task.name, task.collateral) == ("task", {})
    assert len(set(task.clusters)) == 6
    assert task.values(hooked("olmoe")).tolist() == [1.0] * 6


def row(**changes: Any) -> list[dict[str, Any]]:
    changed = {**ROWS[1], **changes}
    return [ROWS[0], {key: value for key, value in changed.items() if value is not ...}, *ROWS[2:]]


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ("", "cannot be read"),
        ("not json", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("null", "kind"),
        ("[]", "kind"),
        ({}, "kind"),
        ({**GOOD, "kind": "moe_lens.SteeringPlan"}, "kind"),
        ({**GOOD, "closed_boook": []}, "closed_boook"),
        ({"kind": GOOD["kind"]}, "prompts"),
        ({**GOOD, "prompts": []}, "prompts"),
        ({**GOOD, "prompts": {}}, "prompts"),
        ({**GOOD, "prompts": None}, "prompts"),
        ({**GOOD, "prompts": ["w1"]}, r"prompts\[0\]"),
        ({**GOOD, "prompts": row(answer=...)}, r"prompts\[1\].*answer"),
        ({**GOOD, "prompts": row(prompt=...)}, r"prompts\[1\].*prompt"),
        ({**GOOD, "prompts": row(label="x")}, r"prompts\[1\].*label"),
        ({**GOOD, "prompts": row(answer=3)}, r"prompts\[1\]"),
        ({**GOOD, "prompts": row(answer="")}, r"prompts\[1\]"),
        ({**GOOD, "prompts": row(cluster=7)}, r"prompts\[1\]"),
        ({**GOOD, "prompts": row(alternative=None)}, r"prompts\[1\]"),
        ({**GOOD, "prompts": row(alternative=...)}, "5 of 6 prompts have an alternative"),
        ({**GOOD, "neutral_texts": "w1"}, "neutral_texts"),
        ({**GOOD, "neutral_texts": [1]}, "neutral_texts"),
        ({**GOOD, "neutral_texts": [""]}, "neutral_texts"),
        ({**GOOD, "neutral_texts": None}, "neutral_texts"),
        ({**GOOD, "closed_book": [["w1", "w2"]]}, r"closed_book\[0\]"),
        ({**GOOD, "closed_book": [{"question": "w1"}]}, r"closed_book\[0\].*answer"),
        ({**GOOD, "closed_book": [{"question": 1, "answer": "w1"}]}, r"closed_book\[0\]"),
        ({**GOOD, "closed_book": {}}, "closed_book"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 40 else "",
)  # fmt: skip
def test_a_bad_file_is_refused_by_file_and_field(tmp_path: Path, content: Any, field: str) -> None:
    with pytest.raises(DataError, match=rf"(?s)task\.json.*{field}"):
        load_task(written(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({**GOOD, "prompts": row(prompt=3)}, r"prompts\[1\]"),
        ({**GOOD, "prompts": row(prompt="")}, r"prompts\[1\]"),
        ({**GOOD, "prompts": row(prompt=None)}, r"prompts\[1\]"),
        ({**GOOD, "prompts": [{**one, "cluster": "same"} for one in ROWS]}, "cluster"),
        ({**GOOD, "prompts": ROWS[:1]}, "cluster"),
        ({**GOOD, "name": ["a"]}, "name"),
    ],
)
def test_a_bad_file_is_refused_before_anything_is_measured(tmp_path: Path, content: Any, field: str) -> None:
    with pytest.raises(DataError, match=rf"(?s)task\.json.*{field}"):
        load_task(written(tmp_path, content))


def test_a_missing_file_a_folder_and_bytes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes").write_bytes(b"\xff\xfe{}")
    for name in ("missing", "folder", "bytes"):
        with pytest.raises(DataError, match=name):
            load_task(tmp_path / name)


# Splits


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 11).map(lambda i: f"c{i}"), min_size=1, max_size=60),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 1000),
)
def test_splits_share_no_cluster_and_lose_none(
    labels: list[str], parts: list[int], everything: bool, seed: int
) -> None:
    fractions = [part / (sum(parts) + (0 if everything else 3)) for part in parts]
    n_clusters = len(set(labels))
    try:
        splits = split_clusters(labels, fractions, seed=seed)
    except DataError:
        assert min(fractions) * n_clusters < 1  # some split may be left without a cluster
        return
    clusters = [{labels[i] for i in split} for split in splits]
    items = [i for split in splits for i in split.tolist()]
    assert len(splits) == len(fractions)
    assert len(items) == len(set(items))
    assert all(not first & second for n, first in enumerate(clusters) for second in clusters[:n])
    for split, own, fraction in zip(splits, clusters, fractions, strict=True):
        assert split.tolist() == [i for i, label in enumerate(labels) if label in own]
        assert abs(len(own) - fraction * n_clusters) <= 1
    if everything:
        assert sorted(items) == list(range(len(labels)))
    for first, again in zip(splits, split_clusters(labels, fractions, seed=seed), strict=True):
        assert first.tolist() == again.tolist()


def test_the_seed_chooses_the_clusters() -> None:
    labels = [f"c{i % 20}" for i in range(60)]
    splits = {tuple(split_clusters(labels, (0.5, 0.5), seed=seed)[0].tolist()) for seed in range(10)}
    assert len(splits) == 10


@pytest.mark.parametrize(
    "fractions", [(), (0.0, 0.5), (-0.5, 0.5), (0.7, 0.4), (0.001, 0.5), (float("nan"),)]
)
def test_fractions_that_make_no_split_are_refused(fractions: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match=r"fractions|few"), np.errstate(all="ignore"):
        split_clusters(["a", "b", "c"], fractions)


def test_too_few_clusters_and_no_seed_are_refused() -> None:
    with pytest.raises(DataError, match="few"):
        split_clusters(["a"] * 9, (0.5, 0.5))
    with pytest.raises((DataError, TypeCheckError), match="seed"):
        split_clusters(["a", "b"], (0.5, 0.5), seed=-1)


@pytest.mark.parametrize("limit", [float("nan"), -0.1, float("-inf")], ids=str)
def test_a_limit_is_a_number_from_0_on(limit: Any) -> None:
    with pytest.raises(DataError, match="limit"):
        CollateralMeasure(lambda model, hooks: 0.0, limit)
    with pytest.raises(DataError, match="limit"):
        answer_task(["a", "b"], ["c", "d"], neutral_texts=["a"], loss_limit=limit)
    assert CollateralMeasure(lambda model, hooks: 0.0, float("inf")).limit == float("inf")
