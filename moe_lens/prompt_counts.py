"""Counts by prompt and by position; which tokens of a cache count, and what RoutingStats sums over them.

stats = collect_routing(model, prompts, per_prompt=True, positions=True)
stats.per_prompt.counts               # [prompt layer expert]
stats.by_position.rates               # [pos layer expert]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from jaxtyping import Bool, Float, Int, Integer, Shaped
from torch import Tensor

from moe_lens import hook_names
from moe_lens.errors import DataError, HookError, warn
from moe_lens.rule_base import RoutingRule, at_least_float32

COMPACT: Final = (torch.uint8, torch.int16, torch.int32)
"""Dtypes of counts by prompt: the first that holds the largest of them."""


@dataclass(frozen=True, eq=False)
class PromptCounts:
    """The counts of each prompt, compactly, on the CPU; `+` appends those of further prompts.

    >>> from moe_lens import collect_routing, organisms
    >>> model = organisms.load("specialised")
    >>> stats = collect_routing(model, ["Question :", "the"], per_prompt=True, progress=False)
    >>> stats.per_prompt.n_tokens.tolist(), stats.per_prompt.counts.shape, stats.per_prompt.counts.dtype
    ([3, 2], torch.Size([2, 4, 8]), torch.uint8)

    Attributes:
        n_tokens: int64, tokens that count; 0 where a mask selected none of the prompt.
        counts: at how many of them the expert was chosen; uint8, int16 or int32, the smallest that will do.
        probability_sums: float32, sum over them of softmax(router logits).
    """

    n_tokens: Int[Tensor, "prompt"]
    counts: Integer[Tensor, "prompt layer expert"]
    probability_sums: Float[Tensor, "prompt layer expert"]

    def __post_init__(self) -> None:
        if self.counts.dtype not in COMPACT or self.n_tokens.dtype != torch.int64:
            raise DataError(f"PromptCounts.counts must be uint8, int16 or int32; got {self.counts.dtype}.")
        sums = self.probability_sums
        if sums.dtype != torch.float32 or not bool(torch.isfinite(sums).all()) or bool((sums < 0).any()):
            raise DataError("PromptCounts.probability_sums must be float32, finite and not negative.")

    @classmethod
    def count(
        cls,
        indices: Sequence[Int[Tensor, "token k"]],
        probability_sums: Sequence[Float[Tensor, "prompt expert"]],
        prompt_of: Int[Tensor, "token"],
    ) -> "PromptCounts":
        """Count one batch.

        Args:
            indices: of each MoE layer, the experts of the tokens that count.
            probability_sums: of each MoE layer, from `probabilities_by_prompt`.
            prompt_of: the prompt of each of those tokens.
        """
        n_prompts, n_experts = probability_sums[0].shape
        counts = counts_by_group(indices, prompt_of, n_prompts, n_experts)
        n_tokens = torch.bincount(prompt_of.cpu(), minlength=n_prompts)
        return cls(n_tokens, compact(counts), torch.stack(list(probability_sums), dim=1))

    def __add__(self, other: "PromptCounts") -> "PromptCounts":
        pairs = ((tensor, getattr(other, name)) for name, tensor in vars(self).items())
        n_tokens, counts, sums = (torch.cat(pair) for pair in pairs)  # counts take the wider dtype
        return PromptCounts(n_tokens, counts, sums)

    def check(self, counts: Int[Tensor, "layer expert"], n_tokens: int, top_k: int) -> None:
        """Raise DataError unless the table is about the tokens with these counts."""
        size = (len(self.n_tokens), *counts.shape)
        if self.n_tokens.ndim != 1 or self.counts.shape != size or self.probability_sums.shape != size:
            raise DataError(f"PromptCounts.counts has shape {tuple(self.counts.shape)}, not {size}.")
        _check_sums("PromptCounts", self.counts, self.n_tokens, counts, n_tokens, top_k)


@dataclass(frozen=True, eq=False)
class PositionCounts:
    """The counts at each position, counted from each prompt's own first token; padding does not shift them.

    `+` adds position by position; prompts may have different lengths.

    >>> from moe_lens import collect_routing, organisms
    >>> model = organisms.load("specialised")
    >>> stats = collect_routing(model, ["Question :", "the"], positions=True, progress=False)
    >>> stats.by_position.n_tokens.tolist(), stats.by_position.rates.shape
    ([2, 2, 1], torch.Size([3, 4, 8]))

    Attributes:
        n_tokens: int64, tokens that count at this position.
        counts: int32, at how many of them the expert was chosen.
    """

    n_tokens: Int[Tensor, "pos"]
    counts: Int[Tensor, "pos layer expert"]

    def __post_init__(self) -> None:
        if self.counts.dtype != torch.int32 or self.n_tokens.dtype != torch.int64:
            raise DataError(f"PositionCounts.counts must be int32; got {self.counts.dtype}.")

    @classmethod
    def count(
        cls, indices: Sequence[Int[Tensor, "token k"]], position: Int[Tensor, "token"], n_experts: int
    ) -> "PositionCounts":
        """Count one batch; `indices` of each MoE layer, `position` of each token in its own prompt."""
        length = int(position.max()) + 1
        counts = counts_by_group(indices, position, length, n_experts)
        return cls(torch.bincount(position.cpu(), minlength=length), counts.int())

    @property
    def rates(self) -> Float[Tensor, "pos layer expert"]:
        """Activation rate at each position, in [0, 1], float64; NaN where no token counts."""
        return self.counts.double() / self.n_tokens[:, None, None]

    def __add__(self, other: "PositionCounts") -> "PositionCounts":
        length = max(len(self.n_tokens), len(other.n_tokens))
        padded = [
            (_lengthened(t, length), _lengthened(getattr(other, name), length))
            for name, t in vars(self).items()
        ]
        return PositionCounts(*(first + second for first, second in padded))

    def check(self, counts: Int[Tensor, "layer expert"], n_tokens: int, top_k: int) -> None:
        """Raise DataError unless the table is about the tokens with these counts."""
        size = (len(self.n_tokens), *counts.shape)
        if self.n_tokens.ndim != 1 or self.counts.shape != size:
            raise DataError(f"PositionCounts.counts has shape {tuple(self.counts.shape)}, not {size}.")
        _check_sums("PositionCounts", self.counts, self.n_tokens, counts, n_tokens, top_k)


def counts_by_group(
    indices: Sequence[Int[Tensor, "token k"]], group: Int[Tensor, "token"], n_groups: int, n_experts: int
) -> Int[Tensor, "group layer expert"]:
    """How often each expert was chosen by the tokens of each group, int64, on the CPU."""
    rows = []
    for layer in indices:
        keys = group.to(layer.device)[:, None] * n_experts + layer
        rows.append(torch.bincount(keys.flatten(), minlength=n_groups * n_experts).cpu())
    return torch.stack(rows).reshape(len(rows), n_groups, n_experts).transpose(0, 1).contiguous()


def compact(counts: Int[Tensor, "*any"]) -> Integer[Tensor, "*any"]:
    """The same counts in the smallest dtype of `COMPACT` that holds the largest of them."""
    largest = int(counts.max()) if counts.numel() else 0
    return counts.to(next(dtype for dtype in COMPACT if largest <= torch.iinfo(dtype).max))


def _lengthened(tensor: Shaped[Tensor, "pos *any"], length: int) -> Shaped[Tensor, "longer *any"]:
    missing = tensor.new_zeros(length - len(tensor), *tensor.shape[1:])
    return torch.cat([tensor, missing])


def _check_sums(
    who: str, parts: Tensor, sizes: Tensor, counts: Int[Tensor, "layer expert"], n_tokens: int, top_k: int
) -> None:
    by_row = parts.sum(-1, dtype=torch.int64) == (sizes * top_k)[:, None]
    total = parts.sum(0, dtype=torch.int64)
    if bool((sizes < 0).any()) or bool((parts < 0).any()) or not bool(by_row.all()):
        raise DataError(f"{who}.counts of a row must sum to its n_tokens × k = n_tokens × {top_k}.")
    if int(sizes.sum()) != n_tokens or not torch.equal(total, counts):
        raise DataError(f"{who} does not belong to these counts: its sum over all rows is another.")


def points_by_layer(cache: Any) -> dict[int, dict[str, Tensor]]:
    """Layer -> short name of the hook point -> cached tensor, ascending; each layer must have all three."""
    if not hasattr(cache, "keys"):
        raise DataError(
            f"from_cache needs a cache, got {type(cache).__name__}; it is the second of the two things that "
            "run_with_cache returns."
        )
    found: dict[int, dict[str, Tensor]] = {}
    for name in cache.keys():  # noqa: SIM118 (an ActivationCache iterates over its tensors' axis)
        if parsed := hook_names.parse(name):
            found.setdefault(parsed[0], {})[parsed[1]] = cache[name]
    if not found:
        raise DataError(
            "The cache holds no routing: run a HookedMoE (or a bridge after attach), and let the "
            "names_filter keep the routing points (names_filter=moe_lens.is_routing_point)."
        )
    for layer, tensors in found.items():
        if missing := [point for point in hook_names.POINTS if point not in tensors]:
            raise DataError(
                f"The cache lacks {', '.join(missing)} of layer {layer}; let the names_filter keep it."
            )
    return dict(sorted(found.items()))


def known_padding(cache: Any, given: Any, batch: torch.Size) -> Bool[Tensor, "*batch"] | None:
    """Where the prompts' own tokens are, as far as it is known."""
    if given is not None:
        return checked_mask(given, batch)
    mask = getattr(cache, "attention_mask", None)
    if mask is None:
        return None
    dropped_batch = mask.ndim == len(batch) + 1 and mask.shape[0] == 1  # remove_batch_dim=True
    return checked_mask(mask[0] if dropped_batch else mask, batch)


def as_prompts(keep: Bool[Tensor, "*batch"]) -> Bool[Tensor, "prompt pos"]:
    """A mask with one row a prompt, on the CPU; a batch [pos] is a single prompt."""
    return keep.reshape(-1, keep.shape[-1] if keep.ndim else 1).cpu()


def every_token(real: Bool[Tensor, "*batch"] | None, batch: torch.Size) -> Bool[Tensor, "*batch"]:
    if real is not None:
        return real
    if len(batch) > 1 and batch[0] > 1:
        warn(
            "This cache does not say which positions are padding, so every position is counted. "
            "Pass mask= if the prompts were padded."
        )
    return torch.ones(batch, dtype=torch.bool)


def checked_mask(mask: Any, batch: torch.Size) -> Bool[Tensor, "*batch"]:
    try:
        mask = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"The mask must be a tensor of shape {tuple(batch)}; got {mask!r}.") from error
    if mask.shape != batch:
        raise DataError(f"The mask has shape {tuple(mask.shape)}, the routing is over {tuple(batch)}.")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise DataError("The mask must hold true and false, or 1 and 0, only.")
    if not bool(mask.any()):
        raise DataError("The mask selects no token; nothing would be counted.")
    return mask.bool()


def own_positions(
    rows: Bool[Tensor, "prompt pos"], real: Bool[Tensor, "*batch"] | None, masked: bool
) -> Int[Tensor, "token"]:
    """The position of each counted token, from its prompt's first token on."""
    if real is None and masked:
        raise DataError(
            "positions=True needs to know where each prompt begins, and this cache does not say which "
            "positions are padding; pass attention_mask=, too."
        )
    own = torch.ones_like(rows) if real is None else real.cpu().reshape(rows.shape)
    return (own.long().cumsum(1) - 1).clamp(min=0)[rows]


def own_tokens(tokens: Any, keep: Bool[Tensor, "*batch"]) -> Int[Tensor, "token"]:
    try:
        tokens = torch.as_tensor(tokens).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"vocabulary=True needs tokens= of the run; got {tokens!r}.") from error
    if tokens.shape != keep.shape or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise DataError(
            f"tokens must be integers of shape {tuple(keep.shape)}; got {tokens.dtype} {tuple(tokens.shape)}."
        )
    return tokens[keep.cpu()].flatten().long()


def probabilities(logits: Float[Tensor, "token expert"]) -> Float[Tensor, "token expert"]:
    """softmax over all experts, in float32 at least."""
    return torch.softmax(at_least_float32(logits), dim=-1)


def probabilities_by_prompt(
    logits: Float[Tensor, "token expert"], prompt_of: Int[Tensor, "token"], n_prompts: int
) -> Float[Tensor, "prompt expert"]:
    """Sums of probabilities over each prompt's tokens, float32, on the CPU; added up in float64."""
    total = torch.zeros(n_prompts, logits.shape[-1], dtype=torch.float64, device=logits.device)
    return total.index_add_(0, prompt_of.to(logits.device), probabilities(logits).double()).float().cpu()


def layer_sums(
    logits: Float[Tensor, "token expert"],
    indices: Int[Tensor, "token k"],
    weights: Float[Tensor, "token k"],
    rule: RoutingRule | None,
) -> dict[str, Tensor]:
    """Field of RoutingStats -> one layer's row of it."""
    n_experts = logits.shape[-1]
    weight_sums = torch.zeros(n_experts, dtype=torch.float64, device=weights.device)
    weight_sums.index_add_(0, indices.flatten(), weights.flatten().double())
    sums = {
        "counts": torch.bincount(indices.flatten(), minlength=n_experts),
        "probability_sums": probabilities(logits).double().sum(0),
        "weight_sums": weight_sums,
        "entropy_sums": router_entropy(logits).double().sum(),
    }
    if rule is not None:
        sums["margin_sums"] = _margins(rule, logits).double().sum()
    return {name: tensor.cpu() for name, tensor in sums.items()}  # layers may lie on different devices


def _margins(rule: RoutingRule, logits: Float[Tensor, "token expert"]) -> Float[Tensor, "token"]:
    try:
        return rule.routing_margin(logits)
    except HookError:  # a rule that needs more than logits does not know how far other experts are
        return torch.full(logits.shape[:-1], torch.nan, device=logits.device)


def router_entropy(router_logits: Float[Tensor, "*batch expert"]) -> Float[Tensor, "*batch"]:
    """Entropy of softmax(router logits) of each token, nats, in [0, ln n_experts]: −Σ_i p_i ln p_i.

    Computed in float32 at least. Softmax over all experts also where the router scores otherwise.

    >>> router_entropy(torch.zeros(2, 8)).exp().round().tolist()       # as undecided as among 8 experts
    [8.0, 8.0]
    """
    return torch.special.entr(probabilities(router_logits)).sum(-1)
