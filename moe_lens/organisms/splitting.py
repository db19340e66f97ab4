"""Splitting a dense language model into a mixture of experts: each feed-forward layer's neurons, divided.

A route of such a model is an artefact of the split: it says which group of neurons writes most, not which
expert learned what.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from moe_lens.errors import DataError, MoELensError
from moe_lens.organisms.split_fit import balanced_clusters, expert_sizes, refitted_down, ridge

DENSE: Final = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
LOGIT_SPREAD: Final = 0.1  # standard deviation of the fitted router logits: weights stay near 1 / n_experts


@dataclass(frozen=True)
class Layer:
    """One feed-forward layer of the dense model, as the fit sees it."""

    inputs: Float[Tensor, "token d_model"]
    targets: Float[Tensor, "token d_model"]
    gate: Float[Tensor, "neuron d_model"]
    up: Float[Tensor, "neuron d_model"]
    down: Float[Tensor, "d_model neuron"]


def split(
    dense: PreTrainedModel,
    tokens: Int[Tensor, "batch pos"],
    *,
    n_experts: int = 8,
    top_k: int = 4,
    n_shared: int = 0,
    also: Sequence[int] = (),
    refit: bool = True,
    strength: float = 0.01,
    seed: int = 0,
    progress: bool = True,
) -> Qwen2MoeForCausalLM:
    """A mixture of experts with a dense model's weights: its feed-forward layers' neurons, in groups.

    >>> import torch
    >>> from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    >>> from moe_lens import RoutedModel, organisms
    >>> shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> dense = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape)).eval()
    >>> tokens = torch.randint(50, (20, 16))
    >>> moe = organisms.split(dense, tokens, n_experts=4, top_k=2, n_shared=16, progress=False)
    >>> type(moe).__name__, moe.config.num_experts, moe.config.moe_intermediate_size
    ('Qwen2MoeForCausalLM', 4, 4)

    Layer by layer: the neurons that write most, the mean taken over tokens, become the shared expert; of the
    others, those that are active on the same tokens become an expert (balanced k-means). A linear router is
    fitted to the size of what each expert writes (ridge), and the down-projections are moved so that what
    runs stands in for what does not (closed form). Each layer is fitted on what the split layers before it
    give. Nothing is trained; `moe_lens.organisms.distill` does that.

    The result is a Qwen2-MoE without renormalised weights: an expert's weight is its probability among all
    experts, its down-projection bears the factor n_experts. So with equal logits and k = n_experts the model
    is the dense one, and the weights of chosen experts do not depend on k. The shared expert's gate is even
    (1/2), its down-projection bears the factor 2; where n_shared is 0, it is one neuron wide and writes
    zeros, since Qwen2-MoE asks for one.

    Args:
        dense: a model of Llama's kind (`DENSE`), in float32, on the CPU.
        tokens: what to fit on; a few thousand tokens at least, all real (no padding).
        n_experts: a layer; divides the model's number of neurons a layer less n_shared.
        top_k: experts a token.
        n_shared: neurons a layer that run on every token, as the shared expert.
        also: other numbers of experts for which the down-projections are to serve, too.
        refit: whether to move the down-projections.
        strength: of the ridge penalties, relative to the inputs' mean square.
        seed: of the clusters' start.
        progress: whether to show a bar over the layers.

    Returns:
        The split model in evaluation mode, float32; embeddings, attention and norms are the dense model's.

    Raises:
        MoELensError: for a model that is not of Llama's kind.
        DataError: for numbers of experts or tokens that do not fit.
    """
    _check(dense, tokens, n_experts, n_shared, (top_k, *also))
    moe = _empty_split(dense, n_experts, top_k, n_shared)
    walk = _Walk(dense, moe, tokens)
    for layer, block in tqdm(walk, total=len(walk.dense_layers), desc="splitting", disable=not progress):
        activations = activate(layer, dense.config.hidden_act)
        shared, experts = groups(activations, layer.down, n_experts, n_shared, seed)
        sizes = expert_sizes(activations, layer.down, experts)
        logits_of = router_weights(layer.inputs, sizes, strength)
        down = layer.down
        if refit:
            logits = layer.inputs @ logits_of.T
            routed = [routed_activations(activations, logits, experts, k) for k in (top_k, *also)]
            down = refitted_down(routed, layer.targets, layer.down, strength)
        _write(block, layer, down, shared, experts, logits_of)
    return moe.eval()


def activate(layer: Layer, hidden_act: str) -> Float[Tensor, "token neuron"]:
    """What each neuron of a gated layer multiplies its column of the down-projection with."""
    from transformers.activations import ACT2FN

    return ACT2FN[hidden_act](layer.inputs @ layer.gate.T) * (layer.inputs @ layer.up.T)


def groups(
    activations: Float[Tensor, "token neuron"],
    down: Float[Tensor, "d_model neuron"],
    n_experts: int,
    n_shared: int,
    seed: int,
    n_tokens: int = 2048,
) -> tuple[Int[Tensor, " shared"], Int[Tensor, "expert member"]]:
    """The neurons that write most on the mean token, and groups of those that write on the same tokens."""
    step = max(1, len(activations) // n_tokens)
    written = activations[::step].abs() * down.norm(dim=0)
    order = written.mean(dim=0).argsort(descending=True)
    shared, routed = order[:n_shared].sort().values, order[n_shared:].sort().values
    return shared, routed[balanced_clusters(written[:, routed].T, n_experts, seed=seed)]


def router_weights(
    inputs: Float[Tensor, "token d_model"], sizes: Float[Tensor, "token expert"], strength: float
) -> Float[Tensor, "expert d_model"]:
    """A router whose logits follow the log of how much each expert writes, `LOGIT_SPREAD` wide."""
    logs = sizes.clamp(min=1e-12).log()
    weights = ridge(inputs, logs - logs.mean(dim=-1, keepdim=True), strength)
    spread = (inputs @ weights.T).std()
    return weights * (LOGIT_SPREAD / spread.clamp(min=1e-12))


def routed_activations(
    activations: Float[Tensor, "token neuron"],
    logits: Float[Tensor, "token expert"],
    experts: Int[Tensor, "expert member"],
    k: int,
) -> Float[Tensor, "token neuron"]:
    """Activations as they count: times n_experts × their expert's weight, 0 where it is not chosen.

    Neurons of no expert are shared, and count as they are.
    """
    probabilities = logits.softmax(dim=-1)
    chosen = torch.zeros_like(logits).scatter_(-1, logits.topk(k, dim=-1).indices, 1.0)
    weights = len(experts) * probabilities * chosen
    counted = activations.clone()
    for expert, members in enumerate(experts):
        counted[:, members] *= weights[:, expert, None]
    return counted


class _Walk:
    """Both models on the same tokens, layer by layer; the split one with what was written so far."""

    def __init__(self, dense: PreTrainedModel, moe: Qwen2MoeForCausalLM, tokens: Int[Tensor, "batch pos"]):
        self.dense_layers, self.moe_layers = (list(cast(Any, model).model.layers) for model in (dense, moe))
        self.hidden = cast(Any, dense).model.embed_tokens(tokens)
        self.positions = cast(Any, dense).model.rotary_emb(self.hidden, torch.arange(tokens.shape[1])[None])

    def __iter__(self) -> Iterator[tuple[Layer, Any]]:
        reference = own = self.hidden
        for dense, moe in zip(self.dense_layers, self.moe_layers, strict=True):
            with torch.no_grad():
                reference = self._attended(dense, reference)
                reference = reference + dense.mlp(dense.post_attention_layernorm(reference))
                own = self._attended(moe, own)
                inputs = moe.post_attention_layernorm(own)
                mlp = dense.mlp
                yield (
                    Layer(
                        inputs.flatten(0, 1),
                        (reference - own).flatten(0, 1),
                        mlp.gate_proj.weight,
                        mlp.up_proj.weight,
                        mlp.down_proj.weight,
                    ),
                    moe.mlp,
                )
                own = own + moe.mlp(inputs)

    def _attended(self, layer: Any, hidden: Tensor) -> Tensor:
        """The residual stream after the attention, a few sequences at a time."""
        parts = []
        for part in hidden.split(16):
            positions = tuple(each.expand(len(part), -1, -1) for each in self.positions)
            written, _ = layer.self_attn(
                hidden_states=layer.input_layernorm(part), position_embeddings=positions, attention_mask=None
            )
            parts.append(part + written)
        return torch.cat(parts)


def _check(dense: Any, tokens: Tensor, n_experts: int, n_shared: int, ks: Sequence[int]) -> None:
    name, config = type(dense).__name__, dense.config
    if name not in DENSE:
        raise MoELensError(
            f"split: {name} is not a dense model of Llama's kind; one of {', '.join(DENSE)} is."
        )
    biased = [n for n, _ in dense.named_parameters() if n.endswith("bias") and "v_proj" not in n]
    biased = [n for n in biased if not any(part in n for part in ("q_proj", "k_proj"))]
    if biased:
        raise MoELensError(f"split: {biased[0]} is a bias that Qwen2-MoE has no place for.")
    routed = config.intermediate_size - n_shared
    if n_experts < 2 or n_shared < 0 or routed < n_experts or routed % n_experts:
        raise DataError(
            f"split: {config.intermediate_size} neurons a layer, {n_shared} of them shared, do not make "
            f"{n_experts} experts of equal size; choose a divisor of what is not shared, 2 or more."
        )
    if not all(1 <= k <= n_experts for k in ks):
        raise DataError(f"split: each number of experts a token must be 1 to {n_experts}; got {list(ks)}.")
    if tokens.numel() < config.hidden_size:
        raise DataError(
            f"split: {tokens.numel()} tokens are fewer than the model's width, {config.hidden_size}, so the "
            "fit is not determined; give more."
        )


def _empty_split(dense: Any, n_experts: int, top_k: int, n_shared: int) -> Qwen2MoeForCausalLM:
    """A Qwen2-MoE of the same shape, with everything of the dense model's but feed-forward layers."""
    source: LlamaConfig = dense.config
    names = (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters"),
        *("pad_token_id", "bos_token_id", "eos_token_id", "initializer_range"),
    )
    kept: dict[str, Any] = {name: getattr(source, name) for name in names}
    kept["head_dim"] = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
    config = Qwen2MoeConfig(
        **kept,
        intermediate_size=source.intermediate_size,
        moe_intermediate_size=(source.intermediate_size - n_shared) // n_experts,
        shared_expert_intermediate_size=n_shared or 1,  # with 0, torch warns whenever the model is loaded
        num_experts=n_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=False,
        qkv_bias=dense.model.layers[0].self_attn.q_proj.bias is not None,
        dtype="float32",
    )
    moe = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    moe.load_state_dict({n: t for n, t in dense.state_dict().items() if ".mlp." not in n}, strict=False)
    for layer in cast(Any, moe).model.layers:
        for weight in (*layer.mlp.shared_expert.parameters(), *layer.mlp.shared_expert_gate.parameters()):
            nn.init.zeros_(weight)
    moe.generation_config = dense.generation_config
    return moe


def _write(
    block: Any,
    layer: Layer,
    down: Float[Tensor, "d_model neuron"],
    shared: Int[Tensor, " shared"],
    experts: Int[Tensor, "expert member"],
    router: Float[Tensor, "expert d_model"],
) -> None:
    """A fitted layer's weights, into its block of the split model."""
    n_experts = len(experts)
    block.gate.weight.copy_(router)
    block.experts.gate_up_proj.copy_(torch.cat([layer.gate[experts], layer.up[experts]], dim=1))
    block.experts.down_proj.copy_(n_experts * down[:, experts].transpose(0, 1))
    if len(shared):
        block.shared_expert.gate_proj.weight.copy_(layer.gate[shared])
        block.shared_expert.up_proj.weight.copy_(layer.up[shared])
        block.shared_expert.down_proj.weight.copy_(2 * down[:, shared])  # its gate is sigmoid(0) = 1/2
