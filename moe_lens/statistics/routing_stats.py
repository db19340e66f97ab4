"""Which experts run, how often and with what weight: `RoutingStats`, from a cache.

    _, cache = model.run_with_cache(prompts)
    stats = RoutingStats.from_cache(cache)
    stats.rates                                            # [layer expert], share of tokens, in [0, 1]
    stats.top_experts(10, layer=3)                         # the ten busiest of a layer
    (stats + other).save("stats.safetensors")

Counts are exact integers; means come from sums in float64.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_lens import hook_names
from moe_lens.checks import as_index
from moe_lens.errors import DataError
from moe_lens.files import atomic_write
from moe_lens.routers.rule import RoutingRule
from moe_lens.shape import UNKNOWN_MODEL, MoEShape, shape_from_json
from moe_lens.statistics.balance import LoadBalance, load_balance
from moe_lens.statistics.cache import (
    as_prompts,
    checked_mask,
    every_token,
    known_model,
    known_padding,
    own_positions,
    own_tokens,
    points_by_layer,
)
from moe_lens.statistics.co_routing import (
    AdjacentOverlap,
    CoActivation,
    CoRouting,
    Transitions,
    adjacent_overlap,
)
from moe_lens.statistics.counts import (
    PositionCounts,
    PromptCounts,
    TokenCounts,
    layer_sums,
    probabilities_by_prompt,
)

_KIND: Final = "moe_lens.RoutingStats"
_SCHEMA: Final = 2
_READABLE: Final = (1, 2)
"""Schemas that `load` reads; files of schema 1 have counts, probability_sums and weight_sums only."""

_MATRICES: Final = ("counts", "probability_sums", "weight_sums")
_VECTORS: Final = ("entropy_sums", "margin_sums")
TABLES: Final[dict[str, Any]] = {
    "co_routing": CoRouting,
    "per_prompt": PromptCounts,
    "by_position": PositionCounts,
    "vocabulary": TokenCounts,
}
OPTIONAL: Final = (*_VECTORS, *TABLES)
"""Fields of RoutingStats that may be None."""


@dataclass(frozen=True, eq=False)
class RoutingStats:
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
        per_prompt: counts of each prompt, if asked for.
        by_position: counts at each position, if asked for.
        vocabulary: counts by token of the vocabulary, if asked for.
    """

    shape: MoEShape
    n_tokens: int
    counts: Int[Tensor, "layer expert"]
    probability_sums: Float[Tensor, "layer expert"]
    weight_sums: Float[Tensor, "layer expert"]
    entropy_sums: Float[Tensor, "layer"] | None = None
    margin_sums: Float[Tensor, "layer"] | None = None
    co_routing: CoRouting | None = None
    per_prompt: PromptCounts | None = None
    by_position: PositionCounts | None = None
    vocabulary: TokenCounts | None = None

    def __post_init__(self) -> None:
        for name in (*_MATRICES, *_VECTORS):
            if getattr(self, name) is not None or name in _MATRICES:
                self._check_sums(name, getattr(self, name))
        if not isinstance(self.n_tokens, int) or self.n_tokens < 1:
            raise DataError(
                f"RoutingStats over {self.n_tokens!r} tokens: the mask or the span must select some."
            )
        if int(self.counts.max()) > self.n_tokens:
            raise DataError(
                "RoutingStats.counts: an expert was chosen more often than there are tokens; did a hook on "
                "the top-k indices name it twice for one token?"
            )
        if not bool((self.counts.sum(-1) == self.n_tokens * self.shape.top_k).all()):
            raise DataError(
                f"RoutingStats.counts: a layer's counts must sum to n_tokens × k = "
                f"{self.n_tokens * self.shape.top_k}; got {self.counts.sum(-1).tolist()}."
            )
        for table in self.tables().values():
            table.check(self.counts, self.n_tokens, self.shape.top_k)

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
                known. Otherwise every position counts, with a warning if there are several prompts.
            rules: the routing rule of each layer, for margins. None: those of the cache's model.
            tokens: [*batch], the tokens of the run, for `vocabulary`.
            attention_mask: [*batch], true where a prompt's own tokens are. None: what the cache of a
                HookedMoE knows (`cache.attention_mask`: the run got a list of strings, an attention_mask, or
                tokens without a pad token).
            per_prompt: keep the counts of each prompt, too.
            positions: keep the counts at each position, too, from each prompt's own first token on.
            vocabulary: keep the counts by token, too.

        Raises:
            DataError: no routing in the cache, a layer without one of the three tensors, a mask of another
                shape, of other values, or one that selects nothing, NaN logits, `vocabulary` without tokens,
                `positions` under a mask where the padding is not known.
        """
        points = points_by_layer(cache)
        batch = next(iter(points.values()))[hook_names.TOPK_INDICES].shape[:-1]
        real = known_padding(cache, attention_mask, batch)
        keep = checked_mask(every_token(real, batch) if mask is None else mask, batch)
        rows = as_prompts(keep)
        prompt_of = rows.nonzero()[:, 0]
        known = known_model(cache)
        if rules is None and known is not None:
            rules = known.rules
        if rules is not None and (missing := sorted(set(points) - set(rules))):
            raise DataError(f"rules lacks layer {missing[0]}; it has {sorted(rules)}.")
        sums, indices, by_prompt, sizes = [], [], [], set()
        for layer, tensors in points.items():
            logits, chosen, weights = (tensors[point] for point in hook_names.POINTS)
            here = keep.to(chosen.device)
            logits, chosen, weights = logits[here], chosen[here], weights[here]
            sizes.add((logits.shape[-1], chosen.shape[-1]))
            indices.append(chosen)
            sums.append(layer_sums(logits, chosen, weights, None if rules is None else rules[layer]))
            if per_prompt:
                by_prompt.append(probabilities_by_prompt(logits, prompt_of, len(rows)))
        if len(sizes) > 1:
            raise DataError(f"The layers differ in (number of experts, k): {sorted(sizes)}.")
        name = UNKNOWN_MODEL if known is None else known.shape.model
        shape = MoEShape(name, tuple(points), *sizes.pop())
        stacked = {name: torch.stack([layer[name] for layer in sums]) for name in sums[0]}
        tables: dict[str, Any] = {"co_routing": CoRouting.count(indices, rows, shape.n_experts)}
        if per_prompt:
            tables["per_prompt"] = PromptCounts.count(indices, by_prompt, prompt_of)
        if positions:
            position = own_positions(rows, real, mask is not None)
            tables["by_position"] = PositionCounts.count(indices, position, shape.n_experts)
        if vocabulary:
            n_vocab = 0 if known is None else known.n_vocab
            of_tokens = own_tokens(tokens, keep)
            tables["vocabulary"] = TokenCounts.count(indices, of_tokens, shape.n_experts, n_vocab)
        return cls(shape, len(prompt_of), **stacked, **tables)

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

    def to_dataframe(self) -> pd.DataFrame:
        """One row an expert, in order: layer, expert, count, rate, mean_probability, mean_weight."""
        n_layers, n_experts = self.counts.shape
        measures = ("counts", "rates", "mean_probability", "mean_weight")
        count, *means = (getattr(self, name).flatten().numpy() for name in measures)
        return pd.DataFrame(
            {
                "layer": np.repeat(self.shape.layers, n_experts),
                "expert": np.tile(np.arange(n_experts), n_layers),
                "count": count,
                **dict(zip(("rate", "mean_probability", "mean_weight"), means, strict=True)),
            }
        )

    def top_experts(self, n: int, layer: int | None = None) -> pd.DataFrame:
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
        if (number := as_index(n)) is None or not 1 <= number <= len(frame):
            where = "all layers together" if layer is None else f"layer {layer}"
            raise DataError(
                f"top_experts: n must be from 1 to {len(frame)}, the experts of {where}; got {n!r}."
            )
        order = np.argsort(-frame["rate"].to_numpy(), kind="stable")
        return frame.iloc[order[:number]].reset_index(drop=True)

    def load_balance(self) -> LoadBalance:
        """How evenly each layer's choices fall on its experts: entropy, Gini, max / mean, busiest experts."""
        return load_balance(self)

    def without(self, *names: str) -> "RoutingStats":
        """The same statistics without these optional fields. Raises DataError for other names."""
        if wrong := [name for name in names if name not in OPTIONAL]:
            raise DataError(f"{wrong[0]!r} is no optional field of RoutingStats; those are {OPTIONAL}.")
        return replace(self, **dict.fromkeys(names))

    def summary(self) -> "RoutingStats":
        """Only counts and the sums of probabilities and weights, which any two statistics of a model have."""
        return self.without(*OPTIONAL)

    def __add__(self, other: "RoutingStats") -> "RoutingStats":
        """The statistics of both sets of tokens together; prompts of `per_prompt` in this order.

        Raises:
            DataError: different models, or an optional field that only one of them has.
        """
        if not isinstance(other, RoutingStats):
            return NotImplemented
        if differences := self.shape.differences(other.shape):
            raise DataError(f"RoutingStats of different models cannot be added: {'; '.join(differences)}.")
        summed: dict[str, Any] = {}
        for name in (*_MATRICES, *OPTIONAL):
            first, second = getattr(self, name), getattr(other, name)
            if (first is None) != (second is None):
                raise DataError(
                    f"Only one of the two RoutingStats has {name}, so they cannot be added. "
                    f"Collect both alike, or drop it: stats.without({name!r}), or stats.summary()."
                )
            summed[name] = None if first is None else first + second
        return RoutingStats(self.shape, self.n_tokens + other.n_tokens, **summed)

    def __radd__(self, zero: int) -> "RoutingStats":
        """Lets `sum([stats, stats])` start from its 0."""
        return self if zero == 0 else NotImplemented

    def save(self, path: str | Path) -> None:
        """Write a safetensors file (never pickle), atomically; the model's shape goes into the metadata."""
        about = {"kind": _KIND, "schema": _SCHEMA, **self.about()}
        with atomic_write(path) as temporary:
            save_file(self.tensors(), temporary, metadata={key: json.dumps(v) for key, v in about.items()})

    @classmethod
    def load(cls, path: str | Path) -> "RoutingStats":
        """Read what `save` wrote. Raises DataError, naming the file and what is wrong with it."""
        try:
            with safe_open(path, framework="pt") as file:
                about = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError, ValueError, RecursionError) as error:
            raise DataError(f"{path} cannot be read as routing statistics: {error}.") from error
        schema = about.pop("schema", None)
        if about.pop("kind", None) != _KIND or schema is True or schema not in _READABLE:
            raise DataError(
                f"{path} is no file of routing statistics of schema {' or '.join(map(str, _READABLE))}: its "
                f"schema is {schema!r}, {about or 'no metadata'}."
            )
        try:
            return cls.from_tensors(about, tensors)
        except DataError as error:
            raise DataError(f"{path} is damaged: {error}") from error

    def about(self) -> dict[str, Any]:
        """What `tensors` does not hold, ready for JSON: n_tokens and the shape."""
        return {"n_tokens": self.n_tokens, "shape": asdict(self.shape)}

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, those of tables as "co_routing.overlaps"; what is None is left out."""
        plain = {name: getattr(self, name) for name in (*_MATRICES, *_VECTORS)}
        inside = {
            f"{name}.{field}": tensor
            for name, table in self.tables().items()
            for field, tensor in vars(table).items()
        }
        return {
            name: tensor.contiguous() for name, tensor in {**plain, **inside}.items() if tensor is not None
        }

    @classmethod
    def from_tensors(cls, about: Any, tensors: Mapping[str, Tensor]) -> "RoutingStats":
        """What `about` and `tensors` came from. Raises DataError for anything else."""
        sums: dict[str, Any] = {}
        tables: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            table, _, inside = name.partition(".")
            if inside:
                tables.setdefault(table, {})[inside] = tensor
            else:
                sums[name] = tensor
        try:
            built = {name: TABLES[name](**fields) for name, fields in tables.items()}
            return cls(shape_from_json(about["shape"]), about["n_tokens"], **sums, **built)
        except (KeyError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
            raise DataError(f"The tensors and metadata are no routing statistics: {error}") from error

    def _check_sums(self, name: str, tensor: Tensor) -> None:
        size = (len(self.shape.layers), self.shape.n_experts)[: 2 if name in _MATRICES else 1]
        dtype = torch.int64 if name == "counts" else torch.float64
        if tuple(tensor.shape) != size or tensor.dtype != dtype:
            raise DataError(
                f"RoutingStats.{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {size}."
            )
        finite = bool(torch.isfinite(tensor).all()) or name == "margin_sums"
        if not finite or bool((tensor < 0).any()):
            raise DataError(
                f"RoutingStats.{name} holds NaN, infinite or negative values; were the router logits NaN?"
            )

    def tables(self) -> dict[str, Any]:
        """The optional counts that these statistics have, by the name of their field."""
        return {name: table for name in TABLES if (table := getattr(self, name)) is not None}

    def _have(self, name: str) -> Any:
        if (value := getattr(self, name)) is None:
            raise DataError(
                f"These RoutingStats hold no {name}; {_REMEDIES.get(name, 'collect them again.')}"
            )
        return value

    def __repr__(self) -> str:
        return f"RoutingStats({self.n_tokens} tokens, {self.shape})"


_REMEDIES: Final = {
    "margin_sums": "give from_cache the rules of the layers, or use collect_routing.",
    "by_position": "collect them with positions=True.",
}


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
