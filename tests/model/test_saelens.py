"""An SAE of SAELens beside routing hooks, in one run.

SAELens up to 6.54 imports what TransformerLens 4 has removed or moved (its issue 738), so that both cannot be
installed together. Here pip fetches it beside them, and it is imported with those names in place.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformer_lens
from torch import Tensor

from moe_lens import SteeringPlan, attach, hook_names, steer_hooks, zero_ablate
from tests.fetched import installed, made_once
from tests.tiny_models import save, tiny_model, tokenizer, tokens

pytestmark = pytest.mark.broad

PACKAGES = (
    "sae-lens==6.54.0",
    "babe==0.0.8",
    "docstring-parser==0.18.0",
    "nltk==3.10.4",
    "plotly==7.1.0",
    "plotly-express==0.4.1",
    "python-dotenv==1.2.4",
    "simple-parsing==0.1.9",
    "tenacity==9.2.1",
)
"""SAELens, and what it imports beyond our own requirements."""


def fetched() -> Path:
    """A folder with these packages; skips where pip cannot get them."""
    return made_once("sae-lens-6.54.0", lambda scratch: installed(PACKAGES, scratch / "site"))


@contextmanager
def former_names() -> Iterator[None]:
    """What SAELens imports of TransformerLens 3, under its names; of no use to what is tested here."""

    class Gone:
        pass

    gone = dict.fromkeys(("HookedTransformer", "Loss", "Output", "CanBeUsedAsMLP", "USE_DEFAULT_VALUE"), Gone)
    moved = {**vars(transformer_lens.utilities), "HookedRootModule": transformer_lens.HookedRootModule}
    stand_ins = {}
    for name in ("HookedTransformer", "components.mlps.can_be_used_as_mlp", "utils"):
        stand_in = stand_ins[f"transformer_lens.{name}"] = ModuleType(name)
        vars(stand_in).update({**moved, **gone})
    with (
        patch.dict(sys.modules, stand_ins),
        patch.dict(vars(transformer_lens), {"HookedTransformer": Gone}),
    ):
        yield


@pytest.fixture(scope="module")
def sae_lens() -> Any:
    sys.path.append(str(fetched()))
    with former_names():
        return import_module("sae_lens")


HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def model(tmp_path: Path, sae_lens: Any) -> Any:
    with former_names():
        bridge_class: Any = import_module("sae_lens.analysis.sae_transformer_bridge").SAETransformerBridge
    folder = save(tiny_model("olmoe"), tmp_path, tokenizer())
    return attach(bridge_class.boot_transformers(str(folder)))


def new_sae(sae_lens: Any, model: Any) -> Any:
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


def test_an_sae_and_routing_hooks_act_in_one_run(sae_lens: Any, model: Any) -> None:
    sae = new_sae(sae_lens, model)
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


def test_features_are_cached_beside_the_routing(sae_lens: Any, model: Any) -> None:
    model.add_sae(new_sae(sae_lens, model))
    with model.hooks(zero_ablate({0: range(6)})):
        _, cache = model.run_with_cache(tokens(1, 4))
    [features] = [cache[name] for name in cache.keys() if name.endswith("hook_sae_acts_post")]  # noqa: SIM118
    assert features.shape == (1, 4, 64)
    assert not bool(cache[hook_names.topk_weights(0)].any())


def test_in_generation(sae_lens: Any, model: Any) -> None:
    plan = steer_hooks(SteeringPlan(deactivate=[(n, 0) for n in range(3)]))
    model.add_sae(new_sae(sae_lens, model))
    seen: list[Tensor] = []
    look = (hook_names.topk_indices(2), lambda value, hook: seen.append(value.clone()))
    with torch.no_grad(), model.hooks([*plan, look]):
        model.generate(tokens(1, 4), max_new_tokens=3, do_sample=False, stop_at_eos=False, verbose=False)
    assert [step.shape[1] for step in seen] == [4, 1, 1]
    assert not any(bool((step == 0).any()) for step in seen)
