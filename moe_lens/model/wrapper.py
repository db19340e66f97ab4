"""`Model`: what `HookedMoE` and `RoutedModel` share, and what functions that run a model take.

def count(model: Model, ...):
    check_hooked(model)                        # says what to pass instead of anything else
    for layer in model.moe_layers: ...
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from moe_lens.errors import HookError, MoELensError
from moe_lens.model.registration import (
    has_expert_out,
    moe_shape,
    register_expert_out,
    routing_layers,
    unregister_expert_out,
)
from moe_lens.routers.rule import RoutingRule
from moe_lens.shape import MoEShape


class Model:
    """A model whose routing has hook points: a `HookedMoE` or a `RoutedModel`."""

    if TYPE_CHECKING:  # what each wrapper has in its own way, with TransformerLens' arguments and results
        cfg: Any
        training: bool

        @property
        def tokenizer(self) -> Any: ...
        @tokenizer.setter
        def tokenizer(self, value: Any) -> None: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
        def to_tokens(self, *args: Any, **kwargs: Any) -> Any: ...
        def to_string(self, *args: Any, **kwargs: Any) -> Any: ...
        def to_str_tokens(self, *args: Any, **kwargs: Any) -> Any: ...
        def to_single_token(self, *args: Any, **kwargs: Any) -> Any: ...
        def run_with_cache(self, *args: Any, **kwargs: Any) -> Any: ...
        def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any: ...
        def hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]: ...
        def add_hook(self, *args: Any, **kwargs: Any) -> None: ...
        def reset_hooks(self, *args: Any, **kwargs: Any) -> None: ...
        def generate(self, *args: Any, **kwargs: Any) -> Any: ...

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have a router, ascending; dense layers are left out."""
        return tuple(routing_layers(self))

    @property
    def moe_shape(self) -> MoEShape:
        """Name, MoE layers, number of experts and k: what results carry to say which model they are about."""
        return moe_shape(self)

    @property
    def n_experts(self) -> int:
        """Number of routed experts in each MoE layer (shared experts, which always run, not counted)."""
        return self.moe_shape.n_experts

    @property
    def top_k(self) -> int:
        """Number of experts that run for each token in each MoE layer."""
        return self.moe_shape.top_k

    def _no_router(self, name: str, layer: int, hook: Any) -> HookError:
        """What to say of a point that is in no layer here; a plan for another model says so itself first."""
        if (check_fits := getattr(hook, "check_fits", None)) is not None:
            check_fits(self.moe_shape)
        return HookError(f"{name}: layer {layer} has no router; the MoE layers are {self.moe_layers}.")

    def routing_rule(self, layer: int) -> RoutingRule:
        """The routing rule of one MoE layer, with the parameters that its router has now.

        Raises:
            HookError: the layer has no router.
        """
        layers = routing_layers(self)
        if layer not in layers:
            raise HookError(f"layer {layer} has no router; the MoE layers are {tuple(layers)}.")
        return layers[layer].rule

    @property
    def use_expert_out(self) -> bool:
        """Whether the points on expert outputs exist; see `set_use_expert_out`."""
        return any(has_expert_out(moe) for moe in routing_layers(self).values())

    def set_use_expert_out(self, use_expert_out: bool) -> None:
        """Put hook_expert_out [batch pos k d_model] into every MoE layer's `mlp`, or take it out again.

        >>> from moe_lens import organisms
        >>> model = organisms.load("specialised")
        >>> model.set_use_expert_out(True)
        >>> _, cache = model.run_with_cache("Question : what is")
        >>> cache["expert_out", 0].shape                         # [batch pos k d_model]
        torch.Size([1, 5, 2, 64])

        It holds what each chosen expert gives, before it is weighted; edits take effect, and gradients flow.
        The sum of weight × output is the block's routed output (without shared experts), bit for bit (with
        transformers' eager experts: up to the order of additions). Three families differ: Llama 4 weights
        what an expert reads, so that its outputs are added as they are; Nemotron-H with latent experts has
        them in the latent space [batch pos k latent]; Laguna scales the sum.

        It costs memory in caches, so it is off by default. Switching it off removes the hooks on it, too.

        Raises:
            HookError: the model does not run its experts in a way that moe_lens knows.
        """
        if use_expert_out:
            register_expert_out(self)
        else:
            unregister_expert_out(self)


def check_hooked(model: Any, kind: type = Model, *, error: type[MoELensError] = MoELensError) -> None:
    """Raise `error`, which says what to pass instead, for anything that is not a wrapper of this kind."""
    if isinstance(model, kind):
        return
    if isinstance(model, Model):
        raise error(
            f"A {kind.__name__} is needed here, for TransformerLens' own hook points; got "
            f"{type(model).__name__}, which has those of routing and of the residual stream."
        )
    raise error(
        f"A {'HookedMoE or RoutedModel' if kind is Model else kind.__name__} is needed here "
        "(from_pretrained, or attach(model) for a bridge or a Hugging Face model); got "
        f"{type(model).__name__}."
    )


def check_options(options: Mapping[str, Any]) -> None:
    """Raise HookError for a plan or hooks among the arguments of `generate`, which takes none."""
    for name in ("plan", "plans", "hooks", "fwd_hooks"):
        if name in options:
            hooks = "steer_hooks(plan)" if name.startswith("plan") else "hooks"
            raise HookError(
                f"generate takes no {name}=. Write under hooks: with model.hooks({hooks}): "
                f"model.generate(...); or generate_text(model, prompts, hooks={hooks})."
            )
