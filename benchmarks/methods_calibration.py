"""Do the intervals of the published methods hold the truth as often as they say?

    python benchmarks/methods_calibration.py                 # a table, in some minutes
    python benchmarks/methods_calibration.py npmi audit      # these cases only

A made-up router sends the tokens of 1,000 made-up prompts to experts; tokens of one prompt are alike. What a
method says of all of them is the truth. Samples of 40 and of 100 prompts are drawn from them with
replacement, and counted is in what share of the samples the 95 % interval holds the truth, and on which side
it lies otherwise. Where a truth is known without prompts (rates, AUROC of normal numbers), it is that.
"""

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.stats import norm
from tqdm.auto import tqdm

from moe_lens import (
    MoEShape,
    RoutingStats,
    cache_hits,
    npmi,
    predict_errors,
    route_divergence,
    route_probe,
    saliency,
    segment_consistency,
)
from moe_lens.evaluation import AuditCondition, AuditReport
from moe_lens.statistics import ExpertOutputs, PromptCounts, PromptRouting, TokenCounts
from moe_lens.statistics.units import with_interval

N_EXPERTS, TOP_K, N_VOCAB, LEVEL = 8, 2, 12, 0.95
SHAPE = MoEShape("made up", (0,), N_EXPERTS, TOP_K)
N_POPULATION, N_RESAMPLES = 1000, 500


@dataclass(frozen=True)
class Prompt:
    """One prompt's routes, and what is counted of them."""

    route: PromptRouting
    other: torch.Tensor
    unit: RoutingStats

    @property
    def agreement(self) -> tuple[float, float]:
        """Sum over tokens of the Jaccard index with the other route, and their number."""
        mine, theirs = (_sets(indices) for indices in (self.route.indices[0], self.other))
        jaccard = (mine & theirs).sum(-1).double() / (mine | theirs).sum(-1)
        return float(jaccard.sum()), float(len(mine))


def _together(prompts: Sequence[Prompt]) -> RoutingStats:
    """Their statistics, a row a prompt."""
    units = [prompt.unit for prompt in prompts]
    counts, sums = (torch.stack([getattr(u, name) for u in units]) for name in ("counts", "probability_sums"))
    n_tokens = torch.tensor([unit.n_tokens for unit in units])
    rows = PromptCounts(n_tokens, counts.to(torch.uint8), sums.float())
    weights = torch.stack([unit.weight_sums for unit in units]).sum(0)
    return RoutingStats(SHAPE, int(n_tokens.sum()), counts.sum(0), sums.sum(0), weights, per_prompt=rows)


def _sets(indices: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(indices), N_EXPERTS, dtype=torch.bool).scatter(-1, indices, True)


@cache
def population(shift: float = 0.0) -> list[Prompt]:
    """Prompts of 8 to 40 tokens; the route follows the token, the prompt and the token before."""
    torch.manual_seed(int(100 * shift))
    of_token = torch.randn(N_VOCAB, N_EXPERTS, generator=torch.Generator().manual_seed(5))
    of_all = shift * torch.linspace(-1, 1, N_EXPERTS)
    prompts = []
    for _ in range(N_POPULATION):
        n = int(torch.randint(8, 41, ()))
        ids = (N_VOCAB * torch.rand(n) ** 1.5).long()
        noise = torch.randn(2, n, N_EXPERTS)
        for pos in range(1, n):
            noise[:, pos] = 0.6 * noise[:, pos - 1] + 0.8 * noise[:, pos]
        logits = of_all + of_token[ids] + 0.7 * torch.randn(N_EXPERTS) + noise[0]
        p = logits.softmax(-1).double()
        weights, indices = p.topk(TOP_K)
        other = (logits + 0.5 * noise[1]).topk(TOP_K).indices
        norms = torch.exp(0.3 * torch.randn(N_EXPERTS) + 0.3 * torch.randn(n, N_EXPERTS)).double()
        norms = norms.gather(-1, indices)

        def summed(values: torch.Tensor, indices: torch.Tensor = indices) -> torch.Tensor:
            return torch.zeros(1, N_EXPERTS).double().index_add(1, indices.flatten(), values.reshape(1, -1))

        counts = torch.bincount(indices.flatten(), minlength=N_EXPERTS)[None]
        outputs = ExpertOutputs(counts, summed(norms), summed(norms * weights), summed(norms), summed(norms))
        unit = RoutingStats(
            SHAPE, n, counts, p.sum(0, keepdim=True), summed(weights),
            vocabulary=TokenCounts.count([indices], ids, N_EXPERTS), outputs=outputs,
        )  # fmt: skip
        route = PromptRouting(SHAPE, ("t",) * n, indices[None], weights[None].float())
        prompts.append(Prompt(route, other, unit))
    return prompts


@dataclass(frozen=True)
class Interval:
    """Truth (None: the mean of what is found), what was found, and bounds; one or more numbers of each."""

    truth: Any
    value: Any
    low: Any
    high: Any


Draw = Callable[[int, np.random.Generator], Interval]
"""From the number of prompts and a generator to a truth and an interval for it."""


def _taken(n: int, rng: np.random.Generator, shift: float = 0.0) -> list[Prompt]:
    everyone = population(shift)
    return [everyone[row] for row in rng.integers(len(everyone), size=n)]


@cache
def _of_all(method: Callable[[Sequence[Prompt]], Any]) -> Any:
    return method(population())


@cache
def _met(n: int) -> Any:
    """[layer expert], how often it is expected to run for the rarer marker in n prompts."""
    joint = np.zeros((N_EXPERTS, N_VOCAB))
    for prompt in population():
        assert prompt.unit.vocabulary is not None
        dense = prompt.unit.vocabulary.dense(0, N_EXPERTS).numpy()
        joint[:, : dense.shape[1]] += dense
    return torch.from_numpy(joint[None, :, :2].min(-1) * n / N_POPULATION)


def _npmi_of(rare: bool) -> Draw:
    """Of experts that both markers are expected to meet 10 times or more, or of the others."""

    def draw(n: int, rng: np.random.Generator) -> Interval:
        found, few = _npmi(_taken(n, rng)), _met(n) < 10
        truth = _of_all(_npmi).values.where(few == rare, torch.nan)
        return Interval(truth, found.values, found.low, found.high)

    return draw


def _sampled(method: Callable[[Sequence[Prompt]], Any], value: Callable[[Any], Any]) -> Draw:
    def draw(n: int, rng: np.random.Generator) -> Interval:
        found = method(_taken(n, rng))
        return Interval(value(_of_all(method)), value(found), found.low, found.high)

    return draw


def _npmi(prompts: Sequence[Prompt]) -> Any:
    return npmi([p.unit for p in prompts], [0, 1], n_resamples=N_RESAMPLES)


def _reap(prompts: Sequence[Prompt]) -> Any:
    return saliency([p.unit for p in prompts], "reap", n_resamples=N_RESAMPLES)


def _weighted_frequency(prompts: Sequence[Prompt]) -> Any:
    return saliency([p.unit for p in prompts], "weighted_frequency", n_resamples=N_RESAMPLES)


def _segments(prompts: Sequence[Prompt]) -> Any:
    return segment_consistency([p.route for p in prompts], 8, n_resamples=N_RESAMPLES)


def _lru(prompts: Sequence[Prompt]) -> Any:
    return cache_hits([p.route for p in prompts], 4, n_resamples=N_RESAMPLES)


@dataclass(frozen=True)
class _Mean:
    value: torch.Tensor
    low: Any
    high: Any


def _agreement(prompts: Sequence[Prompt]) -> _Mean:
    """`route_agreement`'s own way from sums over tokens to an interval, without two models."""
    sums = np.array([p.agreement for p in prompts])
    tables = [sums[:, :1], sums[:, 1:]]
    return _Mean(*with_interval(lambda a, n: a / n, tables, level=LEVEL, n_resamples=N_RESAMPLES, seed=0))


@cache
def _counts_of_all(shift: float) -> RoutingStats:
    return _together(population(shift))


SETTINGS: dict[str, Any] = {"n_resamples": N_RESAMPLES, "n_permutations": 99}


def _divergence(shift: float) -> Draw:
    @cache
    def truth() -> Any:
        found = route_divergence(_counts_of_all(0.0), _counts_of_all(shift), n_resamples=2, n_permutations=1)
        return found.divergence

    def draw(n: int, rng: np.random.Generator) -> Interval:
        one, two = (_together(_taken(n, rng, each)) for each in (0.0, shift))
        found = route_divergence(one, two, **SETTINGS)
        return Interval(truth(), found.corrected, found.low, found.high)

    return draw


def _paired_divergence(n: int, rng: np.random.Generator) -> Interval:
    rows = rng.integers(N_POPULATION, size=n)
    one, two = (_together([population(shift)[row] for row in rows]) for shift in (0.0, 1.0))
    found = route_divergence(one, two, paired=True, **SETTINGS)
    return Interval(_paired_truth(), found.divergence, found.low, found.high)


@cache
def _paired_truth() -> Any:
    return route_divergence(_counts_of_all(0.0), _counts_of_all(1.0), paired=True, **SETTINGS).divergence


def _rates(rate: float, together: int, spread: float = 0.0) -> Draw:
    """An audit's held-out rate; clusters of prompts with rates that differ between them by `spread`."""

    def draw(n: int, rng: np.random.Generator) -> Interval:
        clusters = np.repeat(np.arange(n // together), together)
        own = rng.beta(rate * spread, (1 - rate) * spread, size=n // together) if spread else np.full(n, rate)
        values = (rng.random(len(clusters)) < own[clusters]).astype(float)
        usual = AuditCondition("as trained", np.array([1.0]), values)
        report = AuditReport("task", "model", (usual,), {}, tuple(map(str, clusters)), True, LEVEL, 0)
        return Interval(rate, report.worst_rate, *report.worst_interval)

    return draw


def _errors(gain: bool) -> Draw:
    """Normal numbers one standard deviation apart; the baseline is as good, and half of it is the same."""

    def draw(n: int, rng: np.random.Generator) -> Interval:
        wrong = np.arange(n) % 10 < 3
        shared, own = rng.normal(size=n), rng.normal(size=(2, n))
        one, two = wrong + np.sqrt(0.5) * (shared + own)
        report = predict_errors({"x": one, "softmax entropy": two}, wrong)
        if gain:
            return Interval(0.0, None, *report.gain_interval("x"))
        return Interval(norm.cdf(np.sqrt(0.5)), report.auroc("x"), *report.auroc_interval("x"))

    return draw


def _probe(n: int, rng: np.random.Generator) -> Interval:
    """Ten groups; prompts labelled positive are of another population."""
    positive = np.arange(n) % 2 == 0
    prompts = [_taken(1, rng, 0.6 if label else 0.0)[0] for label in positive]
    units, groups = [p.unit for p in prompts], np.arange(n) // 2 % 10
    return Interval(None, *route_probe(units, positive, groups=groups, n_resamples=N_RESAMPLES).auroc)


CASES: dict[str, Draw] = {
    "npmi, markers met 10 times or more": _npmi_of(rare=False),
    "npmi, fewer times": _npmi_of(rare=True),
    "saliency, reap": _sampled(_reap, lambda found: found.values),
    "saliency, weighted frequency": _sampled(_weighted_frequency, lambda found: found.values),
    "segment_consistency": _sampled(_segments, lambda found: found.performance),
    "cache_hits": _sampled(_lru, lambda found: found.rate),
    "route_agreement": _sampled(_agreement, lambda found: found.value),
    "route_divergence": _divergence(1.0),
    "route_divergence, paired": _paired_divergence,
    "route_probe": _probe,
    "audit, rate 0.5": _rates(0.5, 1),
    "audit, rate 0.9": _rates(0.9, 1),
    "audit, rate 0.5, 4 a cluster": _rates(0.5, 4, 2.0),
    "predict_errors, AUROC": _errors(gain=False),
    "predict_errors, gain": _errors(gain=True),
}


@dataclass(frozen=True)
class Coverage:
    """Shares of intervals, averaged over the numbers of each, with a truth inside, below and above them."""

    held: float
    below: float
    above: float


def coverage(draw: Draw, n: int, n_samples: int, seed: int = 0) -> Coverage:
    """Of so many samples of n prompts."""
    rng = np.random.default_rng([seed, n])
    found = [draw(n, rng) for _ in range(n_samples)]
    low, high = (np.stack([np.asarray(getattr(one, side)) for one in found]) for side in ("low", "high"))
    truth = found[0].truth
    if truth is None:  # what samples of this size give on average
        truth = np.mean([one.value for one in found])
    truth = np.broadcast_to(np.asarray(truth), low.shape)
    known = np.isfinite(low + high) & np.isfinite(truth)
    below, above = (float(side[known].mean()) for side in (truth < low, truth > high))
    return Coverage(1 - below - above, below, above)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help="those whose names begin so; all by default")
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--prompts", type=int, nargs="+", default=[40, 100])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| interval | prompts | holds the truth | truth below | truth above |\n" + "| --- " * 5 + "|")
    for name, draw in tqdm(CASES.items()):
        if options.cases and not name.startswith(tuple(options.cases)):
            continue
        for n in options.prompts:
            found = coverage(draw, n, options.samples)
            shares = " | ".join(f"{100 * share:.1f} %" for share in (found.held, found.below, found.above))
            print(f"| {name} | {n} | {shares} |", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
