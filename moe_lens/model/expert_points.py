"""A HookPoint on what each chosen expert of an MoE layer gives, before it is weighted.

    point = install_expert_out(moe)            # moe: a layer with routing points (router_points.install)
    ...
    uninstall_expert_out(moe)                  # Hugging Face's own experts again, without a trace

As long as nothing hooks the point, HF's own code runs. With a hook, HF's experts are called with each token
repeated k times and unit weights; the outputs go through the point and are weighted and added as HF does it:
bit for bit its result under `grouped_mm` and `batched_mm`, in another order of additions under `eager`.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.errors import HookError
from moe_lens.model.layers import MoELayer
from moe_lens.model.points import BlockRun, RoutingPoint, fire
from moe_lens.model.private_names import implementation_of
from moe_lens.model.router_points import installed_points, points_of
from moe_lens.model.state import uncompiled
from moe_lens.routers.layouts import ExpertsCall, Request, RouterOutput

_TOLERANCE: Final = {torch.float32: 1e-4, torch.float64: 1e-9}  # of the largest output; half precision: 5e-2


class ExpertPoint(RoutingPoint):
    """The point on the chosen experts' outputs [batch pos k d_model]; it can compute other experts' too."""

    def outputs_of(
        self, indices: Int[Tensor, "*tokens slot"], weights: Float[Tensor, "*tokens slot"] | None = None
    ) -> Float[Tensor, "*tokens slot d_model"]:
        """What other experts would give for the tokens that are running; only within a hook on this point.

        Args:
            indices: experts, int64; any number for each token.
            weights: with which they would be chosen. They matter where a weight multiplies what the expert
                reads (Llama 4); None: those of the chosen experts, slot by slot.
        """
        run = self.points.run
        if run is None or run.experts_call is None:
            raise HookError(f"{self.name}: outputs_of works only within a hook on this point.")
        flat = None if weights is None else weights.flatten(0, -2)
        return run.experts_call.outputs(indices.flatten(0, -2), flat).unflatten(0, tuple(indices.shape[:-1]))

    @property
    def weights_on_input(self) -> bool:
        """Whether weights multiply what the expert reads, so that its output is added as it is (Llama 4)."""
        return self.moe.row.experts.weights_on_input


class HookedExperts:
    """Takes the place of the forward of a block's experts; an object for `HookedRouter`'s reason."""

    def __init__(self, moe: MoELayer, original: Callable[..., Any], was_on_instance: bool):
        self.moe = moe
        self.original = original
        self.was_on_instance = was_on_instance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        points = installed_points(self.moe)
        if points.mode == "hooks" and points.expert_out_is_hooked:
            return _hooked(self, args, kwargs)
        if points.mode == "off" and points.is_observed:
            return _observed(self, args, kwargs)
        return self.original(*args, **kwargs)

    def edited(self, run: BlockRun, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the experts give together after the hooks on their outputs."""
        point = installed_points(self.moe).expert_out
        assert point is not None
        assert run.decision is not None
        run.experts_call, outputs = self.apart(run.decision, run.hidden, args, kwargs)
        outputs = outputs.unflatten(0, run.token_shape)
        return run.experts_call.combine(fire(point, outputs).to(outputs.dtype).flatten(0, -3))

    def apart(
        self, decision: RouterOutput, hidden: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[ExpertsCall, Tensor]:
        """The call of the experts, and what each chosen one gives, [token k d_model]."""
        request = Request(self.moe.block, self.original, decision, hidden, [*args, *kwargs.values()])
        call = self.moe.row.experts.open(request)
        outputs = call.outputs()
        way = implementation_of(self.moe.experts)
        added_up = installed_points(self.moe).added_up
        if (way, outputs.dtype) not in added_up:
            with torch.no_grad():
                self._check(call.combine(outputs), self.original(*args, **kwargs))
            added_up.add((way, outputs.dtype))
        return call, outputs

    def _check(self, added: Tensor, together: Tensor) -> None:
        """When they are first told apart: the experts must add up to what they give together."""
        allowed = _TOLERANCE.get(together.dtype, 5e-2) * float(together.abs().max())
        off = float((together - added).abs().max()) if together.numel() else 0.0
        if added.shape != together.shape or off > allowed:
            raise HookError(
                f"{self.moe.where}: the outputs of {type(self.moe.experts).__name__}, expert by expert, do "
                f"not add up to what it gives for all chosen experts (off by {off:.2g}), so they cannot be "
                "hooked. Leave set_use_expert_out(False)."
            )


@uncompiled
def _hooked(experts: HookedExperts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    run = installed_points(experts.moe).run
    if run is None or run.decision is None:
        raise HookError(
            f"{experts.moe.where}: its experts ran without its router. Hooks on expert outputs work only "
            "when the whole block runs."
        )
    run.experts_fired = True
    return experts.edited(run, args, kwargs)


@uncompiled
def _observed(experts: HookedExperts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The experts' own result, whose parts an observer sees."""
    observer = installed_points(experts.moe).observer
    decision = None if observer is None else observer.take_decision()
    if observer is None or decision is None:
        return experts.original(*args, **kwargs)
    call, outputs = experts.apart(decision, None, args, kwargs)
    observer.see_outputs(outputs)
    return call.combine(outputs)


def install_expert_out(moe: MoELayer) -> ExpertPoint:
    """Put a point on the experts' outputs of `moe`, which must have routing points.

    Raises:
        HookError: its block has no module that runs all its experts.
    """
    if moe.experts is None:
        raise HookError(
            f"{moe.where}: {type(moe.block).__name__} has no module that runs all its experts on (hidden "
            "states, indices, weights), so their outputs cannot be hooked. Leave set_use_expert_out(False)."
        )
    experts: Any = moe.experts
    points = installed_points(moe)
    point = points.expert_out = ExpertPoint(points)
    instance_forward = vars(experts).get("forward")
    experts.forward = HookedExperts(
        moe, instance_forward or experts.forward, was_on_instance=instance_forward is not None
    )
    return point


def uninstall_expert_out(moe: MoELayer) -> None:
    """Give the experts of `moe` their own forward back. Does nothing where no point is installed."""
    hooked = None if moe.experts is None else vars(moe.experts).get("forward")
    if not isinstance(hooked, HookedExperts) or moe.experts is None:
        return
    experts: Any = moe.experts
    if hooked.was_on_instance:
        experts.forward = hooked.original
    else:
        del experts.forward
    if (points := points_of(moe)) is not None:
        points.expert_out = None
        points.hooks_changed()
