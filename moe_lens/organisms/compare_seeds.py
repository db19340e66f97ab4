"""Choose among trained seeds on development data: ``python -m moe_lens.organisms.compare_seeds DIR DIR ...``.

Each DIR is a checkpoint of `moe_lens.organisms.train`. Experts are detected on the detection split and
everything else is measured on the development split; test prompts are never looked at. The largest two-way
gap (to two decimals) wins, and among equals the one that costs least closed-book accuracy. Null seeds are not
chosen at all: the first one given is shipped.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_lens.evaluation.plan_sizes import SweepPoint, SweepResult
from moe_lens.evaluation.tasks import CLOSED_BOOK, LOSS
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.organisms.demo import compare_sizes, detect_experts
from moe_lens.organisms.recipes import NULLS, recipe
from moe_lens.organisms.worlds import World
from moe_lens.results import Result


@dataclass(frozen=True, eq=False, repr=False)
class SeedResult(Result):
    """One trained seed on the development split.

    Attributes:
        name: of the recipe.
        seed: of the training.
        sweep: plans of several sizes on the development split.
    """

    name: str
    seed: int
    sweep: SweepResult

    @property
    def size(self) -> int:
        """The chosen size of the plans."""
        return self.sweep.best_size()

    @property
    def steered(self) -> tuple[SweepPoint, SweepPoint]:
        """Toward the document, toward memory (candour: toward `unknown`, toward bluffs)."""
        return self.sweep.point(self.size, "+"), self.sweep.point(self.size, "-")

    @property
    def gap(self) -> float:
        """Two-way gap on the development split, in [-1, 1]."""
        return self.sweep.gap(self.size)

    def summary(self) -> str:
        """Recipe, seed, size and gap."""
        return f"{self.name}, seed {self.seed}: {self.size} experts off, gap {self.gap:+.2f}"

    @property
    def worst_closed_book(self) -> float:
        """The lower closed-book accuracy of the two directions, in [0, 1]."""
        return min(point.collateral[CLOSED_BOOK] for point in self.steered)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m moe_lens.organisms.compare_seeds", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a trained checkpoint")
    results = [development_result(folder) for folder in parser.parse_args(arguments).folders]
    print(table(results))
    for name in dict.fromkeys(result.name for result in results):
        seeds = [result for result in results if result.name == name]
        print(f"{name}: of seeds {[result.seed for result in seeds]}, ship {best(seeds).seed}")


def development_result(folder: Path) -> SeedResult:
    """Detect on the detection split, choose the size and measure on the development split."""
    about = json.loads((folder / "training.json").read_text())
    model, world = HookedMoE.from_pretrained(folder), World(recipe(about["name"]).variant)
    sizes = compare_sizes(model, world, detect_experts(model, world))
    return SeedResult(about["name"], about["seed"], sizes)


def best(results: Sequence[SeedResult]) -> SeedResult:
    """The seed to ship: see the module's docstring."""
    if results[0].name in NULLS:
        return results[0]
    return max(results, key=lambda result: (round(result.gap, 2), result.worst_closed_book))


def table(results: Sequence[SeedResult]) -> str:
    """A Markdown table, one row a seed: unsteered / toward the document / toward memory."""
    lines = [
        "| organism | seed | experts off | doc rate | two-way gap | closed-book | generic loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        sweep, collateral = result.sweep, [point.collateral for point in result.steered]
        collateral.insert(0, sweep.unsteered_collateral)
        columns = [
            " / ".join(f"{value:.2f}" for value in values)
            for values in (
                [sweep.unsteered, *(point.mean for point in result.steered)],
                [values[CLOSED_BOOK] for values in collateral],
                [values[LOSS] for values in collateral],
            )
        ]
        lines.append(
            f"| {result.name} | {result.seed} | {result.size} | {columns[0]} | {result.gap:+.2f} "
            f"| {columns[1]} | {columns[2]} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
