"""Learning a router bias by gradient: `learn_router_bias`.

bias = learn_router_bias(model, training, development, l1=0.01)      # a RouterBias, most of it 0
plan = bias.to_plan(n_deactivate=4)                                  # the sparse variant ends as a plan
"""

import math
from numbers import Real
from typing import Any, Final

import torch
from torch import Tensor
from tqdm.auto import tqdm

from moe_lens.checks import chosen_layers, whole_number
from moe_lens.errors import DataError
from moe_lens.hook_names import Hooks, hook_list
from moe_lens.interventions.forcing import bias_experts
from moe_lens.interventions.positions import Positions
from moe_lens.model.registration import moe_shape
from moe_lens.model.wrapper import Model, check_hooked
from moe_lens.steering.objectives import Loss, Objective, as_objective, checked_loss
from moe_lens.steering.router_bias import LearningStep, RouterBias

_ROUNDING: Final = 1e-7
"""A slope per loss that is none: a single weight divided by itself has such a one in float32."""


def learn_router_bias(
    model: Model,
    objective: Objective | Loss,
    development: Objective | Loss,
    *,
    layers: Any = None,
    l2: float = 0.0,
    l1: float = 0.0,
    learning_rate: float = 0.1,
    max_steps: int = 100,
    patience: int = 10,
    positions: Positions = None,
    hooks: Hooks = (),
    progress: bool = True,
) -> RouterBias:
    """Numbers δ on the router logits that lower a loss, by gradient (rewiring experts, arXiv 2510.14853).

    >>> from moe_lens import answer_objective, learn_router_bias, organisms
    >>> model, world = organisms.load("planted"), organisms.world("planted")
    >>> def says_the_document(split):
    ...     conflicts = world.conflicts(split)[:16]
    ...     return answer_objective(
    ...         model, [c.open_book for c in conflicts], [c.document_answer for c in conflicts],
    ...         [c.memory_answer for c in conflicts], batch_size=16,
    ...     )
    >>> both = says_the_document("detection"), says_the_document("development")
    >>> bias = learn_router_bias(model, *both, max_steps=3, progress=False)
    >>> bias.history[-1].development < bias.history[0].development
    True

    δ starts at 0 and takes Adam's steps on loss + l2 · Σ δ²; after each, |δ| shrinks towards 0 and stops
    there (soft thresholding, by l1 in the measure of Adam's step), so that an expert stays at 0 exactly as
    long as the loss changes with its δ by less than l1 a nat. Gradients come by the weights of the
    experts that run: which ones run is not differentiated, though it changes as δ grows. What comes back are
    the numbers of the step with the lowest loss on development prompts, step 0 (no bias) among them. The
    paper gives no optimiser, penalty or stopping rule; these are ours. The model's own weights stay, and get
    no gradients.

    Args:
        model: a HookedMoE or RoutedModel, in eval mode.
        objective: of the training prompts, from `answer_objective` or `text_objective`; or any function
            (model, hooks) -> scalar tensor, the smaller the better.
        development: the same of other prompts, which decide when to stop. Judge the result on a third set.
        layers: which MoE layers get a bias; a number, several, or a slice. None: all.
        l2: weight of Σ δ², from 0 on.
        l1: weight of Σ |δ|, from 0 on.
        learning_rate: of Adam, in nats a step, above 0.
        max_steps: at most so many, from 1 on.
        patience: stop after so many steps without a lower development loss, from 1 on.
        positions: at which tokens the bias acts, while it is learned; see `moe_lens.interventions.Positions`.
        hooks: forward hooks to run under, before the bias.
        progress: show a progress bar, a step at a time.

    Raises:
        DataError: arguments of another kind; a loss that is no finite scalar, or that no gradient leads from
            to a router's logits: so it is where a single expert runs at weight 1, or under hooks that set
            the weights.
    """
    check_hooked(model)
    before = hook_list(hooks)
    training, other = as_objective(objective, "objective"), as_objective(development, "development")
    penalties = [_number(value, name) for value, name in ((l2, "l2"), (l1, "l1"))]
    rate = _number(learning_rate, "learning_rate")
    if not rate:
        raise DataError("learning_rate must be above 0.")
    max_steps = whole_number(max_steps, "max_steps", least=1)
    patience = whole_number(patience, "patience", least=1)
    shape = moe_shape(model)
    chosen = chosen_layers(layers, shape.layers)
    rows = [shape.layers.index(layer) for layer in chosen]
    delta = torch.zeros(len(rows), shape.n_experts, dtype=torch.float32, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=rate)
    history: list[LearningStep] = []
    best, best_loss = delta.detach().clone(), math.inf

    def with_bias(values: Tensor) -> list[Any]:
        mapping = dict(zip(chosen, values.unbind(), strict=True))
        return [*before, *bias_experts(mapping, positions=positions)]

    with tqdm(total=max_steps, desc="learning a bias", unit="step", disable=not progress) as bar:
        for step in range(max_steps + 1):
            with torch.no_grad():
                on_development = float(checked_loss(other(model, with_bias(delta.detach())), "development"))
            loss, gradient = loss_and_gradient(model, training, delta, with_bias)
            if not step and float(gradient.abs().max()) <= _ROUNDING * abs(loss):
                raise DataError(
                    "No gradient leads from the loss to the router logits: where one expert runs at weight 1 "
                    "whatever its logit, or a hook sets the weights, none can. Search for a plan instead."
                )
            history.append(LearningStep(step, loss, on_development))
            if on_development < best_loss:
                best, best_loss = delta.detach().clone(), on_development
            waited = step - min(history, key=lambda each: each.development).step
            if step == max_steps or waited >= patience:
                break
            optimiser.zero_grad()
            delta.grad = gradient + 2 * penalties[0] * delta.detach()
            optimiser.step()
            _shrink(optimiser, delta, rate * penalties[1])
            bar.update()
    values = torch.zeros(len(shape.layers), shape.n_experts)
    values[rows] = best
    return RouterBias(shape, values, tuple(history))


def loss_and_gradient(
    model: Any, objective: Objective, delta: Tensor, hooks_for: Any
) -> tuple[float, Tensor]:
    """The loss and its gradient with respect to the bias; part by part, one graph at a time."""
    gradient, total = torch.zeros_like(delta, dtype=torch.float64), 0.0
    for part in objective.parts:
        with torch.enable_grad():
            leaf = delta.detach().clone().requires_grad_()
            loss = part(model, hooks_for(leaf))
            total += float(checked_loss(loss, "objective").detach())
            if loss.requires_grad:
                (found,) = torch.autograd.grad(loss, [leaf], allow_unused=True)
                gradient += torch.zeros_like(delta) if found is None else found
    if not bool(gradient.isfinite().all()):
        raise DataError("The gradient of the objective is NaN or infinite; look for logits that are masked.")
    return total / objective.n_units, (gradient / objective.n_units).float()


@torch.no_grad()
def _shrink(optimiser: torch.optim.Adam, delta: Tensor, threshold: float) -> None:
    """The proximal step of threshold · |δ| in the metric of Adam's step, in which each δ has its own rate."""
    state, group = optimiser.state[delta], optimiser.param_groups[0]
    second = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
    step = threshold / (second.sqrt() + group["eps"])
    delta.copy_(delta.sign() * (delta.abs() - step).clamp(min=0))


def _number(value: Any, name: str) -> float:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0 <= float(value) < math.inf:
        raise DataError(f"{name} must be a finite number from 0 on; got {value!r}.")
    return float(value)
