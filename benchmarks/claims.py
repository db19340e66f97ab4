"""Claims of the field on the shipped organisms, each with its control: python benchmarks/claims.py

Prints Markdown tables (about ten minutes of one core), which docs/explanation/claims.md shows:

rice         experts whose nPMI with marker tokens is largest carry a behaviour: reinforce them (2505.14681)
routescan    a behaviour can be read from which experts run (2605.24817): beyond what the words say?
steermoe     the selected experts come again: `--rankings FOLDER` reads the authors' own files (*.pkl, *.csv),
             otherwise counts of the organisms stand for them, token by token as in such a file
"""

import argparse
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from methods_table import Bench, one_each, table
from published_methods import BATCH, Both, Lever

from moe_lens import (
    RoutedModel,
    SteeringPlan,
    collect_by_prompt,
    detect,
    npmi,
    organisms,
    route_probe,
    scale_experts,
    selection_stability,
)
from moe_lens.detection import RouteProbe
from moe_lens.evaluation import answers_with
from moe_lens.evaluation.outcomes import DIRECTIONS
from moe_lens.organisms import document_pairs
from moe_lens.organisms.words import DOUBTFUL, TOPICS, TRUSTED
from moe_lens.steering import PublishedRanking, read_published_ranking
from moe_lens.steering.choosing import Expert
from moe_lens.text import Prompt

NAMES = ("specialised", "planted", "label-free", "null", "null-majority")
N_REINFORCED = 2
FACTORS = (2.0, 4.0, 16.0)
N_RANDOM = 20
EFFECTS = (0.25, 1.0, 4.0, 16.0)
SELECTED = 0.2
"""Share of a file's experts that are selected, half of them on each side."""
Rows = list[Sequence[str]]


def rice(names: Iterable[str] = NAMES, n_random: int = N_RANDOM) -> Rows:
    """Reinforce the two experts of largest nPMI with trusted (or doubtful) source words."""
    rows: Rows = [
        ("organism", "reinforced toward the document", "toward memory", "factor", "gap [95 %]", "p matched",
         "p any layer", "beyond controls", "closed-book", "generic loss")
    ]  # fmt: skip
    for name in names:
        bench = Bench(name)
        model, world = bench.model, bench.world
        n_words = 2 if world.variant == "majority" else 1
        markers = {"+": TRUSTED[:n_words], "-": DOUBTFUL[-n_words:]}
        texts = [
            with_header(c.open_book, header)
            for c in world.conflicts("detection") for header in (markers["+"], markers["-"])
        ]  # fmt: skip
        units = collect_by_prompt(model, texts, vocabulary=True, progress=False)
        found = {side: npmi(units, marker, tokenizer=model.tokenizer) for side, marker in markers.items()}
        chosen = {side: tuple(found[side].top(N_REINFORCED)) for side in DIRECTIONS}
        development, test = (one_each(world.conflicts(split)) for split in ("development", "test"))

        def gap(
            factor: float, bench: Bench = bench, chosen: dict = chosen, asked: list = development
        ) -> float:
            both = reinforced(bench.model, chosen, factor)
            rates = [bench.says_document(both[side], asked).mean() for side in DIRECTIONS]
            return float(rates[0] - rates[1])

        factor = max(FACTORS, key=gap)
        both = reinforced(model, chosen, factor)
        report = bench.report(both, test, n_random, seed=0)
        assert report is not None
        low, high = report.gap_interval
        levers = [reinforced(model, chosen, 1.0)["+"], *(both[side] for side in DIRECTIONS)]
        rows.append(
            (name, *(named(chosen[side]) for side in DIRECTIONS), f"× {factor:g}",
             f"{report.gap:+.2f} [{low:+.2f}, {high:+.2f}]", f"{report.p_matched:.3f}", f"{report.p_any:.3f}",
             "yes" if report.verdict else "no",
             " / ".join(f"{bench.from_memory(lever, world.facts('test')):.2f}" for lever in levers),
             " / ".join(f"{bench.loss(lever):.2f}" for lever in levers))
        )  # fmt: skip
    return rows


def reinforced(model: RoutedModel, chosen: dict[str, tuple[Expert, ...]], factor: float) -> Both:
    """The weights of the experts of each direction are multiplied where they run."""

    def lever(experts: tuple[Expert, ...]) -> Lever:
        def random(seed: int, layer_matched: bool) -> Lever:
            plan = SteeringPlan(activate=experts, shape=model.moe_shape)
            return lever(plan.random_like(seed=seed, layer_matched=layer_matched, model=model).activate)

        hooks = scale_experts(experts, factor)
        return Lever(lambda _: hooks, (), random, ("scale", factor, experts), switched_on=experts)

    return {side: lever(chosen[side]) for side in DIRECTIONS}


def with_header(open_book: str, header: Sequence[str]) -> str:
    """A document with other source words."""
    _, rest = open_book.split(" : ", 1)
    return " ".join(["Document", *header, ":", rest])


def routescan(names: Iterable[str] = NAMES) -> Rows:
    """AUROC of a probe on routes, and of the same probe on words: topic, document, answer."""
    rows: Rows = [("organism", "what is read", "from", "routes", "words", "routes − words [95 %]")]
    for name in names:
        model, world = organisms.load(name, wrapper=RoutedModel), organisms.world(name)
        stories = [story for story in world.generic("test", n=120) if topic(story) in ("sea", "farm")]
        rows.append(
            (name, "topic of a story, sea or farm", "its words",
             *areas(route_probe(counted(model, stories), [topic(s) for s in stories])))
        )  # fmt: skip
        conflicts = one_each(world.conflicts("test"))[::2]
        questions = [Prompt(text, {"question": c.closed_book}) for c in conflicts
                     for text in (c.open_book, c.closed_book)]  # fmt: skip
        units, entities = counted(model, questions, "question"), [c.entity for c in conflicts]
        twice = [entity for entity in entities for _ in range(2)]
        probe = route_probe(units, ["document", "alone"] * len(conflicts), groups=twice)
        rows.append(
            (name, "whether a document stood before", "the question's tokens, alike in both", *areas(probe))
        )
        conflicts = one_each(world.conflicts("test"))
        texts = [c.open_book for c in conflicts]
        says = answers_with(model, texts, [c.document_answer for c in conflicts], batch_size=BATCH)
        groups = [c.entity for c in conflicts]
        probe = route_probe(counted(model, texts), says.tolist(), groups=groups)
        rows.append((name, "the coming answer, the document's or not", "the whole prompt", *areas(probe)))
    return rows


def counted(model: RoutedModel, prompts: Sequence[object], span: str | None = None) -> Sequence:
    """Statistics a prompt."""
    return collect_by_prompt(model, prompts, span=span, vocabulary=True, progress=False)


def topic(story: str) -> str:
    """The topic whose places and people a story names."""
    words = set(story.split())
    return max(
        TOPICS, key=lambda name: len(words & {word for part in TOPICS[name].values() for word in part})
    )


def areas(probe: RouteProbe) -> tuple[str, str, str]:
    """Routes, words, and how much more routes tell."""
    more = probe.difference
    return (
        f"{probe.auroc.value:.2f}",
        f"{probe.bag_auroc.value:.2f}",
        (f"{more.value:+.2f} [{more.low:+.2f}, {more.high:+.2f}]"),
    )


def steermoe(folder: Path | None = None, n_draws: int = 1000) -> Rows:
    """Of a selection from counts, the share that comes again when the counts are drawn anew."""
    worth = [f"design effect {effect:g}" for effect in EFFECTS]
    rows: Rows = [("ranking", "experts", "selected", *worth, "prompts drawn anew")]
    for name, ranking, by_prompts in files(folder) if folder else counts_of_organisms():
        n = max(1, round(SELECTED * len(ranking.layer) / 2))
        n_up, n_down = (min(n, int((sign * ranking.delta > 0).sum())) for sign in (1, -1))
        survive = [
            ranking.survival(n_up, n_down, design_effect=effect, n_draws=n_draws) for effect in EFFECTS
        ]
        shown = [
            f"{found.mean:.2f}; {len(found.survivors())} of {n_up + n_down} in 95 %" for found in survive
        ]
        rows.append((name, str(len(ranking.layer)), f"{n_up} + {n_down}", *shown, by_prompts))
    return rows


def files(folder: Path) -> Iterable[tuple[str, PublishedRanking, str]]:
    """Rankings of the authors; layer numbers are taken as the file has them."""
    for path in sorted([*folder.glob("*.pkl"), *folder.glob("*.csv")]):
        yield path.stem, read_published_ranking(path), "no prompts in the file"


def counts_of_organisms() -> Iterable[tuple[str, PublishedRanking, str]]:
    """The detection pairs' counts, as a file of the authors would have them."""
    for name in NAMES:
        model, world = organisms.load(name, wrapper=RoutedModel), organisms.world(name)
        scores = detect(model, document_pairs(world, "detection"), progress=False)
        one, two = scores.stats_1, scores.stats_2
        shape = one.shape
        layer, expert = np.indices(one.counts.shape)
        columns = {"a1": one.counts, "a2": two.counts}
        columns |= {"d1": one.n_tokens - one.counts, "d2": two.n_tokens - two.counts}
        counts = {column: values.numpy().ravel() for column, values in columns.items()}
        layers = np.array(shape.layers)[layer.ravel()]
        ranking = PublishedRanking(shape, layers, expert.ravel(), **counts)
        stable = selection_stability(scores, n=2 * max(1, round(SELECTED * layer.size / 2)))
        yield (
            name,
            ranking,
            f"{2 * stable.mean / (1 + stable.mean):.2f}",
        )  # of Jaccard J, 2J / (1 + J) are shared


def named(experts: Iterable[Expert]) -> str:
    """L1E3 for (1, 3)."""
    return " ".join(f"L{layer}E{expert}" for layer, expert in experts)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("claims", nargs="*", default=["rice", "routescan", "steermoe"])
    parser.add_argument("--rankings", type=Path, help="folder of the authors' files")
    parser.add_argument("--organisms", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--n-random", type=int, default=N_RANDOM)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    makers = {
        "rice": partial(rice, options.organisms, options.n_random),
        "routescan": partial(routescan, options.organisms),
        "steermoe": partial(steermoe, options.rankings),
    }
    for claim in options.claims:
        print(f"## {claim}\n\n{table(makers[claim]())}\n", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
