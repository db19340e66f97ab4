"""Which experts run, how often and with what weight: `RoutingStats`, from a cache.

    _, cache = model.run_with_cache(prompts)
    stats = RoutingStats.from_cache(cache)
    stats.rates                                            # [layer expert], share of tokens, in [0, 1]
    stats.top_experts(10, layer=3)                         # the ten busiest of a layer
    (stats + other).save("stats.safetensors")

Counts are exact integers; means come from sums in float64.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from jaxtyping import Float, Shaped
from torch import Tensor

from moe_lens import hook_names
from moe_lens.checks import whole_number
from moe_lens.errors import DataError
from moe_lens.routers.layouts import RouterOutput
from moe_lens.routers.rule import RoutingRule
from moe_lens.shape import UNKNOWN_MODEL, MoEShape
from moe_lens.statistics.balance import LoadBalance, load_balance
from moe_lens.statistics.cache import (
    as_prompts,
    checked_mask,
    counted_tokens,
    every_token,
    known_model,
    known_padding,
    positions_in_prompts,
)
from moe_lens.statistics.co_routing import (
    AdjacentOverlap,
    CoActivation,
    Transitions,
    adjacent_overlap,
)
from moe_lens.statistics.counting import RoutingCounter, Wanted
from moe_lens.statistics.sums import RoutingSums

if TYPE_CHECKING:
    import pandas

_REMEDIES: Final = {
    "margin_sums": "give from_cache the rules of the layers, or use collect_routing.",
    "by_position": "collect them with positions=True.",
    "outputs": "collect them with outputs=True.",
}


@dataclass(frozen=True, eq=False, repr=False)
class RoutingStats(RoutingSums):
    """Routing counts over `n_tokens` token positions; every tensor is on the CPU.

    >>> from moe_lens import RoutingStats, organisms
    >>> model = organisms.load("specialised")
    >>> _, cache = model.run_with_cache(["Question : what is", "Document : the"])
    >>> stats = RoutingStats.from_cache(cache)
    >>> stats.rates.shape, float(stats.rates.sum(-1)[0])     # rates of one layer sum to k
    (torch.Size([4, 8]), 2.0)
    >>> stats.coactivation.lift.shape, stats.load_balance().gini.shape, stats.mean_entropy.shape
    (torch.Size([4, 8, 8]), torch.Size([4]), torch.Size([4]))

    Statistics of other tokens are added with `+`, which adds every field; only fields that both have can be
    added (`without`, `summary` drop some).

    Attributes:
        shape: the model, its MoE layers (the rows), number of experts (the columns) and k.
        n_tokens: how many token positions were counted.
        counts: [layer expert], int64, at how many of them the expert was among the top-k.
        probability_sums: [layer expert], float64, sum over tokens of softmax(router logits) over all.
        weight_sums: [layer expert], float64, sum over tokens of the routing weight, 0 where not chosen.
        entropy_sums: [layer], float64, nats, sum over tokens of `router_entropy`.
        margin_sums: [layer], float64, sum over tokens of the rule's `routing_margin`; inf where no change of
            logits changes the choice (a table by token id, k = number of experts), NaN where the rule cannot
            tell. None where the rules were not known.
        co_routing: experts that run together: in one layer, at adjacent tokens, in consecutive MoE layers.
        per_prompt: counts of each prompt; None unless requested.
        by_position: counts at each position; None unless requested.
        vocabulary: counts by token of the vocabulary; None unless requested.
        outputs: how large what each expert gave is; None unless requested.
    """

    @classmethod
    def from_cache(
        cls,
        cache: Mapping[str, Tensor] | Any,
        mask: Shaped[Tensor, "*batch"] | Any = None,
        *,
        rules: Mapping[int, RoutingRule] | None = None,
        tokens: Shaped[Tensor, "*batch"] | Any = None,
        attention_mask: Shaped[Tensor, "*batch"] | Any = None,
        per_prompt: bool = False,
        positions: bool = False,
        vocabulary: bool = False,
    ) -> "RoutingStats":
        """Count the routing in a cache of `run_with_cache` (or a dictionary of its tensors).

        Args:
            cache: must hold router logits [*batch expert], top-k indices and weights [*batch k] of every MoE
                layer that is to be counted (`names_filter=is_routing_point` keeps just those). The last
                dimension of the batch are the positions of one prompt; a batch [pos] (remove_batch_dim=True)
                is a single prompt.
            mask: [*batch], true (or 1) where a token counts. None: every position but padding, where that is
                known. Of a dictionary of tensors every position counts, with a warning if there are several
                prompts.
            rules: the routing rule of each layer, for margins. None: those of the cache's model.
            tokens: [*batch], the tokens of the run, for `vocabulary`.
            attention_mask: [*batch], true where a prompt's own tokens are. None: what the cache of a
                HookedMoE knows (`cache.attention_mask`: the run got a list of strings, an attention_mask, or
                tokens that have no padding at their ends).
            per_prompt: also count each prompt by itself.
            positions: also count each position by itself, from each prompt's own first token on.
            vocabulary: also count by token of the vocabulary.

        Raises:
            DataError: no routing in the cache, a layer without one of the three tensors, layers of different
                tokens, experts that are not there, a mask of another shape or other values, or one that
                selects nothing, NaN logits, `vocabulary` without tokens, `positions` under a mask where the
                padding is not known; without a mask, a run that got padded tokens without an attention_mask.
        """
        points = hook_names.points_of(cache)
        hook_names.check_points(points)
        batch = next(iter(points.values()))[hook_names.TOPK_INDICES].shape[:-1]
        real = known_padding(cache, attention_mask, batch)
        keep = checked_mask(every_token(cache, real, batch) if mask is None else mask, batch)
        known = known_model(cache)
        if rules is None and known is not None:
            rules = known.rules
        rows = as_prompts(keep)
        masked = mask is not None
        counter = RoutingCounter(
            rules, Wanted(per_prompt, positions, vocabulary), known.n_vocab if known else 0
        )
        counter.begin(
            rows,
            position=positions_in_prompts(rows, real, masked) if positions else None,
            tokens=counted_tokens(tokens, keep) if vocabulary else None,
        )
        if rules is not None and (missing := sorted(set(points) - set(rules))):
            raise DataError(f"rules lacks layer {missing[0]}; it has {sorted(rules)}.")
        for layer, tensors in points.items():
            logits, indices, weights = (tensors[point].flatten(0, -2) for point in hook_names.POINTS)
            counter.see(layer, RouterOutput(logits, weights, indices))
        counter.end()
        name = UNKNOWN_MODEL if known is None else known.shape.model
        return cls(MoEShape(name, tuple(points), *counter.sizes()), **counter.values())

    @property
    def rates(self) -> Float[Tensor, "layer expert"]:
        """Activation rate: share of the counted tokens at which the expert was chosen, in [0, 1], float64."""
        return self.counts.double() / self.n_tokens

    @property
    def mean_probability(self) -> Float[Tensor, "layer expert"]:
        """Mean router probability, in [0, 1]; rows sum to 1.

        That is softmax over all experts' logits, also where the router itself scores otherwise (by a sigmoid,
        say), so that models can be compared.
        """
        return self.probability_sums / self.n_tokens

    @property
    def mean_weight(self) -> Float[Tensor, "layer expert"]:
        """Mean routing weight over all counted tokens, 0 where the expert was not chosen."""
        return self.weight_sums / self.n_tokens

    @property
    def mean_weight_when_chosen(self) -> Float[Tensor, "layer expert"]:
        """Mean routing weight over the tokens that chose the expert; NaN for an expert never chosen."""
        return self.weight_sums / self.counts.double()

    @property
    def mean_entropy(self) -> Float[Tensor, "layer"]:
        """Mean over tokens of `router_entropy`, nats, in [0, ln n_experts], float64."""
        return self._have("entropy_sums") / self.n_tokens

    @property
    def mean_margin(self) -> Float[Tensor, "layer"]:
        """Mean over tokens of the rule's `routing_margin`, ≥ 0, float64, in units of its selection scores.

        The rule is the model's own, without steering. inf and NaN as in `margin_sums`.
        """
        return self._have("margin_sums") / self.n_tokens

    @property
    def coactivation(self) -> CoActivation:
        """Pairs of experts of a layer that run for the same token: counts, Jaccard, lift."""
        return CoActivation(self._have("co_routing").coactivation, self.n_tokens)

    @property
    def adjacent_overlap(self) -> AdjacentOverlap:
        """Share of experts that consecutive tokens have in common, beside what independence would give."""
        return adjacent_overlap(self._have("co_routing"), self.counts, self.n_tokens, self.shape.top_k)

    @property
    def transitions(self) -> Transitions:
        """From the experts of one MoE layer to those of the next: counts, P(j | i), lift."""
        return Transitions(self._have("co_routing").transitions, self.counts, self.n_tokens)

    @property
    def position_rates(self) -> Float[Tensor, "pos layer expert"]:
        """Activation rate at each position of the prompts, in [0, 1], float64; NaN where no token counts."""
        return self._have("by_position").rates

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per expert, in order: layer, expert, count, rate, mean_probability, mean_weight."""
        import pandas

        columns = {
            "count": self.counts,
            "rate": self.rates,
            "mean_probability": self.mean_probability,
            "mean_weight": self.mean_weight,
        }
        values = {name: tensor.flatten().numpy() for name, tensor in columns.items()}
        return pandas.DataFrame({**self.shape.grid(), **values})

    def top_experts(self, n: int, layer: int | None = None) -> "pandas.DataFrame":
        """The n experts that are chosen most often: the rows of `to_dataframe`, largest rate first.

        >>> from moe_lens import collect_routing, organisms
        >>> stats = collect_routing(organisms.load("specialised"), "Question : what is", progress=False)
        >>> list(stats.top_experts(3, layer=2)["rate"])
        [0.8, 0.8, 0.2]

        Ties are in the order of layer and expert.

        Args:
            layer: of this layer only; None: of all layers together.

        Raises:
            DataError: a layer without experts, or an n that is not between 1 and the number of experts.
        """
        if layer is not None and layer not in self.shape.layers:
            raise DataError(f"Layer {layer!r} has no counts here; those that have: {self.shape.layers}.")
        frame = self.to_dataframe()
        frame = frame if layer is None else frame.loc[frame["layer"] == layer]
        where = "all layers together" if layer is None else f"layer {layer}"
        number = whole_number(n, "n", least=1, most=len(frame), remedy=f"These are the experts of {where}.")
        ranked = frame.sort_values("rate", ascending=False, kind="stable")
        return ranked.iloc[:number].reset_index(drop=True)

    def load_balance(self) -> LoadBalance:
        """How evenly each layer's choices fall on its experts: entropy, Gini, max / mean, busiest experts."""
        return load_balance(self)

    def _have(self, name: str) -> Any:
        if (value := getattr(self, name)) is None:
            raise DataError(
                f"These RoutingStats hold no {name}; {_REMEDIES.get(name, 'collect them again.')}"
            )
        return value


def is_routing_point(name: str) -> bool:
    """A `names_filter` for `run_with_cache` that keeps what `RoutingStats.from_cache` needs.

    >>> from moe_lens import RoutingStats, is_routing_point, organisms
    >>> model = organisms.load("specialised")
    >>> _, cache = model.run_with_cache("Document : the", names_filter=is_routing_point)
    >>> RoutingStats.from_cache(cache).n_tokens
    4
    """
    parsed = hook_names.parse(name)
    return parsed is not None and parsed[1] in hook_names.POINTS
