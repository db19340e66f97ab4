"""Can a behaviour be read from which experts run, in groups never seen, better than from the words?

units = collect_by_prompt(model, prompts, vocabulary=True)
probe = route_probe(units, labels, groups=topics)
probe.auroc, probe.bag_auroc, probe.difference
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float

from moe_lens.checks import chosen_layers, share, whole_number
from moe_lens.detection.ridge_logistic import auroc, concordance, held_out_scores, stratified_folds
from moe_lens.errors import DataError
from moe_lens.resampling import FEW_UNITS, bounds_of
from moe_lens.results import Result
from moe_lens.shape import MoEShape
from moe_lens.statistics.sums import RoutingSums
from moe_lens.statistics.units import Units, as_units

if TYPE_CHECKING:
    import pandas

_FOLDS: Final = 10


class Area(NamedTuple):
    """An area under the ROC curve, or a difference of two, and its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False, repr=False)
class RouteProbe(Result):
    """How well held-out prompts' labels are read from their routes, and from their words.

    Attributes:
        shape: the model.
        positive, negative: the two labels; scores are log odds of the first.
        auroc: of the probe on expert rates; 0.5 is chance, 1 perfect.
        bag_auroc: of the same probe on the shares of each token of the vocabulary.
        difference: auroc − bag_auroc, on the same draws of prompts.
        groups: name of each held-out group (fold 0, 1, ... where none were given).
        by_group: (auroc, bag_auroc) of each group; NaN where it holds one label only.
        scores, bag_scores: [prompt], log odds when its group was held out.
        n_prompts: prompts.
        level: of the intervals.
    """

    shape: MoEShape
    positive: str
    negative: str
    auroc: Area
    bag_auroc: Area
    difference: Area
    groups: tuple[str, ...]
    by_group: tuple[tuple[float, float], ...]
    scores: Float[np.ndarray, "prompt"]
    bag_scores: Float[np.ndarray, "prompt"]
    n_prompts: int
    level: float

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row a group: group, auroc, bag_auroc."""
        import pandas

        rows = [(name, *areas) for name, areas in zip(self.groups, self.by_group, strict=True)]
        return pandas.DataFrame(rows, columns=["group", "auroc", "bag_auroc"])

    def summary(self) -> str:
        """Both areas, their difference with its interval, and what was held out."""
        return (
            f"{self.positive} / {self.negative}: AUROC {self.auroc.value:.3f} of routes, "
            f"{self.bag_auroc.value:.3f} of words, difference {self.difference.value:+.3f} "
            f"[{self.difference.low:+.3f}, {self.difference.high:+.3f}]; {self.n_prompts} prompts"
        )


def route_probe(
    stats: Units,
    labels: Iterable[Any],
    *,
    groups: Iterable[Any] | None = None,
    tokens: Iterable[Any] | None = None,
    layers: Any = None,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> RouteProbe:
    """Leave-one-group-out AUROC of a linear probe on expert rates, beside the same probe on the words.

    >>> from moe_lens import collect_by_prompt, organisms, route_probe
    >>> model, world = organisms.load("specialised"), organisms.world("specialised")
    >>> conflicts = world.conflicts("detection")
    >>> prompts = [text for c in conflicts[:12] for text in (c.open_book, c.closed_book)]
    >>> units = collect_by_prompt(model, prompts, vocabulary=True, progress=False)
    >>> topics = [c.entity for c in conflicts[:12] for _ in range(2)]
    >>> probe = route_probe(units, ["document", "memory"] * 12, groups=topics)
    >>> probe.auroc.value > 0.9, probe.bag_auroc.value > 0.9           # a document can be seen in the words
    (True, True)

    RouteScan (arXiv 2605.24817) classifies prompts by counts of tokens per expert. Routing is mostly topical
    (2605.29708), and a document, a language or a template changes the words as well as the route: so the
    number to look at is `difference`. Features are, of each prompt, the share of its tokens that chose each
    expert of each layer, and, for the baseline, the share of each token of the vocabulary (a bag of tokens,
    of the tokens that count). Both go through the same ridge logistic regression: features standardised on
    the training prompts, the ridge chosen there from five by 5 folds.

    Each group is held out once. Only prompts of one held-out group are compared with each other: scores of
    different regressions are not on one scale, and where single prompts are left out, each is pushed away
    from its own label (nothing at all to read then looks like an AUROC of 0). So one group at least must hold
    both labels. Without groups: 10 random folds; then prompts alike in all but the label (pairs, templates)
    may be in training and test, and inflate both areas.

    Intervals resample whole groups, and in each of these its prompts of either label (the regressions are not
    run again). They want ten groups or so; of fewer they hold at least the t interval over groups
    (`moe_lens.resampling.bounds_of`), and `by_group` shows all there is.

    Args:
        stats: from `collect_by_prompt(..., vocabulary=True)`, one a prompt; or RoutingStats with per_prompt
            counts, which need `tokens`.
        labels: one a prompt, of two kinds; the positive one is True, 1, or the later in alphabetical order.
        groups: one a prompt (topics, templates, sources); a group is held out as a whole.
        tokens: the ids of the tokens of each prompt that counted, where `stats` has no vocabulary by prompt.
        layers: use these only; numbers, or "early", "middle", "late".
        level: confidence level of the intervals.
        n_resamples: bootstrap resamples.
        seed: of folds and resamples.

    Raises:
        DataError: not one label (and group) a prompt, not two kinds of labels with two prompts each, one
        group
            only, a group outside of which there is one label only, or no tokens for the baseline.
    """
    share(level, "level")
    draws, seed = whole_number(n_resamples, "n_resamples", least=1), whole_number(seed, "seed")
    shape, rates, bag = _features(stats, tokens)
    rows = [shape.layers.index(layer) for layer in chosen_layers(layers, shape.layers)]
    routes = rates[:, rows].reshape(len(rates), -1)
    is_positive, names = _two_kinds(labels, len(routes))
    group, group_names = _groups(groups, is_positive, seed)
    scores, bag_scores = np.zeros(len(routes)), np.zeros(len(routes))
    for number, name in enumerate(group_names):
        test = group == number
        if is_positive[~test].all() or not is_positive[~test].any():
            raise DataError(
                f"Without group {name!r} all prompts are labelled alike, so nothing can be learnt; give more "
                "groups, or others."
            )
        scores[test] = held_out_scores(routes, is_positive, test, seed)
        bag_scores[test] = held_out_scores(bag, is_positive, test, seed)
    members = [group == number for number in range(len(group_names))]
    whole = [m for m in members if is_positive[m].any() and not is_positive[m].all()]
    if not whole:
        raise DataError(
            "No group holds both labels, so no held-out prompts can be compared; join groups of either label."
        )
    tables = [[concordance(s[m], is_positive[m]) for m in whole] for s in (scores, bag_scores)]
    areas = _areas(tables, draws, level, seed)
    by_group = tuple(
        (_area_of(scores[m], is_positive[m]), _area_of(bag_scores[m], is_positive[m])) for m in members
    )
    return RouteProbe(shape, *names, *areas, group_names, by_group, scores, bag_scores, len(routes), level)


def _area_of(scores: Float[np.ndarray, "_"], labels: Bool[np.ndarray, "_"]) -> float:
    """NaN where there is one label only."""
    return float("nan") if labels.all() or not labels.any() else auroc([concordance(scores, labels)])


def _features(
    stats: Any, tokens: Any
) -> tuple[MoEShape, Float[np.ndarray, "prompt layer expert"], Float[np.ndarray, "prompt vocab"]]:
    """Rates of experts, and shares of tokens, of each prompt."""
    units = as_units("route_probe", stats)
    if len(units) == 1 and units[0].per_prompt is not None:
        prompts = units[0].per_prompt
        n_tokens = prompts.n_tokens.numpy()
        if not (n_tokens > 0).all():
            raise DataError("A prompt has no counted token, so it has no rates; leave it out.")
        rates = prompts.counts.double().numpy() / n_tokens[:, None, None]
        return units[0].shape, rates, _bag_of(tokens, n_tokens)
    if tokens is not None:
        raise DataError("tokens are for RoutingStats with per_prompt counts; units know their own.")
    rates = np.stack([(unit.counts.double() / unit.n_tokens).numpy() for unit in units])
    return units[0].shape, rates, _bag_of_units(units)


def _bag_of(tokens: Any, n_tokens: np.ndarray) -> Float[np.ndarray, "prompt vocab"]:
    if tokens is None:
        raise DataError(
            "The baseline needs each prompt's tokens: pass tokens=, or what collect_by_prompt(..., "
            "vocabulary=True) gives."
        )
    rows = [torch.as_tensor(row).flatten().long() for row in tokens]
    if [len(row) for row in rows] != n_tokens.tolist():
        raise DataError(
            "tokens must be, for each prompt, the ids of its counted tokens; their numbers differ from those "
            "of the statistics (special tokens, spans?)."
        )
    longest = 1 + max(int(row.max()) for row in rows)
    return np.stack([torch.bincount(row, minlength=longest).double().numpy() / len(row) for row in rows])


def _bag_of_units(units: list[RoutingSums]) -> Float[np.ndarray, "prompt vocab"]:
    totals = []
    for unit in units:
        if unit.vocabulary is None:
            raise DataError(
                "The baseline needs each prompt's tokens; collect_by_prompt(..., vocabulary=True) keeps them."
            )
        totals.append(unit.vocabulary.totals.double().numpy())
    longest = max(map(len, totals))
    return np.stack([np.pad(row, (0, longest - len(row))) / row.sum() for row in totals])


def _two_kinds(labels: Any, n_prompts: int) -> tuple[Bool[np.ndarray, "prompt"], tuple[str, str]]:
    """Which prompts are positive; the names of the positive and the negative label."""
    given = [label.item() if isinstance(label, np.generic | torch.Tensor) else label for label in labels]
    if len(given) != n_prompts:
        raise DataError(f"{n_prompts} prompts need as many labels; got {len(given)}.")
    kinds = sorted(set(given), key=lambda label: (str(type(label)), label))
    if len(kinds) != 2:
        raise DataError(f"labels must be of two kinds (one against the rest); got {len(kinds)}: {kinds[:4]}.")
    positive = np.array([label == kinds[1] for label in given])
    if min(positive.sum(), (~positive).sum()) < 2:
        raise DataError("Each label needs two prompts at least.")
    return positive, (str(kinds[1]), str(kinds[0]))


def _groups(groups: Any, labels: Bool[np.ndarray, "prompt"], seed: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """The number of each prompt's group, and the names of the groups."""
    if groups is None:
        n_folds = min(_FOLDS, int(labels.sum()), int((~labels).sum()))
        return stratified_folds(labels, n_folds, seed), tuple(f"fold {fold}" for fold in range(n_folds))
    given = [str(group) for group in groups]
    if len(given) != len(labels):
        raise DataError(f"{len(labels)} prompts need as many groups; got {len(given)}.")
    names = tuple(dict.fromkeys(given))
    if len(names) < 2:
        raise DataError("Leaving a group out needs two at least.")
    return np.array([names.index(group) for group in given]), names


def _areas(
    tables: list[list[Float[np.ndarray, "_ _"]]], n_resamples: int, level: float, seed: int
) -> tuple[Area, Area, Area]:
    """Both areas and their difference, from the same draws of groups and of prompts in them.

    Args:
        tables: of either probe, the concordance of the pairs of each group.
    """
    rng = np.random.default_rng([seed, 1])
    sums, pairs = np.zeros((2, n_resamples)), np.zeros(n_resamples)
    groups = _drawn(rng, len(tables[0]), n_resamples)
    for number, both in enumerate(zip(*tables, strict=True)):
        positive, negative = (_drawn(rng, n, n_resamples) for n in both[0].shape)
        for row, table in enumerate(both):
            sums[row] += groups[:, number] * ((positive @ table) * negative).sum(1)
        pairs += groups[:, number] * both[0].size
    values = [auroc(table) for table in tables]
    draws = sums / pairs
    tails, n_groups = [(1 - level) / 2, (1 + level) / 2], len(tables[0])

    def area(value: float, resampled: np.ndarray, least: float = 0.0) -> Area:
        bounds: Any = np.quantile(resampled, tails)
        if n_groups < FEW_UNITS:
            bounds = bounds_of(value, resampled, n_groups, level)
        low, high = np.clip(bounds, least, 1)
        return Area(value, float(low), float(high))

    return (
        area(values[0], draws[0]),
        area(values[1], draws[1]),
        area(values[0] - values[1], draws[0] - draws[1], least=-1.0),
    )


def _drawn(rng: np.random.Generator, n: int, n_resamples: int) -> Float[np.ndarray, "draw unit"]:
    """How often each of n units is drawn."""
    return rng.multinomial(n, np.full(n, 1 / n), n_resamples).astype(np.float64)
