"""How often a recipe succeeds: python benchmarks/organism_seeds.py specialised --seeds 20-29 --out seeds

Trains each recipe on each seed (a few minutes on one core), measures it (seed_measures.py) and prints two
tables: a row a seed, and a row a recipe with the spread over its seeds. Resumable: a trained checkpoint is a
folder of --out, what was measured one JSON file, and neither is made twice. Nor is what `KEPT` has, the
measures behind docs/explanation/seeds.md (but for *specialised*), unless --fresh: another kind of processor
trains other weights.
`make seeds` takes ten seeds of every recipe that ships, some eight hours on one core where nothing was kept.
"""

import argparse
import json
import lzma
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from seed_measures import FEW_PAIRS, HEADERS, SIDES, matched_overlap, measured

from moe_lens.checks import chosen_layers
from moe_lens.evaluation import CLOSED_BOOK, LOSS
from moe_lens.files import atomic_write
from moe_lens.organisms.branching import RECIPE as BRANCHES
from moe_lens.organisms.branching import train_branches
from moe_lens.organisms.recipes import RECIPES, recipe
from moe_lens.organisms.train import train

N_RANDOM = 20
"""Random sets of each kind and direction, as in the demo."""
KINDS = ("deactivate", "activate")
Seeds = list[dict[str, Any]]
Found = dict[tuple[str, int], dict[str, Any]]
KEPT = Path(__file__).with_suffix(".jsonl.xz")
"""Measures of seeds, one JSON object a line."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", help=f"of {', '.join(RECIPES)} (default: all)")
    parser.add_argument("--seeds", default="20-29", help="such as 20-29 or 3,5,8 (default: 20-29)")
    parser.add_argument("--out", type=Path, default=Path("seeds"), help="checkpoints, measures and tables")
    parser.add_argument("--steps", type=int, help="of training, instead of the recipe's")
    parser.add_argument("--n-random", type=int, default=N_RANDOM, help="random sets of each kind and direction")
    parser.add_argument(
        "--fresh", action="store_true", help=f"make what {KEPT.name} has, too, and leave it out"
    )
    parser.add_argument("--keep", action="store_true", help=f"add what is found to {KEPT.name}")
    options = parser.parse_args(arguments)
    other = options.steps is not None or options.n_random != N_RANDOM
    if other and options.keep:
        parser.error(f"--keep is for the recipe's own steps and {N_RANDOM} random sets")
    known = {} if options.fresh or other else kept()
    torch.set_num_threads(1)  # as in training: the same bits wherever it runs
    for name in options.recipes or RECIPES:
        for seed in seeds_of(options.seeds):
            if (name, seed) not in known:
                one_seed(name, seed, options.out, options.steps, options.n_random)
            print(f"{name}, seed {seed}: done", flush=True)
    found = known | read(options.out)
    if options.keep:
        if foreign := [key for key, about in found.items() if not of_the_recipe(about)]:
            parser.error(f"{options.out} has measures of other --steps or --n-random: {foreign}")
        keep(kept() | found)
    text = tables(by_recipe(found))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "tables.md").write_text(text, encoding="utf-8")
    print(text)


def of_the_recipe(about: dict[str, Any]) -> bool:
    """Whether this seed had the recipe's own steps, and 20 random sets of each kind."""
    own = recipe(about["name"])
    steps = sum(stage.steps for stage in BRANCHES.stages) if own.branched else own.steps
    return about["steps"] == steps and about.get("n_random", N_RANDOM) == N_RANDOM


def one_seed(name: str, seed: int, out: Path, steps: int | None, n_random: int) -> None:
    """Train and measure, whichever has not been done."""
    file, folder = out / f"{name}-{seed}.json", out / f"{name}-{seed}"
    if file.exists():
        return
    if not (folder / "training.json").exists():
        if recipe(name).branched:
            train_branches(seed, folder)
        else:
            train(recipe(name), seed=seed, out=folder, steps=steps, name=name)
    about = measured(folder, n_random)
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(about) + "\n", encoding="utf-8")


def seeds_of(text: str) -> list[int]:
    """ "20-22,30" -> [20, 21, 22, 30]."""
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        seeds += range(int(first), int(last or first) + 1)
    return seeds


def read(out: Path) -> Found:
    """(recipe, seed) -> what was measured; whatever the folder has."""
    return _found(json.loads(file.read_text(encoding="utf-8")) for file in out.glob("*-*.json"))


def kept() -> Found:
    """(recipe, seed) -> what was measured; whatever `KEPT` has."""
    if not KEPT.exists():
        return {}
    with lzma.open(KEPT, "rt", encoding="utf-8") as lines:
        return _found(map(json.loads, lines))


def keep(found: Found) -> None:
    """Write `KEPT`."""
    lines = [json.dumps(found[key], sort_keys=True) + "\n" for key in sorted(found)]
    with atomic_write(KEPT) as temporary:
        temporary.write_bytes(lzma.compress("".join(lines).encode(), preset=9))


def _found(measures: Iterable[dict[str, Any]]) -> Found:
    return {(about["name"], about["seed"]): about for about in measures}


def by_recipe(found: Found) -> dict[str, Seeds]:
    """Recipe -> what was measured of its seeds, in their order."""
    seeds = [found[key] for key in sorted(found)]
    return {name: own for name in RECIPES if (own := [about for about in seeds if about["name"] == name])}


def tables(recipes: dict[str, Seeds]) -> str:
    """Both tables, in Markdown."""
    rows = [["organism", "seed", "off", "doc rate, + / −", "two-way gap [95 %]", "p matched / any", "verdict",
             "closed-book, + / −", "generic loss, + / −", "in the middle layers"]]  # fmt: skip
    rows += [row_of(about) for seeds in recipes.values() for about in seeds]
    spread = [["organism", "beyond controls [95 %]", "two-way gap", "selection shared by seeds (by chance)",
               "in the middle layers (by chance)", "harm at equal effect: deactivated / activated",
               f"selection found, gap with {', '.join(map(str, FEW_PAIRS))} pairs",
               f"selection found with {', '.join(HEADERS)}"]]  # fmt: skip
    spread += [spread_of(name, seeds) for name, seeds in recipes.items()]
    return f"{markdown(rows)}\n\n{markdown(spread)}\n"


def row_of(about: dict[str, Any]) -> list[str]:
    """A seed."""
    low, high = about["gap_interval"]
    return [
        about["name"],
        str(about["seed"]),
        str(about["size"]),
        slashed(about["rates"]),
        f"{about['gap']:+.2f} [{low:+.2f}, {high:+.2f}]",
        f"{about['p_matched']:.3f} / {about['p_any']:.3f}",
        "exceeds" if about["verdict"] else "not beyond",
        slashed(each[CLOSED_BOOK] for each in about["collateral"]),
        slashed(each[LOSS] for each in about["collateral"]),
        f"{in_middle([about])[0]:.2f}",
    ]


def spread_of(name: str, seeds: Seeds) -> list[str]:
    """A recipe."""
    positive = sum(about["verdict"] for about in seeds)
    rate = binomtest(positive, len(seeds)).proportion_ci()
    gaps = [about["gap"] for about in seeds]
    spread = f" ± {np.std(gaps, ddof=1):.2f}" if len(gaps) > 1 else ""
    overlaps = [matched_overlap(*pair) for pair in combinations(seeds, 2)]
    shared = "–" if not overlaps else "{:.2f} ({:.2f})".format(*np.mean(overlaps, axis=0))
    middle, by_chance = in_middle(seeds)
    harms = [about["harm_at_equal_effect"][side] for about in seeds for side in SIDES]
    few = [mean_of(about["few_pairs"][str(n)][what] for about in seeds) for n in FEW_PAIRS
           for what in ("share", "gap")]  # fmt: skip
    return [
        name,
        f"{positive} of {len(seeds)} [{rate.low:.2f}, {rate.high:.2f}]",
        f"{np.mean(gaps):+.2f}{spread}, {min(gaps):+.2f} to {max(gaps):+.2f}",
        shared,
        f"{middle:.2f} ({by_chance:.2f})",
        " / ".join(
            f"{np.nanmean([harm[kind] for harm in harms]):+.2f}" for kind in ("deactivate", "activate")
        )
        + f", activated worse in {sum(h['activate'] > h['deactivate'] for h in harms)} of {len(harms)}",
        ", ".join(f"{few[i]}: {few[i + 1]}" for i in range(0, len(few), 2)),
        ", ".join(mean_of(about["headers"][header] for about in seeds) for header in HEADERS),
    ]


def in_middle(seeds: Seeds) -> tuple[float, float]:
    """Share of the selected experts in the "middle" layers (those of `chosen_layers`), and of the layers."""
    layers = range(len(seeds[0]["profiles"]))
    middle = set(chosen_layers("middle", layers))
    chosen = [layer for about in seeds for side in SIDES for layer, _ in about["selected"][side]]
    return float(np.mean([layer in middle for layer in chosen])), len(middle) / len(layers)


def mean_of(values: Iterable[float | None]) -> str:
    """The mean of those that there are."""
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.2f}" if known else "–"


def slashed(values: Iterable[float]) -> str:
    """Two decimals each."""
    return " / ".join(f"{value:.2f}" for value in values)


def markdown(rows: list[list[str]]) -> str:
    """The first row is the header."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


if __name__ == "__main__":
    main()
