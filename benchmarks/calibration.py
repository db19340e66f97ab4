"""Does what says p, q, interval or power keep its word? Simulations with known truth, in one page.

    make calibration                                             # a quarter of an hour; writes the page
    python benchmarks/calibration.py --samples 20 --out page.md  # does it run?
    python benchmarks/calibration.py effects verdicts            # these tables only, printed

Detection: a made-up router sends tokens to 4 of 32 experts. Logits depend on the expert, the cluster of
prompts, the prompt and the token, so tokens of a prompt, prompts of a cluster and the two prompts of a pair
are alike. The truth is that of 20,000 clusters of which the samples are drawn, or, where nothing differs,
that. Steering: zeros and ones, beta-binomial in clusters, whose rates are known. Everything goes through the
library's public functions. (Intervals of the published methods: methods_calibration.py.)
"""

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import beta
from tqdm.auto import tqdm

from moe_lens import MoEShape, RoutingStats, SteeringPlan, compare_routing, required_pairs, required_prompts
from moe_lens.detection import AssumedRouting, ExpertScores
from moe_lens.evaluation import AssumedAnswers, Outcome, SteeringReport
from moe_lens.statistics import PromptCounts

N_EXPERTS, TOP_K, N_POPULATION = 32, 4, 20_000
PLANTED, N_LAYERS = 4, 10
PAGE = Path(__file__).parents[1] / "docs" / "calibration.md"
Rows = list[tuple[str, ...]]


# Detection


@dataclass(frozen=True)
class Design:
    """Where prompts come from.

    Attributes:
        paired: whether each prompt of one condition belongs to one of the other.
        together: prompts a cluster.
        longer: how many times as long the prompts of the first condition are.
    """

    name: str
    paired: bool = True
    together: int = 1
    longer: int = 1


DESIGNS = (
    Design("pairs"),
    Design("pairs, the first three times as long", longer=3),
    Design("pairs, 3 a cluster", together=3),
    Design("two groups", paired=False),
    Design("two groups, the first three times as long", paired=False, longer=3),
    Design("two groups, 3 a cluster", paired=False, together=3),
)


@dataclass(frozen=True)
class Counted:
    """Events [cluster prompt expert] and tokens [cluster prompt] of one condition."""

    events: np.ndarray
    tokens: np.ndarray

    def of(self, clusters: np.ndarray) -> "Counted":
        return Counted(self.events[clusters], self.tokens[clusters])

    @property
    def rates(self) -> np.ndarray:
        return self.events.sum((0, 1)) / self.tokens.sum()

    @property
    def stats(self) -> RoutingStats:
        return stats_of([self])


def stats_of(layers: Sequence[Counted]) -> RoutingStats:
    """Statistics of some layers, a prompt a row; the layers' prompts are as long as the first one's."""
    n_experts = layers[0].events.shape[-1]
    events = np.stack([layer.events.reshape(-1, n_experts) for layer in layers], axis=1)
    tokens = torch.from_numpy(layers[0].tokens.ravel())
    counts, floats = torch.from_numpy(events), torch.from_numpy(events).double()
    rows = PromptCounts(tokens, counts.to(torch.int16), floats.float())
    top_k = int(layers[0].events.sum() // layers[0].tokens.sum())
    shape = MoEShape("made up", tuple(range(len(layers))), n_experts, top_k)
    sums = floats.sum(0)
    return RoutingStats(shape, int(tokens.sum()), counts.sum(0), sums, sums.clone(), per_prompt=rows)


def drawn(
    design: Design, n: int, rng: np.random.Generator, shift: np.ndarray | float = 0.0, tokens: object = None
) -> list[Counted]:
    """Both conditions of n clusters each; the first one's logits are shifted.

    Args:
        tokens: numbers of tokens to keep to, of an earlier layer of the same prompts.
    """
    places, found = (n, design.together), []
    effects = rng.normal(0, 0.7, (n, 1, N_EXPERTS)) + rng.normal(0, 0.7, (*places, N_EXPERTS))
    for number, (factor, moved) in enumerate(((design.longer, shift), (1, 0.0))):
        if number and not design.paired:
            effects = rng.normal(0, 0.7, (n, 1, N_EXPERTS)) + rng.normal(0, 0.7, (*places, N_EXPERTS))
        length = np.clip(16 * np.exp(0.6 * rng.normal(size=places)), 5, 50).astype(int) * factor
        length = length if tokens is None else tokens[number]  # pyright: ignore[reportIndexIssue]
        own = np.linspace(-3.2, 3.2, N_EXPERTS) + effects + moved + rng.normal(0, 0.7, effects.shape)
        prompt = np.repeat(np.arange(length.size), length.ravel())
        logits = own.reshape(-1, N_EXPERTS)[prompt] + rng.gumbel(size=(len(prompt), N_EXPERTS))
        chosen = np.argpartition(-logits, TOP_K, axis=1)[:, :TOP_K]
        events = np.bincount(
            (prompt[:, None] * N_EXPERTS + chosen).ravel(), minlength=length.size * N_EXPERTS
        )
        found.append(Counted(events.reshape(*places, N_EXPERTS), length))
    return found


@cache
def population(design: Design) -> list[Counted]:
    """Both conditions of all clusters; a quarter of the experts are shifted."""
    rng = np.random.default_rng(len(design.name))
    shift = np.zeros(N_EXPERTS)
    shift[::4] = rng.normal(0, 1, N_EXPERTS // 4)
    parts = [drawn(design, 1000, rng, shift) for _ in range(N_POPULATION // 1000)]
    names = ("events", "tokens")
    return [
        Counted(*(np.concatenate([getattr(part[side], name) for part in parts]) for name in names))
        for side in (0, 1)
    ]


def compared(
    design: Design,
    one: RoutingStats,
    two: RoutingStats,
    score: str = "risk_difference",
    level: float = 0.95,
    seed: int = 0,
    permutations: int = 1000,
) -> ExpertScores:
    """What the library says of one sample."""
    assert one.per_prompt is not None
    names = [str(number // design.together) for number in range(len(one.per_prompt.n_tokens))]
    clusters = names if design.paired else [[f"{side}{name}" for name in names] for side in "ab"]
    return compare_routing(
        one, two, score=score, paired=design.paired, clusters=clusters, level=level,
        n_permutations=permutations, seed=seed,
    )  # fmt: skip


def common(rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which experts run often, and which rarely."""
    return rates >= 0.02, (rates >= 0.003) & (rates < 0.02)


def detection_intervals(samples: int) -> Rows:
    """How often the interval of a score holds the truth."""
    rows: Rows = []
    for design in DESIGNS:
        everyone = population(design)
        rates = [side.rates for side in everyone]
        truths = {"risk_difference": rates[0] - rates[1], "log_odds_ratio": _odds(rates[0]) - _odds(rates[1])}
        for score, n, level in (
            ("risk_difference", 20, 0.95), ("risk_difference", 50, 0.9), ("risk_difference", 50, 0.95),
            ("risk_difference", 50, 0.99), ("risk_difference", 150, 0.95), ("log_odds_ratio", 50, 0.95),
        ):  # fmt: skip
            rng, held = np.random.default_rng(n), np.zeros(N_EXPERTS)
            for seed in range(samples):
                both = [rng.integers(N_POPULATION, size=n) for _ in range(2)]
                one, two = (
                    side.of(both[0 if design.paired else number]).stats
                    for number, side in enumerate(everyone)
                )
                found = compared(design, one, two, score, level, seed, permutations=1)
                assert found.low is not None
                assert found.high is not None
                low, high = found.low.numpy()[0], found.high.numpy()[0]
                held += (low <= truths[score]) & (truths[score] <= high)
            shares = [percent(held[which].mean() / samples) for which in common(np.minimum(*rates))]
            rows.append((design.name, score.replace("_", " "), str(n), percent(level, 0), *shares))
    return rows


def _odds(rates: np.ndarray) -> np.ndarray:
    return np.log(rates / (1 - rates))


def detection_p(samples: int) -> Rows:
    """How often p is small where nothing differs."""
    rows: Rows = []
    for design in DESIGNS:
        for n in (10, 20, 50):
            rng, hits, rates = np.random.default_rng(n), np.zeros((2, N_EXPERTS)), np.zeros(N_EXPERTS)
            for seed in range(samples):
                one, two = drawn(design, n, rng)
                p = compared(design, one.stats, two.stats, seed=seed).p
                assert p is not None
                hits += p.numpy()[0] <= np.array([[0.05], [0.01]]) + 1e-12
                rates += np.minimum(one.rates, two.rates) / samples
            shares = [percent(hit[which].mean() / samples) for hit in hits for which in common(rates)]
            rows.append((design.name, str(n), *shares))
    return rows


def discoveries(samples: int) -> Rows:
    """What q-values name, wrongly and rightly."""
    rows: Rows = []
    for design in (DESIGNS[0], DESIGNS[2], DESIGNS[3]):
        for n, moved in ((25, 0.0), (25, 1.5), (50, 0.75), (50, 1.5), (100, 0.75), (100, 1.5)):
            rng, qs = np.random.default_rng(n), (0.05, 0.2)
            false, power = np.zeros(2), np.zeros(2)
            for seed in range(samples):
                shift = np.zeros(N_EXPERTS)
                planted = rng.choice(np.arange(12, N_EXPERTS), PLANTED, replace=False)
                shift[planted] = moved
                layers: list[list[Counted]] = []
                for layer in range(
                    N_LAYERS
                ):  # top-k makes the others of a planted layer rarer: they count as true
                    tokens = [side.tokens for side in layers[0]] if layers else None
                    layers.append(drawn(design, n, rng, shift if layer < 2 else 0.0, tokens))
                one, two = (stats_of([layer[side] for layer in layers]) for side in (0, 1))
                q = compared(design, one, two, seed=seed).q
                assert q is not None
                for row, most in enumerate(qs):
                    chosen = q.numpy() <= most
                    wrong = chosen if not moved else chosen[2:]
                    false[row] += wrong.sum() / max(1, chosen.sum()) / samples
                    power[row] += chosen[:2, planted].mean() / samples if moved else 0.0
            found = [percent(share) if moved else "–" for share in power]
            rows.append((design.name, str(n), f"+{moved:g}", *map(percent, false), *found))
    return rows


def promised_pairs(samples: int) -> Rows:
    """What `required_pairs` promises, and what its number of clusters gives."""
    rows: Rows = []
    for rate, effect, n_experts, paired, power in (
        (0.1, 0.2, 32, True, 0.8), (0.1, 0.1, 32, True, 0.8), (0.3, 0.15, 32, True, 0.9),
        (0.1, 0.2, 32, False, 0.8),
    ):  # fmt: skip
        assumed = AssumedRouting(rate, n_tokens=20, correlation=0.1, n_experts=n_experts, paired=paired)
        n = required_pairs(assumed, effect=effect, power=power, n_simulations=400).n_clusters
        assert n is not None
        a_side = n if paired else n // 2
        rng, hits, scale = np.random.default_rng(1), 0, 1 / 0.1 - 1
        for seed in range(samples):
            sides = []
            for moved in (effect, 0.0):
                rates = np.full(n_experts, rate)
                rates[0] += moved
                own = rng.beta(rates * scale, (1 - rates) * scale, (a_side, n_experts))
                events = rng.binomial(20, own)
                # each expert has a twin that runs where it does not: counts add up, and q-values are the same
                events = np.concatenate([events, 20 - events], axis=-1)
                sides.append(Counted(events[:, None], np.full((a_side, 1), 20)).stats)
            q = compared(Design("", paired=paired), *sides, seed=seed).q
            assert q is not None
            hits += int(q[0, 0] <= 0.05)
        rows.append(
            (f"{rate:g}", f"{effect:g}", str(n_experts), "yes" if paired else "no", percent(power, 0), str(n),
             percent(hits / samples))
        )  # fmt: skip
    return rows


# Steering


def answers(
    rng: np.random.Generator, rates: Sequence[float], n: int, together: int, correlation: float
) -> np.ndarray:
    """Zeros and ones [condition, n · together]; a cluster is high or low under all conditions."""
    scale, rank = 1 / correlation - 1, rng.random((1, n, 1))
    own = np.stack([beta.ppf(rank[0], rate * scale, (1 - rate) * scale) for rate in rates])
    return (rng.random((len(rates), n, together)) < own).reshape(len(rates), -1).astype(float)


def report_of(
    values: np.ndarray,
    together: int,
    level: float = 0.95,
    seed: int = 0,
    controls: Sequence[np.ndarray] = (),
    joint: bool = False,
) -> SteeringReport:
    """Of values under no plan, the plan, its reverse; controls [4 random of each direction prompt]."""
    outcomes = [Outcome(one, {}) for one in values]
    random = [[Outcome(one, {}) for one in each] for each in controls] or [[outcomes[0]]] * 4
    return SteeringReport(
        task="made up", model="made up",
        plans={"+": SteeringPlan(deactivate=[(0, 0)]), "-": SteeringPlan(deactivate=[(0, 1)])},
        clusters=tuple(str(row // together) for row in range(values.shape[1])), unsteered=outcomes[0],
        steered=dict(zip("+-", outcomes[1:], strict=True)),
        controls={"layer-matched": dict(zip("+-", random[:2], strict=True)),
                  "any layer": dict(zip("+-", random[2:], strict=True))},
        bottom=None, limits={}, alpha=0.05, level=level, seed=seed, joint_controls=joint,
    )  # fmt: skip


def effects(samples: int) -> Rows:
    """How often intervals of effects hold the truth."""
    rows: Rows = []
    for rates in ((0.5, 0.7, 0.3), (0.5, 0.5, 0.5), (0.1, 0.3, 0.05)):
        for n, together, level in ((12, 4, 0.95), (24, 8, 0.95), (24, 8, 0.9), (24, 8, 0.99), (96, 1, 0.95)):
            rng, held = np.random.default_rng(n), np.zeros(2)
            for seed in range(4 * samples):
                report = report_of(answers(rng, rates, n, together, 0.3), together, level, seed)
                spans = report.gap_interval, report.effect_interval("+")
                truths = rates[1] - rates[2], rates[1] - rates[0]
                pairs = zip(spans, truths, strict=True)
                held += [low - 1e-12 <= truth <= high + 1e-12 for (low, high), truth in pairs]
            shown = " / ".join(f"{rate:g}" for rate in rates)
            rows.append(
                (shown, f"{n} × {together}", percent(level, 0), *(percent(x / samples / 4) for x in held))
            )
    return rows


def verdicts(samples: int) -> Rows:
    """How often verdicts say yes."""
    rows: Rows = []
    n, together, n_random = 24, 8, 20
    for mirrored, spread in ((False, 0.0), (False, 0.05), (False, 0.15), (True, 0.05), (True, 0.15)):
        for gain in (0.0, 0.1, 0.25):
            rng, hits = np.random.default_rng(int(100 * spread)), np.zeros(3)
            for seed in range(samples):
                random = 0.5 + spread * rng.normal(size=4 * n_random)
                plan = 0.5 + spread * rng.normal(size=2) + np.array([gain, -gain])
                if mirrored:  # the reverse takes away what the plan adds, and so in each random draw
                    plan[1] = 1 - plan[0]
                    random = random.reshape(2, 2, n_random)
                    random[:, 1] = 1 - random[:, 0]
                rates = np.clip([0.5, *plan, *random.ravel()], 0.02, 0.98)
                drawn_answers = answers(rng, list(rates), n, together, 0.3)
                controls = drawn_answers[3:].reshape(4, n_random, -1)
                report = report_of(drawn_answers[:3], together, 0.95, seed, list(controls), mirrored)
                both = max(report.p_matched, report.p_any) <= 0.05
                hits += [report.p_matched <= 0.05, both, report.verdict]
            words = "shared" if mirrored else "others"
            rows.append((words, f"{spread:g}", f"{gain:g}", *(percent(hit / samples) for hit in hits)))
    return rows


def promised_prompts(samples: int) -> Rows:
    """What `required_prompts` promises, and what its number of clusters gives."""
    rows: Rows = []
    for rate, gap, together, power in ((0.5, 0.25, 4, 0.8), (0.5, 0.4, 1, 0.8), (0.3, 0.2, 8, 0.9)):
        assumed = AssumedAnswers(rate, prompts_per_cluster=together, correlation=0.2)
        n = required_prompts(assumed, gap=gap, power=power, n_simulations=400).n_clusters
        assert n is not None
        rng, hits = np.random.default_rng(2), 0
        for seed in range(samples):
            sides = [answers(rng, [each], n, together, 0.2)[0] for each in (rate + gap / 2, rate - gap / 2)]
            hits += report_of(np.stack([sides[0], *sides]), together, 0.95, seed).gap_interval[0] > 0
        rows.append(
            (f"{rate:g}", f"{gap:g}", str(together), percent(power, 0), str(n), percent(hits / samples))
        )
    return rows


# The page


class Table(NamedTuple):
    """Title, what it shows, its header, and what makes its rows from a number of data sets."""

    title: str
    words: str
    header: tuple[str, ...]
    make: Callable[[int], Rows]


TABLES = {
    "detection-intervals": Table(
        "Intervals of scores",
        "How often the interval of a score holds the truth, mean over experts that run often and rarely "
        "(rate under the rarer condition).",
        ("design", "score", "units a condition", "level", "rates ≥ 2 %", "0.3 to 2 %"),
        detection_intervals,
    ),
    "detection-p": Table(
        "p-values of scores",
        "Nothing differs. How often an expert's p is small all the same. (Groups whose clusters are all in "
        "both are tested as pairs are; where only some are, the test is conservative: pair the prompts where "
        "you can.)",
        (
            "design",
            "units a condition",
            "p ≤ 0.05, rates ≥ 2 %",
            "0.3 to 2 %",
            "p ≤ 0.01, rates ≥ 2 %",
            "0.3 to 2 %",
        ),
        detection_p,
    ),
    "discoveries": Table(
        "q-values, and what they find",
        "Ten layers of 32 experts; in two of them four experts' logits are raised (+0: in none). False: "
        "mean share, of the experts that q names, that are in the other layers. Found: share of the raised "
        "experts that q names.",
        (
            "design",
            "units a condition",
            "planted, logits",
            "false of those with q ≤ 0.05",
            "q ≤ 0.2",
            "planted found, q ≤ 0.05",
            "q ≤ 0.2",
        ),
        discoveries,
    ),
    "promised-pairs": Table(
        "Power of detection",
        "`required_pairs` says how many clusters find a difference; with so many, how often did q ≤ 0.05 "
        "find it? (Two groups: clusters of both together.)",
        ("rate", "difference", "experts", "paired", "power asked", "clusters it says", "found with these"),
        promised_pairs,
    ),
    "effects": Table(
        "Intervals of steering effects",
        "How often `report.gap_interval` and `report.effect_interval` hold the truth; four times as many "
        "data sets.",
        ("rates: unsteered, +, −", "clusters × prompts", "level", "gap inside", "effect of + inside"),
        effects,
    ),
    "verdicts": Table(
        "Verdicts",
        "24 clusters of 8 prompts, 20 random sets of each kind and direction. A plan that adds nothing is "
        "one more random set, and a positive verdict wrong. Where it adds something, answers move by that "
        "much in each direction. Experts are shared where the reverse is the plan with its roles swapped and "
        "undoes what that does; random sets of both directions are then one draw.",
        (
            "the reverse has experts",
            "a random set moves answers by (sd)",
            "the plan adds, each way",
            "p matched ≤ 0.05",
            "both p ≤ 0.05",
            "verdict",
        ),
        verdicts,
    ),
    "promised-prompts": Table(
        "Power of steering",
        "`required_prompts` says how many clusters show a gap; with so many, how often did its interval "
        "lie above 0?",
        (
            "rate",
            "gap",
            "prompts a cluster",
            "power asked",
            "clusters it says",
            "interval above 0 with these",
        ),
        promised_prompts,
    ),
}

PAGE_TEXT = """\
# Does it keep its word?

<!-- written by benchmarks/calibration.py -->

`make calibration` writes this page: simulations in which the truth is known, {samples} data sets a row, \
through the library's own functions (`compare_routing`, `SteeringReport`, `required_pairs`, \
`required_prompts`). {process}

The standard error of a share of 95 % of single intervals is {error}; shares over experts have a \
smaller one. Also measured: [intervals of the published methods](methods.md#how-often-the-intervals-hold), \
[the verdict on real splits](explanation/verdicts.md). [What the units are](explanation/units.md).

{tables}"""


def percent(share: float, digits: int = 1) -> str:
    """A share in per cent."""
    return f"{100 * share:.{digits}f} %"


def table(name: str, samples: int) -> str:
    """A table in Markdown."""
    rows = [TABLES[name].header, *TABLES[name].make(samples)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(TABLES)}; default: all, written as a page")
    parser.add_argument("--samples", type=int, default=500, help="data sets a row (default: 500)")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.tables:
        for name in options.tables:
            print(table(name, options.samples), flush=True)
        return
    options.out.write_text(page(options.samples), encoding="utf-8")


def page(samples: int) -> str:
    """The whole page."""
    parts = [f"## {one.title}\n\n{one.words}\n\n{table(name, samples)}" for name, one in tqdm(TABLES.items())]
    process = " ".join((__doc__ or "").split("\n\n")[2].split(" Everything goes")[0].split())
    error = f"{100 * (0.95 * 0.05 / samples) ** 0.5:.1f} points"
    whole = PAGE_TEXT.format(samples=samples, process=process, error=error, tables="\n\n".join(parts))
    return "\n".join(line if line.startswith("|") else fill(line, 118) for line in whole.splitlines()) + "\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
