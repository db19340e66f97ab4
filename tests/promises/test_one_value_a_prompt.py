"""Plans, one a prompt, keep to their prompt in every function that runs prompts batch by batch.

As many plans as prompts give what each prompt gives by itself under its plan; any other number is refused,
also one that is as large as a batch.
"""

from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch

from moe_lens import (
    SteeringPlan,
    answer_objective,
    average_routes,
    collect_by_prompt,
    collect_generation,
    collect_routing,
    generate_text,
    mean_expert_outputs,
    mediation,
    record_dense,
    route_agreement,
    route_uncertainty,
    steer_hooks,
    text_objective,
)
from moe_lens.attribution import expert_logit_attribution, expert_logit_lens, virtual_ablation
from moe_lens.engines import collect_distributed
from moe_lens.errors import HookError
from moe_lens.evaluation import answers_with, continuation_log_probs, text_loss
from moe_lens.statistics import collect_to_file, iterate_routing
from tests.tiny_models import prompt

Hooked = Callable[..., Any]

PROMPTS = [prompt(length, seed) for seed, length in enumerate((4, 2, 5, 4))]
PLANS = [
    SteeringPlan([(0, 3)], [(1, 2)]),
    None,
    SteeringPlan(deactivate=[(0, 1), (1, 3), (2, 5)]),
    SteeringPlan([(1, 4), (2, 0)]),
]
QUIET: Any = {"batch_size": 2, "progress": False}


def last_logit(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 9]


def outputs(model: Any, prompts: Any, hooks: Any) -> Any:
    found = mean_expert_outputs(model, prompts, span=None, hooks=hooks, **QUIET)
    return (found.values * found.counts[..., None]).nan_to_num()[None]


def parts(model: Any, prompts: Any, hooks: Any) -> Any:
    stats = iterate_routing(model, prompts, hooks=hooks, **QUIET)
    return torch.stack([part.counts for part in stats]).sum(0)[None]


def counts(model: Any, prompts: Any, hooks: Any) -> Any:
    stats = collect_routing(model, prompts, per_prompt=True, hooks=hooks, **QUIET)
    assert stats.per_prompt is not None
    return stats.per_prompt.counts


def mediated(model: Any, prompts: Any, hooks: Any) -> Any:
    others = [text.replace("w1", "w2").replace("w5", "w6") for text in prompts]
    found = mediation(model, prompts, others, last_logit, hooks=hooks, **QUIET)
    return torch.stack([found.clean, found.corrupted, found.with_clean_route, *found.clean_route_in], dim=1)


def agreement(model: Any, prompts: Any, hooks: Any) -> Any:
    found = route_agreement(model, model, prompts, other_hooks=hooks, progress=False)
    return found.jaccard[None] * found.n_tokens


def distributed(model: Any, prompts: Any, hooks: Any) -> Any:
    with TemporaryDirectory() as folder:
        return collect_distributed(model, prompts, folder, hooks=hooks, unit=1, **QUIET).counts[None]


def averaged(model: Any, prompts: Any, hooks: Any) -> Any:
    return average_routes(model, prompts, 2, temperature=0, hooks=hooks, **QUIET)


def uncertain(model: Any, prompts: Any, hooks: Any) -> Any:
    return route_uncertainty(model, prompts, 2, temperature=0, hooks=hooks, **QUIET).entropy


BY_PROMPT: dict[str, Any] = {
    "answers_with": lambda m, p, h: answers_with(m, p, ["w3"] * len(p), hooks=h, batch_size=2),
    "continuation_log_probs": lambda m, p, h: continuation_log_probs(
        m, p, ["w3 w4", "w5", "w6 w3 w2", "w7"][: len(p)] if len(p) > 1 else ["w3 w4"], hooks=h, batch_size=2
    ),
    "attribution": lambda m, p, h: expert_logit_attribution(m, p, "w3", hooks=h, **QUIET).logit,
    "lens": lambda m, p, h: expert_logit_lens(m, p, 1, -1, hooks=h, **QUIET)[:, 0],
    "routed around": lambda m, p, h: virtual_ablation(m, p, hooks=h, exact=False, **QUIET).loss,
    "mediation": mediated,
    "counts": counts,
    "by prompt": lambda m, p, h: torch.stack(
        [unit.counts for unit in collect_by_prompt(m, p, hooks=h, progress=False)]
    ),
    "averaged": averaged,
    "uncertainty": uncertain,
    "dense": lambda m, p, h: record_dense(m, p, hooks=h, **QUIET).weights.transpose(0, 1),
    "generation": lambda m, p, h: [
        row.tolist() for row in collect_generation(m, p, 3, hooks=h, **QUIET).tokens
    ],
    "text": lambda m, p, h: generate_text(m, p, 3, hooks=h, **QUIET),
}
"""What each prompt gives, as a list or an array over prompts."""

SUMS: dict[str, Any] = {
    "outputs": outputs,
    "parts": parts,
    "agreement": agreement,
    "distributed": distributed,
    "answers": lambda m, p, h: (
        answer_objective(m, p, ["w3 w4"] * len(p), batch_size=2)(m, h).detach()[None] * len(p)
    ),
    "texts": lambda m, p, h: (
        text_objective(m, p, batch_size=2)(m, h).detach()[None] * sum(len(text.split()) for text in p)
    ),
    "loss": lambda m, p, h: (
        np.array([text_loss(m, p, hooks=h, batch_size=2)]) * sum(len(text.split()) for text in p)
    ),
}
"""What the prompts give together: a sum over prompts."""


def alone(run: Any, model: Any) -> list[Any]:
    return [
        run(model, [text], [] if plan is None else steer_hooks(plan))[0]
        for text, plan in zip(PROMPTS, PLANS, strict=True)
    ]


@pytest.mark.parametrize("name", [name for name in BY_PROMPT if name != "continuation_log_probs"])
def test_each_prompt_has_its_own_plan(hooked: Hooked, name: str) -> None:
    model, run = hooked("olmoe"), BY_PROMPT[name]
    together, by_itself = run(model, PROMPTS, steer_hooks(PLANS)), alone(run, model)
    if isinstance(by_itself[0], str | list):
        assert together == by_itself
        return
    for mine, other in zip(together, by_itself, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)
    if together.dtype == torch.bool:
        return
    unsteered = run(model, PROMPTS, [])
    assert not np.allclose(np.asarray(unsteered), np.asarray(together), atol=1e-4)


@pytest.mark.parametrize("name", SUMS)
def test_sums_are_those_of_each_prompt_under_its_plan(hooked: Hooked, name: str) -> None:
    model, run = hooked("olmoe"), SUMS[name]
    together = np.asarray(run(model, PROMPTS, steer_hooks(PLANS))[0])
    np.testing.assert_allclose(
        together, np.sum([np.asarray(x) for x in alone(run, model)], axis=0), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("n_plans", [2, 3, 5])
@pytest.mark.parametrize("name", [*BY_PROMPT, *SUMS])
def test_another_number_of_plans_is_refused(hooked: Hooked, name: str, n_plans: int) -> None:
    """2 is the size of a batch, and 5 more than there are."""
    run, plans = {**BY_PROMPT, **SUMS}[name], (PLANS * 2)[:n_plans]
    with pytest.raises(HookError, match=f"{n_plans} plans"):
        run(hooked("olmoe"), PROMPTS, steer_hooks(plans))


@pytest.mark.parametrize("n_plans", [pytest.param(3, marks=pytest.mark.broad), 5])
@pytest.mark.parametrize(
    "name", ["counts", "parts", "generation", "text", "outputs", "averaged", "dense", "distributed", "file"]
)
def test_so_it_is_where_a_generator_gives_the_prompts(
    hooked: Hooked, name: str, n_plans: int, tmp_path: Any
) -> None:
    """How many there are is known at the end only."""
    every: dict[str, Any] = {**BY_PROMPT, **SUMS}
    every["file"] = lambda m, p, h: collect_to_file(
        m, p, tmp_path / "stats", about="test", hooks=h, **QUIET
    ).counts[None]
    with pytest.raises(HookError, match=f"{n_plans} plans"):
        every[name](hooked("olmoe"), (text for text in PROMPTS), steer_hooks((PLANS * 2)[:n_plans]))
    as_many = every[name](hooked("olmoe"), (text for text in PROMPTS), steer_hooks(PLANS))
    listed = every[name](hooked("olmoe"), PROMPTS, steer_hooks(PLANS))
    assert np.array_equal(np.asarray(as_many, dtype=object), np.asarray(listed, dtype=object))
