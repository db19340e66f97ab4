"""Every published method on every organism, beside its controls, in one table.

    make methods                                             # an hour of one core; writes a page
    python benchmarks/methods_table.py --quick --out DIR     # two methods, few controls: does it run?
    python benchmarks/methods_table.py --only splits         # a part; once more for the page

Methods (published_methods.py) choose on the detection split, those that need it also on the development
split; rates come from the test split. Then, on the null organism, all 48 countries are split anew, again and
again: how often does a method say something of a model whose routes decide nothing? A file a row lies in
--out, and what lies there is not run again; --fresh runs everything.

Forward passes are shared: what a plan does is measured once a prompt, whichever method, control or split
asks.
"""

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from published_methods import BATCH, METHODS, SIZE, Both, Known, Lever, Material
from published_readings import READINGS
from tqdm.auto import tqdm

from moe_lens import RoutedModel, SteeringPlan, organisms
from moe_lens.evaluation import Outcome, SteeringReport, answers_with, split_clusters, text_loss
from moe_lens.evaluation.outcomes import ANY_LAYER, DIRECTIONS, LAYER_MATCHED
from moe_lens.organisms import SPLITS, Conflict, Fact
from moe_lens.organisms.words import ATTRIBUTES
from moe_lens.resampling import clustered_interval, spawned_seeds

ORGANISMS = ("planted", "specialised", "label-free", "null")
BASE = "risk difference"
POOLS = 1
"""Seeds of random sets of the splits, in turn; sets that splits share are measured once."""
N_JOINT = 24
"""Random draws for what comes in mirrored pairs: with fewer than 19, no p-value would reach 0.05."""
BLOCK = 10
"""Splits in a file."""
PAGE = Path(__file__).parents[1] / "docs" / "methods-table.md"
Row = dict[str, Any]


class Bench:
    """One organism, and what has been measured on it so far."""

    def __init__(self, name: str) -> None:
        self.name, self.world = name, organisms.world(name)
        self._known: dict[tuple[Hashable, str], float] = {}
        self._losses: dict[Hashable, float] = {}

    @cached_property
    def model(self) -> RoutedModel:
        """Loaded when first asked for."""
        return organisms.load(self.name, wrapper=RoutedModel)

    @cached_property
    def known(self) -> Known:
        """The material of all countries."""
        every = one_each(c for split in SPLITS for c in self.world.conflicts(split))
        return Known(self.model, self.world, every, [])

    def says_document(self, lever: Lever, conflicts: Sequence[Conflict]) -> np.ndarray:
        """For each conflict, 1 where the model answers with the document's value."""
        asked = [(c.open_book, c.document_answer) for c in conflicts]
        return self._answers(lever, asked)

    def from_memory(self, lever: Lever, facts: Sequence[Fact]) -> float:
        """Share of the questions without a document that are answered rightly."""
        return float(self._answers(lever, [(fact.question, fact.answer) for fact in facts]).mean())

    def _answers(self, lever: Lever, asked: Sequence[tuple[str, str]]) -> np.ndarray:
        missing = [one for one in asked if lever.key is None or (lever.key, " ".join(one)) not in self._known]
        if not missing:
            return np.array([self._known[lever.key, " ".join(one)] for one in asked])
        prompts, answers = [prompt for prompt, _ in missing], [answer for _, answer in missing]
        self.model.set_use_expert_out(lever.on_outputs)
        hooks = lever.hooks(prompts)
        found = answers_with(self.model, prompts, answers, hooks=hooks, batch_size=BATCH).double().numpy()
        if lever.key is None:
            return found
        for one, value in zip(missing, found, strict=True):
            self._known[lever.key, " ".join(one)] = float(value)
        return self._answers(lever, asked)

    def loss(self, lever: Lever) -> float:
        """Generic loss, nats a token, on sentences of the test split."""
        if lever.key is not None and lever.key in self._losses:
            return self._losses[lever.key]
        texts = self.world.generic("test")
        self.model.set_use_expert_out(lever.on_outputs)
        loss = text_loss(self.model, texts, hooks=lever.hooks(texts), batch_size=BATCH)
        if lever.key is not None:
            self._losses[lever.key] = loss
        return loss

    def report(
        self, both: Both, conflicts: Sequence[Conflict], n_random: int, seed: int
    ) -> SteeringReport | None:
        """The verdict on what is done in both directions; None where one has no control."""
        if not all(lever.random for lever in both.values()):
            return None

        def measured(lever: Lever) -> Outcome:
            return Outcome(self.says_document(lever, conflicts), {})

        joint = all(lever.joint for lever in both.values())
        kinds = [(kind, side) for kind in (LAYER_MATCHED, ANY_LAYER) for side in DIRECTIONS]
        controls: dict[str, dict[str, list[Outcome]]] = {LAYER_MATCHED: {}, ANY_LAYER: {}}
        own_seeds = spawned_seeds(seed, 4)
        if joint:
            own_seeds[1::2] = own_seeds[::2]
        for (kind, side), own in zip(kinds, own_seeds, strict=True):
            draw = both[side].random
            assert draw is not None
            seeds = spawned_seeds(own, max(n_random, N_JOINT) if joint else n_random)
            controls[kind][side] = [measured(draw(number, kind == LAYER_MATCHED)) for number in seeds]
        return SteeringReport(
            task="answers with the document's value",
            model=self.name,
            plans=dict.fromkeys(DIRECTIONS, SteeringPlan()),
            clusters=tuple(c.entity for c in conflicts),
            unsteered=measured(AS_IT_IS),
            steered={side: measured(lever) for side, lever in both.items()},
            controls=controls,
            bottom=None,
            limits={},
            alpha=0.05,
            level=0.95,
            seed=seed,
            joint_controls=joint,
        )


AS_IT_IS = Lever(lambda _: [], (), None, SteeringPlan())


def row_of(bench: Bench, method: str, n_random: int) -> Row:
    """One method on one organism."""
    conflicts = {split: bench.world.conflicts(split) for split in SPLITS}
    start = time.process_time()
    both = METHODS[method].choose(
        Material(bench.model, bench.world, conflicts["detection"], conflicts["development"])
    )
    seconds = time.process_time() - start
    test, facts = one_each(conflicts["test"]), bench.world.facts("test")
    report = bench.report(both, test, n_random, seed=0)
    levers = [AS_IT_IS, *(both[side] for side in DIRECTIONS)]
    return {
        "off": {side: both[side].experts for side in DIRECTIONS},
        "on": {side: both[side].switched_on for side in DIRECTIONS},
        "values": [bench.says_document(lever, test).tolist() for lever in levers],
        "clusters": [c.entity for c in test],
        "p": None if report is None else [report.p_matched, report.p_any],
        "verdict": None if report is None else report.verdict,
        "closed_book": [bench.from_memory(lever, facts) for lever in levers],
        "loss": [bench.loss(lever) for lever in levers],
        "seconds": seconds,
    }


def split_rows(bench: Bench, method: str, splits: Iterable[int], n_random: int) -> Row:
    """What a method says on random splits: 12 countries to choose by, 12 for development, 24 to judge by."""
    material = bench.known
    rows: list[Row] = []
    conflicts = material.detection
    for split in splits:
        parts = split_clusters([c.entity for c in conflicts], (0.25, 0.25, 0.5), seed=split)
        both = METHODS[method].choose(material.part(parts[0].tolist(), parts[1].tolist()))
        judged = [c for row in parts[2] if (c := conflicts[row]).attribute in ATTRIBUTES[:2]]
        report = bench.report(both, judged, n_random, seed=split % POOLS)
        row: Row = {"named": [len(both[side].experts + both[side].switched_on) for side in DIRECTIONS]}
        if report is None:
            row |= {"gap": None, "interval": False, "p": False, "verdict": False}
        else:
            p = max(report.p_matched, report.p_any) <= 0.05
            low = report.gap_interval[0]
            row |= {
                "gap": report.gap,
                "interval": low > 0,
                "p": p,
                "verdict": low > 0 and p and report.verdict,
            }
        rows.append(row)
    return {"rows": rows}


def reading_of(bench: Bench, reading: str) -> Row:
    """What a method that chooses nobody says of the test split."""
    words, something = READINGS[reading](bench.model, one_each(bench.world.conflicts("test")))
    return {"words": words, "something": something}


def one_each(conflicts: Iterable[Conflict]) -> list[Conflict]:
    """One conflict for each country and attribute; intervals go by countries anyway."""
    return list({(c.entity, c.attribute): c for c in conflicts}.values())


# Files


@dataclass(frozen=True)
class Shelf:
    """Where rows lie: what is there and was made by the same settings is not made again."""

    folder: Path
    fresh: bool = False
    runs: bool = True

    def row(self, name: str, settings: Row, make: Callable[[], Row]) -> Row | None:
        """The row of that name; None where it is missing and nothing is to be run."""
        path = self.folder / f"{name}.json"
        if path.is_file() and not self.fresh:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["settings"] == settings:
                return found
        if not self.runs:
            return None
        made = {"settings": settings, **make()}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(made), encoding="utf-8")
        os.replace(part, path)
        return json.loads(path.read_text(encoding="utf-8"))


def file_name(method: str) -> str:
    """A method's name as that of a file."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in method.lower()).split())


# Words


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first row is the header."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def named(off: Iterable[Sequence[int]], on: Iterable[Sequence[int]]) -> str:
    """L1E3 for (1, 3), with a plus where it is switched on."""
    words = [f"{sign}L{layer}E{expert}" for sign, some in (("", off), ("+", on)) for layer, expert in some]
    return " ".join(words) or "–"


def with_interval(values: np.ndarray, clusters: Sequence[str]) -> tuple[str, float]:
    """A mean with its 95 % interval over countries, and the lower bound."""
    low, high = clustered_interval(values, clusters)
    return f"{values.mean():+.2f} [{low:+.2f}, {high:+.2f}]", low


def organism_table(rows: dict[str, Row]) -> tuple[str, list[str], list[str]]:
    """One organism's table; methods beyond their controls; those with more than the risk difference's gap."""
    header = [
        "method", "experts, for the document", "for memory", "gap [95 %]", "− risk difference's", "p matched",
        "p any layer", "beyond controls", "closed-book", "generic loss", "CPU s",
    ]  # fmt: skip
    base = np.diff(np.array(rows[BASE]["values"])[[2, 1]], axis=0)[0]
    lines, beyond, better = [header], [], []
    for method, row in rows.items():
        gap = np.diff(np.array(row["values"])[[2, 1]], axis=0)[0]
        difference, low = with_interval(gap - base, row["clusters"])
        p = ["–"] * 2 if row["p"] is None else [f"{each:.3f}" for each in row["p"]]
        if row["verdict"]:
            beyond.append(method)
            if low > 0:
                better.append(method)
        lines.append(
            [
                method,
                *(named(row["off"][side], row["on"][side]) for side in DIRECTIONS),
                with_interval(gap, row["clusters"])[0],
                "" if method == BASE else difference,
                *p,
                {True: "yes", False: "no", None: "–"}[row["verdict"]],
                " / ".join(f"{share:.2f}" for share in row["closed_book"]),
                " / ".join(f"{loss:.2f}" for loss in row["loss"]),
                f"{row['seconds']:.1f}",
            ]
        )
    return table(lines), beyond, better


def null_table(found: dict[str, list[Row]]) -> str:
    """How often each method says something on the null organism."""
    lines = [
        [
            "method",
            "splits",
            "names experts both ways",
            "interval above 0",
            "both p ≤ 0.05",
            "beyond controls",
        ]
    ]
    for method, rows in found.items():
        shares = [sum(min(row["named"]) > 0 for row in rows)]
        shares += [sum(row[key] for row in rows) for key in ("interval", "p", "verdict")]
        lines.append([method, str(len(rows)), *map(str, shares)])
    return table(lines)


def reading_table(readings: dict[str, dict[str, Row]]) -> str:
    """A row a method, a column an organism; bold where it says that there is something."""
    names = list(readings)
    lines = [["method", *names]]
    for reading in readings[names[0]]:
        cells = [readings[name].get(reading, {"words": "", "something": None}) for name in names]
        words = [f"**{cell['words']}**" if cell["something"] else cell["words"] for cell in cells]
        lines.append([reading, *words])
    return table(lines)


def in_words(names: Sequence[str]) -> str:
    """A list in words."""
    return "; ".join(names) if names else "none"


def page(
    rows: dict[str, dict[str, Row]],
    splits: dict[str, list[Row]],
    readings: dict[str, dict[str, Row]],
    n_random: int,
    n_split: int,
) -> str:
    """The page of the documents; every sentence about a result is made from the rows."""
    parts, sentences = [], []
    for name, own in rows.items():
        text, beyond, better = organism_table(own)
        parts.append(f"### {name}\n\n{text}")
        sentences.append(
            f"- **{name}**: beyond their controls: {in_words(beyond)}. Of these, a larger gap than the risk "
            f"difference's, with an interval above 0: {in_words(better)}."
        )
    said = [method for method, of_method in splits.items() if sum(row["verdict"] for row in of_method)]
    p_alone = [
        method for method, own in splits.items() if sum(row["p"] for row in own) > 0.05 * max(len(own), 1)
    ]
    sentences.append(
        f"- Over the splits of **null** that were run, beyond controls at least once: {in_words(said)}. "
        f"With both p-values at most 0.05 on more than 5 % of the splits: {in_words(p_alone)}."
    )
    if unsplit := [method for method, own in splits.items() if not own]:
        sentences.append(f"- On no split of **null** was run: {in_words(unsplit)}.")
    for name, own in rows.items():
        if missing := [method for method in METHODS if method not in own]:
            sentences.append(f"- Not run for this page, on **{name}**: {in_words(missing)}.")
    return PAGE_TEXT.format(
        size=SIZE,
        n_random=n_random,
        n_split=n_split,
        n_joint=N_JOINT,
        tables="\n\n".join(parts),
        sentences="\n".join(sentences),
        null=null_table(splits),
        readings=reading_table(readings),
        pools=POOLS,
        fewer=FEWER if len({len(own) for own in splits.values()}) > 1 else "",
    )


FEWER = " Search and\ninterventions are run on fewer splits."
PAGE_TEXT = """\
# The methods, side by side

<!-- written by benchmarks/methods_table.py -->

`make methods` runs [the published methods](methods.md) on the shipped [organisms](explanation/organisms.md)
and writes this page, its sentences about results included; an hour of one core, most of
it for search and learning on the splits of *null*. The contrast is the demo's: does the model answer with its
document or from memory? Methods choose by 48 conflicts of 12 countries (search and learning use 96 of 12
others, too); all rates are of 96 held-out conflicts of 24 further countries.

- *experts, for the document* and *for memory*: what is switched off (nudged or replaced, as the method
  says; on, with a plus) so that the model says what its document says, or what it remembers; at most
  {size} of 32. (The demo chooses the number on development questions: 8 on *specialised*, where the risk
  difference then gets +0.96. And it measures on twice as many conflicts, against 20 random sets: there
  *label-free*, here beyond its controls with plans of the same size, is not. So near the limit a verdict
  hangs on which prompts and sets are drawn.)
- *gap*: share of conflicts answered with the document's value under the first minus under the second, with a
  bootstrap interval over countries. *− risk difference's*: how much more than in the first row, on the same
  prompts.
- *p*: exact p-value of the gap against {n_random} random choices a direction of as many experts, in the same
  layers or in any. A learned bias is held against its own numbers given to other experts, those of both
  directions to the same ones ({n_joint} draws), since they mirror each other (on *specialised* with a
  correlation of −.65); neighbours' routes against random records. *beyond controls*: [the
  verdict](explanation/verdicts.md), both p-values and an excess that other prompts would confirm. "–":
  nobody is named in a direction, or everybody is moved, so that there is nothing to draw at random.
- *closed-book*, *generic loss* (nats a token): as trained / for the document / for memory.
- *CPU s*: what choosing took, both directions, on one core.

What each method does, and with which settings: `benchmarks/published_methods.py`.

## What it shows

{sentences}

One seed of controls and one training of each organism: a method's place here is no ranking of methods in
general. The organisms have 4 layers of 8 experts and, but for *null*, were trained so that routes matter
([what they do not show](explanation/organisms.md)).

## On held-out prompts

{tables}

## What they say of a model whose routes decide nothing

The null organism's 48 countries are split anew: 12 countries to choose by, 12 for development (4 conflicts
each), 24 to judge by (2 conflicts each). Counted are splits on which the method *names experts* both ways, on
which the gap's *interval* lies above 0, on which *both p-values* are at most 0.05 (against {n_split} random
choices of either kind and direction), and on which the whole verdict is *beyond controls*.{fewer}
All share one model, its countries and {pools} pool(s) of random sets: they are no independent trials.

{null}

Naming experts is no fault by itself: with a document other experts run, on null as elsewhere. Wrong on null
is to say that they decide the answer.

## Methods that choose nobody

On the same 96 held-out conflicts; two numbers are the least and the largest over layers. Bold: the method
says that there is something, by an interval (route probe: beyond the words; route uncertainty: beyond chance
and softmax entropy; audit: below the rate as trained) or by p ≤ 0.05 over all layers. None of that says that
routes decide an answer.

{readings}
"""


# The command


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("moe-lens-methods"))
    parser.add_argument(
        "--page", type=Path, help="where to write the page; by default docs/, with --quick --out"
    )
    parts = (*ORGANISMS, "splits", "readings")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts to run; then no page")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="the same")
    parser.add_argument("--splits", type=int, default=100, help="of the null organism")
    parser.add_argument("--dear-splits", type=int, default=100, help="for search and interventions")
    parser.add_argument("--n-random", type=int, default=12, help="random sets of each kind and direction")
    parser.add_argument("--n-random-split", type=int, default=9, help="the same on splits")
    parser.add_argument("--quick", action="store_true", help="two methods on two organisms, few controls")
    parser.add_argument("--fresh", action="store_true", help="run what lies in --out again, too")
    parser.add_argument("--as-is", action="store_true", help="write the page of what lies there; run nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    names, methods = ORGANISMS, options.methods
    n_random, n_split = options.n_random, options.n_random_split
    numbers = options.splits, options.dear_splits
    if options.quick:
        names, methods, n_random, n_split, numbers = ORGANISMS[::3], [BASE, "soft plan"], 4, 4, (2, 1)
    shelf = Shelf(options.out, options.fresh, not options.as_is)
    rows: dict[str, dict[str, Row]] = {}
    for name in (name for name in names if name in options.only):
        rows[name] = all_rows(shelf, name, methods, n_random)
    splits: dict[str, list[Row]] = {}
    if "splits" in options.only:
        splits = all_splits(shelf, methods, numbers, n_split)
    readings: dict[str, dict[str, Row]] = {}
    if "readings" in options.only:
        readings = {name: all_readings(shelf, name) for name in names}
    if options.only != parts or options.methods != list(METHODS):
        return
    text = page(rows, splits, readings, n_random, n_split)
    where = options.page or (options.out / PAGE.name if options.quick else PAGE)
    where.write_text(text, encoding="utf-8")
    print(text)


def all_rows(shelf: Shelf, name: str, methods: Sequence[str], n_random: int) -> dict[str, Row]:
    """Every method on an organism."""
    bench, found = Bench(name), {}
    for method in tqdm(methods, desc=name):
        make = partial(row_of, bench, method, n_random)
        if row := shelf.row(f"{name}-{file_name(method)}", {"n_random": n_random}, make):
            found[method] = row
    return found


def all_readings(shelf: Shelf, name: str) -> dict[str, Row]:
    """What every method that chooses nobody says of an organism."""
    bench, found = Bench(name), {}
    for reading in tqdm(READINGS, desc=f"readings of {name}"):
        make = partial(reading_of, bench, reading)
        if row := shelf.row(f"readings/{name}-{file_name(reading)}", {}, make):
            found[reading] = row
    return found


def all_splits(
    shelf: Shelf, methods: Sequence[str], numbers: tuple[int, int], n_random: int
) -> dict[str, list[Row]]:
    """Every method that has a control on splits of the null organism, all of them in turn."""
    bench = Bench("null")
    found: dict[str, list[Row]] = {method: [] for method in methods if method != "noisy routes"}
    settings = {"n_random": n_random, "pools": POOLS}
    for first in tqdm(range(0, max(numbers), BLOCK), desc="splits of null"):
        for method, rows in found.items():
            block = range(first, min(first + BLOCK, numbers[METHODS[method].dear]))
            name = f"splits/{file_name(method)}-{first}-{block.stop}"
            make = partial(split_rows, bench, method, block, n_random)
            if block and (made := shelf.row(name, settings, make)):
                rows += made["rows"]
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
