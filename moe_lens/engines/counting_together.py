"""Counting with many processes: each runs the same call, and a folder that all see is what they share.

    stats = collect_distributed(model, prompts, "counts")  # in each process; in each, the whole result
    scores = detect_distributed(model, pairs, "counts")
    stats = merge_distributed("counts")                    # later, without a model

torchrun, accelerate launch, srun, a SLURM array or `&` in a shell: how the processes were started, and how
many there are, makes no difference, since they say nothing to each other.
"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from tqdm.auto import tqdm

from moe_lens.checks import whole_number
from moe_lens.detection.detecting import detected_by
from moe_lens.detection.expert_scores import ExpertScores
from moe_lens.detection.scores import Score
from moe_lens.engines.fingerprints import what_computes
from moe_lens.engines.job_files import Job
from moe_lens.engines.routing_units import Damaged, RoutingUnits, total_of
from moe_lens.engines.unit_files import Unit, UnitFolder
from moe_lens.files import digest_of
from moe_lens.hook_names import Hooks
from moe_lens.model.wrapper import Model
from moe_lens.statistics.collection import Counting
from moe_lens.statistics.counting import Wanted
from moe_lens.statistics.routing_stats import RoutingStats
from moe_lens.text.batching import Prompts, how_many
from moe_lens.text.groups import ContrastiveGroups
from moe_lens.text.pairs import ContrastivePairs
from moe_lens.text.spans import Span

STATISTICS: Final = "routing statistics"
UNIT: Final = 8
"""Batches of a unit."""


def collect_distributed(
    model: Model,
    prompts_or_tokens: Prompts,
    folder: str | Path,
    *,
    unit: int = UNIT,
    about: str = "",
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    span: Span = None,
    special_tokens: bool = False,
    hooks: Hooks = (),
    progress: bool = True,
    per_prompt: bool = False,
    positions: bool = False,
    vocabulary: bool = False,
    outputs: bool = False,
) -> RoutingStats:
    """`collect_routing`, shared by all processes that make this call with this folder.

    >>> from moe_lens import collect_routing, organisms
    >>> from moe_lens.engines import collect_distributed
    >>> model, prompts = organisms.load("specialised"), ["Question : what is", "Document : the"]
    >>> stats = collect_distributed(model, prompts, "counts", progress=False)
    >>> stats.n_tokens == collect_routing(model, prompts, progress=False).n_tokens
    True

    The batches are those of `collect_routing`; every `unit` of them are counted into one file of the folder
    by whichever process comes to them first. Each process reads and tokenises all prompts, and at the end
    returns the whole result: bit for bit that of `collect_routing` with the same arguments, for any number of
    processes, on hardware that rounds alike and with as many threads a process.

    A unit's file is named by its number and a digest of its tokens, which of them count, the model (weights,
    config, hooks and k as they are now), what is counted, and the versions of moe_lens, torch and
    transformers. So a file is never used for anything else, several jobs may share a folder, and a job that
    was killed goes on with what is there, with another number of processes, too. Nothing waits at a barrier:
    who comes late takes what is left, and what a dead process had begun is done by another (after a minute,
    if it ran on another machine).

    Args:
        model: a HookedMoE or RoutedModel, whole in each process; on several GPUs, on a GPU of its own.
        prompts_or_tokens: as in `collect_routing`, the same in each process and in the same order; a
            generator will do.
        folder: made if need be; on several machines, on a file system that all see.
        unit: batches a file. What is lost when a process dies, and how long others may wait at the end.
        about: what hooks do that have no `digest`; it goes into the files' names.
        hooks: forward hooks to run under. Plans (`steer_hooks`) say what they do; others need `about`.
        progress: show a bar, in the first process of a launcher.
        batch_size: and the other settings, as in `collect_routing`.

    Raises:
        DataError: as `collect_routing`; hooks of unknown effect without `about`; a model that is spread over
            processes; a folder that cannot be written to. What was counted stays.
    """
    number = whole_number(unit, "unit", least=1)
    wanted = Wanted(per_prompt, positions, vocabulary, outputs)
    counting = Counting(model, hooks, wanted, span, special_tokens, batch_size, batch_tokens)
    settings = [name for name, value in asdict(wanted).items() if value] + [str(counting.limits)]
    said = {**what_computes(model, counting.hooks, about), "settings": settings}
    units = RoutingUnits(counting, digest_of(said), number)
    shared = UnitFolder(Path(folder))
    for attempt in range(3):
        job = _all_done(shared, units, said, prompts_or_tokens, progress and is_first())
        total = Unit(job.result, lambda path, job=job: total_of(shared.path, job.units).save(path))
        try:
            return shared.one(total, RoutingStats.load)
        except Damaged as damage:
            for name in damage.names:
                (shared.path / name).unlink(missing_ok=True)
            is_read = iter(prompts_or_tokens) is prompts_or_tokens  # a generator
            if is_read or attempt == 2:
                raise
    raise AssertionError("the last attempt returns or raises")


def _all_done(
    folder: UnitFolder, units: RoutingUnits, about: dict[str, Any], prompts: Prompts, progress: bool
) -> Job:
    sizes: list[int] = []
    with tqdm(total=how_many(prompts), desc="routing", unit="prompt", disable=not progress) as bar:
        names = folder.work(units.of(prompts, sizes.append), lambda number: bar.update(sizes[number]))
    job = Job(STATISTICS, about, tuple(names))
    job.save(folder.path)
    return job


def merge_distributed(folder: str | Path, *, job: str | None = None) -> RoutingStats:
    """What `collect_distributed` returned for a folder, from its unit files; needs no model.

    >>> from moe_lens import organisms
    >>> from moe_lens.engines import collect_distributed, merge_distributed
    >>> model, prompts = organisms.load("specialised"), ["Question : what is", "Document : the"]
    >>> stats = collect_distributed(model, prompts, "merged", progress=False)
    >>> merge_distributed("merged").n_tokens
    9

    Args:
        folder: that units were counted into, and whose job lists them: some process has read all prompts.
        job: the digest of the job that is meant, or its beginning; needed where a folder holds several.

    Raises:
        DataError: no job; several, which it lists; units that are missing or damaged, which it names.
    """
    path = Path(folder)
    meant = Job.only(path, STATISTICS, job)
    meant.check_whole(path)
    return total_of(path, meant.units)


def detect_distributed(
    model: Model,
    pairs: ContrastivePairs | ContrastiveGroups,
    folder: str | Path,
    *,
    unit: int = UNIT,
    about: str = "",
    score: str | Score = "risk_difference",
    span: Span = "pairs",
    special_tokens: bool = False,
    hooks: Hooks = (),
    level: float = 0.95,
    n_resamples: int = 1000,
    n_permutations: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> ExpertScores:
    """`detect`, shared by all processes that make this call with this folder.

    >>> from moe_lens import ContrastivePairs, detect, organisms
    >>> from moe_lens.engines import detect_distributed
    >>> model, conflicts = organisms.load("null"), organisms.world("null").conflicts("detection")
    >>> pairs = ContrastivePairs.from_lists(
    ...     [c.open_book for c in conflicts], [c.closed_book for c in conflicts], span="last"
    ... )
    >>> scores = detect_distributed(model, pairs, "counts", progress=False)
    >>> bool((scores.delta == detect(model, pairs, progress=False).delta).all())
    True

    Counting is shared; the statistics after it each process does by itself. Each returns the scores, which
    are those of `detect` with the same arguments, bit for bit. Another score, level or seed counts nothing
    anew.

    Args:
        folder, unit, about: as in `collect_distributed`; the prompts of both conditions go there.
        model, pairs: and the other settings, as in `detect`.

    Raises:
        DataError: as `detect`, or `collect_distributed`.
    """

    def count(prompts: Any, counted: Span) -> RoutingStats:
        return collect_distributed(
            model,
            prompts,
            folder,
            unit=unit,
            about=about,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            span=counted,
            special_tokens=special_tokens,
            hooks=hooks,
            progress=progress,
            per_prompt=True,
        )

    return detected_by(
        count,
        model,
        pairs,
        score=score,
        span=span,
        special_tokens=special_tokens,
        level=level,
        n_resamples=n_resamples,
        n_permutations=n_permutations,
        seed=seed,
    )


def is_first() -> bool:
    """Whether this is the only process of a launcher (torchrun, accelerate, srun), or the first of them."""
    numbers = (os.environ.get(name, "0") for name in ("RANK", "SLURM_PROCID"))
    return all(number == "0" for number in numbers)
