"""What a plan is measured on: a behaviour, prompt by prompt, and what must not suffer.

task = answer_task(prompts, answers, clusters=entities, neutral_texts=sentences, closed_book=questions)
task = load_task("task.json")
values = task.measure(model, steer_hooks(plan))        # [prompt]; 1.0 where the model gives the answer
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
from jaxtyping import Float

from moe_lens.checks import short, whole_number
from moe_lens.errors import DataError
from moe_lens.evaluation.answering import (
    NOTES,
    Comparison,
    answer_measure,
    checked_comparison,
    loss,
    on_model,
    share_answered,
)
from moe_lens.evaluation.reading import MeasuredModel, Reading
from moe_lens.files import FileKind
from moe_lens.hook_names import Hooks, hook_list
from moe_lens.results import Result
from moe_lens.text.prompts import as_prompt

Measure = Callable[[Any, Hooks], Any]
"""From a model and forward hooks to the behaviour's values, one a prompt."""
Collateral = Callable[[Any, Hooks], float]
"""From a model and forward hooks to one number."""
LOSS: Final = "neutral loss (nats a token)"
CLOSED_BOOK: Final = "closed-book accuracy"
_KIND: Final = FileKind("moe_lens.SteeringTask", 1, (1,), "a steering task", default_schema=1)
_FIELDS: Final = ("name", "prompts", "measure", "neutral_texts", "closed_book")


@dataclass(frozen=True, eq=False)
class CollateralMeasure:
    """Something that a plan should leave as it is.

    Attributes:
        measure: from a model and hooks to one number.
        limit: how much worse a plan may make it, from 0 on; infinite for no limit.
        larger_is_worse: True for a loss, False for an accuracy.

    Raises:
        DataError: a limit that is no number from 0 on.
    """

    measure: Collateral
    limit: float
    larger_is_worse: bool = True

    def __post_init__(self) -> None:
        limit = self.limit
        is_number = isinstance(limit, int | float | np.number) and not isinstance(limit, bool)
        if not is_number or not limit >= 0:
            raise DataError(f"The limit of a collateral measure must be a number from 0 on; got {limit!r}.")
        object.__setattr__(self, "limit", float(limit))

    def harm(self, value: float, unsteered: float) -> float:
        """How much worse `value` is than the unsteered one."""
        return value - unsteered if self.larger_is_worse else unsteered - value

    def value(self, model: MeasuredModel, hooks: Hooks = ()) -> float:
        """The number under the hooks. Raises DataError unless it is finite."""
        value = _numbers(self.measure(model, hook_list(hooks)), "A collateral measure")
        if value.shape != () or not np.isfinite(value):
            raise DataError(f"A collateral measure must give one finite number; got {value}.")
        return float(value)


@dataclass(frozen=True, eq=False, repr=False)
class SteeringTask(Result):
    """A behaviour to move, measured on held-out prompts, and what must not suffer from it.

    >>> from moe_lens import SteeringTask, organisms
    >>> model, facts = organisms.load("null"), organisms.world("null").facts("test")[:3]
    >>> task = SteeringTask("says Kyoto", lambda model, hooks: [1.0, 0.0, 0.0], clusters=("a", "b", "b"))
    >>> task.values(model).tolist()
    [1.0, 0.0, 0.0]

    Attributes:
        name: of the behaviour, for tables and figures.
        measure: from (model, hooks) to one number a prompt; large where the behaviour shows. Zeros and ones
            give the share of prompts that show it.
        clusters: one label a prompt; prompts of one label are not independent.
        collateral: name -> what should stay as it is.
        note: what a value means.

    Raises:
        DataError: prompts of fewer than two clusters.
    """

    name: str
    measure: Measure
    clusters: tuple[str, ...]
    collateral: Mapping[str, CollateralMeasure] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        labels = _listed(self.clusters, "clusters")
        object.__setattr__(self, "clusters", tuple(str(label) for label in labels))
        if len(set(self.clusters)) < 2:
            raise DataError(
                f"The task {self.name!r} needs prompts of at least two clusters for an interval; it has "
                f"{len(set(self.clusters))}."
            )

    def summary(self) -> str:
        """Name, prompts and clusters, and what should stay as it is."""
        beside = f", beside {', '.join(self.collateral)}" if self.collateral else ""
        return f"{self.name}: {len(self.clusters)} prompts of {len(set(self.clusters))} clusters{beside}"

    def __str__(self) -> str:
        return "\n".join(filter(None, [self.summary(), self.note]))

    def on(self, model: MeasuredModel) -> "SteeringTask":
        """The same task for this model, with its texts read and made tokens once for many runs.

        Measures of your own stay as they are.
        """
        collateral = {
            name: replace(each, measure=on_model(each.measure, model))
            for name, each in self.collateral.items()
        }
        return replace(self, measure=on_model(self.measure, model), collateral=collateral)

    def values(self, model: MeasuredModel, hooks: Hooks = ()) -> Float[np.ndarray, "prompt"]:
        """The behaviour of each prompt under the hooks. Raises DataError unless it is a number a prompt."""
        values = _numbers(self.measure(model, hook_list(hooks)), f"The task {self.name!r}")
        if values.shape != (len(self.clusters),) or not np.isfinite(values).all():
            raise DataError(
                f"The task {self.name!r} must give one finite number for each of its {len(self.clusters)} "
                f"prompts; got shape {values.shape}."
            )
        return values


def is_numbered(clusters: Sequence[str]) -> bool:
    """Whether these are the numbers that prompts without clusters get, which say nothing."""
    return tuple(clusters) == tuple(map(str, range(len(clusters))))


def shared_labels(development: SteeringTask, held_out: SteeringTask) -> list[str]:
    """The clusters that both tasks name; none where one has no clusters of its own."""
    if is_numbered(development.clusters) or is_numbered(held_out.clusters):
        return []
    return sorted(set(development.clusters) & set(held_out.clusters))


def n_shared_prompts(development: SteeringTask, held_out: SteeringTask) -> int:
    """How many prompts of the held-out task the other one has, too.

    Both as they come from `on(model)`. A measure of somebody's own does not tell its prompts: 0.
    """
    seen: list[set[tuple[int, ...]]] = []
    for task in (development, held_out):
        asked = task.measure.asked if isinstance(task.measure, Reading) else ()
        seen.append({tuple(each.tokens[: each.n_prompt].tolist()) for each in asked})
    return len(seen[0] & seen[1])


def answer_task(
    prompts: Sequence[Any],
    answers: Sequence[str | Sequence[str]],
    *,
    alternatives: Sequence[str] | None = None,
    measure: Comparison | None = None,
    clusters: Iterable[Any] | None = None,
    neutral_texts: Sequence[str] = (),
    closed_book: Sequence[tuple[str, str]] = (),
    loss_limit: float = 0.1,
    accuracy_limit: float = 0.1,
    name: str = "gives the answer",
    batch_size: int | None = None,
    batch_tokens: int | None = None,
) -> SteeringTask:
    """A task of prompts with the answer that shows the behaviour.

    >>> from moe_lens import answer_task, organisms
    >>> model, conflicts = organisms.load("specialised"), organisms.world("specialised").conflicts("test")
    >>> task = answer_task(
    ...     [c.open_book for c in conflicts], [c.document_answer for c in conflicts],
    ...     clusters=[c.entity for c in conflicts],
    ... )
    >>> task.values(model).shape
    (192,)
    >>> answer_task(
    ...     [c.open_book for c in conflicts], [c.document_answer for c in conflicts],
    ...     alternatives=[c.memory_answer for c in conflicts],
    ... ).note
    '1 where the answer is more probable than its alternative, by the sums of log-probabilities'

    Args:
        prompts: strings, chats or tokens.
        answers: one a prompt; with measure="whole_answer" also a list of texts, of which one will do. Without
            alternatives and measure each is a single token, and the value is 1 where it is the most probable
            next one.
        alternatives: answers of the opposite behaviour, one a prompt; then all may be of any length.
        measure: what makes a value 1.

            - "sum" (with alternatives, the default): the answer is the more probable text of the two, by the
              sums of its tokens' log-probabilities. Longer texts are the less probable for it, as they are to
              the model.
            - "mean": its mean log-probability a token is higher. It misleads where the numbers of tokens
              differ, of which there is a warning: " 8" in two tokens beats " eight" in one whatever the
              prompt says, since the second of two tokens often follows from the first.
            - "first_difference": after the prompt and what both begin with, its next token is more probable.
            - "whole_answer" (without alternatives): greedy decoding gives it, token by token.
        clusters: one label a prompt; by default the prompts are independent.
        neutral_texts: their loss should not rise by more than `loss_limit`.
        closed_book: (question, answer) pairs; the share answered should not fall by more than
            `accuracy_limit`.
        loss_limit: in nats a token.
        accuracy_limit: a share, in [0, 1].
        name: of the behaviour, for tables and figures.
        batch_size: prompts in one forward, at most; see `answers_with`.
        batch_tokens: tokens in one forward, at most.

    Raises:
        DataError: unequal numbers; a measure that does not go with alternatives, or without; when measured,
            an answer of several tokens with neither alternatives nor a measure, or answers and alternatives
            that do not differ in a token. A limit that is no number from 0 on.
    """
    prompts, given = _listed(prompts, "prompts"), _answers(answers)
    neutral_texts, closed_book = _texts(neutral_texts, "neutral_texts"), _pairs(closed_book)
    alternatives = None if alternatives is None else _texts(alternatives, "alternatives")
    labels = _listed(range(len(prompts)) if clusters is None else clusters, "clusters")
    for what, things in (("answers", given), ("clusters", labels), ("alternatives", alternatives)):
        if things is not None and len(things) != len(prompts):
            raise DataError(f"{len(prompts)} prompts need as many {what}; got {len(things)}.")
    comparison = checked_comparison(measure, alternatives, any(len(texts) > 1 for texts in given))
    batches = {"batch_size": batch_size, "batch_tokens": batch_tokens}
    collateral = {}
    if neutral_texts:
        collateral[LOSS] = CollateralMeasure(loss(neutral_texts, batches), loss_limit)
    if closed_book:
        share = share_answered([pair[0] for pair in closed_book], [pair[1] for pair in closed_book], batches)
        collateral[CLOSED_BOOK] = CollateralMeasure(share, accuracy_limit, larger_is_worse=False)
    measured = answer_measure(prompts, given, alternatives, comparison, batches)
    return SteeringTask(name, measured, tuple(str(label) for label in labels), collateral, NOTES[comparison])


def load_task(path: str | Path, *, measure: str | None = None) -> SteeringTask:
    """Read a task from JSON.

    >>> import json
    >>> from pathlib import Path
    >>> rows = [{"prompt": "Question : what is", "answer": "the", "cluster": c} for c in ("a", "b")]
    >>> _ = Path("task.json").write_text(json.dumps({"kind": "moe_lens.SteeringTask", "prompts": rows}))
    >>> load_task("task.json").clusters
    ('a', 'b')

    The file holds {"kind": "moe_lens.SteeringTask", "name": ..., "prompts": [{"prompt": text or messages,
    "answer": text, "alternative": text (optional), "cluster": label (optional)}, ...], "measure": one of
    `answer_task`, "neutral_texts": [text, ...], "closed_book": [{"question": text, "answer": text}, ...]};
    the last three may be left out.

    Args:
        path: of the file.
        measure: instead of the file's; see `answer_task`.

    Raises:
        DataError: naming the file and the field at fault.
    """
    content = _KIND.load_json(path)
    del content["schema"]
    if unknown := set(content) - set(_FIELDS):
        raise DataError(f"{path}: unknown field {sorted(unknown)[0]!r}; a task has {', '.join(_FIELDS)}.")
    rows = _rows(path, content, "prompts", ("prompt", "answer"), ("alternative", "cluster"))
    facts = _rows(path, content, "closed_book", ("question", "answer"), ())
    if not rows:
        raise DataError(f"{path}: prompts is empty.")
    texts = content.get("neutral_texts", [])
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise DataError(f"{path}: neutral_texts must be a list of texts.")
    clusters = _column(path, rows, "cluster") or [f"prompt {index}" for index in range(len(rows))]
    if len(set(clusters)) < 2:
        raise DataError(f"{path}: the prompts are of one cluster; an interval needs at least two.")
    name = content.get("name", Path(path).stem)
    if not isinstance(name, str) or not name:
        raise DataError(f"{path}: name must be text; got {name!r}.")
    alternatives = _column(path, rows, "alternative")
    try:
        comparison = checked_comparison(measure or content.get("measure"), alternatives, several=False)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return answer_task(
        [row["prompt"] for row in rows],
        [row["answer"] for row in rows],
        alternatives=alternatives,
        measure=comparison,
        clusters=clusters,
        neutral_texts=texts,
        closed_book=[(row["question"], row["answer"]) for row in facts],
        name=name,
    )


def split_clusters(labels: Sequence[Any], fractions: Sequence[float], *, seed: int = 0) -> list[np.ndarray]:
    """Indices of held-out splits: every cluster is in one split only.

    >>> first, second = split_clusters(["a", "a", "b", "c"], (0.5, 0.5), seed=0)
    >>> sorted([*first.tolist(), *second.tolist()])
    [0, 1, 2, 3]

    Args:
        labels: one cluster label an item.
        fractions: share of the clusters for each split; they sum to at most 1.
        seed: the same seed gives the same splits.

    Raises:
        DataError: fractions that are not positive or sum to more than 1; fewer clusters than splits.
    """
    labels = [str(label) for label in _listed(labels, "labels")]
    fractions = _numbers(fractions, "fractions").tolist()
    clusters = list(dict.fromkeys(labels))
    total = float(sum(fractions))
    if not fractions or not min(fractions) > 0 or not total <= 1 + 1e-9:
        raise DataError(f"fractions must be positive and sum to at most 1; got {tuple(fractions)}.")
    order = np.random.default_rng(whole_number(seed, "seed")).permutation(len(clusters))
    bounds = np.floor(np.cumsum([0.0, *fractions]) * len(clusters) + 0.5 + 1e-9).astype(int)  # halves go up
    groups = [{clusters[i] for i in order[low:high]} for low, high in pairwise(bounds)]
    if not all(groups):
        raise DataError(f"{len(clusters)} clusters are too few for splits of {tuple(fractions)}.")
    return [np.array([i for i, label in enumerate(labels) if label in group]) for group in groups]


def _listed(given: Any, name: str) -> list[Any]:
    """The items; a text, which would be taken for its letters, is refused."""
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise DataError(f"{name} must be a list; got {given!r}.")
    return list(given)


def _texts(given: Any, name: str) -> list[str]:
    texts = _listed(given, name)
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            raise DataError(f"{name}[{index}] must be a text; got {text!r}.")
    return texts


def _answers(given: Any) -> list[list[str]]:
    """A list of texts a prompt, of which one will do."""
    found = []
    for index, answer in enumerate(_listed(given, "answers")):
        texts = [answer] if isinstance(answer, str) or not isinstance(answer, Sequence) else list(answer)
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise DataError(f"answers[{index}] must be a text, or a list of texts; got {answer!r}.")
        found.append(texts)
    return found


def _pairs(given: Any) -> list[tuple[str, str]]:
    pairs = _listed(given, "closed_book")
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise DataError("closed_book must be (question, answer) pairs.")
    return [cast(tuple[str, str], tuple(pair)) for pair in pairs]


def _numbers(given: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} must give numbers; got {given!r}.") from error


def _column(path: str | Path, rows: list[dict[str, Any]], name: str) -> list[str] | None:
    """An optional field of all rows; None where no row has it."""
    n_rows = sum(name in row for row in rows)
    if n_rows not in (0, len(rows)):
        article = "an" if name[0] in "aeiou" else "a"
        raise DataError(
            f"{path}: {n_rows} of {len(rows)} prompts have {article} {name}; give it to all or to none."
        )
    return [row[name] for row in rows] if n_rows else None


def _rows(
    path: str | Path, content: dict[str, Any], name: str, required: Sequence[str], optional: Sequence[str]
) -> list[dict[str, Any]]:
    """The objects in the list `name`, each with its fields as they should be."""
    rows = content.get(name, [])
    if not isinstance(rows, list):
        raise DataError(f"{path}: {name} must be a list of objects.")
    for index, row in enumerate(rows):
        where, fields = f"{path}: {name}[{index}]", set(row) if isinstance(row, dict) else set()
        if not set(required) <= fields or not fields <= {*required, *optional}:
            may = f" and may have {', '.join(optional)}" if optional else ""
            got = f"fields {sorted(row)}" if isinstance(row, dict) else short(row)
            raise DataError(f"{where} must have {', '.join(required)}{may}; got {got}.")
        texts = [row[field] for field in fields - {"prompt"}]
        if not all(isinstance(text, str) and text for text in texts):
            raise DataError(f"{where}: every field but the prompt must be text; got {short(row)}.")
        try:
            if "prompt" in row:
                as_prompt(row["prompt"] or None)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
    return rows
