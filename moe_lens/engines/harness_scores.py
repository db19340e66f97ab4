"""Scores of a harness task's documents, one number each, under hooks.

scored = scored_task("arc_easy", "acc", limit=100, ...)         # loads the data, and checks the metric
run = scored.on(model)                                          # builds the requests, once
run(hooks)                                                      # [document]
"""

import difflib
import functools
import hashlib
import inspect
import json
import math
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Float
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean, nanmean
from lm_eval.tasks import TaskManager

from moe_lens.checks import short
from moe_lens.engines.benchmark_tasks import BenchmarkTask
from moe_lens.engines.harness_model import SEED, WrappedLM, check_generated, quiet, steered_requests
from moe_lens.engines.judging import Answer, Judge
from moe_lens.engines.paper_benchmarks import PREFIX, benchmark_named
from moe_lens.errors import DataError
from moe_lens.hook_names import Hooks

_MEANS: Final = (mean, nanmean)
"""How the harness sums up what is one number a document."""


@dataclass(frozen=True, eq=False)
class ScoredTask:
    """Tasks of the harness, and which number of each document counts.

    Attributes:
        name: of the whole.
        tasks: the harness' own objects; several of a group.
        metric: its name.
        filter: the name of the filter whose answers count.
        judge: instead of the metric.
        clusters: column, function, or None.
        limit: first documents of each task.
        prompting: what the harness builds requests with.
        batch_size: requests in one forward.
        higher_is_better: of the metric.
    """

    name: str
    tasks: list[Any]
    metric: str
    filter: str
    judge: Judge | None
    clusters: Any
    limit: int | None
    prompting: Mapping[str, Any]
    batch_size: int
    higher_is_better: bool

    @property
    def note(self) -> str:
        """What a value means."""
        by = "as the judge says" if self.judge else "as lm-evaluation-harness scores it"
        better = "larger" if self.higher_is_better else "smaller"
        return f"{self.metric} of each document of {self.name}, {by}; {better} is better"

    def labels(self) -> Iterator[str]:
        """The cluster of each document. Raises DataError for a column that is not there."""
        for task in self.tasks:
            with _seeded():  # a look at the documents may shuffle them anew
                documents = list(task.doc_iterator(rank=0, limit=self.limit, world_size=1))
            for number, document in documents:
                if self.clusters is None:
                    label = document["cluster"] if isinstance(task, BenchmarkTask) else number
                elif callable(self.clusters):
                    label = self.clusters(document)
                elif self.clusters not in document:
                    raise DataError(
                        f"The documents of {_name(task)} have no column {self.clusters!r} for clusters; "
                        f"their columns are {list(document)}."
                    )
                else:
                    label = document[self.clusters]
                yield f"{_name(task)} {label}" if len(self.tasks) > 1 else str(label)

    def on(self, model: Any) -> "ScoredOnModel":
        """For a model, from it and hooks to the value of each document."""
        with _seeded():
            lm = WrappedLM(model, self.batch_size)
            return ScoredOnModel(self, lm, [(task, self._requests(task, lm)) for task in self.tasks])

    def _requests(self, task: Any, lm: WrappedLM) -> list[Instance]:
        task.set_fewshot_seed(SEED)  # anew for each model, so that all see the same examples
        with quiet():
            task.build_all_requests(
                limit=self.limit,
                rank=0,
                world_size=1,
                chat_template=lm.apply_chat_template if self.prompting["apply_chat_template"] else None,
                **self.prompting,
            )
        return list(task.instances)

    def _answered(self, lm: WrappedLM, task: Any, requests: list[Instance]) -> list[list[Instance]]:
        """The requests of each document, with the model's answers and what filters make of them."""
        fresh = [replace(request, resps=[], filtered_resps={}) for request in requests]
        for kind in dict.fromkeys(request.request_type for request in fresh):
            asked = [one for one in fresh if one.request_type == kind for _ in range(one.repeats or 1)]
            if kind == "loglikelihood":
                check_generated(lm, asked)
            for request, answer in zip(asked, getattr(lm, kind)(asked), strict=True):
                request.resps.append(answer)
        task._instances = fresh
        task.apply_filters()
        grouped: dict[Any, list[Instance]] = {}
        for request in fresh:
            grouped.setdefault(request.doc_id, []).append(request)
        return [sorted(of_one, key=lambda request: request.idx) for of_one in grouped.values()]

    def _values(self, task: Any, answered: list[list[Instance]]) -> list[float]:
        filtered = [[request.filtered_resps[self.filter] for request in of_one] for of_one in answered]
        if self.judge is not None:
            answers = [
                Answer(of_one[0].args[0], texts[0], of_one[0].doc)
                for of_one, texts in zip(answered, filtered, strict=True)
            ]
            values = list(self.judge(answers))
            if len(values) != len(answers):
                raise DataError(f"The judge gave {len(values)} numbers for {len(answers)} answers.")
        else:
            pairs = zip(answered, filtered, strict=True)
            values = [task.process_results(of_one[0].doc, given)[self.metric] for of_one, given in pairs]
        return [_number(value, self.metric) for value in values]


@dataclass(frozen=True, eq=False)
class ScoredOnModel:
    """A task with its requests built for a model: called with the model and hooks, a value a document."""

    scored: ScoredTask
    lm: WrappedLM
    built: list[tuple[Any, list[Instance]]]

    def __call__(self, _model: Any, hooks: Hooks) -> Float[np.ndarray, "document"]:
        values: list[float] = []
        with steered_requests(self.lm, hooks), _seeded():
            for task, requests in self.built:
                values += self.scored._values(task, self.scored._answered(self.lm, task, requests))
        return np.array(values, dtype=np.float64)

    @functools.cached_property
    def digest(self) -> str | None:
        """Says what is asked and how it is scored, for processes that share the work; None with a judge.

        The harness' version, each request as text and as tokens, its document, and the task's config, in
        which functions stand as their source; what such functions call in turn is not looked at.
        """
        one = self.scored
        if one.judge is not None:
            return None
        said = hashlib.sha256(f"{version('lm_eval')} {one.metric} {one.filter} {one.batch_size}".encode())
        for task, requests in self.built:
            config = json.dumps(task.dump_config(), sort_keys=True, default=_as_text)
            said.update(f"{config} {_as_text(type(task))}".encode())
            for request in requests:
                tokens = [self.lm.tok_encode(text) for text in request.args if isinstance(text, str)]
                what = (request.request_type, request.doc_id, request.idx, request.repeats, request.args)
                document = json.dumps(request.doc, sort_keys=True, default=_as_text)
                said.update(f"{what} {tokens} {document}\n".encode())
        return said.hexdigest()


def _as_text(value: Any) -> str:
    """The source of a function or class, and what else is no JSON, without where it lies in memory."""
    if callable(value):
        try:
            return inspect.getsource(value)
        except (OSError, TypeError):  # typed in at a prompt, or not written in Python
            value = getattr(value, "__qualname__", type(value).__qualname__)
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def scored_task(
    task: str | Path,
    metric: str | None,
    *,
    limit: int | None,
    batch_size: int,
    data: Any = None,
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    judge: Judge | None = None,
    filter: str | None = None,
    clusters: Any = None,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    gen_kwargs: Mapping[str, Any] | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
) -> ScoredTask:
    """A task with its data loaded; the arguments are those of `harness_task`, and so are the errors."""
    with _seeded():
        tasks, labels = _loaded(task, include_path, data, columns, template, clusters)
        for each in tasks:
            _configure(each, num_fewshot, gen_kwargs)
            _check_kind(each, judge)
    if judge is not None:
        metric, higher = metric or "judge", True
    else:
        metric, higher = _checked_metric(tasks, metric)
    return ScoredTask(
        name=str(task) if len(tasks) > 1 or isinstance(tasks[0], BenchmarkTask) else _name(tasks[0]),
        tasks=tasks,
        metric=metric,
        filter=_checked_filter(tasks, filter),
        judge=judge,
        clusters=labels,
        limit=limit,
        prompting={
            "apply_chat_template": apply_chat_template,
            "fewshot_as_multiturn": apply_chat_template,
            "system_instruction": system_instruction,
        },
        batch_size=batch_size,
        higher_is_better=higher,
    )


def _loaded(
    task: str | Path,
    include_path: str | Path | None,
    data: Any,
    columns: Mapping[str, str] | None,
    template: str | None,
    clusters: Any,
) -> tuple[list[Any], Any]:
    """The harness' task objects, and where their clusters are."""
    if isinstance(task, str) and task.startswith(PREFIX):
        if data is None:
            raise DataError(
                f"{task} ships without data: give data=, a .jsonl file or rows with the columns "
                f"{', '.join(benchmark_named(task).columns)}."
            )
        column = clusters if isinstance(clusters, str) else None
        with quiet():
            one = BenchmarkTask.of(task, data, columns=columns, template=template, clusters=column)
        return [one], (None if column else clusters)
    for name, value in (("data", data), ("columns", columns), ("template", template)):
        if value is not None:
            raise DataError(f"{name}= belongs to benchmarks of moe_lens ({PREFIX}NAME); {task} has its own.")
    manager, name = _manager(task, include_path)
    try:
        with quiet():
            found = list(manager.load([name])["tasks"].values())
    except Exception as error:  # the harness, datasets and the task's own code raise all kinds
        raise DataError(f"The harness cannot load {task}: {_first_line(error)}") from error
    return found, clusters


def _manager(task: str | Path, include_path: str | Path | None) -> tuple[TaskManager, str]:
    """The harness' index of tasks that has this one, and its name there."""
    if isinstance(task, Path) or str(task).endswith((".yaml", ".yml")):
        path = Path(task).absolute()
        if not path.is_file():
            raise DataError(f"There is no file {task}.")
        return TaskManager(include_path=str(path.parent), include_defaults=False), str(path)
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise DataError(f"include_path must be a folder of tasks; {include_path} is none.")
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if task in own.all_tasks:
            return own, str(task)
    manager = _default_tasks()
    if task not in manager.all_tasks:
        near = difflib.get_close_matches(str(task), manager.all_tasks, 3)
        hint = f" Near it are {', '.join(near)}." if near else ""
        raise DataError(f"The harness has no task {task!r}.{hint} `lm-eval ls tasks` lists them.")
    return manager, str(task)


@functools.cache
def _default_tasks() -> TaskManager:
    """The index of the harness' own tasks, which takes seconds to read."""
    return TaskManager()


@contextmanager
def _seeded() -> Iterator[None]:
    """The harness' seeds, for tasks that shuffle or guess; afterwards the user's random numbers go on."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(0)
    np.random.seed(SEED)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002


def _configure(task: Any, num_fewshot: int | None, gen_kwargs: Mapping[str, Any] | None) -> None:
    """As the harness' `simple_evaluate` does: a task that says 0 examples keeps them."""
    said = task.get_config("num_fewshot")
    if said is None or (num_fewshot is not None and said != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    if gen_kwargs and task.get_config("output_type") == "generate_until":
        task.set_config(key="generation_kwargs", value=dict(gen_kwargs), update=True)


def _check_kind(task: Any, judge: Judge | None) -> None:
    name = _name(task)
    if getattr(task, "UNSAFE_CODE", False):
        raise DataError(f"{name} runs code that the model writes; run it with lm-eval itself, in a sandbox.")
    if getattr(task, "MULTIMODAL", False):
        raise DataError(f"{name} needs images or sound, which moe_lens does not give to a model.")
    if judge is not None and task.OUTPUT_TYPE != "generate_until":
        raise DataError(f"A judge reads answers, and {name} has none written ({task.OUTPUT_TYPE}).")


def _checked_metric(tasks: list[Any], metric: str | None) -> tuple[str, bool]:
    """The metric's name, and whether higher is better, in every task."""
    higher = set()
    for task in tasks:
        known = task.aggregation()
        single = [name for name, how in known.items() if how in _MEANS]
        if metric is None and isinstance(task, BenchmarkTask) and single:
            metric = single[0]
        if metric is None and len(single) == 1:
            metric = single[0]
        there = f"those with a number for each document are {', '.join(single) or 'none'}"
        if metric is None:
            raise DataError(
                f"{_name(task)} has no metric of its own to take: {there}. Name one, or give a judge=."
            )
        if metric not in known:
            raise DataError(f"{_name(task)} has no metric {metric!r}; {there}.")
        if metric not in single:
            raise DataError(
                f"{metric} of {_name(task)} is of all documents together, so that no prompt has "
                f"a value of its own; {there}."
            )
        higher.add(bool(task.higher_is_better().get(metric, True)))
    if metric is None or len(higher) != 1:
        raise DataError(
            f"The tasks of the group do not agree which way {metric} is better; give one of them."
        )
    return metric, higher.pop()


def _checked_filter(tasks: list[Any], filter: str | None) -> str:
    names = [[one.name for one in task._filters] for task in tasks if hasattr(task, "_filters")]
    common = [name for name in names[0] if all(name in others for others in names)] if names else ["none"]
    if filter is None and len(common) == 1:
        return common[0]
    if filter is None or filter not in common:
        raise DataError(
            f"{_name(tasks[0])} has the filters {', '.join(common)}; name one with filter=."
            if filter is None
            else f"{_name(tasks[0])} has no filter {filter!r}; it has {', '.join(common)}."
        )
    return filter


def _name(task: Any) -> str:
    """(The harness' own `task_name` draws a random number each time.)"""
    return str(task.get_config("task") or type(task).__name__)


def _number(value: Any, metric: str) -> float:
    is_number = isinstance(value, bool | int | float | np.number | np.bool_)
    if not is_number or not math.isfinite(value):
        raise DataError(f"{metric} gave {short(value)} for a document, which is no finite number.")
    return float(value)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
