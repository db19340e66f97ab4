"""A script: does each family's model, steered by a fixed plan, compile whole and equal eager?

    python -m tests.model.compiled_whole olmoe gpt_oss     # prints a line for each that does, fails otherwise

It runs in a process of its own, without the checks of shapes that tests put on the package's functions, which
torch.compile cannot trace.
"""

import sys
import warnings

import torch

from moe_lens import RoutedModel, SteeringPlan, steer_hooks, zero_ablate
from tests.tiny_models import tiny_model, tokens


def check(recipe: str) -> None:
    hf_model, given = tiny_model(recipe), tokens(2, 7)
    model = RoutedModel(hf_model)
    layer = model.moe_layers[-1]
    plan = steer_hooks(SteeringPlan(activate=[(layer, 1)], deactivate=[(layer, 2)]))
    other = zero_ablate([(layer, 0), (layer, 3)])
    expected = {"bare": hf_model(given).logits, "plan": model.run_with_hooks(given, fwd_hooks=plan)}
    expected["hooks"] = model.run_with_hooks(given, fwd_hooks=other)
    assert not torch.equal(expected["bare"], expected["plan"])
    torch._dynamo.reset()
    whole = torch.compile(hf_model, backend="eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(whole(given).logits, expected["bare"], rtol=0, atol=5e-6)
        with model.hooks(plan):
            torch.testing.assert_close(whole(given).logits, expected["plan"], rtol=0, atol=5e-6)
    parts = torch.compile(hf_model, backend="eager")
    with model.hooks(other):
        torch.testing.assert_close(parts(given).logits, expected["hooks"], rtol=0, atol=5e-6)
    torch.testing.assert_close(whole(given).logits, expected["bare"], rtol=0, atol=5e-6)
    print(recipe, "compiles whole")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with torch.no_grad():
        for name in sys.argv[1:]:
            check(name)
