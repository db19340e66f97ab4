"""How large the outputs of each expert are: sums and maxima over the tokens that chose it.

stats = collect_routing(model, prompts, outputs=True)
stats.outputs.mean_weighted_norm          # [layer expert]: REAP's saliency
stats.outputs.max_abs                     # [layer expert]: where super experts show
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.errors import DataError
from moe_lens.results import Result
from moe_lens.statistics.counts import one_hot


@dataclass(frozen=True, eq=False, repr=False)
class ExpertOutputs(Result):
    """Norms of what each expert gave, f_e(x) before it is weighted, over the tokens that chose it.

    >>> from moe_lens import collect_routing, organisms
    >>> model = organisms.load("specialised")
    >>> stats = collect_routing(model, "Question : what is", outputs=True, progress=False)
    >>> stats.outputs.norm_sums.shape, bool((stats.outputs.max_norm <= stats.outputs.norm_sums).all())
    (torch.Size([4, 8]), True)

    `+` adds the sums and takes the larger maxima. In Llama 4, whose weights multiply what an expert reads,
    f_e(x) contains the weight, and g_e(x) is 1.

    Attributes:
        chosen: int64, at how many tokens the expert was chosen.
        norm_sums: float64, Σ ‖f_e(x)‖₂ (Expert Activation Norm in REAP, arXiv 2510.13999).
        weighted_norm_sums: float64, Σ g_e(x) · ‖f_e(x)‖₂, with the routing weight g_e(x).
        max_norm: float64, the largest ‖f_e(x)‖₂; 0 for an expert that was never chosen.
        max_abs: float64, the largest |f_e(x)_i| (super experts, arXiv 2507.23279); 0 likewise.
    """

    chosen: Int[Tensor, "layer expert"]
    norm_sums: Float[Tensor, "layer expert"]
    weighted_norm_sums: Float[Tensor, "layer expert"]
    max_norm: Float[Tensor, "layer expert"]
    max_abs: Float[Tensor, "layer expert"]

    def __post_init__(self) -> None:
        for name, tensor in vars(self).items():
            dtype = torch.int64 if name == "chosen" else torch.float64
            bad = tensor.dtype != dtype or not bool(torch.isfinite(tensor).all())
            if bad or (name != "weighted_norm_sums" and bool((tensor < 0).any())):
                raise DataError(
                    f"ExpertOutputs.{name} must be {dtype}, finite and not negative. Were the experts' "
                    "outputs NaN or infinite?"
                )

    @property
    def mean_norm(self) -> Float[Tensor, "layer expert"]:
        """Mean ‖f_e(x)‖₂ over the tokens that chose the expert; NaN for an expert never chosen."""
        return self.norm_sums / self.chosen

    @property
    def mean_weighted_norm(self) -> Float[Tensor, "layer expert"]:
        """Mean g_e(x) · ‖f_e(x)‖₂ over the tokens that chose the expert: REAP's saliency."""
        return self.weighted_norm_sums / self.chosen

    def __add__(self, other: "ExpertOutputs") -> "ExpertOutputs":
        added = {}
        for name, tensor in vars(self).items():
            of_other = getattr(other, name)
            added[name] = torch.maximum(tensor, of_other) if name.startswith("max") else tensor + of_other
        return ExpertOutputs(**added)

    def summary(self) -> str:
        """Numbers of layers and experts, and where the largest output is."""
        n_layers, n_experts = self.max_abs.shape
        row, expert = divmod(int(self.max_abs.argmax()), n_experts)
        return (
            f"{n_layers} layers × {n_experts} experts; the largest output component, "
            f"{float(self.max_abs.max()):.3g}, is in row {row}, expert {expert}"
        )

    def check(self, counts: Int[Tensor, "layer expert"], n_tokens: int, top_k: int) -> None:
        """Raise DataError unless the table is about the tokens with these counts."""
        if any(tensor.shape != counts.shape for tensor in vars(self).values()):
            raise DataError(f"ExpertOutputs.norm_sums has shape {tuple(self.norm_sums.shape)}.")
        if not torch.equal(self.chosen, counts):
            raise DataError("ExpertOutputs does not belong to these counts: its experts ran at other tokens.")


def output_sizes(outputs: Float[Tensor, "token k d_model"]) -> tuple[Tensor, Tensor]:
    """[token k] each, in float32 at least: ‖f_e(x)‖₂ and the largest |f_e(x)_i|."""
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    largest = torch.maximum(outputs.amax(-1), -outputs.amin(-1))  # faster than a norm of order inf
    return torch.linalg.vector_norm(outputs, dim=-1, dtype=dtype), largest.to(dtype)


def output_sums(
    norms: Float[Tensor, "layer token k"],
    largest: Float[Tensor, "layer token k"],
    weights: Float[Tensor, "layer token k"],
    indices: Int[Tensor, "layer token k"],
    n_experts: int,
) -> dict[str, Float[Tensor, "layer expert"]]:
    """Field of ExpertOutputs -> its rows; but for `chosen`, which is counted anyway."""
    nothing = torch.zeros(len(norms), n_experts, dtype=torch.float64, device=norms.device)
    flat = indices.flatten(1)
    return {
        "norm_sums": one_hot(indices, norms, n_experts).sum(1),
        "weighted_norm_sums": one_hot(indices, norms.double() * weights, n_experts).sum(1),
        "max_norm": nothing.scatter_reduce(1, flat, norms.flatten(1).double(), "amax"),
        "max_abs": nothing.scatter_reduce(1, flat, largest.flatten(1).double(), "amax"),
    }
