"""Which experts run, how often and with what weight: `RoutingStats`, from a cache or streamed.

    _, cache = model.run_with_cache(prompts)
    stats = RoutingStats.from_cache(cache)                 # one batch
    stats = collect_routing(model, prompts)                # any number of prompts, one batch at a time
    stats.rates                                            # [layer expert], share of tokens, in [0, 1]
    (stats + other).save("stats.safetensors")

Counts are exact integers; means come from sums in float64.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Bool, Float, Int, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from moe_lens import hook_names
from moe_lens.batching import Prompts, padded_batches
from moe_lens.bridge_layers import moe_shape
from moe_lens.errors import DataError
from moe_lens.files import atomic_write
from moe_lens.moe_shape import UNKNOWN_MODEL, MoEShape, shape_from_json

Span = slice | Callable[[Int[Tensor, "pos"]], Bool[Tensor, "pos"]] | None
"""Which tokens of a prompt count: None for all, a slice of its positions (`slice(-1, None)` for the last), or
a function from the prompt's tokens [pos] to a bool [pos]."""

_KIND: Final = "moe_lens.RoutingStats"
_SCHEMA: Final = 1


@dataclass(frozen=True, eq=False)
class RoutingStats:
    """Routing counts over `n_tokens` token positions; every tensor is [layer expert], on the CPU.

    >>> from moe_lens import RoutingStats, organisms
    >>> model = organisms.load("specialised")
    >>> _, cache = model.run_with_cache(["Question : what is", "Document : the"])
    >>> stats = RoutingStats.from_cache(cache)
    >>> stats.rates.shape, float(stats.rates.sum(-1)[0])     # rates of one layer sum to k
    (torch.Size([4, 8]), 2.0)

    Attributes:
        shape: the model, its MoE layers (the rows), number of experts (the columns) and k.
        n_tokens: how many token positions were counted.
        counts: int64, at how many of them the expert was among the top-k.
        probability_sums: float64, sum over tokens of softmax(router logits), over all experts.
        weight_sums: float64, sum over tokens of the routing weight, 0 where the expert was not chosen.
    """

    shape: MoEShape
    n_tokens: int
    counts: Int[Tensor, "layer expert"]
    probability_sums: Float[Tensor, "layer expert"]
    weight_sums: Float[Tensor, "layer expert"]

    def __post_init__(self) -> None:
        size = (len(self.shape.layers), self.shape.n_experts)
        for name, tensor in self._tensors().items():
            dtype = torch.int64 if name == "counts" else torch.float64
            if tuple(tensor.shape) != size or tensor.dtype != dtype:
                raise DataError(
                    f"RoutingStats.{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {size}."
                )
            if not bool(torch.isfinite(tensor).all()) or bool((tensor < 0).any()):
                raise DataError(
                    f"RoutingStats.{name} holds NaN, infinite or negative values; were the router logits NaN?"
                )
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

    @classmethod
    def from_cache(
        cls, cache: Mapping[str, Tensor] | Any, mask: Shaped[Tensor, "*batch"] | Any = None
    ) -> "RoutingStats":
        """Count the routing in a cache of `run_with_cache` (or a dictionary of its tensors).

        Args:
            cache: must hold router logits [*batch expert], top-k indices and weights [*batch k] of every MoE
                layer that is to be counted (`names_filter=is_routing_point` keeps just those).
            mask: [*batch], true (or 1) where a token counts. None: every position but padding, where the
                cache of a HookedMoE knows it (`cache.attention_mask`: the run got a list of strings, an
                attention_mask, or tokens without a pad token). Otherwise every position counts, with a
                warning if there are several prompts.

        Raises:
            DataError: no routing in the cache, a layer without one of the three tensors, a mask of another
                shape, of other values, or one that selects nothing, NaN logits.
        """
        points = _points_by_layer(cache)
        layers = tuple(points)
        batch = points[layers[0]][hook_names.TOPK_INDICES].shape[:-1]
        keep = _checked_mask(_known_mask(cache, batch) if mask is None else mask, batch)
        rows, sizes = [], set()
        for tensors in points.values():
            logits, indices, weights = (tensors[point] for point in hook_names.POINTS)
            here = keep.to(indices.device)
            rows.append(_count_layer(logits[here], indices[here], weights[here]))
            sizes.add((logits.shape[-1], indices.shape[-1]))
        if len(sizes) > 1:
            raise DataError(f"The layers differ in (number of experts, k): {sorted(sizes)}.")
        counts, probabilities, weight_sums = (torch.stack(column) for column in zip(*rows, strict=True))
        model = getattr(cache, "model", None)
        name = moe_shape(model).model if isinstance(model, TransformerBridge) else UNKNOWN_MODEL
        shape = MoEShape(name, layers, *sizes.pop())
        return cls(shape, int(keep.sum()), counts, probabilities, weight_sums)

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

    def __add__(self, other: "RoutingStats") -> "RoutingStats":
        """The statistics of both sets of tokens together. Raises DataError for different models."""
        if not isinstance(other, RoutingStats):
            return NotImplemented
        if differences := self.shape.differences(other.shape):
            raise DataError(f"RoutingStats of different models cannot be added: {'; '.join(differences)}.")
        summed = {name: tensor + other._tensors()[name] for name, tensor in self._tensors().items()}
        return RoutingStats(self.shape, self.n_tokens + other.n_tokens, **summed)

    def __radd__(self, zero: int) -> "RoutingStats":
        """Lets `sum([stats, stats])` start from its 0."""
        return self if zero == 0 else NotImplemented

    def save(self, path: str | Path) -> None:
        """Write a safetensors file (never pickle), atomically; the model's shape goes into the metadata."""
        about = {"kind": _KIND, "schema": _SCHEMA, "n_tokens": self.n_tokens, "shape": asdict(self.shape)}
        with atomic_write(path) as temporary:
            save_file(self._tensors(), temporary, metadata={key: json.dumps(v) for key, v in about.items()})

    @classmethod
    def load(cls, path: str | Path) -> "RoutingStats":
        """Read what `save` wrote. Raises DataError, naming the file and what is wrong with it."""
        try:
            with safe_open(path, framework="pt") as file:
                about = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError, ValueError, RecursionError) as error:
            raise DataError(f"{path} cannot be read as routing statistics: {error}.") from error
        if (about.get("kind"), about.get("schema")) != (_KIND, _SCHEMA):
            raise DataError(
                f"{path} is no file of routing statistics of schema {_SCHEMA}: {about or 'no metadata'}."
            )
        try:
            return cls(shape_from_json(about["shape"]), about["n_tokens"], **tensors)
        except (KeyError, TypeError, OverflowError, DataError) as error:
            raise DataError(f"{path} is damaged: {error}") from error

    def _tensors(self) -> dict[str, Tensor]:
        names = ("counts", "probability_sums", "weight_sums")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        return f"RoutingStats({self.n_tokens} tokens, {self.shape})"


def collect_routing(
    model: TransformerBridge,
    prompts_or_tokens: Prompts,
    *,
    batch_size: int = 8,
    span: Span = None,
    progress: bool = True,
) -> RoutingStats:
    """Routing statistics over many prompts, one batch in memory at a time.

    >>> from moe_lens import collect_routing, organisms
    >>> model = organisms.load("specialised")
    >>> stats = collect_routing(model, ["Question : what is", "Document : the"], progress=False)
    >>> stats.n_tokens                                       # 5 + 4, with BOS; padding is never counted
    9

    Args:
        model: a HookedMoE, or a bridge after `attach`.
        prompts_or_tokens: a string, strings, a token tensor [batch pos], or token sequences of any lengths;
            a generator is read batch by batch, so that memory does not grow with the number of prompts.
        batch_size: prompts a forward.
        span: which tokens of each prompt count: None (all), a slice of its positions, or a function from its
            tokens [pos], BOS included, to a bool [pos].
        progress: show a progress bar.

    Raises:
        DataError: no prompts, an empty prompt, or a span that selects no token of some prompt.
    """
    total: RoutingStats | None = None
    done = 0
    known = 1 if isinstance(prompts_or_tokens, str) else _length(prompts_or_tokens)
    with tqdm(total=known, desc="routing", unit="prompt", disable=not progress) as bar:
        for tokens, mask in padded_batches(model, prompts_or_tokens, batch_size):
            counted = mask.clone()
            for row in range(len(tokens)):
                chosen = _in_span(tokens[row, mask[row]].cpu(), span, done + row)
                counted[row, mask[row]] = chosen.to(mask.device)
            stats = RoutingStats.from_cache(_routing_cache(model, tokens, mask), counted)
            total = stats if total is None else total + stats
            done += len(tokens)
            bar.update(len(tokens))
    assert total is not None  # padded_batches refuses an empty list
    return total


def is_routing_point(name: str) -> bool:
    """A `names_filter` for `run_with_cache` that keeps what `RoutingStats.from_cache` needs.

    >>> from moe_lens import RoutingStats, is_routing_point, organisms
    >>> model = organisms.load("specialised")
    >>> _, cache = model.run_with_cache("Document : the", names_filter=is_routing_point)
    >>> RoutingStats.from_cache(cache).n_tokens
    4
    """
    return hook_names.parse(name) is not None


def _routing_cache(model: TransformerBridge, tokens: Tensor, mask: Tensor) -> Any:
    # Without padding no mask is passed: the run is then the very one that `model(tokens)` makes.
    padding: dict[str, Any] = {} if bool(mask.all()) else {"attention_mask": mask.long()}
    with torch.no_grad():
        return model.run_with_cache(tokens, names_filter=is_routing_point, return_type=None, **padding)[1]


def _length(prompts: Any) -> int | None:
    return len(prompts) if hasattr(prompts, "__len__") else None


def _in_span(tokens: Int[Tensor, "pos"], span: Span, index: int) -> Bool[Tensor, "pos"]:
    try:
        if callable(span):
            chosen = torch.as_tensor(span(tokens), dtype=torch.bool).cpu()
        else:
            chosen = torch.zeros(len(tokens), dtype=torch.bool)
            chosen[slice(None) if span is None else span] = True
    except (TypeError, ValueError, IndexError) as error:
        raise DataError(
            f"The span {span!r} cannot be applied to prompt {index}: {error}. Give None, a slice with a "
            "positive step, or a function from tokens [pos] to a bool [pos]."
        ) from error
    if chosen.shape != tokens.shape:
        raise DataError(
            f"The span gave shape {tuple(chosen.shape)} for prompt {index} with {len(tokens)} tokens; "
            "it must give one bool a token."
        )
    if not bool(chosen.any()):
        raise DataError(f"The span selects no token of prompt {index} ({len(tokens)} tokens).")
    return chosen


def _points_by_layer(cache: Mapping[str, Tensor] | Any) -> dict[int, dict[str, Tensor]]:
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


def _known_mask(cache: Any, batch: torch.Size) -> Tensor:
    """Where the prompts' own tokens are, as far as the cache knows."""
    mask = getattr(cache, "attention_mask", None)
    if mask is None:
        if len(batch) > 1 and batch[0] > 1:
            warnings.warn(
                "This cache does not say which positions are padding, so every position is counted. "
                "Pass mask= if the prompts were padded.",
                stacklevel=3,
            )
        return torch.ones(batch, dtype=torch.bool)
    dropped_batch = mask.ndim == len(batch) + 1 and mask.shape[0] == 1  # remove_batch_dim=True
    return mask[0] if dropped_batch else mask


def _checked_mask(mask: Any, batch: torch.Size) -> Bool[Tensor, "*batch"]:
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


def _count_layer(
    logits: Float[Tensor, "token expert"], indices: Int[Tensor, "token k"], weights: Float[Tensor, "token k"]
) -> tuple[Int[Tensor, "expert"], Float[Tensor, "expert"], Float[Tensor, "expert"]]:
    n_experts = logits.shape[-1]
    counts = torch.bincount(indices.flatten(), minlength=n_experts)
    probabilities = torch.softmax(logits.float(), dim=-1).double().sum(0)
    weight_sums = torch.zeros(n_experts, dtype=torch.float64, device=weights.device)
    weight_sums.index_add_(0, indices.flatten(), weights.flatten().double())
    return counts.cpu(), probabilities.cpu(), weight_sums.cpu()  # layers may lie on different devices
