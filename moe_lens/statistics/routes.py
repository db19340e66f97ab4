"""Routes as data: `PromptRouting`, one prompt's, which a figure colours; `RouteRecord`, kept to be replayed.

record = RouteRecord.from_cache(cache)                     # or .from_generation(model, prompt, 20)
frozen = model.run_with_hooks(other_prompt, fwd_hooks=replay_hooks(record))
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from moe_lens import hook_names
from moe_lens.errors import DataError
from moe_lens.files import FileKind
from moe_lens.results import Result
from moe_lens.shape import UNKNOWN_MODEL, MoEShape, shape_from_json
from moe_lens.statistics.cache import known_model
from moe_lens.text.batching import Prompts, TextModel, pad_sequences, token_sequences

if TYPE_CHECKING:
    import pandas

_KIND: Final = FileKind(
    "moe_lens.RouteRecord", schema=2, reads=(1, 2), words="routes", former_names=("moe_lens routes",)
)


@dataclass(frozen=True, eq=False, repr=False)
class PromptRouting(Result):
    """Which experts every token of one prompt went to, and with what weights.

    Attributes:
        shape: the model; rows of the tensors are `shape.layers`.
        tokens: the text of each token, special ones included.
        indices: int64, [layer pos k], the experts.
        weights: float32, [layer pos k], their routing weights.
        entropy: float32, [layer pos], `router_entropy`, nats; None where the router logits were not seen.
        margin: float32, [layer pos], the rule's `routing_margin`; inf and NaN as in
            `RoutingStats.margin_sums`; None where the router logits were not seen.
    """

    shape: MoEShape
    tokens: tuple[str, ...]
    indices: Int[Tensor, "layer pos k"]
    weights: Float[Tensor, "layer pos k"]
    entropy: Float[Tensor, "layer pos"] | None = None
    margin: Float[Tensor, "layer pos"] | None = None

    def row(self, layer: int) -> int:
        """The row of a layer. Raises DataError for a layer without router."""
        if layer not in self.shape.layers:
            raise DataError(f"Layer {layer} has no router; MoE layers are {self.shape.layers}.")
        return self.shape.layers.index(layer)

    def top_expert(self, layer: int) -> Int[Tensor, "pos"]:
        """The expert with the largest weight at each token of a layer."""
        row = self.row(layer)
        best = self.weights[row].argmax(-1, keepdim=True)
        return self.indices[row].gather(-1, best)[:, 0]

    def summary(self) -> str:
        """The number of tokens, the first of them, and the model."""
        text = "".join(self.tokens[:20])
        return f"{len(self.tokens)} tokens {text!r}; {self.shape.words}"

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row for each layer, token and chosen expert: layer, pos, token, expert, weight."""
        import pandas

        return pandas.DataFrame(
            [
                (layer, pos, token, expert, weight)
                for layer, experts, weights in zip(
                    self.shape.layers, self.indices.tolist(), self.weights.tolist(), strict=True
                )
                for pos, token in enumerate(self.tokens)
                for expert, weight in zip(experts[pos], weights[pos], strict=True)
            ],
            columns=["layer", "pos", "token", "expert", "weight"],
        )


@dataclass(frozen=True, eq=False, repr=False)
class RouteRecord(Result):
    """The route of a run: for every layer and token, the chosen experts and, optionally, their weights.

    >>> from moe_lens import RouteRecord, organisms, replay_hooks
    >>> model = organisms.load("specialised")
    >>> logits, cache = model.run_with_cache("Question : what is")
    >>> record = RouteRecord.from_cache(cache)
    >>> record
    RouteRecord(4 layers, 1 prompt of 5 columns, top 2 of 8 experts, without weights)
    >>> bool((model.run_with_hooks("Question : what is", fwd_hooks=replay_hooks(record)) == logits).all())
    True

    Attributes:
        shape: which model's layers these are.
        indices: [layer batch pos k], the experts in the router's order, as small integers (uint8 up to 256
            experts). Columns are those of the padded batch.
        weights: [layer batch pos k] in the router's dtype, or None.
        tokens: int64 [batch pos], the tokens that were routed; None where they are not known.

    Raises:
        DataError: shapes that do not belong together, experts that the shape does not have.
    """

    shape: MoEShape
    indices: Integer[Tensor, "layer batch pos k"]
    weights: Float[Tensor, "layer batch pos k"] | None = None
    tokens: Int[Tensor, "batch pos"] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.indices, Tensor) or self.indices.ndim != 4 or self.indices.is_floating_point():
            raise DataError("RouteRecord needs indices as integers [layer batch pos k].")
        n_layers, _, _, k = self.indices.shape
        if (n_layers, k) != (len(self.shape.layers), self.shape.top_k) or not self.indices.numel():
            raise DataError(f"Indices of shape {tuple(self.indices.shape)} are no routes of {self.shape}.")
        if int(self.indices.min()) < 0 or int(self.indices.max()) >= self.shape.n_experts:
            raise DataError(f"The indices name experts beyond 0 to {self.shape.n_experts - 1}.")
        if self.weights is not None and self.weights.shape != self.indices.shape:
            raise DataError(f"Weights of shape {tuple(self.weights.shape)} for {tuple(self.indices.shape)}.")
        if self.tokens is not None and self.tokens.shape != self.indices.shape[1:3]:
            raise DataError(f"Tokens of shape {tuple(self.tokens.shape)} for {tuple(self.indices.shape)}.")
        object.__setattr__(self, "indices", self.indices.cpu().to(_smallest(self.shape.n_experts)))

    @classmethod
    def from_cache(cls, cache: Mapping[str, Tensor] | Any, *, weights: bool = False) -> "RouteRecord":
        """The route in a cache of `run_with_cache`, or in a dictionary of its tensors.

        Args:
            cache: must hold the top-k indices of every layer that is to be replayed, and with `weights` their
                weights, [batch pos k] or [pos k]. A dictionary also needs the router logits, which tell the
                number of experts.
            weights: keep the weights; a replay then uses them. Without, the rule derives them anew from the
                replaying run's logits.

        Raises:
            DataError: no routing in the cache, a layer that lacks a tensor, layers of different tokens, or
                experts that are not there.
        """
        needed = [hook_names.TOPK_INDICES, *([hook_names.TOPK_WEIGHTS] if weights else [])]
        points = hook_names.points_of(cache, needed)
        shape = _shape_of(cache, points)
        hook_names.check_points(points, shape.n_experts)
        kept = [_stacked(points, shape, point) for point in needed]
        return cls(shape, kept[0], kept[1] if weights else None)

    @classmethod
    def from_generation(
        cls,
        model: TextModel,
        prompts: Prompts,
        max_new_tokens: int,
        *,
        weights: bool = False,
        hooks: Sequence[tuple[Any, Any]] = (),
    ) -> "RouteRecord":
        """Let the model write greedily, and record the route of prompts and generated tokens.

        All prompts run as one batch, padded on the left. The last generated token is read by no step, so the
        record has max_new_tokens - 1 columns more than the prompts (fewer where all of them end early).
        `record.tokens` are the tokens that were routed; run them, or generate again, to replay.

        Args:
            hooks: under which to generate (steering, say).

        Raises:
            DataError: as in `collect_generation`.
        """
        from moe_lens.statistics.generation import (  # records load without a model
            generate_recorded,
            moe_shape,
        )

        hooked: Any = model
        tokens, mask = pad_sequences(model, list(token_sequences(model, prompts)))
        new, recorded = generate_recorded(hooked, tokens, mask, max_new_tokens, hooks)
        steps: dict[int, dict[str, Tensor]] = {}
        for name, values in recorded.items():
            layer, point = hook_names.parse(name) or (0, "")
            whole = [values[0], *(value[:, -1:] for value in values[1:])]
            steps.setdefault(layer, {})[point] = torch.cat(whole, dim=1)
        shape = moe_shape(hooked)
        routed = torch.cat([tokens, new.to(tokens)], dim=1)[:, :-1].cpu()
        kept = [_stacked(steps, shape, point) for point in (hook_names.TOPK_INDICES, hook_names.TOPK_WEIGHTS)]
        return cls(shape, kept[0], kept[1] if weights else None, routed)

    def summary(self) -> str:
        """Numbers of layers, prompts, columns and experts, and whether weights are kept."""
        _, n_rows, n_columns, _ = self.indices.shape
        return (
            f"{len(self.shape.layers)} layers, {n_rows} prompt{'s' * (n_rows > 1)} of "
            f"{n_columns} columns, top {self.shape.top_k} of {self.shape.n_experts} experts, "
            f"with{'out' * (self.weights is None)} weights"
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, atomically; the model's shape goes into the metadata."""
        tensors = {"indices": self.indices, "weights": self.weights, "tokens": self.tokens}
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        _KIND.save_tensors(path, present, {"shape": asdict(self.shape)})

    @classmethod
    def load(cls, path: str | Path) -> "RouteRecord":
        """Read what `save` wrote. Raises DataError, naming the file and what is wrong with it."""
        about, tensors = _KIND.load_tensors(path)
        _check_tensors(path, tensors)
        try:
            return cls(shape_from_json(about.get("shape")), **tensors)
        except DataError as error:
            raise DataError(f"{path} is damaged: {error}") from error


def _smallest(n_experts: int) -> torch.dtype:
    return torch.uint8 if n_experts <= 256 else torch.int16 if n_experts <= 2**15 else torch.int32


def _stacked(points: dict[int, dict[str, Tensor]], shape: MoEShape, point: str) -> Tensor:
    tensors = [points[layer][point].detach().cpu() for layer in shape.layers]
    if len({tensor.shape for tensor in tensors}) > 1 or tensors[0].ndim not in (2, 3):
        raise DataError(
            f"{point} has shapes {sorted({tuple(x.shape) for x in tensors})}, not one [batch pos k]."
        )
    return torch.stack([tensor if tensor.ndim == 3 else tensor[None] for tensor in tensors])


def _shape_of(cache: Any, points: dict[int, dict[str, Tensor]]) -> MoEShape:
    layers, known = tuple(points), known_model(cache)
    k = points[layers[0]][hook_names.TOPK_INDICES].shape[-1]
    if known is not None:
        return MoEShape(known.shape.model, layers, known.shape.n_experts, k)
    logits = points[layers[0]].get(hook_names.ROUTER_LOGITS)
    if logits is None:
        raise DataError("A dictionary of tensors needs the router logits, which tell the number of experts.")
    return MoEShape(UNKNOWN_MODEL, layers, logits.shape[-1], k)


def _check_tensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    dims = {"indices": 4, "weights": 4, "tokens": 2}
    for name, tensor in tensors.items():
        wrong_kind = tensor.is_floating_point() != (name == "weights")
        if dims.get(name) != tensor.ndim or wrong_kind or tensor.dtype == torch.bool:
            raise DataError(f"{path} is damaged: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}.")
    if "indices" not in tensors:
        raise DataError(f"{path} is damaged: it holds no indices.")
    shape = tensors["indices"].shape
    for name, wanted in (("weights", shape), ("tokens", shape[1:3])):
        if name in tensors and tensors[name].shape != wanted:
            raise DataError(
                f"{path} is damaged: {name} have shape {tuple(tensors[name].shape)}, indices {tuple(shape)}."
            )
