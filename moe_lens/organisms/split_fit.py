"""How one feed-forward layer becomes experts: which neurons go together, who routes, what they then write.

A gated feed-forward layer is a sum over its neurons, f(x) = Σ_n a_n(x) d_n, where a_n is a neuron's
activation and d_n its column of the down-projection. Any partition of the neurons is a sum over experts.
`balanced_clusters` chooses one, `ridge` fits the router to the size of what each expert writes, and
`refitted_down` moves the columns d_n, in closed form, so that the chosen experts make up for those left out.

References: Zhang et al. 2022, MoEfication (arXiv:2110.01786): clusters of co-activated neurons as experts.
Zhu et al. 2024, LLaMA-MoE (arXiv:2406.16554): splitting SwiGLU layers.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moe_lens.errors import DataError


def balanced_clusters(
    features: Float[Tensor, "neuron feature"], n_clusters: int, *, seed: int = 0, n_rounds: int = 6
) -> Int[Tensor, "cluster member"]:
    """Clusters of equal size: k-means by the angle between features, each round an optimal assignment.

    >>> import torch
    >>> from moe_lens.organisms.split_fit import balanced_clusters
    >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.1, 0.9]])
    >>> sorted(balanced_clusters(features, 2).tolist())
    [[0, 2], [1, 3]]

    Args:
        features: one row a neuron, such as its activation on many tokens; only directions count.
        n_clusters: which divides the number of neurons.
        seed: of the neurons that the clusters start from (each far from those before it, as in k-means++).
        n_rounds: at most; it ends when nothing moves.

    Returns:
        Neuron numbers, int64, in rising order in each cluster.

    Raises:
        DataError: if n_clusters does not divide the number of neurons.
    """
    n_neurons = len(features)
    if n_clusters < 1 or n_neurons % n_clusters:
        raise DataError(
            f"{n_neurons} neurons do not make {n_clusters} clusters of equal size; choose a divisor."
        )
    size = n_neurons // n_clusters
    directions = torch.nn.functional.normalize(features.double(), dim=-1)
    centres = _far_apart(directions, n_clusters, np.random.default_rng(seed))
    cluster_of = torch.full((n_neurons,), -1)
    for _ in range(n_rounds):
        similarity = (directions @ centres.T).repeat_interleave(size, dim=1)  # one column a place
        _, places = linear_sum_assignment(similarity.numpy(), maximize=True)
        moved = torch.from_numpy(places) // size
        if torch.equal(moved, cluster_of):
            break
        cluster_of = moved
        sums = torch.zeros_like(centres).index_add_(0, cluster_of, directions)
        centres = torch.nn.functional.normalize(sums, dim=-1)
    return torch.argsort(cluster_of, stable=True).view(n_clusters, size)


def _far_apart(
    directions: Float[Tensor, "neuron feature"], n: int, rng: np.random.Generator
) -> Float[Tensor, "cluster feature"]:
    """n of the directions, each drawn by its squared distance to the nearest one before it."""
    chosen = [int(rng.integers(len(directions)))]
    for _ in range(n - 1):
        nearest = (directions @ directions[chosen].T).amax(dim=1)
        distance = (2 - 2 * nearest).clamp(min=1e-12).numpy()
        chosen.append(int(rng.choice(len(directions), p=distance / distance.sum())))
    return directions[chosen]


def ridge(
    inputs: Float[Tensor, "token d_in"], targets: Float[Tensor, "token d_out"], strength: float
) -> Float[Tensor, "d_out d_in"]:
    """The W that minimises mean |W x − y|² + strength · mean |x|²/d_in · |W|², in closed form.

    >>> import torch
    >>> from moe_lens.organisms.split_fit import ridge
    >>> x = torch.eye(2)
    >>> ridge(x, 3 * x, strength=0.0)
    tensor([[3., 0.],
            [0., 3.]])

    Args:
        inputs: one row a token.
        targets: what W x is to be.
        strength: 0 is least squares; 1 a penalty as large as the mean of the inputs' squares.
    """
    gram = (inputs.T @ inputs).double()
    gram += strength * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.solve(gram, (inputs.T @ targets).double()).T.to(inputs.dtype)


def expert_sizes(
    activations: Float[Tensor, "token neuron"],
    down: Float[Tensor, "d_model neuron"],
    experts: Int[Tensor, "expert member"],
) -> Float[Tensor, "token expert"]:
    """The Euclidean norm of what each expert writes on each token, in units of the residual stream.

    Args:
        activations: a_n(x), of all neurons of the layer.
        down: the layer's down-projection.
        experts: which neurons each expert has.
    """
    norms = [(activations[:, members] @ down[:, members].T).norm(dim=-1) for members in experts]
    return torch.stack(norms, dim=-1)


def refitted_down(
    features: list[Float[Tensor, "token neuron"]],
    targets: Float[Tensor, "token d_model"],
    down: Float[Tensor, "d_model neuron"],
    strength: float,
) -> Float[Tensor, "d_model neuron"]:
    """The down-projection nearest to `down` with which the routed neurons write the targets.

    It minimises Σ_k Σ |D φ_k − y|² + strength · s · |D − down|² over D, where the inner sum is over tokens
    and s is the mean over neurons of Σ_k Σ φ_k². Where all neurons run and the targets are the dense
    layer's own, it is `down` itself.

    Args:
        features: for each number of experts k that counts: the neurons' activations times the weight of their
            expert, 0 where it is not chosen.
        targets: what the layer is to write.
        down: the dense layer's down-projection.
        strength: how much it is held back, as in `ridge`; above 0, since unused neurons are free otherwise.
    """
    gram = torch.zeros(down.shape[1], down.shape[1], dtype=torch.float64)
    cross = torch.zeros(down.shape[1], down.shape[0], dtype=torch.float64)
    for routed in features:
        gram += (routed.T @ routed).double()
        cross += (routed.T @ (targets - routed @ down.T)).double()
    gram += strength * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return down + torch.linalg.solve(gram, cross).T.to(down.dtype)
