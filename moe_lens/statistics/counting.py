"""Counting routing layer after layer, batch after batch, while the model runs.

    counter = RoutingCounter(rules, Wanted(per_prompt=True))
    counter.begin(counted)                             # bool [prompt pos]: which tokens count
    counter.see(layer, decision)                       # for every MoE layer, as it runs
    counter.end()
    RoutingStats(shape, **counter.values())

Of a layer's router logits only sums are kept; of a batch, the numbers of the chosen experts, until its end.
Nothing here waits for a value on another device while the model runs; at the end of a batch it is asked once
whether all is finite, and the tables by prompt, position and token are fetched.

Integers are exact. Floats are float64 sums: over the tokens of a batch in the order of torch's `sum`, then
over batches, one after the other. So a sum that was saved after some batches goes on bit for bit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from moe_lens.errors import DataError, HookError
from moe_lens.routers.layouts import RouterOutput
from moe_lens.routers.rule import RoutingRule
from moe_lens.statistics.co_routing import CoRouting, n_shared, pair_counts
from moe_lens.statistics.counts import (
    PositionCounts,
    PromptCounts,
    TokenCounts,
    one_hot,
    probability_sums_by_prompt,
    softmax_over_experts,
)
from moe_lens.statistics.expert_outputs import ExpertOutputs, output_sizes, output_sums
from moe_lens.statistics.sums import RoutingSums

_MERGED: Final = ("per_prompt", "by_position", "vocabulary")
"""Tables that grow with the prompts, kept on the CPU."""


@dataclass(frozen=True)
class Wanted:
    """Which tables are counted beside the sums; as in `collect_routing`."""

    per_prompt: bool = False
    positions: bool = False
    vocabulary: bool = False
    outputs: bool = False


@dataclass(eq=False)
class _Batch:
    """Where the tokens that count stand among those that run, on the CPU, and what was seen of them."""

    keep: Bool[Tensor, "prompt pos"]
    position: Int[Tensor, "token"] | None
    tokens: Int[Tensor, "token"] | None
    layers: dict[int, "_Layer"] = field(default_factory=dict)
    on_device: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict)

    def on(self, name: str, device: torch.device) -> Tensor:
        """One of the tensors below, moved once to each device, without waiting for it."""
        if (name, device) not in self.on_device:
            self.on_device[name, device] = moved(getattr(self, name), device)
        return self.on_device[name, device]

    def __post_init__(self) -> None:
        flat = self.keep.flatten()
        self.all_count = bool(flat.all())
        self.counted = flat.nonzero()[:, 0]
        self.prompt_of = self.keep.nonzero()[:, 0]
        self.lengths = self.keep.sum(dim=1)
        number = (flat.cumsum(0) - 1).reshape(self.keep.shape)  # place -> row among those that count
        both = self.keep[:, :-1] & self.keep[:, 1:]
        self.first, self.second = number[:, :-1][both], number[:, 1:][both]

    def of_counted(self, part: Tensor) -> Tensor:
        """The rows of the tokens that count."""
        return part if self.all_count else part.index_select(0, self.on("counted", part.device))


@dataclass(eq=False)
class _Layer:
    indices: Integer[Tensor, "token k"]
    weights: Float[Tensor, "token k"]
    sums: dict[str, Tensor]
    by_prompt: Float[Tensor, "prompt expert"] | None
    sizes: tuple[Tensor, Tensor] | None = None
    """[token k] each: norms and largest components of what the experts gave."""


class RoutingCounter:
    """Sums over the batches seen so far, on the model's devices.

    Args:
        rules: the routing rule of each layer, for margins; None to leave these out.
        n_vocab: size of the vocabulary, for the table by token.
        before: statistics to go on from, those of `n_batches` batches.
    """

    def __init__(
        self,
        rules: Mapping[int, RoutingRule] | None,
        wanted: Wanted,
        n_vocab: int = 0,
        before: RoutingSums | None = None,
        n_batches: int = 0,
    ):
        self.rules, self.wanted, self.n_vocab = rules, wanted, n_vocab
        self.rows: list[int] = []  # numbers of the prompts, in the order in which they ran
        self._batch: _Batch | None = None
        self._state = _State() if before is None else _State.of(before, n_batches)

    @property
    def n_batches(self) -> int:
        """How many batches were counted."""
        return self._state.n_batches

    def begin(
        self,
        counted: Bool[Tensor, "prompt pos"],
        position: Int[Tensor, "token"] | None = None,
        tokens: Int[Tensor, "token"] | None = None,
    ) -> None:
        """A batch begins.

        Args:
            counted: which tokens count, on the CPU.
            position: of each of those in its own prompt, for the table by position.
            tokens: the number of each of those, for the table by token.
        """
        self._batch = _Batch(counted, position, tokens)

    def see(self, layer: int, decision: RouterOutput, is_own: bool = False) -> None:
        """Count a layer's decision on all tokens of the batch, row after row.

        Args:
            is_own: whether the experts are those that the rule chooses for these logits.

        Raises:
            DataError: the layer saw other tokens than the batch has.
        """
        batch = self._batch
        assert batch is not None
        if len(decision.logits) != batch.keep.numel():
            raise DataError(
                f"Layer {layer}: {len(decision.logits)} tokens were routed, and the batch has "
                f"{batch.keep.numel()}, so none can be counted. Does an adapter put tokens of its own before "
                "the prompts (prompt tuning)? Count without it."
            )
        logits, weights, indices = (batch.of_counted(part) for part in decision)
        by_prompt = None
        probabilities = softmax_over_experts(logits)
        if self.wanted.per_prompt:
            by_prompt = probability_sums_by_prompt(probabilities, batch.on("lengths", logits.device))
        sums = {
            "probability_sums": probabilities.sum(0, dtype=torch.float64),
            "entropy_sums": torch.special.entr(probabilities).sum(dtype=torch.float64),
        }
        if self.rules is not None:
            margins = margins_of(self.rules[layer], logits, indices if is_own else None)
            sums["margin_sums"] = margins.sum(dtype=torch.float64)
        small = torch.uint8 if logits.shape[-1] <= 2**8 else torch.int16
        batch.layers[layer] = _Layer(indices.to(small), weights, sums, by_prompt)

    def see_outputs(self, layer: int, outputs: Float[Tensor, "token k d"]) -> None:
        """Note how large what the chosen experts of a layer gave is; after `see` for that layer."""
        batch = self._batch
        assert batch is not None
        norms, largest = (batch.of_counted(part) for part in output_sizes(outputs))
        batch.layers[layer].sizes = norms, largest

    def end(self, rows: Sequence[int] = ()) -> None:
        """The batch's forward is over: from now on it counts. Its prompts have the numbers `rows`.

        Raises:
            DataError: NaN or infinite router logits or weights in a layer; then nothing of the batch counts.
        """
        batch, self._batch = self._batch, None
        assert batch is not None
        layers = [batch.layers[number] for number in sorted(batch.layers)]
        sizes = {(len(layer.sums["probability_sums"]), layer.indices.shape[-1]) for layer in layers}
        if len(sizes) > 1:
            raise DataError(f"The layers differ in (number of experts, k): {sorted(sizes)}.")
        n_experts, top_k = sizes.pop()
        home = layers[0].indices.device
        sums = {name: _stacked([layer.sums[name] for layer in layers], home) for name in layers[0].sums}
        indices = _stacked([layer.indices for layer in layers], home).long()
        weights = _stacked([layer.weights for layer in layers], home)
        sums |= _sums(indices, weights, batch.on("first", home), batch.on("second", home), n_experts)
        _refuse_nan(sorted(batch.layers), sums)
        if self.wanted.outputs:
            norms, largest = (
                _stacked(each, home) for each in zip(*(layer.sizes or () for layer in layers), strict=True)
            )
            sums |= _of_outputs(norms, largest, weights, indices, sums["counts"])
        tables = self._tables(batch, layers, indices, n_experts)
        self.rows.extend(rows)
        self._state = self._state.plus(len(batch.counted), len(batch.first), (n_experts, top_k), sums, tables)

    def _tables(
        self,
        batch: _Batch,
        layers: list[_Layer],
        indices: Int[Tensor, "layer token k"],
        n_experts: int,
    ) -> dict[str, Any]:
        tables: dict[str, Any] = {}
        if self.wanted.per_prompt:
            sums = _stacked(
                [layer.by_prompt for layer in layers if layer.by_prompt is not None], indices.device
            )
            tables["per_prompt"] = PromptCounts.count(indices, list(sums), batch.prompt_of)
        if self.wanted.positions:
            assert batch.position is not None
            tables["by_position"] = PositionCounts.count(indices, batch.position, n_experts)
        if self.wanted.vocabulary:
            assert batch.tokens is not None
            tables["vocabulary"] = TokenCounts.count(indices, batch.tokens, n_experts, self.n_vocab)
        return tables

    def sizes(self) -> tuple[int, int]:
        """(number of experts, k) of the layers seen."""
        return self._state.sizes

    def values(self) -> dict[str, Any]:
        """The fields of RoutingSums but the shape, on the CPU; prompts in the order in which they ran."""
        return self._state.values()

    def ordered(self) -> dict[str, Any]:
        """The same, with prompts in the order of their numbers (`rows`)."""
        values = self.values()
        if values.get("per_prompt") is not None and self.rows != sorted(self.rows):
            place = torch.tensor(self.rows).argsort()
            values["per_prompt"] = values["per_prompt"].of(place)
        return values


@dataclass(frozen=True, eq=False)
class _State:
    """What was counted; replaced whole, so that an interrupt finds a batch counted or not, never half."""

    n_batches: int = 0
    n_tokens: int = 0
    n_adjacent: int = 0
    sizes: tuple[int, int] = (0, 0)
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    merged: tuple[tuple[int, dict[str, Any]], ...] = ()  # (batches in it, tables), in order, of falling size

    @classmethod
    def of(cls, stats: RoutingSums, n_batches: int) -> "_State":
        """Of statistics that were saved."""
        tables = {name: table for name, table in stats.tables().items() if name in _MERGED}
        sums = {
            name: tensor
            for name, tensor in stats.tensors().items()
            if name.partition(".")[0] not in _MERGED and name != "co_routing.n_adjacent"
        }
        n_adjacent = 0 if stats.co_routing is None else int(stats.co_routing.n_adjacent)
        sizes = (stats.shape.n_experts, stats.shape.top_k)
        return cls(n_batches, stats.n_tokens, n_adjacent, sizes, sums, ((n_batches, tables),))

    def plus(
        self,
        n_tokens: int,
        n_adjacent: int,
        sizes: tuple[int, int],
        sums: dict[str, Tensor],
        tables: dict[str, Any],
    ) -> "_State":
        """With one more batch."""
        if self.sums:
            sums = {name: _added(name, self.sums[name], value) for name, value in sums.items()}
        merged = [*self.merged, (1, tables)]
        while len(merged) > 1 and merged[-1][0] == merged[-2][0]:
            merged = _last_merged(merged)
        return _State(
            self.n_batches + 1,
            self.n_tokens + n_tokens,
            self.n_adjacent + n_adjacent,
            sizes,
            sums,
            tuple(merged),
        )

    def values(self) -> dict[str, Any]:
        """By the names of RoutingSums' fields."""
        on_cpu = {name: tensor.cpu() for name, tensor in self.sums.items()}
        plain = {name: tensor for name, tensor in on_cpu.items() if "." not in name}
        merged = list(self.merged)
        while len(merged) > 1:
            merged = _last_merged(merged)
        co_routing = CoRouting(
            **_of("co_routing", on_cpu), n_adjacent=torch.tensor(self.n_adjacent, dtype=torch.int64)
        )
        outputs = _of("outputs", on_cpu)
        tables = {**merged[0][1], **({"outputs": ExpertOutputs(**outputs)} if outputs else {})}
        return {"n_tokens": self.n_tokens, **plain, "co_routing": co_routing, **tables}


def _of(table: str, sums: dict[str, Tensor]) -> dict[str, Any]:
    return {name.partition(".")[2]: sums[name] for name in sums if name.startswith(f"{table}.")}


def _added(name: str, total: Tensor, batch: Tensor) -> Tensor:
    total = total.to(batch.device)
    return torch.maximum(total, batch) if name.startswith("outputs.max") else total + batch


def _last_merged(tables: Sequence[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
    """Merged in pairs of like size: adding each batch's to the whole would copy the whole each time."""
    (size, first), (other, second) = tables[-2:]
    merged = {name: table + second[name] for name, table in first.items()}
    return [*tables[:-2], (size + other, merged)]


def _stacked(rows: Sequence[Tensor], home: torch.device) -> Tensor:
    """Of each layer, [layer ...]; layers may lie on different devices."""
    return torch.stack([row.to(home, non_blocking=True) for row in rows])


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on a device, copied while other things go on."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


AT_ONCE: Final = 2**22
"""Largest intermediate tensor: as many layers as fit are counted together."""


def _sums(
    indices: Int[Tensor, "layer token k"],
    weights: Float[Tensor, "layer token k"],
    first: Int[Tensor, "pair"],
    second: Int[Tensor, "pair"],
    n_experts: int,
) -> dict[str, Tensor]:
    """What the chosen experts alone tell: field of RoutingSums -> [layer ...]."""
    n_layers, n_tokens, k = indices.shape
    step = max(1, AT_ONCE // max(n_tokens * max(k * k, n_experts), 1))
    parts: dict[str, list[Tensor]] = {"pairs": [], "gaps": [], "shared": [], "weights": []}
    for start in range(0, n_layers, step):
        part = indices[start : start + step]
        after = indices[start + 1 : start + 1 + step]
        parts["pairs"].append(pair_counts(part, part, n_experts))
        parts["gaps"].append(pair_counts(part[: len(after)], after, n_experts))
        parts["shared"].append(n_shared(part, first, second))
        parts["weights"].append(one_hot(part, weights[start : start + step], n_experts).sum(1))
    pairs, gaps, shared, weight_sums = (torch.cat(each) for each in parts.values())
    return {
        "counts": pairs.sum(-1) // k,
        "weight_sums": weight_sums,
        "co_routing.coactivation": pairs,
        "co_routing.transitions": gaps,
        "co_routing.overlaps": shared,
    }


def _refuse_nan(layers: Sequence[int], sums: Mapping[str, Tensor]) -> None:
    """One wait a batch: a sum that holds NaN would take all batches with it."""
    finite = torch.stack([sums[name].isfinite().all(dim=-1) for name in ("probability_sums", "weight_sums")])
    if not bool(finite.all()):
        layer = layers[finite.all(dim=0).tolist().index(False)]
        raise DataError(
            f"Layer {layer}: its router logits or routing weights are NaN or infinite on some token, so this "
            "batch is not counted. Check hooks and, in half precision, the model's own activations."
        )


def margins_of(
    rule: RoutingRule, logits: Float[Tensor, "token expert"], chosen: Int[Tensor, "token k"] | None
) -> Float[Tensor, "token"]:
    """`routing_margin` of each token; NaN where the rule cannot tell.

    Args:
        chosen: the experts, where they are known to be the rule's own choice for these logits.
    """
    try:
        if chosen is not None and type(rule).routing_margin is RoutingRule.routing_margin:
            return rule.margin_of(logits, chosen)
        return rule.routing_margin(logits)
    except HookError:  # a rule that needs more than logits does not know how far other experts are
        return torch.full(logits.shape[:-1], torch.nan, device=logits.device)


def _of_outputs(
    norms: Float[Tensor, "layer token k"],
    largest: Float[Tensor, "layer token k"],
    weights: Float[Tensor, "layer token k"],
    indices: Int[Tensor, "layer token k"],
    chosen: Int[Tensor, "layer expert"],
) -> dict[str, Tensor]:
    """The table of what experts gave, by name, as many layers at a time as are counted together."""
    n_experts = chosen.shape[-1]
    step = max(1, AT_ONCE // max(indices.shape[1] * n_experts, 1))
    sums = [
        output_sums(*part, n_experts=n_experts)
        for part in zip(*(each.split(step) for each in (norms, largest, weights, indices)), strict=True)
    ]
    return {
        "outputs.chosen": chosen,
        **{f"outputs.{name}": torch.cat([part[name] for part in sums]) for name in sums[0]},
    }
