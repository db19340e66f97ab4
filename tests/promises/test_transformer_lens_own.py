"""TransformerLens' own tests of MoE bridges pass on attached bridges wherever they pass on plain ones.

Its source distribution holds all of its tests. Those that load checkpoints from the hub fail either way
without one; files of nothing else are left out here.
"""

import pytest

from tests.families import broad
from tests.promises.sdists import failed_only_with_us, run_tests, source_of

TESTS = (
    "tests/integration/model_bridge/test_qwen2_moe_bridge.py",
    "tests/integration/model_bridge/test_qwen3_moe_bridge.py",
    "tests/integration/model_bridge/test_glm4_moe_bridge.py",
    "tests/integration/model_bridge/test_ernie4_5_moe_adapter.py",
    "tests/integration/model_bridge/test_afmoe_adapter.py",
    "tests/unit/model_bridge/test_batched_moe_fold_ln.py",
    "tests/unit/model_bridge/test_gpt_oss_moe.py",
)
_AS_THEY_ARE = ("-o", "addopts=", "-W", "ignore")  # without their notebooks and type checks


@broad
def test_no_test_of_transformer_lens_fails_only_with_us(capsys: pytest.CaptureFixture) -> None:
    folder, settings = source_of("transformer-lens"), {"arguments": _AS_THEY_ARE, "MOE_LENS_BRIDGES": "1"}
    plain = run_tests(folder, *TESTS, attached="no", **settings)
    attached = run_tests(folder, *TESTS, attached="yes", **settings)
    only_with_us = failed_only_with_us(plain, attached)
    passed = list(plain.values()).count("passed")
    with capsys.disabled():
        print(f"\nTransformerLens' MoE tests: {passed} pass; failed only with us: {len(only_with_us)}")
    assert passed > 50
    assert only_with_us == []
