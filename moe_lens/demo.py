"""The main job, end to end, on a model that ships with the package: measure, detect, choose, steer, control.

    result = run_demo("specialised")            # a DemoResult
    print(table([result]))

Each organism knows facts by heart and can read them from a document. The question is which of the two it
says when they disagree, and whether choosing the route moves that in both directions. Everything is
detected on one split of the entities, the plan's size is chosen on a second, and the numbers that are shown
come from a third.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from moe_lens import organisms
from moe_lens.contrast import ExpertScores, risk_difference
from moe_lens.errors import DataError, PlanError
from moe_lens.evaluation import answers_with, clustered_interval, pairwise_gaps, text_loss
from moe_lens.hooked_moe import HookedMoE
from moe_lens.organisms import World
from moe_lens.routing_stats import collect_routing
from moe_lens.steering import steer_hooks
from moe_lens.steering_plan import SteeringPlan

SIZES: Final = (2, 4, 6, 8, 10, 12)
"""Numbers of deactivated experts that are tried on the development split."""
LOSS_LIMIT: Final = 0.1
"""Nats a token by which a plan may worsen generic text on the development split and still be chosen."""
GAP_TOLERANCE: Final = 0.1
"""How much of the largest development gap is given up for a smaller plan, which does less damage."""
DIRECTIONS: Final = ("+", "−")


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a model does under one intervention."""

    says_document: Bool[np.ndarray, "prompt"]
    closed_book: float
    loss: float

    @property
    def document_rate(self) -> float:
        """Share of the conflict prompts answered with the document's value, in [0, 1]."""
        return float(self.says_document.mean())


@dataclass(frozen=True, eq=False)
class DemoResult:
    """The demo on one organism. Directions: "+" toward the document, "−" toward memory.

    Attributes:
        scores: risk difference, document + question against question alone, on the detection split.
        plans: direction -> plan; both deactivate `size` experts and activate none.
        development: size -> (gap, worst loss increase in nats a token) on the development split.
        unsteered, steered: outcomes on the test split.
        random: outcomes on the test split of random sets of `size` deactivated experts, in any layers.
        layer_matched: direction -> outcomes of random sets with as many experts in each layer as its plan.
        clusters: the entity of each conflict prompt; resampled as a whole for the interval.
    """

    name: str
    scores: ExpertScores
    plans: dict[str, SteeringPlan]
    development: dict[int, tuple[float, float]]
    unsteered: Outcome
    steered: dict[str, Outcome]
    random: list[Outcome]
    layer_matched: dict[str, list[Outcome]]
    clusters: list[str]
    seed: int

    @property
    def size(self) -> int:
        """Number of experts that each plan deactivates."""
        return len(self.plans["+"])

    @property
    def gap(self) -> float:
        """Two-way gap: document rate under "+" minus document rate under "−", in [-1, 1]."""
        return self.steered["+"].document_rate - self.steered["−"].document_rate

    @cached_property
    def gap_interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of the gap, over entities."""
        plus, minus = (self.steered[direction].says_document.astype(float) for direction in DIRECTIONS)
        return clustered_interval(plus - minus, self.clusters, seed=self.seed)

    @property
    def random_rates(self) -> Float[np.ndarray, "set"]:
        """Document rate under each random set."""
        return np.array([outcome.document_rate for outcome in self.random])

    @property
    def random_gaps(self) -> Float[np.ndarray, "pair"]:
        """Two-way gaps of all pairs of random sets."""
        return pairwise_gaps(self.random_rates)

    @property
    def layer_matched_gaps(self) -> Float[np.ndarray, "pair"]:
        """Two-way gaps of all pairs of a set matched to "+" with one matched to "−"."""
        plus, minus = (
            np.array([outcome.document_rate for outcome in self.layer_matched[direction]])
            for direction in DIRECTIONS
        )
        return (plus[:, None] - minus[None, :]).flatten()


def run_demo(
    name: str = "specialised", *, seed: int = 0, n_random: int = 20, progress: bool = True
) -> DemoResult:
    """Detect, choose the plan's size, steer both ways and hold the effect against random sets.

    >>> from moe_lens.demo import run_demo
    >>> result = run_demo("null", n_random=2, progress=False)
    >>> result.size in (2, 4, 6, 8, 10, 12)
    True

    Args:
        name: one of `organisms.names()`.
        seed: of the random sets and of the bootstrap; detection and steering have no randomness.
        n_random: number of random sets, at least 2.

    Raises:
        MoELensError: no organism of that name. DataError: n_random below 2.
    """
    if n_random < 2:
        raise DataError(f"n_random must be at least 2, since gaps are between two sets; got {n_random}.")
    return run_on(organisms.load(name), organisms.world(name), name, seed, n_random, progress)


def run_on(
    model: HookedMoE, world: World, name: str, seed: int = 0, n_random: int = 20, progress: bool = True
) -> DemoResult:
    """The same for any model that lives in a world of organisms (a freshly trained one, say)."""
    scores = detect_document_experts(model, world)
    with tqdm(total=2 * len(SIZES) + 4 + 3 * n_random, desc=name, unit="run", disable=not progress) as bar:

        def measure(split: str, plan: SteeringPlan) -> Outcome:
            outcome = measure_outcome(model, world, split, plan)
            bar.update()
            return outcome

        development = compare_sizes(lambda plan: measure("development", plan), scores)
        plans = two_plans(scores, best_size(development))
        seeds = range(seed * n_random, (seed + 1) * n_random)
        result = DemoResult(
            name=name,
            scores=scores,
            plans=plans,
            development=development,
            unsteered=measure("test", SteeringPlan()),
            steered={direction: measure("test", plan) for direction, plan in plans.items()},
            random=[measure("test", plans["+"].random_like(seed=number)) for number in seeds],
            layer_matched={
                direction: [
                    measure("test", plan.random_like(seed=shift + number, layer_matched=True))
                    for number in seeds
                ]
                for shift, (direction, plan) in zip((0, 10**6), plans.items(), strict=True)
            },
            clusters=[conflict.entity for conflict in world.conflicts("test")],
            seed=seed,
        )
        bar.update(bar.total - bar.n)
    return result


def detect_document_experts(model: HookedMoE, world: World) -> ExpertScores:
    """Risk difference of document + question against question alone, counted from the word Question on."""
    start = int(model.to_tokens("Question", prepend_bos=False)[0, 0])

    def from_question(tokens: Int[Tensor, "pos"]) -> Bool[Tensor, "pos"]:
        return (tokens == start).cumsum(0) > 0

    pairs = world.conflicts("detection")
    stats = [
        collect_routing(model, prompts, batch_size=64, span=from_question, progress=False)
        for prompts in ([pair.open_book for pair in pairs], [pair.closed_book for pair in pairs])
    ]
    return risk_difference(*stats)


def two_plans(scores: ExpertScores, size: int) -> dict[str, SteeringPlan]:
    """Toward the document by deactivating memory's experts, toward memory by deactivating the document's."""
    return {
        "+": SteeringPlan.from_scores(scores, n_deactivate=size),
        "−": SteeringPlan.from_scores(-scores, n_deactivate=size),
    }


def measure_outcome(model: HookedMoE, world: World, split: str, plan: SteeringPlan) -> Outcome:
    """Document rate on the conflicts, closed-book accuracy and generic loss of a split, under a plan."""
    conflicts, facts, hooks = world.conflicts(split), world.facts(split), steer_hooks(plan)
    says = answers_with(
        model, [c.open_book for c in conflicts], [c.document_answer for c in conflicts], hooks=hooks
    )
    knows = answers_with(model, [f.question for f in facts], [f.answer for f in facts], hooks=hooks)
    loss = text_loss(model, world.generic(split), hooks=hooks)
    return Outcome(says.numpy(), float(knows.float().mean()), loss)


def compare_sizes(
    measure: Callable[[SteeringPlan], Outcome], scores: ExpertScores
) -> dict[int, tuple[float, float]]:
    """Size -> (two-way gap, worst increase of the generic loss), for the sizes that are possible."""
    base = measure(SteeringPlan())
    found = {}
    for size in SIZES:
        try:
            plans = two_plans(scores, size)
        except PlanError:  # fewer experts of one sign, or more than E − k in one layer
            continue
        plus, minus = (measure(plans[direction]) for direction in DIRECTIONS)
        found[size] = (plus.document_rate - minus.document_rate, max(plus.loss, minus.loss) - base.loss)
    return found


def best_size(development: dict[int, tuple[float, float]]) -> int:
    """The smallest size whose gap is within `GAP_TOLERANCE` of the largest, among those within `LOSS_LIMIT`.

    If no size keeps the generic loss within the limit, the one that does least harm.
    """
    if not development:
        raise PlanError(f"No plan of {SIZES} experts is possible on this model.")
    gentle = {size: gap for size, (gap, harm) in development.items() if harm <= LOSS_LIMIT}
    if not gentle:
        return min(development, key=lambda size: development[size][1])
    return min(size for size, gap in gentle.items() if gap >= max(gentle.values()) - GAP_TOLERANCE)


def table(results: Iterable[DemoResult]) -> str:
    """The results as a Markdown table, one row an organism, with the controls beside the effect."""
    header = [
        "organism", "experts off", "doc rate", "toward doc", "toward memory", "two-way gap [95 %]",
        "random sets", "pairs ≥ gap", "matched ≥ gap", "closed-book", "generic loss", "loss, random",
    ]  # fmt: skip
    rows = [header, *(_row(result) for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    rows.insert(1, ["-" * width for width in widths])
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _row(result: DemoResult) -> Sequence[str]:
    outcomes = [result.unsteered, result.steered["+"], result.steered["−"]]
    low, high = result.gap_interval
    n_experts = len(result.scores.shape.layers) * result.scores.shape.n_experts
    as_large = int((result.random_gaps >= result.gap).sum())
    random_losses = [outcome.loss for outcome in result.random]
    return [
        result.name,
        f"{result.size} of {n_experts}",
        *(f"{outcome.document_rate:.2f}" for outcome in outcomes),
        f"{result.gap:+.2f} [{low:+.2f}, {high:+.2f}]",
        f"{result.random_rates.mean():.2f} ± {result.random_rates.std(ddof=1):.2f}",
        f"{as_large} of {len(result.random_gaps)}",
        f"{int((result.layer_matched_gaps >= result.gap).sum())} of {result.layer_matched_gaps.size}",
        " / ".join(f"{outcome.closed_book:.2f}" for outcome in outcomes),
        " / ".join(f"{outcome.loss:.2f}" for outcome in outcomes),
        f"{np.median(random_losses):.2f}, max {max(random_losses):.2f}",
    ]


LEGEND: Final = """\
Plans come from the risk difference of document + question against question alone, counted on the
question's tokens. experts off: how many of all experts each plan deactivates, chosen on the development
split. doc rate: share of the 192 held-out conflicts (24 countries) answered with the document's value:
unsteered, steered toward the document ("toward doc"), steered toward memory. two-way gap: the difference of
the last two, with a bootstrap interval over countries; it may come from one direction only, so read both.
random sets: doc rate (mean ± sd) when as many random experts, in any layers, are deactivated. pairs ≥ gap:
pairs of random sets that differ at least as much as the gap. matched ≥ gap: the same for pairs of one random
set with as many experts in each layer as the plan toward the document, and one as the plan toward memory.
Pairs share sets, so these counts are no p-values. closed-book: share of remembered facts still answered
without a document, and generic loss: nats a token on everyday sentences; each unsteered / toward doc /
toward memory. loss, random: median and maximum of the generic loss under the random sets."""
