"""An SAE of SAELens beside routing hooks, in one run. Skipped where SAELens, or one that works with the
installed TransformerLens, is missing (SAELens up to 6.54 imports what TransformerLens 4 has removed)."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sae_lens = pytest.importorskip("sae_lens", exc_type=ImportError)

from moe_lens import SteeringPlan, attach, hook_names, steer_hooks, zero_ablate  # noqa: E402
from tests.tiny_models import save, tiny_model, tokenizer, tokens  # noqa: E402

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def model(tmp_path: Path) -> Any:
    bridge_class: Any = import_module("sae_lens.analysis.sae_transformer_bridge").SAETransformerBridge
    folder = save(tiny_model("olmoe"), tmp_path, tokenizer())
    return attach(bridge_class.boot_transformers(str(folder)))


def new_sae(model: Any) -> Any:
    config = sae_lens.StandardSAEConfig(
        d_in=model.cfg.d_model, d_sae=64, metadata=sae_lens.saes.sae.SAEMetadata(hook_name=HOOK)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sae = sae_lens.StandardSAE(config)
        with torch.no_grad():
            sae.b_dec.normal_(std=0.1)
    return sae.eval()


def run(model: Any, hooks: Any = ()) -> Tensor:
    with torch.no_grad():
        return model.run_with_hooks(tokens(2, 5), fwd_hooks=list(hooks))


def test_an_sae_and_routing_hooks_act_in_one_run(model: Any) -> None:
    sae = new_sae(model)
    steering = steer_hooks(SteeringPlan(deactivate=[(0, 0), (0, 1), (2, 3)]))
    by_hand = [*steering, (HOOK, lambda resid, hook: sae.decode(sae.encode(resid)))]
    plain, steered, both_by_hand = run(model), run(model, steering), run(model, by_hand)
    model.add_sae(sae)
    through, both = run(model), run(model, steering)
    for one, other in ((plain, steered), (plain, through), (steered, both), (through, both)):
        assert not torch.equal(one, other)
    torch.testing.assert_close(both, both_by_hand, rtol=1e-4, atol=1e-5)
    model.reset_saes()
    assert torch.equal(run(model), plain)


def test_features_are_cached_beside_the_routing(model: Any) -> None:
    model.add_sae(new_sae(model))
    with model.hooks(zero_ablate({0: range(6)})):
        _, cache = model.run_with_cache(tokens(1, 4))
    [features] = [cache[name] for name in cache.keys() if name.endswith("hook_sae_acts_post")]  # noqa: SIM118
    assert features.shape == (1, 4, 64)
    assert not bool(cache[hook_names.topk_weights(0)].any())


def test_in_generation(model: Any) -> None:
    plan = steer_hooks(SteeringPlan(deactivate=[(n, 0) for n in range(3)]))
    model.add_sae(new_sae(model))
    seen: list[Tensor] = []
    look = (hook_names.topk_indices(2), lambda value, hook: seen.append(value.clone()))
    with torch.no_grad(), model.hooks([*plan, look]):
        model.generate(tokens(1, 4), max_new_tokens=3, do_sample=False, stop_at_eos=False, verbose=False)
    assert [step.shape[1] for step in seen] == [4, 1, 1]
    assert not any(bool((step == 0).any()) for step in seen)
