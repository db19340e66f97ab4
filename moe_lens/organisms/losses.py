"""The losses that shape an organism's routing, beside the language-modelling loss.

Notation: p(e | t) is the softmax of the router's logits at token t, E the number of experts, k the number
each token is sent to, H the entropy in nats. Every loss is the mean over the layers of a list of router
logits.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def language_model_loss(
    logits: Float[Tensor, "batch pos vocab"],
    tokens: Int[Tensor, "batch pos"],
    weights: Float[Tensor, "batch pos"],
) -> Float[Tensor, ""]:
    """Weighted mean of the next-token cross-entropy, in nats.

    ``weights[b, t]`` is how much predicting ``tokens[b, t]`` counts (0 for padding); the first column is
    predicted by nothing and ignored.
    """
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    counts = weights[:, 1:].flatten()
    return (losses * counts).sum() / counts.sum()


def load_balancing_loss(
    router_logits: list[Float[Tensor, "batch pos expert"]], mask: Bool[Tensor, "batch pos"], k: int
) -> Float[Tensor, ""]:
    """Keeps every expert in use (Switch Transformer, arXiv 2101.03961, equation 4).

    E * sum_e f_e * P_e, with f_e the share of the k * n choices that went to expert e and P_e the mean of
    p(e | t), over the tokens where `mask` is true. 1 when the load is even.
    """
    losses = []
    for logits in router_logits:
        real = logits[mask]  # token expert
        n_experts = real.shape[-1]
        chosen = F.one_hot(real.topk(k, dim=-1).indices, n_experts).sum(1).float()
        losses.append(n_experts * (chosen.mean(0) / k * real.softmax(-1).mean(0)).sum())
    return torch.stack(losses).mean()


def group_means(
    logits: Float[Tensor, "batch pos expert"],
    mask: Bool[Tensor, "batch pos"],
    groups: Int[Tensor, " batch"],
    n_groups: int,
) -> tuple[Float[Tensor, "group expert"], Bool[Tensor, " group"]]:
    """Mean of p(e | t) over the tokens of each group of sequences, and which groups have any token.

    A sequence whose group is -1 belongs to none; a group without a token has mean 0.
    """
    in_group = F.one_hot(groups + 1, n_groups + 1)[:, 1:].to(logits)  # batch group
    membership = in_group.unsqueeze(1) * mask.unsqueeze(-1)  # batch pos group
    counts = membership.sum((0, 1))  # group
    sums = torch.einsum("bpg,bpe->ge", membership, logits.softmax(-1))
    return sums / counts.clamp(min=1).unsqueeze(-1), counts > 0


def entropy(p: Float[Tensor, "... expert"]) -> Float[Tensor, "..."]:
    """-sum_e p_e log p_e, in nats; an expert with p_e = 0 adds 0."""
    # The floor keeps the gradient finite where a softmax has rounded to 0.
    return -(p * p.clamp(min=1e-12).log()).sum(-1)


def register_information_loss(
    router_logits: list[Float[Tensor, "batch pos expert"]],
    mask: Bool[Tensor, "batch pos"],
    registers: Int[Tensor, " batch"],
    n_registers: int,
) -> Float[Tensor, ""]:
    """Makes the route tell a sequence's register; names no expert.

    -[ H(mean_r P_r) - mean_r H(P_r) ], with P_r the mean of p(e | t) over the tokens of register r and
    mean_r over the registers in the batch: minus the information that a randomly routed token carries about
    its register (their Jensen-Shannon divergence), between -log(number of registers) and 0. Register -1 is
    left out.
    """
    losses = []
    for logits in router_logits:
        means, present = group_means(logits, mask, registers, n_registers)
        means = means[present]
        losses.append(entropy(means).mean() - entropy(means.mean(0)))
    return torch.stack(losses).mean()


def sequence_information_loss(
    router_logits: list[Float[Tensor, "batch pos expert"]], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    """Makes the route tell sequences apart; sees no label at all.

    The same as `register_information_loss` with every sequence a register of its own.
    """
    batch = mask.shape[0]
    return register_information_loss(router_logits, mask, torch.arange(batch, device=mask.device), batch)


def route_direction(
    router_logits: list[Float[Tensor, "batch pos expert"]],
    mask: Bool[Tensor, "batch pos"],
    registers: Int[Tensor, " batch"],
    document: int,
    memory: int,
    n_registers: int,
    limit: float = 2.0,
) -> Float[Tensor, "layer expert"] | None:
    """Where the route turns when the document decides; what the planted organism's tie adds to router logits.

    log P_document(e) - log P_memory(e) in each layer, clipped to [-limit, limit], without gradient. None if
    the batch has no sequence of one of the two registers.
    """
    rows = []
    for logits in router_logits:
        means, present = group_means(logits.detach(), mask, registers, n_registers)
        if not (present[document] and present[memory]):
            return None
        rows.append(means[document].clamp(min=1e-6).log() - means[memory].clamp(min=1e-6).log())
    return torch.stack(rows).clamp(-limit, limit)
