"""`MoEShape`: which model a count, a score or a plan is about. Results of different shapes never mix.

>>> MoEShape("OLMoE-1B-7B-0125", layers=(0, 1), n_experts=64, top_k=8).n_deactivatable
56
"""

from dataclasses import dataclass, fields

from moe_lens.errors import DataError


@dataclass(frozen=True)
class MoEShape:
    """The name of a model, its MoE layers, the number of experts in each and how many run for a token."""

    model: str
    layers: tuple[int, ...]
    n_experts: int
    top_k: int

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise DataError(
                f"layers must be different layer numbers, ascending, at least one; got {self.layers}."
            )
        if not 1 <= self.top_k <= self.n_experts:
            raise DataError(f"top_k must lie between 1 and n_experts={self.n_experts}; got {self.top_k}.")

    @property
    def n_deactivatable(self) -> int:
        """How many experts of one layer can be deactivated: k must be left to choose from."""
        return self.n_experts - self.top_k

    def differences(self, other: "MoEShape") -> list[str]:
        """What differs, in words: ["model 'a' / 'b'", "top_k 2 / 8"]; empty if nothing does."""
        return [
            f"{field.name} {getattr(self, field.name)!r} / {getattr(other, field.name)!r}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]
