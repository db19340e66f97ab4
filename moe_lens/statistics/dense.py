"""`DenseRoutes`: how much each of all experts would count for the last token of each of some prompts.

records = record_dense(model, solved_prompts)                    # dense_recording.py
records.neighbours(similarity, k=3)                              # mixed from the nearest ones (C3PO)
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.checks import whole_number
from moe_lens.errors import DataError
from moe_lens.files import FileKind
from moe_lens.results import Result
from moe_lens.shape import MoEShape, shape_from_json

if TYPE_CHECKING:
    import pandas

_KIND: Final = FileKind("moe_lens.DenseRoutes", 1, (1,), "dense routing weights")


@dataclass(frozen=True, eq=False, repr=False)
class DenseRoutes(Result):
    """Dense routing weights of one token a prompt: softmax over all experts, or each expert's own score.

    >>> from moe_lens import DenseRoutes, organisms, record_dense
    >>> model = organisms.load("specialised")
    >>> records = record_dense(model, ["Question : what is", "the"], progress=False)
    >>> records
    DenseRoutes(2 prompts; specialised, 4 layers × 8 experts, top 2)
    >>> records.neighbours([[0.9, 0.3]], k=2).weights.shape
    torch.Size([4, 1, 8])

    Attributes:
        shape: which model's layers these are.
        weights: float32, [layer prompt expert], at least 0; see `moe_lens.routers.dense_weights`.

    Raises:
        DataError: weights of another shape, negative or not finite.
    """

    shape: MoEShape
    weights: Float[Tensor, "layer prompt expert"]

    def __post_init__(self) -> None:
        wanted = (len(self.shape.layers), self.shape.n_experts)
        if self.weights.ndim != 3 or self.weights.shape[::2] != wanted or not self.weights.numel():
            raise DataError(
                f"DenseRoutes needs weights [layer prompt expert] of {self.shape.words}; got shape "
                f"{tuple(self.weights.shape)}."
            )
        if not bool(self.weights.isfinite().all()) or bool((self.weights < 0).any()):
            raise DataError("Dense routing weights are finite numbers from 0 on.")
        object.__setattr__(self, "weights", self.weights.detach().cpu().float())

    @property
    def n_prompts(self) -> int:
        """How many prompts."""
        return self.weights.shape[1]

    def neighbours(self, similarity: Any, k: int = 3) -> "DenseRoutes":
        """For each query the mean of its k nearest prompts' weights, ŵ = Σ s_i w_i / Σ s_i.

        C3PO's kNN form (arXiv 2504.07964), which `neighbour_routes` carries out.
        Among equally near prompts the earlier one counts as nearer.

        Args:
            similarity: [query prompt] or, for one query, [prompt]: how near each of these prompts is to a
                query, the cosine of question embeddings in the paper.
            k: how many; the paper takes 3.

        Returns: one "prompt" a query.

        Raises:
            DataError: another number of similarities than prompts, k beyond them; similarities of the k
                nearest that are negative or all 0, by which no mean can be weighted.
        """
        k = whole_number(k, "k", least=1, most=self.n_prompts)
        try:
            given = torch.as_tensor(similarity, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"similarity must be numbers; got {type(similarity).__name__}.") from error
        near = given[None] if given.ndim == 1 else given
        if near.ndim != 2 or near.shape[1] != self.n_prompts or not len(near) or bool(near.isnan().any()):
            raise DataError(
                f"similarity must be numbers [query prompt] to {self.n_prompts} prompts; got shape "
                f"{tuple(given.shape)}."
            )
        order = near.argsort(dim=1, descending=True, stable=True)[:, :k]  # [query k]
        shares = near.gather(1, order)
        if bool((shares < 0).any()) or bool((shares.sum(dim=1) <= 0).any()):
            query = int(((shares < 0).any(dim=1) | (shares.sum(dim=1) <= 0)).nonzero()[0])
            raise DataError(
                f"The {k} nearest prompts of query {query} have similarities {shares[query].tolist()}; a "
                "weighted mean needs numbers from 0 on, not all 0. Take fewer neighbours, or leave it out."
            )
        shares = shares / shares.sum(dim=1, keepdim=True)
        mixed = torch.einsum("qk,lqke->lqe", shares, self.weights.double()[:, order])
        return DenseRoutes(self.shape, mixed.float())

    def summary(self) -> str:
        """How many prompts, and the model."""
        return f"{self.n_prompts} prompt{'s' * (self.n_prompts != 1)}; {self.shape.words}"

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row for each layer, prompt and expert: layer, prompt, expert, weight."""
        import pandas as pd

        rows = [
            (layer, prompt, expert, weight)
            for layer, of_layer in zip(self.shape.layers, self.weights.tolist(), strict=True)
            for prompt, of_prompt in enumerate(of_layer)
            for expert, weight in enumerate(of_prompt)
        ]
        return pd.DataFrame(rows, columns=["layer", "prompt", "expert", "weight"])

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, atomically; the model's shape goes into the metadata."""
        _KIND.save_tensors(path, {"weights": self.weights}, {"shape": asdict(self.shape)})

    @classmethod
    def load(cls, path: str | Path) -> "DenseRoutes":
        """Read what `save` wrote. Raises DataError, naming the file and what is wrong with it."""
        about, tensors = _KIND.load_tensors(path)
        weights = tensors.get("weights")
        if set(tensors) != {"weights"} or weights is None or not weights.is_floating_point():
            raise DataError(f"{path} is damaged: it holds {sorted(tensors)}, not weights alone.")
        try:
            return cls(shape_from_json(about.get("shape")), weights)
        except DataError as error:
            raise DataError(f"{path} is damaged: {error}") from error
