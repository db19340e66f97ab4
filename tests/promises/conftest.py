"""Fixtures of the promises."""

import gc
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from tests.promises.decisions import Plain
from tests.tiny_models import (
    plain_bridge,
    tiny_model,
    tokenizer,
    tokens,
)


@pytest.fixture(scope="session")
def plain() -> Plain:
    """`plain("olmoe", torch.bfloat16)`: TransformerLens' own bridge around the same weights, built once."""

    @cache
    def build(recipe: str, dtype: torch.dtype = torch.float32) -> TransformerBridge:
        bridge = plain_bridge(tiny_model(recipe, dtype), tokenizer())
        bridge.run_with_cache(tokens(1, 2))  # transformers puts hooks of its own at the first such run
        gc.freeze()  # the collector need not look at all these models again and again
        return bridge

    return build


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.no_grad():  # tests of gradients switch them on
        yield
