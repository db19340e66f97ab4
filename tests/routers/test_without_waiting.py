"""Steering by the built-in rules branches on no tensor: nothing waits for a device, and it compiles whole.

In a process of its own, for the type checks of this test run would break the compiled graph.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

SCRIPT = """
import torch
from benchmarks.measuring import Waits
from moe_lens import SteeringPlan, steer_hooks
from moe_lens.routers import (
    BiasedSoftmaxTopK, GroupLimit, GroupLimitedSoftmax, SigmoidTopK, SoftmaxTopK, SparseMixer, TopKSigmoid,
    TopKSoftmax,
)

N, K = 8, 3
sizes, bias = {"n_experts": N, "top_k": K}, torch.linspace(-0.3, 0.3, N)
RULES = [
    SoftmaxTopK(N, K, True), SoftmaxTopK(N, K, False, in_order=False, scaling=2.0), TopKSoftmax(N, K),
    TopKSigmoid(N, K), SparseMixer(N, 0.01), SigmoidTopK(**sizes, bias=bias),
    SigmoidTopK(**sizes, bias=bias, groups=GroupLimit(4, 2, 2), float32_scores=False),
    BiasedSoftmaxTopK(**sizes, bias=bias), GroupLimitedSoftmax(**sizes, groups=GroupLimit(4, 2, 1)),
]

[(_, hook)] = steer_hooks(SteeringPlan([(0, 1)], [(0, 2), (0, 4)]))
for dtype in (torch.float32, torch.bfloat16):
    z = torch.randn(40, N, generator=torch.Generator().manual_seed(0)).to(dtype)
    for rule in RULES:
        def by_lists(z, rule=rule):
            steered, after = rule.steer(z, [1], [2, 4], 0.01)
            twice, after = after.steer(steered, [0], [], 0.01)
            return twice, *after.route(twice)

        def by_hook(z, rule=rule):
            steered, after = hook.steer(rule, z)
            return steered, *after.route(steered)

        for run in (by_lists, by_hook):
            torch._dynamo.reset()
            with Waits() as waits:
                eager = run(z)
            assert not waits.counts, (rule, waits.counts)
            compiled = torch.compile(run, fullgraph=True, backend="eager")(z)
            assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True)), rule
print("whole")
"""


@pytest.mark.broad
@pytest.mark.skipif(torch.__version__ < "2.9", reason="older dynamo cannot trace dataclasses.replace")
def test_steering_compiles_whole_and_waits_for_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.stdout.strip() == "whole", done.stderr[-2000:]
