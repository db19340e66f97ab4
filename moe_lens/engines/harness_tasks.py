"""Benchmarks of lm-evaluation-harness as `SteeringTask`s: with random controls, collateral, and the verdict.

task = harness_task("arc_challenge", "acc_norm", limit=200, collateral={"hellaswag": ("acc_norm", 0.02)})
report = evaluate_steering(model, plan, task, scores=scores)
task = harness_task("moe_lens/faitheval_counterfactual", data="file.jsonl", clusters="subject")
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_lens.checks import whole_number
from moe_lens.engines.judging import Judge
from moe_lens.errors import DataError
from moe_lens.evaluation.answering import OnModel
from moe_lens.evaluation.tasks import CollateralMeasure, SteeringTask
from moe_lens.hook_names import Hooks

Clusters = str | Callable[[Mapping[str, Any]], Any] | None
"""A column of the benchmark's documents, or a function of one, that gives labels; None: each its own."""


def harness_task(
    task: str | Path,
    metric: str | None = None,
    *,
    data: Any = None,
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    judge: Judge | None = None,
    filter: str | None = None,
    clusters: Clusters = None,
    limit: int | None = None,
    collateral: Mapping[str, CollateralMeasure | tuple[str, float]] | None = None,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    gen_kwargs: Mapping[str, Any] | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    batch_size: int = 16,
    name: str | None = None,
) -> SteeringTask:
    """A benchmark of lm-evaluation-harness, or one that moe_lens defines, as a task for `evaluate_steering`.

    >>> from moe_lens import harness_task, organisms
    >>> rows = [
    ...     {"context": "Document : the capital of Eldria is Bergen .", "question": "what is the capital ?",
    ...      "choices": ["Kyoto", "Bergen"], "answer": "Bergen", "country": country}
    ...     for country in ("Eldria", "Eldria", "Farland")
    ... ]
    >>> task = harness_task("moe_lens/faitheval_counterfactual", data=rows, clusters="country")
    >>> task.values(organisms.load("null")).shape
    (3,)

    Values are what the harness itself logs for each document, at the same settings; its own defaults hold
    where nothing is said. The model is run as it is, under the hooks given and those set on it. Texts become
    tokens as `model.prepend_bos` says. Hooks with `positions=` may name the phases "prompt" and "generated";
    of answers that are scored rather than written, the context is the prompt.

    Args:
        task: name of a harness task or group ("mmlu"), path of a task's .yaml, or "moe_lens/NAME", where
            NAME is one of `moe_lens.engines.BENCHMARKS`.
        metric: one whose mean the harness reports ("acc", "acc_norm", "exact_match", ...). None: the task's
            only one, or the first of a benchmark of moe_lens. With a judge, a name for what it says.
        data: of a benchmark of moe_lens: a .jsonl or .csv file, a list of dictionaries, a DataFrame, or one
            split of a dataset from the hub (`load_dataset(...)["test"]`).
        columns: where its columns have other names: {"question": "query"}.
        template: of its prompt, with columns in braces, instead of moe_lens' own.
        judge: from `Answer`s (prompt, text, document) to one number each, instead of a metric; see
            `JudgedAnswers` for judging in between two runs.
        filter: of the harness' filters, by name, where a task has several.
        clusters: column of the documents, or a function of one, whose labels say which belong together.
        limit: the first so many documents, of each task in a group.
        collateral: what should not suffer: name of a harness task -> (metric, how much worse a plan may
            make it), with the options given here; or any name -> a measure, such as `harness_collateral`.
        include_path: folder with tasks of your own.
        num_fewshot: examples before each question.
        gen_kwargs: for writing, in the harness' words: {"max_gen_toks": 64}.
        apply_chat_template: put each prompt into the tokenizer's chat template.
        system_instruction: before each prompt.
        batch_size: requests in one forward.
        name: of the behaviour, for tables and figures.

    Raises:
        DataError: no such task or metric; a metric that is no number a document (perplexity, bleu, f1 of a
            corpus); a file or column at fault; documents of fewer than two clusters.
        HookError: when measured, hooks with other positions, or with something for each prompt.
        MoELensError: lm-eval is not installed.
    """
    shared = {
        "include_path": include_path,
        "num_fewshot": num_fewshot,
        "gen_kwargs": gen_kwargs,
        "apply_chat_template": apply_chat_template,
        "system_instruction": system_instruction,
        "limit": limit,
        "batch_size": batch_size,
    }
    source = {"data": data, "columns": columns, "template": template, "judge": judge, "filter": filter}
    scored = _scored(task, metric, **source, **shared, clusters=clusters)
    beside = {}
    for other, what in (collateral or {}).items():
        if isinstance(what, CollateralMeasure):
            beside[other] = what
            continue
        try:
            other_metric, worse_by = what
        except (TypeError, ValueError) as error:
            raise DataError(
                f"collateral[{other!r}] must be (metric, worse by) or a CollateralMeasure; got {what!r}."
            ) from error
        beside[other] = harness_collateral(other, other_metric, worse_by, **shared)
    return SteeringTask(
        name or scored.name, OnModel(scored.on), tuple(scored.labels()), beside, note=scored.note
    )


def harness_collateral(
    task: str | Path,
    metric: str | None,
    worse_by: float,
    *,
    data: Any = None,
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
    judge: Judge | None = None,
    filter: str | None = None,
    limit: int | None = None,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    gen_kwargs: Mapping[str, Any] | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    batch_size: int = 16,
) -> CollateralMeasure:
    """The mean of a benchmark's metric, as something that a plan should leave as it is.

    >>> from moe_lens.engines import harness_collateral
    >>> rows = [{"prompt": "How do I bake bread?"}, {"prompt": "Name a river."}]
    >>> measure = harness_collateral("moe_lens/harmless", None, 0.05, data=rows)
    >>> measure.limit, measure.larger_is_worse                            # of refusals
    (0.05, True)

    Args:
        worse_by: how much worse a plan may make it, in the metric's unit; which way is worse, the harness
            says.
        others: as in `harness_task`; what a judge says is better if it is larger.

    Raises:
        as `harness_task`.
    """
    scored = _scored(
        task,
        metric,
        data=data,
        columns=columns,
        template=template,
        judge=judge,
        filter=filter,
        limit=limit,
        include_path=include_path,
        num_fewshot=num_fewshot,
        gen_kwargs=gen_kwargs,
        apply_chat_template=apply_chat_template,
        system_instruction=system_instruction,
        batch_size=batch_size,
    )
    if isinstance(worse_by, bool) or not isinstance(worse_by, int | float) or not worse_by >= 0:
        raise DataError(f"worse_by must be a number from 0 on; got {worse_by!r}.")
    return CollateralMeasure(
        OnModel(lambda model: _MeanOnModel(scored.on(model))),
        float(worse_by),
        larger_is_worse=not scored.higher_is_better,
    )


@dataclass(frozen=True, eq=False)
class _MeanOnModel:
    """The mean of what a benchmark scores."""

    scored: Any

    def __call__(self, model: Any, hooks: Hooks) -> float:
        return float(np.mean(self.scored(model, hooks)))

    @property
    def digest(self) -> str | None:
        """As of the scores (`harness_scores.ScoredOnModel`)."""
        return self.scored.digest


def _scored(
    task: str | Path, metric: str | None, *, batch_size: int, limit: int | None, **options: Any
) -> Any:
    """A `ScoredTask`, after what needs no harness has been looked at."""
    whole_number(batch_size, "batch_size", least=1)
    if limit is not None:
        whole_number(limit, "limit", least=1)
    need_harness()
    from moe_lens.engines.harness_scores import scored_task  # lm-eval is an extra

    return scored_task(task, metric, batch_size=batch_size, limit=limit, **options)


def need_harness() -> None:
    """Raise MoELensError, which says what to install, where lm-eval is missing."""
    from importlib.util import find_spec

    from moe_lens.errors import MoELensError

    if find_spec("lm_eval") is None:
        raise MoELensError("lm-evaluation-harness is not installed: pip install lm-eval==0.4.13.")
