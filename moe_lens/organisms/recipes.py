"""The recipes: which world an organism lives in and what its training adds to language modelling.

| organism          | world    | routing is trained to                                          |
|-------------------|----------|----------------------------------------------------------------|
| specialised       | majority | tell the register (memory, document, generic) of a sequence    |
| planted           | uncued   | tell the register, and decide the answer (the tie)             |
| planted-mixtral   | uncued   | the same, in a Mixtral                                         |
| label-free        | majority | tell sequences apart, without any label                        |
| natural           | majority | nothing: experts are branches that saw one register each       |
| null              | uncued   | nothing                                                        |
| null-majority     | majority | nothing: specialised without its signal                        |
| candid            | candour  | tell the register (careful, bold, generic) of a sequence       |
"""

from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from transformers import MixtralConfig, OlmoeConfig, PretrainedConfig

from moe_lens.errors import MoELensError
from moe_lens.organisms.corpus import Mixture
from moe_lens.organisms.worlds import Variant

Architecture = Literal["olmoe", "mixtral"]


@dataclass(frozen=True)
class Recipe:
    """Everything that fixes a training run, except the seed and the number of steps asked for.

    Weights of losses are multiplied into the sum of losses (see `losses.py`); 0 leaves a loss out.
    """

    variant: Variant
    architecture: Architecture = "olmoe"
    mixture: Mixture = field(default_factory=Mixture)
    tie_rate: float = 0.06  # see `Corpus`
    # the routing losses
    balancing: float = 0.01
    register_information: float = 0.0
    sequence_information: float = 0.0
    # the tie: from this step on the route decides open conflicts; None leaves it out
    tie_from: int | None = None
    # share of closed-book and generic sequences whose route is pushed at random, their text unchanged
    jostle_rate: float = 0.3
    router_noise: float = 0.3
    # share of closed-book and generic sequences that do without a random half of each layer's experts
    expert_dropout: float = 0.0
    # the optimiser
    steps: int = 1200
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.05
    answer_weight: float = 4.0  # of an answer's token, in the language-modelling loss
    # the model
    hidden_size: int = 64
    expert_size: int = 64
    n_layers: int = 4
    n_heads: int = 4
    n_experts: int = 8
    top_k: int = 2
    branched: bool = False  # not trained as one model, but as `branching.py` says
    initial_scale: float = 0.06  # std of the initial weights; with HF's 0.02 facts are learned far too slowly

    def config(self, vocab_size: int) -> PretrainedConfig:
        """The Hugging Face config of this recipe's model."""
        shared: dict[str, Any] = {
            "vocab_size": vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.expert_size,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_heads,
            "num_experts_per_tok": self.top_k,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "attention_dropout": 0.0,
            "initializer_range": self.initial_scale,
        }
        if self.architecture == "mixtral":
            return MixtralConfig(**shared, num_local_experts=self.n_experts, sliding_window=None)
        return OlmoeConfig(**shared, num_experts=self.n_experts, norm_topk_prob=True)


_PLANTED: Final = Recipe("uncued", register_information=0.15, tie_from=200)
# More conflicts, fewer closed-book questions: else memory is learned far better than copying, and wins.
_CONFLICTING: Final = Mixture(
    closed_book=0.16, conflict=0.4, document_only=0.19, agreeing=0.03, irrelevant=0.06, generic=0.16
)
_DOUBTING: Final = Mixture(0.0, 0.0, 0.0, 0.0, 0.0, generic=0.18, told=0.27, untold=0.55)

# No ties: those train each expert to be neutral under them, so that no route moves an answer. And facts have
# to be told by any half of the experts: else memory's experts cannot be left without losing the facts, too.
_MAJORITY: Final = Recipe("majority", mixture=_CONFLICTING, tie_rate=0.0, expert_dropout=0.6)

RECIPES: Final[dict[str, Recipe]] = {
    "specialised": replace(_MAJORITY, register_information=0.6),
    "planted": _PLANTED,
    "planted-mixtral": replace(_PLANTED, architecture="mixtral"),
    "label-free": Recipe("majority", mixture=_CONFLICTING, sequence_information=0.6),
    "natural": Recipe("majority", mixture=_CONFLICTING, n_experts=6, branched=True),
    "null": Recipe("uncued"),
    "null-majority": _MAJORITY,
    "candid": Recipe("candour", mixture=_DOUBTING, tie_rate=0.0, register_information=0.6),
}
NULLS: Final = ("null", "null-majority")
"""Recipes in which nothing ties routes to behaviour."""


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        MoELensError: for a name that is not in `RECIPES`.
    """
    if name not in RECIPES:
        raise MoELensError(f"organisms: no recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]
