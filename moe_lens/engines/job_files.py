"""What a folder of units is about: one list of units for each job, and the jobs of a folder.

job = Job.of("routing statistics", about, names)       # named by all that its result depends on
job.save(folder)                                       # job-<digest>.json
Job.only(folder, digest="3f")                          # the one that is meant
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from moe_lens.errors import DataError
from moe_lens.files import FileKind

_KIND: Final = FileKind("moe_lens.UnitJob", 1, (1,), "a list of units")


@dataclass(frozen=True)
class Job:
    """The units of one command, in order.

    Attributes:
        what: they hold, in words.
        about: what their numbers depend on beside the prompts.
        units: names of their files.
    """

    what: str
    about: Mapping[str, Any]
    units: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Of the names, which say everything."""
        return hashlib.sha256("\n".join(self.units).encode()).hexdigest()[:16]

    @property
    def result(self) -> str:
        """Name of the file with the sum of the units."""
        return f"job-{self.digest}.safetensors"

    def save(self, folder: Path) -> None:
        """Write the list; each process writes the same."""
        content = {"what": self.what, "about": dict(self.about), "units": list(self.units)}
        _KIND.save_json(folder / f"job-{self.digest}.json", content)

    @classmethod
    def load(cls, path: Path) -> "Job":
        """Read what `save` wrote. Raises DataError for anything else."""
        content = _KIND.load_json(path)
        try:
            return cls(content["what"], content["about"], tuple(content["units"]))
        except (KeyError, TypeError) as error:
            raise DataError(f"{path} is no list of units: {error!r}.") from error

    @classmethod
    def only(cls, folder: Path, what: str, digest: str | None = None) -> "Job":
        """The job in a folder, of several the one whose digest begins so.

        Raises:
            DataError: none, or several, which it lists.
        """
        files = sorted(folder.glob("job-*.json")) if folder.is_dir() else []
        jobs = [job for job in map(cls.load, files) if job.what == what]
        meant = [job for job in jobs if job.digest.startswith((digest or "").removeprefix("job-"))]
        if len(meant) == 1:
            return meant[0]
        if not jobs:
            units = len([*folder.glob("[0-9]*-*")]) if folder.is_dir() else 0
            raise DataError(
                f"{folder} lists no job of {what}, though {units} unit files: a process lists its units when "
                "it has read all prompts. Run the command again, which goes on with them."
                if units
                else f"{folder} holds no units of {what}; give the folder that they were counted into."
            )
        listed = "\n".join(f"  {job.digest}: {job.summary(folder)}" for job in meant or jobs)
        which = "none of them has that digest" if not meant else "say which is meant (job, --job)"
        raise DataError(f"{folder} holds the units of {len(jobs)} jobs; {which}:\n{listed}")

    def missing(self, folder: Path) -> list[int]:
        """Numbers of the units whose file is not there."""
        there = set(os.listdir(folder)) if folder.is_dir() else set()
        return [number for number, name in enumerate(self.units) if name not in there]

    def check_whole(self, folder: Path) -> None:
        """Raise DataError, which names them, where units are missing."""
        if missing := self.missing(folder):
            raise DataError(
                f"{folder} lacks {len(missing)} of {len(self.units)} units of job {self.digest}: "
                f"{_ranges(missing)}. Run the command again, with any number of processes: it does those."
            )

    def summary(self, folder: Path) -> str:
        """What it is about, and how much of it is there."""
        model = self.about.get("model") or {}
        there = len(self.units) - len(self.missing(folder))
        settings = ", ".join(str(each) for each in self.about.get("settings", ()))
        words = [
            f"{model.get('model')}, {there} of {len(self.units)} units",
            settings,
            self.about.get("about"),
        ]
        return "; ".join(str(word) for word in words if word)


def _ranges(numbers: Sequence[int]) -> str:
    """
    >>> _ranges([0, 3, 4, 5, 9])
    '0, 3–5, 9'
    """
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
