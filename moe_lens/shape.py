"""`MoEShape`: which model a count, a score or a plan is about. Results of different shapes never mix.

>>> MoEShape("OLMoE-1B-7B-0125", layers=(0, 1), n_experts=64, top_k=8).max_deactivated
56
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from jaxtyping import Int

from moe_lens.checks import as_index
from moe_lens.errors import DataError

UNKNOWN_MODEL: Final = "unknown"
"""Name of the model where a result came from tensors alone."""


@dataclass(frozen=True)
class MoEShape:
    """The name of a model, its MoE layers, the number of experts in each and how many run for a token.

    >>> from moe_lens import MoEShape, SteeringPlan
    >>> shape = MoEShape("OLMoE-1B-7B-0125", layers=tuple(range(16)), n_experts=64, top_k=8)
    >>> SteeringPlan(deactivate=[(3, 17)]).made_for(shape).shape.top_k
    8

    Raises:
        DataError: layers that are not different layer numbers in ascending order, or not 1 ≤ k ≤ n_experts.
    """

    model: str
    layers: tuple[int, ...]
    n_experts: int
    top_k: int

    def __post_init__(self) -> None:
        layers = [as_index(layer) for layer in self.layers] if isinstance(self.layers, Iterable) else []
        if not layers or None in layers or layers != sorted({layer for layer in layers if layer is not None}):
            raise DataError(
                f"layers must be different layer numbers, ascending, at least one; got {self.layers!r}."
            )
        n_experts, top_k = as_index(self.n_experts), as_index(self.top_k)
        if n_experts is None or top_k is None or not 1 <= top_k <= n_experts:
            raise DataError(f"top_k must lie between 1 and n_experts={self.n_experts!r}; got {self.top_k!r}.")
        if not isinstance(self.model, str):
            raise DataError(f"model must be a name; got {self.model!r}.")
        for name, value in (("layers", tuple(layers)), ("n_experts", n_experts), ("top_k", top_k)):
            object.__setattr__(self, name, value)

    @property
    def words(self) -> str:
        """The shape in a few words: "OLMoE-1B-7B-0125, 16 layers × 64 experts, top 8"."""
        return f"{self.model}, {len(self.layers)} layers × {self.n_experts} experts, top {self.top_k}"

    def grid(self) -> dict[str, Int[np.ndarray, "row"]]:
        """The first two columns of a table with one row per expert: "layer" and "expert", layer by layer.

        >>> shape = MoEShape("m", layers=(0, 3), n_experts=2, top_k=1)
        >>> {name: column.tolist() for name, column in shape.grid().items()}
        {'layer': [0, 0, 3, 3], 'expert': [0, 1, 0, 1]}
        """
        layers, experts = np.array(self.layers), np.arange(self.n_experts)
        return {"layer": np.repeat(layers, len(experts)), "expert": np.tile(experts, len(layers))}

    @property
    def max_deactivated(self) -> int:
        """How many experts of one layer can be deactivated at most: k must be left to choose from."""
        return self.n_experts - self.top_k

    def differences(self, other: "MoEShape") -> list[str]:
        """What differs, in words: ["model 'a' / 'b'", "top_k 2 / 8"]; empty if nothing does."""
        return [
            f"{field.name} {getattr(self, field.name)!r} / {getattr(other, field.name)!r}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]

    def misfits(self, model: "MoEShape") -> list[str]:
        """What keeps a result of this shape from being used on a model, in words; empty if nothing does.

        The result may cover some of the model's layers only, and may not know the model's name.
        """
        name = model.model if self.model == UNKNOWN_MODEL else self.model
        layers = model.layers if set(self.layers) <= set(model.layers) else self.layers
        return MoEShape(name, layers, self.n_experts, self.top_k).differences(model)


def shape_from_json(content: Any) -> MoEShape:
    """The shape that `asdict` and JSON were made from. Raises DataError, naming the field at fault."""
    names = [field.name for field in fields(MoEShape)]
    if not isinstance(content, dict) or set(content) != set(names):
        raise DataError(f"field 'shape' must hold {', '.join(names)}; got {content!r}.")
    if not isinstance(content["layers"], list):
        raise DataError(f"field 'shape.layers' must be a list; got {content['layers']!r}.")
    try:
        return MoEShape(**{**content, "layers": tuple(content["layers"])})
    except DataError as error:
        raise DataError(f"field 'shape': {error}") from error
