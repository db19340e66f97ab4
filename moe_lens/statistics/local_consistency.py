"""How local routes are in time: one set of experts for a segment of tokens, and hits of a cache of experts.

segment_consistency(records, m=16).performance       # [layer], in [0, 1]: SRP
cache_hits(records, size=16, policy="lru").rate      # [layer], share of expert calls
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from moe_lens.checks import whole_number
from moe_lens.errors import DataError, warn
from moe_lens.results import Result, columns
from moe_lens.shape import MoEShape
from moe_lens.statistics.routes import PromptRouting, RouteRecord
from moe_lens.statistics.units import with_interval

if TYPE_CHECKING:
    import pandas

Routes = RouteRecord | PromptRouting | Sequence[RouteRecord | PromptRouting]
Policy = Literal["lru", "lfu", "segment"]
POLICIES: Final = get_args(Policy)
Route = Int[np.ndarray, "layer pos k"]


@dataclass(frozen=True, eq=False, repr=False)
class SegmentConsistency(Result):
    """How well one set of experts serves m tokens in a row; every tensor is [layer], float64.

    Attributes:
        shape: the model; rows are `shape.layers`.
        m: tokens of a segment.
        performance: SRP, the best F1 of a set of experts a segment, in (0, 1]; 1 where routes never change.
        low, high: its interval over prompts; None for a single prompt.
        size_ratio: experts of these sets over k, on average.
        threshold: in how many of a segment's m tokens an expert must run to be in its set, int64.
        n_prompts: prompts with m tokens or more.
        level: of the interval.
    """

    shape: MoEShape
    m: int
    performance: Float[Tensor, "layer"]
    low: Float[Tensor, "layer"] | None
    high: Float[Tensor, "layer"] | None
    size_ratio: Float[Tensor, "layer"]
    threshold: Int[Tensor, "layer"]
    n_prompts: int
    level: float

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per layer: layer, performance, low, high, size_ratio, threshold."""
        import pandas

        names = ("performance", "low", "high", "size_ratio", "threshold")
        table = columns(**{name: getattr(self, name) for name in names})
        return pandas.DataFrame({"layer": self.shape.layers, **table})

    def summary(self) -> str:
        """Mean over layers, segments, prompts, and the model."""
        return (
            f"segments of {self.m} tokens: SRP {self.performance.mean():.3f}, mean over layers, with "
            f"{self.size_ratio.mean():.2f} k experts; {self.n_prompts} prompts; {self.shape.words}"
        )


def segment_consistency(
    routes: Routes,
    m: int,
    *,
    mask: Shaped[Tensor, "batch pos"] | Any = None,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> SegmentConsistency:
    """Segment routing best performance: how well a fixed set of experts predicts the routes of m tokens.

    >>> from moe_lens import organisms, route_prompt, segment_consistency
    >>> model = organisms.load("specialised")
    >>> routes = [route_prompt(model, p) for p in ("Question : what is the", "Document : the", "the")]
    >>> found = segment_consistency(routes, 2)
    >>> found.performance.shape, bool((found.performance <= 1).all()), found.n_prompts
    (torch.Size([4]), True, 3)

    SRP(m) = max over t of 2 Σ matches / (Σ predictions + Σ activations), over all segments of m consecutive
    tokens (every position begins one; none crosses prompts): the set of a segment are the experts that run at
    t or more of its tokens, it predicts each of them at all m (predictions: m a segment and expert), matches
    are the tokens where they do run, activations k · m a segment (arXiv 2505.16056). One t for a layer. It is
    an upper bound, made with knowledge of the segment; independent routes have more than 0, too: compare
    models or layers of the same k, number of experts and m.

    Args:
        routes: a `RouteRecord`, a `PromptRouting` (`route_prompt`), or a list of such; every row is a prompt.
        m: tokens of a segment, 1 or more; shorter prompts are left out.
        mask: bool [batch pos], where prompts' own tokens are, for one record of padded prompts. A prompt's
            tokens must be consecutive.
        level: confidence level of the intervals.
        n_resamples: bootstrap resamples of the prompts.
        seed: the same seed gives the same intervals.

    Raises:
        DataError: no routes, of different models, or none of m tokens; a mask of another shape, or with gaps.
    """
    length = whole_number(m, "m", least=1)
    shape, prompts = _prompts("segment_consistency", routes, mask)
    prompts = [route for route in prompts if route.shape[1] >= length]
    if not prompts:
        raise DataError(f"No prompt has {length} tokens; choose a smaller m.")
    histograms = np.stack([_histogram(route, length, shape.n_experts) for route in prompts])
    settings = {"level": level, "n_resamples": n_resamples, "seed": seed}
    best, low, high = with_interval(lambda h: _f1(h).max(-1), [histograms], limits=(0.0, 1.0), **settings)
    total = histograms.sum(0)
    threshold = _f1(total).argmax(-1) + 1
    n_segments = total.sum(-1) / shape.n_experts
    sizes = [total[row, first:].sum() for row, first in enumerate(threshold)]
    return SegmentConsistency(
        shape,
        length,
        best,
        low,
        high,
        torch.from_numpy(np.array(sizes) / n_segments / shape.top_k),
        torch.from_numpy(threshold),
        len(prompts),
        level,
    )


def _histogram(route: Route, m: int, n_experts: int) -> Float[np.ndarray, "layer times"]:
    """In each layer, how many pairs of segment and expert meet 0, 1, ... m times."""
    n_layers, n_pos, _ = route.shape
    runs = np.zeros((n_layers, n_pos + 1, n_experts), dtype=np.int64)
    np.put_along_axis(runs[:, 1:], route, 1, axis=-1)
    up_to = runs.cumsum(1)
    met = up_to[:, m:] - up_to[:, :-m]  # [layer segment expert]
    return np.stack([np.bincount(row.ravel(), minlength=m + 1) for row in met]).astype(np.float64)


def _f1(histogram: Float[np.ndarray, "*rows times"]) -> Float[np.ndarray, "*rows threshold"]:
    """F1 of the sets of experts that meet a segment t times or more, t from 1 to m."""
    times = np.arange(histogram.shape[-1])
    m = times[-1]
    matches = (histogram * times)[..., ::-1].cumsum(-1)[..., ::-1]
    predictions = m * histogram[..., ::-1].cumsum(-1)[..., ::-1]
    return (2 * matches / (predictions + matches[..., :1]))[..., 1:]


@dataclass(frozen=True, eq=False, repr=False)
class CacheHits(Result):
    """How often a cache of experts holds what a token needs; every tensor is [layer], float64.

    Attributes:
        shape: the model; rows are `shape.layers`.
        policy: "lru", "lfu" or "segment".
        size: experts of each layer that the cache holds.
        rate: hits / (tokens × k), in [0, 1].
        low, high: its interval over prompts; None for a single prompt.
        n_prompts: prompts counted.
        level: of the interval.
    """

    shape: MoEShape
    policy: str
    size: int
    rate: Float[Tensor, "layer"]
    low: Float[Tensor, "layer"] | None
    high: Float[Tensor, "layer"] | None
    n_prompts: int
    level: float

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per layer: layer, rate, low, high."""
        import pandas

        table = columns(rate=self.rate, low=self.low, high=self.high)
        return pandas.DataFrame({"layer": self.shape.layers, **table})

    def summary(self) -> str:
        """Policy, size, mean rate over layers, prompts, and the model."""
        return (
            f"{self.policy}, {self.size} experts a layer: hit rate {self.rate.mean():.3f}, mean over layers; "
            f"{self.n_prompts} prompts; {self.shape.words}"
        )


def cache_hits(
    routes: Routes,
    size: int,
    policy: Policy = "lru",
    *,
    m: int | None = None,
    mask: Shaped[Tensor, "batch pos"] | Any = None,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> CacheHits:
    """Share of expert calls that a cache of `size` experts in each layer would serve.

    >>> from moe_lens import cache_hits, organisms, route_prompt
    >>> model = organisms.load("specialised")
    >>> routes = [route_prompt(model, p) for p in ("Question : what is the", "Document : the", "the")]
    >>> [float(cache_hits(routes, 8, policy).rate.max()) < 1 for policy in ("lru", "lfu")]
    [True, True]
    >>> float(cache_hits(routes, 8, "segment", m=2).rate.min())             # room for all experts
    1.0

    Every prompt begins with an empty cache, so its first calls are misses. A token's k experts are looked up
    all at once, before any of them is loaded; those that miss are loaded and stay at least for the token.

    - "lru": evicts the expert whose last use is longest ago; of experts that a token used together, first the
      one that the router ranks lower.
    - "lfu": evicts the expert used least often in this prompt so far, evicted or not in between; of equals
      the one whose last use is longest ago.
    - "segment": no real cache but a bound, the first version's SCH of arXiv 2505.16056: for each segment of m
      tokens the `size` experts that it uses most, known beforehand; the share of its calls that they serve.

    Args:
        routes: as in `segment_consistency`.
        size: from k to the number of experts.
        policy: "lru", "lfu", or "segment".
        m: tokens of a segment, for "segment" only; shorter prompts are left out.
        mask: as in `segment_consistency`.
        level: confidence level of the intervals.
        n_resamples: bootstrap resamples of the prompts.
        seed: the same seed gives the same intervals.

    Raises:
        DataError: as `segment_consistency`; another policy, a size below k or above the number of experts.
    """
    if policy not in POLICIES:
        raise DataError(f"policy must be one of {', '.join(POLICIES)}; got {policy!r}.")
    if (m is None) == (policy == "segment"):
        raise DataError(
            f"m is the length of a segment, which policy='segment' needs and no other; got {m!r}."
        )
    shape, prompts = _prompts("cache_hits", routes, mask)
    number = whole_number(
        size, "size", least=shape.top_k, most=shape.n_experts, remedy="A token's k experts must have room."
    )
    if m is not None:
        length = whole_number(m, "m", least=1)
        prompts = [route for route in prompts if route.shape[1] >= length]
        if not prompts:
            raise DataError(f"No prompt has {length} tokens; choose a smaller m.")
        counted = [_segment_hits(route, length, number, shape.n_experts) for route in prompts]
    else:
        counted = [
            (np.array([_hits(layer, number, policy == "lfu") for layer in route]), route[0].size)
            for route in prompts
        ]
    hits, calls = np.stack([h for h, _ in counted]), np.array([float(n) for _, n in counted])
    settings = {"level": level, "n_resamples": n_resamples, "seed": seed}
    rate, low, high = with_interval(lambda h, n: h / n[:, None], [hits, calls], limits=(0.0, 1.0), **settings)
    return CacheHits(shape, policy, number, rate, low, high, len(prompts), level)


def _hits(route: Int[np.ndarray, "pos k"], size: int, by_count: bool) -> int:
    """Hits of one layer's cache along one prompt."""
    used: Counter[int] = Counter()
    last: dict[int, tuple[int, int]] = {}  # when, and the router's rank (lower ranks go first)
    held: set[int] = set()
    hits = 0
    for time, experts in enumerate(route.tolist()):
        hits += sum(expert in held for expert in experts)
        for rank, expert in enumerate(experts):
            used[expert] += 1
            last[expert] = (time, -rank)
        held |= set(experts)
        while len(held) > size:
            free = held - set(experts)
            held.remove(min(free, key=lambda e: (used[e] if by_count else 0, last[e])))
    return hits


def _segment_hits(route: Route, m: int, size: int, n_experts: int) -> tuple[Float[np.ndarray, "layer"], int]:
    """Calls of all segments that their `size` busiest experts serve, and all calls."""
    n_layers, n_pos, k = route.shape
    runs = np.zeros((n_layers, n_pos + 1, n_experts), dtype=np.int64)
    np.put_along_axis(runs[:, 1:], route, 1, axis=-1)
    up_to = runs.cumsum(1)
    met = np.sort(up_to[:, m:] - up_to[:, :-m], axis=-1)[..., n_experts - size :]
    return met.sum((1, 2)).astype(np.float64), (n_pos - m + 1) * m * k


def _prompts(who: str, routes: Any, mask: Any) -> tuple[MoEShape, list[Route]]:
    """Each prompt's own tokens, one after the other."""
    given = [routes] if isinstance(routes, RouteRecord | PromptRouting) else list(_listed(who, routes))
    for each in given:
        if not isinstance(each, RouteRecord | PromptRouting):
            raise DataError(f"{who} needs RouteRecords or PromptRoutings; got {type(each).__name__}.")
        if differences := given[0].shape.differences(each.shape):
            raise DataError(f"{who}: the routes are of different models: {'; '.join(differences)}.")
    if not given:
        raise DataError(f"{who} needs routes of at least one prompt.")
    if mask is not None and (len(given) > 1 or isinstance(given[0], PromptRouting)):
        raise DataError("A mask is for a single RouteRecord of padded prompts; give its prompts one by one.")
    return given[0].shape, [route for each in given for route in _rows(each, mask)]


def _listed(who: str, routes: Any) -> Iterable[Any]:
    if not isinstance(routes, Iterable):
        raise DataError(f"{who} needs RouteRecords or PromptRoutings; got {type(routes).__name__}.")
    return routes


def _rows(routes: RouteRecord | PromptRouting, mask: Any) -> Iterator[Route]:
    if isinstance(routes, PromptRouting):
        yield _checked(routes.indices.numpy())
        return
    indices = routes.indices.numpy().astype(np.int64)  # [layer batch pos k]
    n_rows, n_columns = indices.shape[1:3]
    if mask is None and n_rows > 1:
        warn(
            "A RouteRecord does not say which columns are padding, so every column is counted. Pass mask= if "
            "the prompts were padded."
        )
    kept: Bool[np.ndarray, "batch pos"] = np.ones((n_rows, n_columns), dtype=bool)
    if mask is not None:
        kept = np.asarray(torch.as_tensor(mask).cpu()).astype(bool)
        if kept.shape != (n_rows, n_columns):
            raise DataError(f"The mask has shape {kept.shape}, the record {n_rows, n_columns} (batch, pos).")
    for row, own in enumerate(kept):
        places = np.flatnonzero(own)
        if not len(places):
            raise DataError(f"The mask selects no token of prompt {row}.")
        if places[-1] - places[0] + 1 != len(places):
            raise DataError(f"The mask of prompt {row} has gaps; segments are of consecutive tokens.")
        yield _checked(indices[:, row, places])


def _checked(route: Route) -> Route:
    if (np.diff(np.sort(route, axis=-1), axis=-1) == 0).any():
        raise DataError("A token's route names an expert twice; did a hook on the top-k indices do that?")
    return route
