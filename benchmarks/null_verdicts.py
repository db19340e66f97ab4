"""How often the verdict is wrong: python benchmarks/null_verdicts.py null null-majority --seeds 100

All countries that an organism knows are pooled and split anew by each seed: 12 for detection, 12 to choose
the plan's size, 24 to judge it. Detection, choice and verdict are those of the demo. Prints a table, one row
an organism: on how many splits the verdict says that steering exceeds its controls (on the two null organisms
false positives), how large the gaps are, and on what share each of the verdict's criteria would by itself
have said yes. The splits share one model and its 48 countries, so they are no independent trials.
"""

import argparse

import numpy as np
import torch
from scipy.stats import binomtest
from tqdm.auto import tqdm

from moe_lens import organisms
from moe_lens.detection import ExpertScores, detect
from moe_lens.errors import PlanError
from moe_lens.evaluation import (
    LOSS,
    Limit,
    Outcome,
    SteeringReport,
    SweepPoint,
    SweepResult,
    answers_with,
    opposite_plan,
    run_controls,
    split_clusters,
    text_loss,
)
from moe_lens.model import HookedMoE
from moe_lens.organisms import SIZES, SPLITS, Conflict, document_pairs
from moe_lens.steering import SteeringPlan, steer_hooks
from moe_lens.text import ContrastivePairs

POOLS = 10
"""Seeds of random sets, taken in turn; splits with the same one share many sets, which are measured once."""


class Bench:
    """One organism, every conflict of its world, and what has been measured so far."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model: HookedMoE = organisms.load(name)
        self.world = organisms.world(name)
        self.conflicts: list[Conflict] = [c for split in SPLITS for c in self.world.conflicts(split)]
        every = [document_pairs(self.world, split) for split in SPLITS]
        self.pairs: ContrastivePairs = every[0] + every[1] + every[2]
        self.values: dict[SteeringPlan, np.ndarray] = {}
        self.losses: dict[SteeringPlan, float] = {}

    def says_document(self, plan: SteeringPlan, rows: np.ndarray) -> np.ndarray:
        """For these conflicts, 1 where the model answers with the document's value under the plan."""
        known = self.values.setdefault(plan, np.full(len(self.conflicts), np.nan))
        if missing := [row for row in rows if np.isnan(known[row])]:
            asked = [self.conflicts[row] for row in missing]
            known[missing] = answers_with(
                self.model, [c.open_book for c in asked], [c.document_answer for c in asked],
                hooks=steer_hooks(plan), batch_size=192,
            ).numpy()  # fmt: skip
        return known[rows]

    def loss(self, plan: SteeringPlan) -> float:
        """Generic loss on the development sentences."""
        if plan not in self.losses:
            sentences = self.world.generic("development")
            self.losses[plan] = text_loss(self.model, sentences, hooks=steer_hooks(plan))
        return self.losses[plan]

    def report(self, seed: int, n_random: int) -> SteeringReport:
        """Detection, choice of the size and verdict on the splits of a seed."""
        splits = split_clusters([c.entity for c in self.conflicts], (0.25, 0.25, 0.5), seed=seed)
        scores = detect(self.model, self.pairs.select(splits[0].tolist()), batch_size=128, progress=False)
        plan = SteeringPlan.from_scores(scores, n_deactivate=self._size(scores, splits[1]))
        test = splits[2]

        def measure(one: SteeringPlan) -> Outcome:
            return Outcome(self.says_document(one, test), {})

        plans = {"+": plan, "-": opposite_plan(scores, plan)}
        return SteeringReport(
            task="answers with the document's value",
            model=self.name,
            plans=plans,
            clusters=tuple(self.conflicts[row].entity for row in test),
            unsteered=measure(SteeringPlan()),
            steered={side: measure(one) for side, one in plans.items()},
            controls=run_controls(self.model, plans, measure, n_random, seed % POOLS),
            bottom=None,
            limits={},
            alpha=0.05,
            level=0.95,
            seed=seed,
        )

    def _size(self, scores: ExpertScores, rows: np.ndarray) -> int:
        points = []
        for size in SIZES:
            try:
                plans = [
                    (side, SteeringPlan.from_scores(own, n_deactivate=size))
                    for side, own in (("+", scores), ("-", -scores))
                ]
            except PlanError:  # too few experts of one sign, or too many in one layer
                continue
            for side, plan in plans:
                rate = float(self.says_document(plan, rows).mean())
                points.append(SweepPoint(size, side, rate, rate, rate, {LOSS: self.loss(plan)}, []))
        base, limits = {LOSS: self.loss(SteeringPlan())}, {LOSS: Limit(0.1, True)}
        return SweepResult("", "", "deactivate", 0.0, base, limits, tuple(points)).best_size()


HEADER = (
    "organism", "exceeds controls", "95 %", "two-way gap", "interval above 0", "p matched", "p any layer",
    "both p", "excess matched", "excess any layer",
)  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    choices = [name for name in organisms.names() if organisms.world(name).variant != "candour"]
    parser.add_argument("organisms", nargs="+", choices=choices, metavar="ORGANISM")
    parser.add_argument("--seeds", type=int, default=100, help="splits of the countries (default: 100)")
    parser.add_argument("--n-random", type=int, default=20, help="random sets of each kind and direction")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row(judged(name, options.seeds, options.n_random)) for name in options.organisms]
    print(markdown([HEADER, *rows]))


def judged(name: str, n_seeds: int, n_random: int) -> list[SteeringReport]:
    """The reports of one organism, a split each."""
    bench, reports = Bench(name), []
    with tqdm(range(n_seeds), desc=name) as seeds:
        for seed in seeds:
            reports.append(bench.report(seed, n_random))
            seeds.set_postfix(positive=sum(report.verdict for report in reports))
    return reports


def row(reports: list[SteeringReport]) -> tuple[str, ...]:
    """An organism's row of the table."""
    positive = sum(report.verdict for report in reports)
    interval = binomtest(positive, len(reports)).proportion_ci()
    gaps = [report.gap for report in reports]
    criteria = [
        [report.gap_interval[0] > 0 for report in reports],
        [report.p_matched <= report.alpha for report in reports],
        [report.p_any <= report.alpha for report in reports],
        [max(report.p_matched, report.p_any) <= report.alpha for report in reports],
        [report.excess_matched.low > 0 for report in reports],
        [report.excess_any.low > 0 for report in reports],
    ]
    return (
        reports[0].model,
        f"{positive} of {len(reports)}",
        f"[{interval.low:.3f}, {interval.high:.3f}]",
        f"{np.mean(gaps):+.2f} ± {np.std(gaps, ddof=1):.2f}",
        *(f"{np.mean(held):.2f}" for held in criteria),
    )


def markdown(rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; the first row is its header."""
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


if __name__ == "__main__":
    main()
