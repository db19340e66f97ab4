"""The methods that methods_table.py holds against each other, each as one function.

From detection (and, where it needs them, development) prompts to what is done in either direction: "+" so
that the model says what its document says, "-" so that it says what it remembers. Whatever is chosen by a
score names at most `SIZE` experts a direction, so that methods differ in which experts they name, not in how
many.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_lens import (
    Prompt,
    RoutedModel,
    RoutingStats,
    SteeringPlan,
    answer_objective,
    bias_experts,
    collect_by_prompt,
    collect_routing,
    compare_routing,
    driver_experts,
    learn_router_bias,
    mean_ablate,
    mean_expert_outputs,
    neighbour_routes,
    noisy_routes,
    npmi,
    record_dense,
    route_divergence,
    saliency,
    search_plan,
    steer_hooks,
    virtual_ablation,
    zero_ablate,
)
from moe_lens.attribution import ExpertEffects, VirtualAblation, effects_by_expert
from moe_lens.detection import ExpertScores
from moe_lens.errors import DataError, PlanError
from moe_lens.evaluation import SteeringTask, answer_task, answers_with
from moe_lens.hook_names import HookList
from moe_lens.organisms import Conflict, World
from moe_lens.statistics import PromptCounts
from moe_lens.steering import RouterBias
from moe_lens.steering.choosing import Expert

SIZE = 6
"""Experts that a direction names at most, of 32."""
STRENGTH = 1.5
"""Of soft plans, in standard deviations of a token's router logits."""
TEMPERATURE = 0.5
"""Of noisy routes, nats."""
N_STEPS = 10
"""Of Adam, at 0.3 nats a step, for a learned bias."""
SPARSITY = 0.02
"""L1 of the sparse variant, nats."""
MARKERS = ("Document", "is", ".")
"""Tokens of the document's sentence."""
BATCH = 96


@dataclass(frozen=True, eq=False)
class Lever:
    """What is done in one direction.

    Attributes:
        hooks: from the prompts that run to hooks.
        experts: that it names, to switch off; none for what moves all of them.
        random: from a seed, and whether each layer keeps its number of experts, to the same done to random
            experts (or, of neighbours, by random records). None: nothing is chosen that could be drawn.
        key: levers of one key do the same. None: unknown.
        on_outputs: whether its hooks are on the experts' outputs.
        switched_on: experts that it names to switch on.
        joint: what is done in the other direction mirrors it, so that random draws of both go together: from
            one seed, the numbers of both are given to the same experts.
    """

    hooks: Callable[[Sequence[str]], HookList]
    experts: tuple[Expert, ...]
    random: Callable[[int, bool], "Lever"] | None = None
    key: Hashable = None
    on_outputs: bool = False
    switched_on: tuple[Expert, ...] = ()
    joint: bool = False


Both = Mapping[str, Lever]
"""Direction, "+" or "-", to what is done."""


class Material:
    """What methods choose by: conflicts of a detection and a development set, and how they are routed."""

    def __init__(
        self, model: RoutedModel, world: World, detection: Sequence[Conflict], development: Sequence[Conflict]
    ) -> None:
        self.model, self.world = model, world
        self.detection, self.development = list(detection), list(development)

    @cached_property
    def stats(self) -> tuple[RoutingStats, RoutingStats]:
        """With and without a document, counted on the question's tokens."""
        with_document, without = (
            collect_routing(
                self.model, given, span="question", per_prompt=True, batch_size=BATCH, progress=False
            )
            for given in _both(self.detection)
        )
        return with_document, without

    @cached_property
    def units(self) -> tuple[Sequence[RoutingStats], Sequence[RoutingStats]]:
        """The same prompt by prompt, with outputs."""
        with_document, without = (
            collect_by_prompt(self.model, given, span="question", outputs=True, progress=False)
            for given in _both(self.detection)
        )
        return with_document, without

    @cached_property
    def whole(self) -> Sequence[RoutingStats]:
        """All tokens of the prompts with a document, with their vocabulary, prompt by prompt."""
        texts = [c.open_book for c in self.detection]
        return collect_by_prompt(self.model, texts, vocabulary=True, progress=False)

    @cached_property
    def ablation(self) -> VirtualAblation:
        """Estimated changes of log p(document's answer) − log p(remembered one), experts routed around."""
        pairs = {}
        for conflict in self.detection:
            tokens = tuple(self.model.to_tokens(conflict.open_book)[0].tolist())
            words = (conflict.document_answer, conflict.memory_answer)
            pairs[tokens] = [self.model.to_single_token(word) for word in words]

        def margin(logits: Tensor, tokens: Tensor) -> Tensor:
            both = torch.tensor([pairs[tuple(row)] for row in tokens.tolist()])
            one, other = logits[:, -1].gather(1, both).unbind(1)
            return one - other

        texts = [c.open_book for c in self.detection]
        return virtual_ablation(self.model, texts, margin, exact=False, progress=False)

    @property
    def entities(self) -> list[str]:
        """The cluster of each conflict."""
        return [c.entity for c in self.detection]

    def scores(self, score: str = "risk_difference", n: int = 1000) -> ExpertScores:
        """Of document + question against question alone, with n resamples and sign flips."""
        return compare_routing(
            *self.stats, score=score, clusters=self.entities, n_resamples=n, n_permutations=n
        )

    def effects(self) -> ExpertEffects:
        """Of each expert on the margin of the document's answer."""
        return effects_by_expert(self.ablation, clusters=self.entities)

    def tasks(self) -> tuple[SteeringTask, SteeringTask]:
        """Answering with the document's value, on detection and on development prompts."""
        one, two = (
            answer_task(
                [c.open_book for c in conflicts],
                [c.document_answer for c in conflicts],
                clusters=[c.entity for c in conflicts],
                name="answers with the document's value",
                batch_size=BATCH,
            )
            for conflicts in (self.detection, self.development)
        )
        return one, two


class Known(Material):
    """Material of all conflicts of a world, of which splits take some without another run."""

    def part(self, detection: Sequence[int], development: Sequence[int]) -> Material:
        """The material of some conflicts, by their numbers."""
        rows = list(detection)
        part = Material(
            self.model,
            self.world,
            [self.detection[row] for row in rows],
            [self.detection[row] for row in development],
        )
        units = [[of_all[row] for row in rows] for of_all in self.units]
        part.units = (units[0], units[1])
        part.stats = (sum(map(_with_row, units[0])), sum(map(_with_row, units[1])))  # type: ignore[assignment]
        part.whole = [self.whole[row] for row in rows]
        found, chosen = self.ablation, torch.tensor(rows)
        part.ablation = replace(
            found,
            estimate=found.estimate[:, chosen],
            indices=found.indices[:, chosen],
            replacement=found.replacement[:, chosen],
            loss=found.loss[chosen],
        )
        return part


def _both(conflicts: Iterable[Conflict]) -> tuple[list[Prompt], list[Prompt]]:
    ones = [Prompt(c.open_book, {"question": c.closed_book}) for c in conflicts]
    others = [Prompt(c.closed_book, {"question": c.closed_book}) for c in conflicts]
    return ones, others


def _with_row(unit: RoutingStats) -> RoutingStats:
    """One prompt's statistics with its counts as a row, for what resamples prompts."""
    row = PromptCounts(
        torch.tensor([unit.n_tokens]), unit.counts[None].to(torch.uint8), unit.probability_sums[None].float()
    )
    return replace(unit.without("outputs"), per_prompt=row)


# Levers


def of_plan(model: RoutedModel, plan: SteeringPlan) -> Lever:
    """The plan carried out."""

    def random(seed: int, layer_matched: bool) -> Lever:
        return of_plan(model, plan.random_like(seed=seed, layer_matched=layer_matched, model=model))

    hooks = steer_hooks(plan)
    draw = random if len(plan) else None
    return Lever(lambda _: hooks, plan.deactivate, draw, plan, switched_on=plan.activate)


def plans(material: Material, plus: Iterable[Expert], minus: Iterable[Expert], **soft: Any) -> Both:
    """The experts of either direction switched off, or nudged; none where there are none."""
    shape = material.model.moe_shape
    return {
        side: of_plan(material.model, SteeringPlan(deactivate=tuple(experts)[:SIZE], shape=shape, **soft))
        for side, experts in (("+", plus), ("-", minus))
    }


def by_scores(material: Material, scores: ExpertScores, **settings: Any) -> Both:
    """The first experts of either sign, as many as there are up to `SIZE`."""
    return plans(material, *(_off(signed, **settings) for signed in (scores, -scores)))


def _off(scores: ExpertScores, **settings: Any) -> tuple[Expert, ...]:
    for size in range(SIZE, 0, -1):
        try:
            return SteeringPlan.from_scores(scores, n_deactivate=size, **settings).deactivate
        except PlanError:  # fewer of this sign, or none that is significant or stable
            continue
    return ()


def by_values(material: Material, values: Tensor) -> Both:
    """Switch off where a number is smallest for "+", largest for "-"; NaN is passed over."""
    shape = material.model.moe_shape
    known = [
        place
        for place in values.flatten().argsort(stable=True).tolist()
        if not values.flatten()[place].isnan()
    ]
    ranked = [(shape.layers[place // shape.n_experts], place % shape.n_experts) for place in known]
    return plans(material, ranked, ranked[::-1])


# Scores


def risk_difference(material: Material) -> Both:
    """SteerMoE's score: what runs more often without a document is switched off for "+"."""
    return by_scores(material, material.scores())


def log_odds_ratio(material: Material) -> Both:
    """The logarithm of the odds ratio of both activation rates."""
    return by_scores(material, material.scores("log_odds_ratio"))


def probability_difference(material: Material) -> Both:
    """Mean router probabilities in the place of rates."""
    return by_scores(material, material.scores("probability_difference"))


def paired_t(material: Material) -> Both:
    """The paired t of the pairs' risk differences."""
    return by_scores(material, material.scores("paired_t"))


def marker_npmi(material: Material) -> Both:
    """nPMI with tokens of the document's sentence."""
    return by_values(material, npmi(material.whole, MARKERS, tokenizer=material.model.tokenizer).values)


def _saliency_difference(kind: str) -> Callable[[Material], Both]:
    def method(material: Material) -> Both:
        one, other = (saliency(units, kind, n_resamples=1).values for units in material.units)
        return by_values(material, one - other)

    return method


def driver(material: Material) -> Both:
    """Experts among the half that prefers one condition most and the half with the largest effects."""
    one, other = material.stats
    groups = {"document": one, "memory": other}
    found = driver_experts(groups, material.effects(), least_tokens=0, n_resamples=1)
    return plans(material, found.both("memory", share=0.5), found.both("document", share=0.5))


def causal_effect(material: Material) -> Both:
    """Experts without which, by the estimates, the document's answer gains (or loses) most."""
    effects = material.effects()
    return plans(material, _some(effects.highest), _some(effects.lowest))


def _some(first: Callable[[int], list[Expert]]) -> list[Expert]:
    try:
        return first(SIZE)
    except DataError:  # none has such an effect
        return []


# Selections


def significant(material: Material) -> Both:
    """Of the risk difference, experts with q ≤ 0.05 only."""
    return by_scores(material, material.scores(), q=0.05)


def stable(material: Material) -> Both:
    """Of the risk difference, experts that 80 % of the resamples select, too."""
    return by_scores(material, material.scores(), stable=0.8)


def middle_layers(material: Material) -> Both:
    """Of the risk difference, experts of the middle layers."""
    return by_scores(material, material.scores(), layers="middle")


def divergent_layers(material: Material) -> Both:
    """Of the risk difference, experts of the two layers of largest route divergence."""
    found = route_divergence(*material.stats, n_resamples=2, n_permutations=1)
    rows = found.divergence.argsort(descending=True)[:2].tolist()
    return by_scores(material, material.scores(), layers=[found.shape.layers[row] for row in rows])


def searched(material: Material) -> Both:
    """`search_plan`, greedy: up to 4 of the 8 largest risk differences, by development prompts."""
    first = [(score.layer, score.expert) for score in material.scores().ranked()[:8]]
    one, development = material.tasks()
    found: list[tuple[Expert, ...]] = []
    for toward in ("higher", "lower"):
        try:
            search = search_plan(
                material.model, development, one, first, size=4, toward=toward, n_random=0, progress=False
            )
            found.append(search.plan.deactivate)
        except PlanError:  # no set moves the mean
            found.append(())
    return plans(material, *found)


# Interventions


def soft_plan(material: Material) -> Both:
    """The risk difference's experts nudged by 1.5 standard deviations."""
    return _softly(material, strength=STRENGTH)


def soft_where_needed(material: Material) -> Both:
    """The same where the router does otherwise only."""
    return _softly(material, strength=STRENGTH, only_unmet=True)


def _softly(material: Material, **soft: Any) -> Both:
    scores = material.scores()
    return plans(material, _off(scores), _off(-scores), **soft)


def activated(material: Material) -> Both:
    """The risk difference's experts switched on, not off: at most 2 in each layer, `SIZE` in all."""
    scores, shape = material.scores(), material.model.moe_shape
    both = {}
    for side, signed in (("+", scores), ("-", -scores)):
        chosen: list[Expert] = []
        for score in signed.ranked():
            full = sum(layer == score.layer for layer, _ in chosen) == shape.top_k
            if score.delta > 0 and not full and len(chosen) < SIZE:
                chosen.append((score.layer, score.expert))
        both[side] = of_plan(material.model, SteeringPlan(activate=chosen, shape=shape))
    return both


def averaged_out(material: Material) -> Both:
    """Replaces the risk difference's experts by their mean outputs, or zeros if never chosen; routes stay."""
    scores, model = material.scores(), material.model
    texts = [text for c in material.detection for text in (c.open_book, c.closed_book)]
    means, these = mean_expert_outputs(model, texts, progress=False), object()
    shape = model.moe_shape

    def lever(plan: SteeringPlan) -> Lever:
        def random(seed: int, layer_matched: bool) -> Lever:
            return lever(plan.random_like(seed=seed, layer_matched=layer_matched, model=model))

        ran = [e for e in plan.deactivate if int(means.counts[shape.layers.index(e[0]), e[1]])]
        never = [e for e in plan.deactivate if e not in ran]
        hooks = (mean_ablate(ran, means) if ran else []) + (zero_ablate(never) if never else [])
        return Lever(lambda _: hooks, plan.deactivate, random, (these, plan), on_outputs=True)

    return {
        side: lever(SteeringPlan(deactivate=_off(signed), shape=shape))
        for side, signed in (("+", scores), ("-", -scores))
    }


def learned_bias(material: Material) -> Both:
    """`learn_router_bias` toward either answer, 10 steps, stopped by development prompts."""
    return {side: _of_bias(bias) for side, bias in _learned(material, l1=0.0).items()}


def learned_plan(material: Material) -> Both:
    """The same with L1; its largest numbers become a plan of experts switched on and off."""
    return {
        side: of_plan(material.model, bias.kept(SIZE).to_plan(on_excess="drop"))
        for side, bias in _learned(material, l1=SPARSITY).items()
    }


def _learned(material: Material, l1: float) -> dict[str, RouterBias]:
    found = {}
    for side in ("+", "-"):

        def objective(conflicts: list[Conflict], side: str = side) -> Any:
            answers = [(c.document_answer, c.memory_answer)[:: 1 if side == "+" else -1] for c in conflicts]
            wanted, unwanted = zip(*answers, strict=True)
            texts = [c.open_book for c in conflicts]
            return answer_objective(material.model, texts, wanted, unwanted, batch_size=BATCH)

        found[side] = learn_router_bias(
            material.model,
            objective(material.detection),
            objective(material.development),
            l1=l1,
            learning_rate=0.3,
            max_steps=N_STEPS,
            progress=False,
        )
    return found


def _of_bias(bias: RouterBias) -> Lever:
    """The control: the same numbers given to the experts of each layer, or of all layers, at random."""

    def random(seed: int, layer_matched: bool) -> Lever:
        generator = np.random.default_rng(seed)
        values = bias.values.numpy().copy()
        mixed = (
            generator.permuted(values, axis=1)
            if layer_matched
            else generator.permutation(values.ravel()).reshape(values.shape)
        )
        return _of_bias(RouterBias(bias.shape, torch.from_numpy(mixed)))

    hooks = bias_experts(bias) if bias.numbers else []
    return Lever(lambda _: hooks, (), random if bias.numbers else None, joint=True)


def noisy(_: Material) -> Both:
    """Gumbel noise on all router logits against the model as it is: it has no direction, and no control."""
    hooks = noisy_routes(TEMPERATURE, seed=0)
    return {"+": Lever(lambda _: hooks, ()), "-": Lever(lambda _: [], ())}


def neighbours(material: Material) -> Both:
    """C3PO: the last token routed as at the 3 most similar detection prompts that were answered so.

    Similarity is the cosine of the prompts' bags of words; the control draws the 3 records at random from all
    detection prompts, whatever their answers.
    """
    model = material.model
    texts = [c.open_book for c in material.detection]
    records = record_dense(model, texts, batch_size=BATCH, progress=False)

    def lever(among: list[int], seed: int | None = None) -> Lever:
        def hooks(prompts: Sequence[str]) -> HookList:
            similarity = _cosines(prompts, [texts[row] for row in among])
            if seed is not None:
                similarity = np.random.default_rng(seed).permuted(similarity, axis=1)
            part = replace(records, weights=records.weights[:, among])
            return neighbour_routes(part, similarity, k=3)

        random = None if seed is not None else lambda n, _: lever(list(range(len(texts))), n)
        return Lever(hooks, (), random)

    both = {}
    for side in ("+", "-"):
        answers = [c.document_answer if side == "+" else c.memory_answer for c in material.detection]
        given = answers_with(model, texts, answers, batch_size=BATCH).nonzero()[:, 0].tolist()
        both[side] = lever(given) if len(given) >= 3 else Lever(lambda _: [], ())
    return both


def _cosines(ones: Sequence[str], others: Sequence[str]) -> np.ndarray:
    words = {word: number for number, word in enumerate({w for t in (*ones, *others) for w in t.split()})}
    tables = []
    for texts in (ones, others):
        table = np.zeros((len(texts), len(words)))
        for row, text in enumerate(texts):
            np.add.at(table[row], [words[word] for word in text.split()], 1)
        tables.append(table / np.linalg.norm(table, axis=1, keepdims=True))
    return tables[0] @ tables[1].T


@dataclass(frozen=True)
class Method:
    """A row of the table: what kind it is of, how it chooses, and whether judging it again is dear.

    What scores and selections find is switched off, and so shares its controls with all others.
    """

    kind: str
    choose: Callable[[Material], Both]
    dear: bool = False


METHODS: dict[str, Method] = {
    "risk difference": Method("score", risk_difference),
    "log odds ratio": Method("score", log_odds_ratio),
    "probability difference": Method("score", probability_difference),
    "paired t": Method("score", paired_t),
    "nPMI of markers": Method("score", marker_npmi),
    "REAP, difference": Method("score", _saliency_difference("reap")),
    "weighted frequency, difference": Method("score", _saliency_difference("weighted_frequency")),
    "largest output, difference": Method("score", _saliency_difference("max")),
    "driver experts": Method("score", driver),
    "significance": Method("selection", significant),
    "stability": Method("selection", stable),
    "middle layers": Method("selection", middle_layers),
    "layers of route divergence": Method("selection", divergent_layers),
    "causal effect": Method("selection", causal_effect),
    "search_plan": Method("selection", searched, dear=True),
    "soft plan": Method("intervention", soft_plan, dear=True),
    "soft plan where needed": Method("intervention", soft_where_needed, dear=True),
    "activated": Method("intervention", activated, dear=True),
    "replaced by means": Method("intervention", averaged_out, dear=True),
    "learned bias": Method("intervention", learned_bias, dear=True),
    "learned plan": Method("intervention", learned_plan, dear=True),
    "noisy routes": Method("intervention", noisy),
    "neighbours' routes": Method("intervention", neighbours, dear=True),
}
