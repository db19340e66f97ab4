"""transformers' own tests of a model pass on attached models wherever they pass on plain ones."""

import shutil
from pathlib import Path

import pytest

from tests.families import broad
from tests.promises.sdists import failed_only_with_us, run_tests, source_of

FAMILIES = ("olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
_STUBS = {
    "exporters/test_export.py": "ExportTesterMixin",
    "generation/test_utils.py": "GenerationTesterMixin",
}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformers' `tests/test_modeling_common.py` with our models' testers beside it.

    The two mixins that the source distribution leaves out are there without tests.
    """
    folder = tmp_path_factory.mktemp("transformers")
    tests = folder / "tests"
    tests.mkdir()
    for source in (source_of("transformers") / "tests").glob("test_*.py"):
        shutil.copy(source, tests / source.name)
    for path, mixin in _STUBS.items():
        (tests / path).parent.mkdir()
        (tests / path).write_text(f"class {mixin}:\n    pass\n")
        (tests / path).with_name("__init__.py").touch()
    (tests / "__init__.py").touch()
    shutil.copy(Path(__file__).parent / "others" / "moe_models.py", tests / "test_moe_models.py")
    return folder


@broad
@pytest.mark.parametrize("family", FAMILIES)
def test_no_test_of_transformers_fails_only_with_us(suite, family, capsys):
    path = "tests/test_moe_models.py"
    plain = run_tests(suite, path, attached="no", MOE_LENS_FAMILY=family)
    attached = run_tests(suite, path, attached="yes", MOE_LENS_FAMILY=family)
    only_with_us = failed_only_with_us(plain, attached)
    passed = list(plain.values()).count("passed")
    with capsys.disabled():
        print(f"\ntransformers' tests on {family}: {passed} pass; failed only with us: {len(only_with_us)}")
    assert passed > 80
    assert only_with_us == []
