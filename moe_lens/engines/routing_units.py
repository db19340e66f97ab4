"""Routing statistics in units: some batches of `collect_routing` to a file, and what it gives from all files.

    units = RoutingUnits(counting, digest, n_batches=8)
    units.of(prompts)                                      # Unit after Unit, as prompts are read
    total_of(folder, names)                                # RoutingStats: those of collect_routing

Counts add up exactly in any order. Float sums do not, so a file keeps those of each batch, and they are added
batch by batch, as `collect_routing` adds them.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Int
from torch import Tensor

from moe_lens.engines.unit_files import Unit
from moe_lens.errors import DataError
from moe_lens.files import FileKind
from moe_lens.model.state import Pass
from moe_lens.statistics.collection import Counting
from moe_lens.statistics.routing_stats import RoutingStats
from moe_lens.statistics.sums import TABLES
from moe_lens.text.batching import Prompts, how_many
from moe_lens.text.spans import CountedPrompts

_KIND: Final = FileKind("moe_lens.RoutingUnit", 1, (1,), "a unit of routing statistics")
_GROWING: Final = ("per_prompt", "by_position", "vocabulary")
"""Tables that grow with the prompts."""
_BATCHES: Final = "batches."
_ROWS: Final = "rows"


@dataclass(frozen=True, eq=False)
class RoutingUnits:
    """How prompts become units.

    Attributes:
        counting: the model, and what is counted of which tokens.
        settings: a digest of the model and of what is counted.
        n_batches: of a unit.
    """

    counting: Counting
    settings: str
    n_batches: int

    def of(self, prompts: Prompts, read: Callable[[int], object] = lambda _: None) -> Iterator[Unit]:
        """The units of prompts, which are read as they are needed.

        Args:
            read: is told the number of prompts of each unit.
        """
        batches, among = self.counting.batches(prompts), Pass(how_many(prompts))
        number = n_prompts = 0
        while unit := list(islice(batches, self.n_batches)):
            name = f"{number:06d}-{_digest(self.settings, number, unit)}.safetensors"
            n_rows = sum(len(batch.rows) for batch in unit)
            read(n_rows)
            yield Unit(name, partial(self._write, unit, among))
            number, n_prompts = number + 1, n_prompts + n_rows
        among.end(n_prompts)

    def _write(self, batches: Sequence[CountedPrompts], among: Pass, path: Path) -> None:
        parts = self.counting.of_each(batches, among)
        rows = torch.tensor([row for batch in batches for row in batch.rows])
        whole: RoutingStats = sum(parts[1:], parts[0])
        floats = [_floats(part) for part in parts]
        tensors = {name: tensor for name, tensor in whole.tensors().items() if name not in floats[0]}
        tensors |= {f"{_BATCHES}{name}": torch.stack([each[name] for each in floats]) for name in floats[0]}
        _KIND.save_tensors(path, {**tensors, _ROWS: rows}, {**whole.about(), "unit": path.name})


def _digest(settings: str, number: int, batches: Iterable[CountedPrompts]) -> str:
    """Of all that a unit's numbers depend on: tokens, which of them count, which prompts they are."""
    digest = hashlib.sha256(f"{settings} {number}".encode())
    for batch in batches:
        digest.update(f"\n{batch.rows} {[len(sequence) for sequence in batch.sequences]}\n".encode())
        for sequence, chosen in zip(batch.sequences, batch.chosen, strict=True):
            digest.update(sequence.to(torch.int64).numpy().tobytes())
            digest.update(chosen.numpy().tobytes())
    return digest.hexdigest()[:32]


def _floats(stats: RoutingStats) -> dict[str, Tensor]:
    """Sums whose last bits depend on the order of addition, and maxima."""
    return {
        name: tensor
        for name, tensor in stats.tensors().items()
        if tensor.is_floating_point() and name.partition(".")[0] not in _GROWING
    }


class Damaged(DataError):
    """Unit files that are not what was written; `names` are theirs."""

    def __init__(self, names: Sequence[str], reason: Exception):
        others = f" So are {len(names) - 1} others." if len(names) > 1 else ""
        super().__init__(f"{reason}{others} The same command counts their prompts again.")
        self.names = names


def total_of(folder: Path, names: Sequence[str]) -> RoutingStats:
    """What `collect_routing` gives for the prompts of all these unit files, in this order.

    Raises:
        Damaged: files that cannot be read, or that are another unit's.
    """
    total, damaged, reason = _Total(), [], None
    for name in names:
        try:
            about, tensors = _KIND.load_tensors(folder / name)
            if about.get("unit") != name:
                raise DataError(f"{folder / name} is the unit {about.get('unit')!r} under another name.")
            if not damaged:
                total.add(about, tensors)
        except DataError as error:
            damaged.append(name)
            reason = reason or error
    if reason is not None:
        raise Damaged(damaged, reason) from reason
    return total.stats()


@dataclass(eq=False)
class _Total:
    """The sum of the units so far."""

    about: dict[str, Any] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    tables: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """(units in it, tables), in order, of falling size: else each addition would copy the whole."""
    rows: list[Int[Tensor, "prompt"]] = field(default_factory=list)

    def add(self, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Add a unit's."""
        n_tokens = self.about.get("n_tokens", 0) + about["n_tokens"]
        self.about = {"n_tokens": n_tokens, "shape": about["shape"]}
        self.rows.append(tensors[_ROWS])
        inside: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            table, _, part = name.partition(".")
            if name.startswith(_BATCHES):
                for batch in tensor:
                    self._add(name.removeprefix(_BATCHES), batch)
            elif table in _GROWING:
                inside.setdefault(table, {})[part] = tensor
            elif name != _ROWS:
                self._add(name, tensor)
        self.tables.append((1, {name: TABLES[name](**parts) for name, parts in inside.items()}))
        while len(self.tables) > 1 and self.tables[-1][0] == self.tables[-2][0]:
            self._merge_last()

    def stats(self) -> RoutingStats:
        """Prompts in the order of their numbers."""
        while len(self.tables) > 1:
            self._merge_last()
        tables = dict(self.tables[0][1])
        if "per_prompt" in tables:
            tables["per_prompt"] = tables["per_prompt"].of(torch.cat(self.rows).argsort())
        parts = {
            f"{name}.{part}": tensor for name, table in tables.items() for part, tensor in vars(table).items()
        }
        return RoutingStats.from_tensors(self.about, {**self.sums, **parts})

    def _add(self, name: str, value: Tensor) -> None:
        if (before := self.sums.get(name)) is not None:
            value = torch.maximum(before, value) if name.startswith("outputs.max") else before + value
        self.sums[name] = value

    def _merge_last(self) -> None:
        (size, first), (other, second) = self.tables[-2:]
        merged = {name: table + second[name] for name, table in first.items()}
        self.tables[-2:] = [(size + other, merged)]
