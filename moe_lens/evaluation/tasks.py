"""What a plan is measured on: a behaviour, prompt by prompt, and what must not suffer.

task = answer_task(prompts, answers, clusters=entities, neutral_texts=sentences, closed_book=questions)
task = load_task("task.json")
values = task.measure(model, steer_hooks(plan))        # [prompt]; 1.0 where the model gives the answer
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Float

from moe_lens.checks import as_index
from moe_lens.errors import DataError
from moe_lens.evaluation.measures import Hooks, answers_with, continuation_log_probs, text_loss
from moe_lens.model.registration import Model
from moe_lens.text.prompts import as_prompt

Measure = Callable[[Model, Hooks], Any]
"""From a model and forward hooks to the behaviour's values, one a prompt."""
Collateral = Callable[[Model, Hooks], float]
LOSS: Final = "neutral loss (nats a token)"
CLOSED_BOOK: Final = "closed-book accuracy"
_KIND: Final = "moe_lens.SteeringTask"
_FIELDS: Final = {"kind", "name", "prompts", "neutral_texts", "closed_book"}


@dataclass(frozen=True, eq=False)
class CollateralMeasure:
    """Something that a plan should leave as it is.

    Attributes:
        measure: from a model and hooks to one number.
        limit: how much worse a plan may make it.
        larger_is_worse: True for a loss, False for an accuracy.
    """

    measure: Collateral
    limit: float
    larger_is_worse: bool = True

    def harm(self, value: float, unsteered: float) -> float:
        """How much worse `value` is than the unsteered one."""
        return value - unsteered if self.larger_is_worse else unsteered - value

    def value(self, model: Model, hooks: Hooks = ()) -> float:
        """The number under the hooks. Raises DataError unless it is finite."""
        value = _numbers(self.measure(model, hooks), "A collateral measure")
        if value.shape != () or not np.isfinite(value):
            raise DataError(f"A collateral measure must give one finite number; got {value}.")
        return float(value)


@dataclass(frozen=True, eq=False)
class SteeringTask:
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

    Raises:
        DataError: no clusters.
    """

    name: str
    measure: Measure
    clusters: tuple[str, ...]
    collateral: Mapping[str, CollateralMeasure] = field(default_factory=dict)

    def __post_init__(self) -> None:
        labels = _listed(self.clusters, "clusters")
        object.__setattr__(self, "clusters", tuple(str(label) for label in labels))
        if len(set(self.clusters)) < 2:
            raise DataError(
                f"The task {self.name!r} needs prompts of at least two clusters for an interval; it has "
                f"{len(set(self.clusters))}."
            )

    def values(self, model: Model, hooks: Hooks = ()) -> Float[np.ndarray, "prompt"]:
        """The behaviour of each prompt under the hooks. Raises DataError unless it is a number a prompt."""
        values = _numbers(self.measure(model, hooks), f"The task {self.name!r}")
        if values.shape != (len(self.clusters),) or not np.isfinite(values).all():
            raise DataError(
                f"The task {self.name!r} must give one finite number for each of its {len(self.clusters)} "
                f"prompts; got shape {values.shape}."
            )
        return values


def answer_task(
    prompts: Sequence[Any],
    answers: Sequence[str],
    *,
    alternatives: Sequence[str] | None = None,
    clusters: Iterable[Any] | None = None,
    neutral_texts: Sequence[str] = (),
    closed_book: Sequence[tuple[str, str]] = (),
    loss_limit: float = 0.1,
    accuracy_limit: float = 0.1,
    name: str = "gives the answer",
    batch_size: int = 64,
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

    Args:
        answers: one a prompt, a single token each; 1 where it is the model's most probable next token.
        alternatives: answers of the opposite behaviour, one a prompt. With them, answers and alternatives may
            be of any length, and the value is 1 where the answer has the higher mean log-probability a token.
        clusters: one label a prompt; by default the prompts are independent.
        neutral_texts: their loss should not rise by more than `loss_limit` nats a token.
        closed_book: (question, answer) pairs; the share answered should not fall by more than
            `accuracy_limit`.

    Raises:
        DataError: unequal numbers, or (when measured) an answer that is no single token.
    """
    prompts, answers = _listed(prompts, "prompts"), _listed(answers, "answers")
    neutral_texts, closed_book = _listed(neutral_texts, "neutral_texts"), _listed(closed_book, "closed_book")
    labels = [
        str(label) for label in _listed(range(len(prompts)) if clusters is None else clusters, "clusters")
    ]
    if alternatives is not None:
        alternatives = _listed(alternatives, "alternatives")
    for what, given in (("answers", answers), ("clusters", labels), ("alternatives", alternatives)):
        if given is not None and len(given) != len(prompts):
            raise DataError(f"{len(prompts)} prompts need as many {what}; got {len(given)}.")
    _check_texts("answers", answers)
    _check_texts("alternatives", alternatives or [])
    _check_texts("neutral_texts", neutral_texts)
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in closed_book):
        raise DataError("closed_book must be (question, answer) pairs.")

    def measure(model: Model, hooks: Hooks) -> Any:
        if alternatives is None:
            return answers_with(model, prompts, answers, hooks=hooks, batch_size=batch_size).double().numpy()
        first, second = (
            continuation_log_probs(model, prompts, texts, hooks=hooks, batch_size=batch_size)
            for texts in (answers, alternatives)
        )
        return (first > second).astype(float)

    collateral = {}
    if neutral_texts:
        collateral[LOSS] = CollateralMeasure(
            lambda model, hooks: text_loss(model, neutral_texts, hooks=hooks, batch_size=batch_size),
            loss_limit,
        )
    if closed_book:
        questions, known = [q for q, _ in closed_book], [a for _, a in closed_book]

        def accuracy(model: Model, hooks: Hooks) -> float:
            right = answers_with(model, questions, known, hooks=hooks, batch_size=batch_size)
            return float(right.double().mean())

        collateral[CLOSED_BOOK] = CollateralMeasure(accuracy, accuracy_limit, larger_is_worse=False)
    return SteeringTask(name, measure, tuple(labels), collateral)


def load_task(path: str | Path) -> SteeringTask:
    """Read a task from JSON.

    >>> import json
    >>> from pathlib import Path
    >>> rows = [{"prompt": "Question : what is", "answer": "the", "cluster": c} for c in ("a", "b")]
    >>> _ = Path("task.json").write_text(json.dumps({"kind": "moe_lens.SteeringTask", "prompts": rows}))
    >>> load_task("task.json").clusters
    ('a', 'b')

    The file holds {"kind": "moe_lens.SteeringTask", "name": ..., "prompts": [{"prompt": text or messages,
    "answer": text, "alternative": text (optional), "cluster": label (optional)}, ...], "neutral_texts":
    [text, ...], "closed_book": [{"question": text, "answer": text}, ...]}; the last two may be left out.

    Raises:
        DataError: naming the file and the field at fault.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as a task: {error}.") from error
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise DataError(f'{path} is no task; it must be a JSON object with "kind": "{_KIND}".')
    if unknown := set(content) - _FIELDS:
        raise DataError(f"{path}: unknown field {sorted(unknown)[0]!r}; a task has {sorted(_FIELDS)}.")
    rows = _rows(path, content, "prompts", ("prompt", "answer"), ("alternative", "cluster"))
    if not rows:
        raise DataError(f"{path}: prompts is empty.")
    with_alternative = sum("alternative" in row for row in rows)
    if with_alternative not in (0, len(rows)):
        raise DataError(
            f"{path}: {with_alternative} of {len(rows)} prompts have an alternative; all or none."
        )
    facts = _rows(path, content, "closed_book", ("question", "answer"), ())
    texts = content.get("neutral_texts", [])
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise DataError(f"{path}: neutral_texts must be a list of texts.")
    with_cluster = sum("cluster" in row for row in rows)
    if with_cluster not in (0, len(rows)):
        raise DataError(
            f"{path}: {with_cluster} of {len(rows)} prompts have a cluster; give it to all or none."
        )
    clusters = [row.get("cluster", f"prompt {index}") for index, row in enumerate(rows)]
    if len(set(clusters)) < 2:
        raise DataError(f"{path}: the prompts are of one cluster; an interval needs at least two.")
    name = content.get("name", Path(path).stem)
    if not isinstance(name, str) or not name:
        raise DataError(f"{path}: name must be text; got {name!r}.")
    return answer_task(
        [row["prompt"] for row in rows],
        [row["answer"] for row in rows],
        alternatives=[row["alternative"] for row in rows] if with_alternative else None,
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
    if (number := as_index(seed)) is None:
        raise DataError(f"seed must be a number from 0 on; got {seed!r}.")
    order = np.random.default_rng(number).permutation(len(clusters))
    bounds = np.floor(np.cumsum([0.0, *fractions]) * len(clusters) + 0.5 + 1e-9).astype(int)  # halves go up
    groups = [{clusters[i] for i in order[low:high]} for low, high in pairwise(bounds)]
    if not all(groups):
        raise DataError(f"{len(clusters)} clusters are too few for splits of {tuple(fractions)}.")
    return [np.array([i for i, label in enumerate(labels) if label in group]) for group in groups]


def _listed(given: Any, name: str) -> list[Any]:
    """The items of anything but a text, which is one item by mistake."""
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise DataError(f"{name} must be a list; got {given!r}.")
    return list(given)


def _check_texts(name: str, texts: Sequence[Any]) -> None:
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            raise DataError(f"{name}[{index}] must be a text; got {text!r}.")


def _numbers(given: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} must give numbers; got {given!r}.") from error


def _rows(
    path: str | Path, content: dict[str, Any], name: str, required: Sequence[str], optional: Sequence[str]
) -> list[dict[str, Any]]:
    rows = content.get(name, [])
    if not isinstance(rows, list):
        raise DataError(f"{path}: {name} must be a list of objects.")
    for index, row in enumerate(rows):
        fields = set(row) if isinstance(row, dict) else set()
        if not set(required) <= fields or not fields <= {*required, *optional}:
            raise DataError(
                f"{path}: {name}[{index}] must have {', '.join(required)}"
                + (f" and may have {', '.join(optional)}" if optional else "")
                + f"; got {row!r}."
            )
        texts = [row[key] for key in (*required, *optional) if key in row and key != "prompt"]
        if not all(isinstance(text, str) and text for text in texts):
            raise DataError(f"{path}: {name}[{index}]: every field but the prompt must be text; got {row!r}.")
        try:
            if "prompt" in row:
                as_prompt(row["prompt"] or None)
        except DataError as error:
            raise DataError(f"{path}: {name}[{index}]: {error}") from error
    return rows
