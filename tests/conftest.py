"""Fixtures shared by all tests. Tiny models and the tokenizer are plain functions in tests/tiny_models.py.

What takes seconds to import is imported in the fixtures: the process that hands tests out to others needs
none of it, and they wait for it.
"""

import copy
import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import is_hypothesis_test, settings

if TYPE_CHECKING:
    from moe_lens.model.hooked_moe import HookedMoE
    from moe_lens.organisms.demo import DemoResult

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may ask the network

settings.register_profile("steady", derandomize=True)  # `--hypothesis-profile=default` looks further
settings.load_profile("steady")


@pytest.fixture(scope="session", autouse=True)
def for_tiny_models() -> None:
    import torch
    from transformer_lens.model_bridge.supported_architectures.qwen3_5_multimodal import (
        Qwen3_5MultimodalArchitectureAdapter,
    )
    from transformer_lens.model_bridge.supported_architectures.qwen3_vl import Qwen3VLArchitectureAdapter

    # These adapters ask for torchvision, which has no CPU build; only images need it, and tests send none.
    Qwen3VLArchitectureAdapter.required_libraries = []
    Qwen3_5MultimodalArchitectureAdapter.required_libraries = []
    torch.set_num_threads(1)  # the models are too small to gain from more, and threads wait for each other


@pytest.fixture(scope="session", autouse=True)
def quick_organisms() -> Iterator[None]:
    """`organisms.load` in a fifth of its time: each is loaded once a process, and tests get copies."""
    from moe_lens import organisms

    loaded = cache(organisms.load)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(organisms, "load", lambda *args, **kwargs: copy.deepcopy(loaded(*args, **kwargs)))
        yield


@pytest.fixture(scope="session")
def hooked() -> Callable[..., "HookedMoE"]:
    """`hooked("olmoe", torch.bfloat16)`: a HookedMoE with a left-padding tokenizer, one a session.

    For tests that leave the model as they found it; the others build their own.
    """
    from moe_lens.model.hooked_moe import HookedMoE
    from tests.tiny_models import tiny_model, tokenizer, tokens

    @cache
    def build(recipe: str = "olmoe", *args: Any, **config: Any) -> HookedMoE:
        model = HookedMoE.from_hf(tiny_model(recipe, *args, **config), tokenizer())
        model.run_with_cache(tokens(1, 2))  # transformers puts hooks of its own at the first such run
        return model

    def hand_out(*args: Any, **config: Any) -> HookedMoE:
        model = build(*args, **config)
        model.zero_grad()  # another test's backward pass leaves gradients
        return model

    return hand_out


@pytest.fixture
def with_outputs(hooked: Callable[..., "HookedMoE"]) -> Iterator[Callable[..., "HookedMoE"]]:
    """`hooked`, with points on expert outputs until the test ends."""
    used: list[HookedMoE] = []

    def switch_on(*args: Any, **config: Any) -> "HookedMoE":
        used.append(hooked(*args, **config))
        used[-1].set_use_expert_out(True)
        return used[-1]

    yield switch_on
    for model in used:
        model.set_use_expert_out(False)


@pytest.fixture(scope="session")
def planted_demo() -> "DemoResult":
    """The demo on the planted organism, run once a session (and process)."""
    from moe_lens.organisms.demo import run_demo

    # of few random sets, a single one that happens to do as much decides the verdict
    return run_demo("planted", n_random=8, progress=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--examples", type=int, default=1, metavar="N", help="N times the examples of each property test"
    )


@pytest.hookimpl(trylast=True)  # after tests were deselected
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The tutorials first, since they are the longest, then the file with the most tests, and so on."""
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name != "test_tutorials.py", -sizes[item.path]))
    _try_more_examples(
        {item.obj for item in items if isinstance(item, pytest.Function)}, config.option.examples
    )


def _try_more_examples(tests: set[Any], times: int) -> None:
    """The settings that @settings has put down; it has no public way to raise them afterwards."""
    for test in tests:
        if is_hypothesis_test(test):
            given = test._hypothesis_internal_use_settings
            test._hypothesis_internal_use_settings = settings(given, max_examples=times * given.max_examples)
