"""Evaluating with many processes: a unit is a plan, one measure of the task, and some of its batches.

    report = evaluate_distributed(model, plan, task, "runs", scores=scores)        # in each process
    result = sweep_distributed(model, scores, task, "runs", sizes=(2, 4, 8))

The measures of `answer_task` and `load_task` are cut between the batches that they have anyway, so that
nothing but the order of work differs. A measure that is a benchmark of the harness, or a function of the
user's, is one unit a plan.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from moe_lens.checks import whole_number
from moe_lens.detection.expert_scores import ExpertScores
from moe_lens.engines.counting_together import UNIT, is_first
from moe_lens.engines.fingerprints import what_computes
from moe_lens.engines.unit_files import Unit, UnitFolder
from moe_lens.errors import DataError
from moe_lens.evaluation.evaluating import MeasureAll, Mode, evaluated_by, measure_outcome, swept_by
from moe_lens.evaluation.outcomes import DIRECTIONS, Outcome
from moe_lens.evaluation.plan_sizes import SweepResult
from moe_lens.evaluation.reading import Reading
from moe_lens.evaluation.report import SteeringReport
from moe_lens.evaluation.tasks import SteeringTask
from moe_lens.files import FileKind, digest_of
from moe_lens.hook_names import Hooks
from moe_lens.model.wrapper import Model
from moe_lens.steering.hooks import steer_hooks
from moe_lens.steering.plan import SteeringPlan

_KIND: Final = FileKind("moe_lens.MeasuredUnit", 1, (1,), "a unit of a measure")
_BEHAVIOUR: Final = ""
"""Name of the task's own measure, beside those of its collateral measures."""


def evaluate_distributed(
    model: Model,
    plan: SteeringPlan,
    task: SteeringTask,
    folder: str | Path,
    *,
    unit: int = UNIT,
    about: str = "",
    reverse: SteeringPlan | None = None,
    scores: ExpertScores | None = None,
    n_random: int = 20,
    alpha: float = 0.05,
    level: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> SteeringReport:
    """`evaluate_steering`, shared by all processes that make this call with this folder.

    >>> from moe_lens import SteeringPlan, answer_task, evaluate_steering, organisms
    >>> from moe_lens.engines import evaluate_distributed
    >>> model, conflicts = organisms.load("null"), organisms.world("null").conflicts("test")[:12]
    >>> task = answer_task([c.open_book for c in conflicts], [c.document_answer for c in conflicts])
    >>> plan, reverse = SteeringPlan(deactivate=[(2, 5), (3, 7)]), SteeringPlan(deactivate=[(0, 1), (2, 2)])
    >>> options = {"reverse": reverse, "n_random": 4, "progress": False}
    >>> report = evaluate_distributed(model, plan, task, "runs", **options)
    >>> str(report) == str(evaluate_steering(model, plan, task, **options))
    True

    Each process returns the report, that of `evaluate_steering` with the same arguments. What a plan did is
    kept: an evaluation of other sizes or with more random sets measures what is new.

    Args:
        folder: as in `collect_distributed`.
        unit: batches a file, of the measures of `answer_task` and `load_task`.
        about: what a task's own functions measure, on which prompts; it goes into the files' names. A
            `harness_task` without a judge says it itself (attribute `digest` of its measures).
        model, plan, task: and the other settings, as in `evaluate_steering`.

    Raises:
        DataError: as `evaluate_steering` or `collect_distributed`; a task of the user's own functions without
            `about`.
    """
    return evaluated_by(
        _measured_together(folder, unit, about, progress),
        model,
        plan,
        task,
        reverse=reverse,
        scores=scores,
        n_random=n_random,
        alpha=alpha,
        level=level,
        seed=seed,
    )


def sweep_distributed(
    model: Model,
    scores: ExpertScores,
    task: SteeringTask,
    folder: str | Path,
    *,
    sizes: Sequence[int],
    unit: int = UNIT,
    about: str = "",
    directions: Sequence[str] = DIRECTIONS,
    mode: Mode = "deactivate",
    n_random: int = 5,
    level: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> SweepResult:
    """`sweep`, shared by all processes that make this call with this folder.

    >>> from moe_lens import organisms, sweep
    >>> from moe_lens.engines import sweep_distributed
    >>> from moe_lens.organisms import detect_document_experts, document_task
    >>> model, world = organisms.load("planted"), organisms.world("planted")
    >>> scores, task = detect_document_experts(model, world), document_task(world, "development")
    >>> result = sweep_distributed(model, scores, task, "runs", sizes=(2,), n_random=0, progress=False)
    >>> result == sweep(model, scores, task, sizes=(2,), n_random=0, progress=False)
    True

    Each process returns the result, that of `sweep` with the same arguments.

    Args:
        folder, unit, about: as in `evaluate_distributed`.
        model, scores, task: and the other settings, as in `sweep`.

    Raises:
        DataError: as `sweep` or `evaluate_distributed`.
    """
    return swept_by(
        _measured_together(folder, unit, about, progress),
        model,
        scores,
        task,
        sizes=sizes,
        directions=directions,
        mode=mode,
        n_random=n_random,
        level=level,
        seed=seed,
    )


def _measured_together(folder: str | Path, unit: int, about: str, progress: bool) -> MeasureAll:
    number = whole_number(unit, "unit", least=1)

    def measure_all(model: Model, task: SteeringTask, plans: Sequence[SteeringPlan]) -> list[Outcome]:
        shared = _Shared(UnitFolder(Path(folder)), model, task, number, about)
        units = [shared.units(plan) for plan in plans]  # of each plan, by the names of measures
        work = [each for by_name in units for several in by_name.values() for each in several]
        with tqdm(total=len(work), unit="unit", disable=not (progress and is_first())) as bar:
            shared.folder.work(work, lambda _: bar.update())
        return [shared.outcome(plan, by_name) for plan, by_name in zip(plans, units, strict=True)]

    return measure_all


@dataclass(eq=False)
class _Shared:
    """A task on a model, measured in units.

    Attributes:
        task: with its texts read (`SteeringTask.on`).
        unit: batches a file.
        about: what functions of the user's measure.
    """

    folder: UnitFolder
    model: Model
    task: SteeringTask
    unit: int
    about: str

    def __post_init__(self) -> None:
        collateral = {name: each.measure for name, each in self.task.collateral.items()}
        self.measures: dict[str, Any] = {_BEHAVIOUR: self.task.measure, **collateral}
        own = [
            name
            for name, measure in self.measures.items()
            if not isinstance(measure, Reading) and getattr(measure, "digest", None) is None
        ]
        if own and not self.about:
            raise DataError(
                f"The task {self.task.name!r} measures {own[0] or 'the behaviour'} by a function of its own, "
                'and processes cannot know whether theirs does the same. Say in about="..." what it '
                "measures, on which prompts, and say something else when that changes."
            )
        self.settings = digest_of(what_computes(self.model, (), self.about))
        self.asked = {name: _measure_digest(name, measure) for name, measure in self.measures.items()}

    def units(self, plan: SteeringPlan) -> dict[str, list[Unit]]:
        """What is to be done for a plan."""
        hooks = steer_hooks(plan)
        steered = [f"{point} {getattr(hook, 'digest', None)}" for point, hook in hooks]
        found = {}
        for name, measure in self.measures.items():
            parts: list[Any] = [None]
            if isinstance(measure, Reading):
                batches = measure.batches(hooks)
                parts = [batches[start : start + self.unit] for start in range(0, len(batches), self.unit)]
            found[name] = []
            for part in parts:
                said = f"{self.settings} {self.asked[name]} {steered} {part}"
                file = f"measure-{hashlib.sha256(said.encode()).hexdigest()[:32]}.safetensors"
                found[name].append(Unit(file, partial(self._write, measure, hooks, part)))
        return found

    def _write(self, measure: Any, hooks: Hooks, part: Any, path: Path) -> None:
        if isinstance(measure, Reading):
            tensors = {str(number): tensor for number, tensor in measure.found(hooks, part).items()}
        else:
            values = np.asarray(measure(self.model, hooks), dtype=np.float64)
            tensors = {"values": torch.from_numpy(values.copy())}
        _KIND.save_tensors(path, tensors, {"unit": path.name})

    def outcome(self, plan: SteeringPlan, units: Mapping[str, list[Unit]]) -> Outcome:
        """What a plan did, from the files of its units."""
        values = {name: self._value(self.measures[name], several) for name, several in units.items()}
        collateral = {
            name: replace(each, measure=_known(values[name])) for name, each in self.task.collateral.items()
        }
        task = replace(self.task, measure=_known(values[_BEHAVIOUR]), collateral=collateral)
        return measure_outcome(self.model, task, plan)  # which checks the numbers

    def _value(self, measure: Any, units: list[Unit]) -> Any:
        found: dict[str, Tensor] = {}
        for unit in units:
            found |= self.folder.one(unit, _read)
        if isinstance(measure, Reading):
            return measure.finish([found[str(number)] for number in range(len(measure.asked))])
        return found["values"].numpy()


def _known(value: Any) -> Callable[[Any, Hooks], Any]:
    return lambda model, hooks: value


def _read(path: Path) -> dict[str, Tensor]:
    about, tensors = _KIND.load_tensors(path)
    if about.get("unit") != path.name:
        raise DataError(f"{path} is the unit {about.get('unit')!r} under another name.")
    return tensors


def _measure_digest(name: str, measure: Any) -> str:
    """Of all that a measure asks of a model; of a function, which `about` describes, its name."""
    if not isinstance(measure, Reading):
        return f"{name} {getattr(measure, 'digest', None) or ''}"
    digest = hashlib.sha256(
        f"{measure.judge.__module__}.{measure.judge.__qualname__} {measure.limits}".encode()
    )
    for each in measure.asked:
        digest.update(
            f"{each.row} {each.n_prompt} {each.start} {each.stop} {tuple(each.expected.shape)}\n".encode()
        )
        digest.update(f"{len(each.tokens)} {each.tokens.tolist()} {each.expected.tolist()}\n".encode())
    return digest.hexdigest()
