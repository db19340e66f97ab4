"""What a user writes, as a type checker reads it; test_types.py compares it with what pyright says.

A comment `shows: T` at the end of a line: pyright reveals the type T there. `wrong: RULE`: pyright reports
an error by that rule. It reports nothing else. The file is never run, and `make lint` leaves it out.
"""

from pathlib import Path
from typing import reveal_type

import moe_lens
from moe_lens import (
    DataError,
    HookedMoE,
    MoELensError,
    RoutingStats,
    SteeringPlan,
    collect_routing,
    risk_difference,
    steer_hooks,
    supported_models,
)
from moe_lens.plots import volcano
from moe_lens.steering import random_sets

plan = SteeringPlan(activate=[(0, 3)], deactivate=((1, 2), (1, 5)))
reveal_type(plan)  # shows: SteeringPlan
reveal_type(steer_hooks(plan))  # shows: list[tuple[str | ((...) -> Any), (...) -> Any]]
reveal_type(plan.deactivate)  # shows: tuple[tuple[int, int], ...]
reveal_type(SteeringPlan.load("plan.json"))  # shows: SteeringPlan
reveal_type(len(plan))  # shows: int

SteeringPlan(activate=3)  # wrong: reportArgumentType
SteeringPlan(aktivate=[(0, 3)])  # wrong: reportCallIssue
steer_hooks([(0, 3)])  # wrong: reportArgumentType
plan.activate = ()  # wrong: reportAttributeAccessIssue
plan.experts  # wrong: reportAttributeAccessIssue

model = HookedMoE.from_pretrained("a-model")
reveal_type(model)  # shows: HookedMoE
reveal_type(model.moe_layers)  # shows: tuple[int, ...]
reveal_type(model.moe_shape.top_k)  # shows: int

stats = collect_routing(model, ["a prompt"], batch_size=4)
reveal_type(stats)  # shows: RoutingStats
reveal_type(stats.rates)  # shows: Tensor
reveal_type(RoutingStats.load(Path("stats")) + stats)  # shows: RoutingStats
collect_routing(model, ["a prompt"], batchsize=4)  # wrong: reportCallIssue

scores = risk_difference(stats, stats)
reveal_type(scores)  # shows: ExpertScores
reveal_type(scores.ranked()[0].expert)  # shows: int
reveal_type(SteeringPlan.from_scores(scores, n_deactivate=2))  # shows: SteeringPlan
reveal_type(scores.to_dataframe())  # shows: DataFrame
reveal_type(volcano(scores))  # shows: Axes
reveal_type([row.architecture for row in supported_models()])  # shows: list[str]
reveal_type(random_sets(model, plan, 20, seed=1))  # shows: list[SteeringPlan]
random_sets(model, plan, "20")  # wrong: reportArgumentType

reveal_type(moe_lens.__version__)  # shows: str
moe_lens.no_such_name  # wrong: reportAttributeAccessIssue

try:
    plan.save("plan.json")
except DataError as error:
    reveal_type(error)  # shows: DataError
    whatever: MoELensError = error
