"""What is counted of routing: exact counts and sums over tokens, that add up and can be saved.

`RoutingSums` is the part of `RoutingStats` that measures (load_balance and others) are made from.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.errors import DataError
from moe_lens.files import FileKind
from moe_lens.results import Result
from moe_lens.shape import MoEShape, shape_from_json
from moe_lens.statistics.co_routing import CoRouting
from moe_lens.statistics.counts import PositionCounts, PromptCounts, TokenCounts
from moe_lens.statistics.expert_outputs import ExpertOutputs

_KIND: Final = FileKind("moe_lens.RoutingStats", schema=4, reads=(1, 2, 3, 4), words="routing statistics")
"""Files of schema 1 have counts, probability_sums and weight_sums only; up to 3, no `outputs`."""

_MATRICES: Final = ("counts", "probability_sums", "weight_sums")
_VECTORS: Final = ("entropy_sums", "margin_sums")
TABLES: Final[dict[str, Any]] = {
    "co_routing": CoRouting,
    "per_prompt": PromptCounts,
    "by_position": PositionCounts,
    "vocabulary": TokenCounts,
    "outputs": ExpertOutputs,
}
OPTIONAL: Final = (*_VECTORS, *TABLES)
"""Fields of RoutingSums that may be None."""

Sums = TypeVar("Sums", bound="RoutingSums")


@dataclass(frozen=True, eq=False, repr=False)
class RoutingSums(Result):
    """Routing counts over `n_tokens` token positions; every tensor is on the CPU.

    Sums over other tokens are added with `+`, which adds every field; only fields that both have can be added
    (`without`, `summary` drop some).

    `RoutingStats` documents the fields.

    Raises:
        DataError: counts, sums and tables that do not belong together.
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
    outputs: ExpertOutputs | None = None

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

    def without(self: Sums, *names: str) -> Sums:
        """The same statistics without these optional fields. Raises DataError for other names."""
        if wrong := [name for name in names if name not in OPTIONAL]:
            raise DataError(f"{wrong[0]!r} is no optional field of RoutingStats; those are {OPTIONAL}.")
        return replace(self, **dict.fromkeys(names))

    # The name is older than Result.summary, which this class does without: `__repr__` below says its line.
    def summary(self: Sums) -> Sums:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Only counts and the sums of probabilities and weights, which any two statistics of a model have."""
        return self.without(*OPTIONAL)

    def __add__(self: Sums, other: Sums) -> Sums:
        """The statistics of both sets of tokens together; prompts of `per_prompt` in this order.

        Raises:
            DataError: different models, or an optional field that only one of them has.
        """
        if not isinstance(other, RoutingSums):
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
        return type(self)(self.shape, self.n_tokens + other.n_tokens, **summed)

    def __radd__(self: Sums, zero: int) -> Sums:
        """Lets `sum([stats, stats])` start from its 0."""
        if zero != 0:
            return NotImplemented
        return self

    def save(self, path: str | Path) -> None:
        """Write a safetensors file (never pickle), atomically; the model's shape goes into the metadata."""
        _KIND.save_tensors(path, self.tensors(), self.about())

    @classmethod
    def load(cls: "type[Sums]", path: str | Path) -> Sums:
        """Read what `save` wrote. Raises DataError, naming the file and what is wrong with it."""
        about, tensors = _KIND.load_tensors(path)
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
        return {name: tensor for name, tensor in {**plain, **inside}.items() if tensor is not None}

    @classmethod
    def from_tensors(cls: "type[Sums]", about: Any, tensors: Mapping[str, Tensor]) -> Sums:
        """The inverse of `about` and `tensors`. Raises DataError for anything else."""
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
        if not finite:
            raise DataError(f"RoutingStats.{name} holds NaN or infinite values; were the router logits NaN?")
        if bool((tensor < 0).any()):
            raise DataError(
                f"RoutingStats.{name} holds negative values; did a hook multiply routing weights by a "
                "negative factor? Statistics are of weights from 0 on: count under other hooks."
            )

    def tables(self) -> dict[str, Any]:
        """The optional counts that these statistics have, by the name of their field."""
        return {name: table for name in TABLES if (table := getattr(self, name)) is not None}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.n_tokens} tokens, {self.shape.words})"
