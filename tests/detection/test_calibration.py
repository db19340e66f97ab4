"""Known answers: a synthetic router, dependent within prompts; do intervals, p- and q-values keep their word?

`python -m tests.detection.test_calibration` prints the tables from many more data sets (minutes).
"""

from dataclasses import dataclass, field

import numpy as np
import pytest

from moe_lens.detection.paired_counts import PairedCounts
from moe_lens.detection.paired_statistics import interval, q_values, score, sign_flip_p
from moe_lens.detection.scores import SCORES
from tests.families import first_of

N_EXPERTS, TOP_K = 32, 4
NAMES = tuple(SCORES)


@dataclass(frozen=True)
class Router:
    """Top-k of base + prompt effects + Gumbel noise a token; effects are partly those of the pair."""

    longer: int = 1  # how many times longer the prompts of the first condition are
    shared: float = 1.0  # standard deviation of the effects that both prompts of a pair have
    own: float = 1.0  # ... and of those of each prompt: the dependence between its tokens
    shift: np.ndarray = field(default_factory=lambda: np.zeros(N_EXPERTS))  # of the first condition's logits

    def draw(self, generator: np.random.Generator, n_pairs: int) -> list[np.ndarray]:
        """events_1, tokens_1, probabilities_1, events_2, ...; longer pairs also prefer other experts."""
        length = generator.normal(size=n_pairs)
        base = np.linspace(-3.2, 3.2, N_EXPERTS) + generator.normal(0, self.shared, (n_pairs, N_EXPERTS))
        base[:, ::3] += 0.3 * length[:, None]
        drawn = []
        for factor, shift in ((self.longer, self.shift), (1, 0.0)):
            spread = 0.42 * length + 0.42 * generator.normal(size=n_pairs)
            tokens = np.clip(16 * np.exp(spread), 5, 50).astype(int) * factor
            prompt = np.repeat(np.arange(n_pairs), tokens)
            effects = base + shift + generator.normal(0, self.own, base.shape)
            logits = effects[prompt] + generator.gumbel(size=(len(prompt), N_EXPERTS))
            chosen = np.argpartition(-logits, TOP_K, axis=1)[:, :TOP_K]
            events = np.bincount((prompt[:, None] * N_EXPERTS + chosen).ravel(), minlength=base.size)
            odds = np.exp(logits)
            starts = np.concatenate([[0], np.cumsum(tokens)[:-1]])
            probabilities = np.add.reduceat(odds / odds.sum(1, keepdims=True), starts, axis=0)
            drawn += [events.reshape(base.shape).astype(float), tokens.astype(float), probabilities]
        return drawn


def counts_of(name: str, drawn: list[np.ndarray], rows: np.ndarray | slice = slice(None)) -> PairedCounts:
    kind = 2 if SCORES[name].sums == "probability_sums" else 0
    return PairedCounts(drawn[kind][rows], drawn[1][rows], drawn[3 + kind][rows], drawn[4][rows])


def some_shift(generator: np.random.Generator) -> np.ndarray:
    shift = np.zeros(N_EXPERTS)
    shift[::4] = generator.normal(0, 1, len(shift[::4]))
    return shift


def coverage(
    name: str, router: Router, n_units: int, level: float, n_sets: int, population: list[np.ndarray]
):
    """Share of data sets whose interval holds the truth, [expert]; units come from a known population."""
    generator = np.random.default_rng(n_units)
    all_units = counts_of(name, population)
    if name == "log_odds_ratio":
        r1, r2 = (
            all_units.sums_1.sum(0) / all_units.tokens_1.sum(),
            all_units.sums_2.sum(0) / all_units.tokens_2.sum(),
        )
        truth = np.log(r1 / (1 - r1)) - np.log(r2 / (1 - r2))
    else:
        truth = score(name, all_units)
    held = np.zeros(N_EXPERTS)
    for seed in range(n_sets):
        sample = counts_of(name, population, generator.integers(0, all_units.n_units, n_units))
        low, high = interval(name, sample, level=level, seed=seed)
        if name == "paired_t":  # its interval is that of the mean difference over this sample's error
            differences = sample.rate_differences
            error = differences.std(0, ddof=1) / np.sqrt(n_units)
            truth = all_units.rate_differences.mean(0) / np.maximum(error, 1e-12)
        held += (low <= truth) & (truth <= high)
    return held / n_sets


def rates(population: list[np.ndarray]) -> np.ndarray:
    """Of the rarer condition, [expert]."""
    return np.minimum(population[0].sum(0) / population[1].sum(), population[3].sum(0) / population[4].sum())


def false_positives(name: str, router: Router, n_units: int, n_sets: int, alphas=(0.05, 0.01, 0.001)):
    """Share of p-values up to each alpha where nothing differs: [alpha expert]; and the rate, [expert]."""
    generator = np.random.default_rng(n_units)
    hits, rate = np.zeros((len(alphas), N_EXPERTS)), np.zeros(N_EXPERTS)
    for seed in range(n_sets):
        drawn = router.draw(generator, n_units)
        p = sign_flip_p(name, counts_of(name, drawn), n_permutations=1999, seed=seed)
        hits += p <= np.array(alphas)[:, None] + 1e-12
        rate += drawn[0].sum(0) / drawn[1].sum() / n_sets
    return hits / n_sets, rate


def discoveries(
    n_units: int, n_planted_layers: int, n_sets: int, q: float, n_layers: int = 10, longer: int = 1
):
    """Mean false discovery proportion, its standard error, and power among planted experts.

    A planted increase of some experts lowers others of their layer (top-k), so only whole layers are null.
    """
    generator = np.random.default_rng(100 * n_units + n_planted_layers)
    proportions, found = [], []
    for seed in range(n_sets):
        shift = np.zeros(N_EXPERTS)
        planted = generator.choice(np.arange(12, N_EXPERTS), 4, replace=False)
        shift[planted] = 1.5
        layers = [
            Router(longer, shift=shift if layer < n_planted_layers else np.zeros(N_EXPERTS)).draw(
                generator, n_units
            )
            for layer in range(n_layers)
        ]
        p = [sign_flip_p("risk_difference", counts_of("risk_difference", one), seed=seed) for one in layers]
        chosen = (q_values(np.concatenate(p)) <= q).reshape(n_layers, N_EXPERTS)
        proportions.append(chosen[n_planted_layers:].sum() / max(1, chosen.sum()))
        found.append(chosen[:n_planted_layers, planted].mean() if n_planted_layers else 0.0)
    error = np.std(proportions, ddof=1) / np.sqrt(n_sets)
    return float(np.mean(proportions)), float(error), float(np.mean(found))


@pytest.fixture(scope="module")
def populations() -> dict[int, list[np.ndarray]]:
    generator = np.random.default_rng(0)
    return {
        longer: Router(longer, shift=some_shift(generator)).draw(generator, 4000 // longer)
        for longer in (1, 3)
    }


@pytest.mark.parametrize("longer", [1, 3])
@pytest.mark.parametrize(
    ("name", "n_units", "level"),
    first_of(
        [
            *(("risk_difference", n_units, level) for n_units, level in ((20, 0.95), (50, 0.9))),
            ("log_odds_ratio", 50, 0.95),
        ],
        [(name, *design) for name in NAMES for design in ((20, 0.95), (50, 0.9), (50, 0.95), (50, 0.99))],
    ),
)
def test_intervals_hold_the_truth_as_often_as_they_say(populations, name, longer, n_units, level) -> None:
    held = coverage(name, Router(longer), n_units, level, 100, populations[longer])
    frequent = rates(populations[longer]) >= 0.02
    assert frequent.sum() >= 15
    assert abs(held[frequent].mean() - level) <= 0.02


@pytest.mark.parametrize("longer", [1, 3, 10])
@pytest.mark.parametrize("n_units", [10, 30])
def test_p_values_are_small_no_oftener_than_they_say(longer: int, n_units: int) -> None:
    hits, rate = false_positives("risk_difference", Router(longer), n_units, 120)
    for group in (rate < 0.02, (rate >= 0.02) & (rate < 0.1), rate >= 0.1):
        # standard error of hits[0] over 120 dependent rows of about 10 experts: below 0.008
        assert hits[0, group].mean() <= 0.05 + 0.02
        assert hits[1, group].mean() <= 0.01 + 0.01
    assert hits[0].mean() > 0.015  # a test that never rejects would pass the rest


@pytest.mark.parametrize(("n_planted_layers", "n_units"), [(0, 30), (2, 60)])
def test_no_more_false_discoveries_than_q_promises(n_planted_layers: int, n_units: int) -> None:
    proportion, error, power = discoveries(n_units, n_planted_layers, 40, q=0.1)
    assert proportion <= 0.1 + 2 * error
    assert n_planted_layers == 0 or power > 0.5


def main() -> None:
    """The tables."""
    groups = {"0.003-0.02": (0.003, 0.02), "0.02-0.05": (0.02, 0.05), "0.05-0.5": (0.05, 0.6)}
    print("coverage, % (rate of the expert:", ", ".join(groups), ")")
    generator = np.random.default_rng(1)
    for longer in (1, 3):
        population = Router(longer, shift=some_shift(generator)).draw(generator, 10000)
        rate = rates(population)
        for name in NAMES:
            for n_units, level in ((20, 0.95), (50, 0.9), (50, 0.95), (50, 0.99), (200, 0.95)):
                held = coverage(name, Router(longer), n_units, level, 300, population)
                shown = [100 * held[(low <= rate) & (rate < high)].mean() for low, high in groups.values()]
                print(
                    f"x{longer} {name:24} n={n_units:3} {level}:", *(f"{x:5.1f}" for x in shown), flush=True
                )
    print("false positives, % at 0.05 0.01 0.001 (same groups, below 0.02 all)")
    for name in ("risk_difference", "probability_difference", "paired_t"):
        for router in (Router(1), Router(3), Router(10), Router(3, shared=2.0, own=1.5)):
            for n_units in (8, 20, 50, 200):
                hits, rate = false_positives(name, router, n_units, 400 if n_units < 100 else 150)
                shown = [
                    " ".join(f"{100 * x:.2f}" for x in hits[:, (low <= rate) & (rate < high)].mean(1))
                    for low, high in ((0, 0.02), (0.02, 0.05), (0.05, 0.6))
                ]
                print(
                    f"{name:22} x{router.longer} own={router.own} n={n_units:3}:",
                    " | ".join(shown),
                    flush=True,
                )
    print("false discovery proportion, its standard error, power")
    for longer in (1, 3):
        for n_units in (20, 50, 100):
            for planted in (0, 1, 2):
                for q in (0.05, 0.2):
                    result = discoveries(n_units, planted, 100, q, longer=longer)
                    print(
                        f"x{longer} n={n_units} planted={10 * planted}% q={q}:",
                        *(f"{x:.3f}" for x in result),
                        flush=True,
                    )


if __name__ == "__main__":
    main()
