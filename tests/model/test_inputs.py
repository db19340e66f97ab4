"""What a wrapper takes (text, chats, a tokenizer's output) and prepends, against Hugging Face's forward."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lens import hook_names
from moe_lens.errors import DataError
from moe_lens.model.hooked_moe import HookedMoE, attach
from moe_lens.model.routed_model import RoutedModel
from moe_lens.statistics.collection import collect_routing
from moe_lens.statistics.routing_stats import RoutingStats
from moe_lens.text.prompts import Prompt
from tests.tiny_models import plain_bridge, prompt, save, tiny_model, tokenizer

WRAPPERS = pytest.mark.parametrize("wrapper", [HookedMoE, RoutedModel])
TEMPLATE = "{% for m in messages %}{{ bos_token }} {{ m.content }} {% endfor %}{{ mark }}"
TEXTS = [prompt(3), prompt(6), prompt(5, 1)]
CHAT = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]


def made(wrapper: Any, own: Any = None, **options: Any) -> Any:
    own = tokenizer() if own is None else own
    own.chat_template = TEMPLATE
    build = wrapper.from_hf if wrapper is HookedMoE else wrapper
    return build(tiny_model(), own, **options)


def without_bos() -> Any:
    own = tokenizer()
    own.backend_tokenizer.post_processor = None
    own.init_kwargs["add_bos_token"] = False
    assert own("w1")["input_ids"] == [5]
    return own


def by_hugging_face(row: list[int]) -> Tensor:
    return tiny_model()(torch.tensor([row])).logits[0]


@WRAPPERS
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", ["pad_token", "eos_token", "bos_token"])
def test_a_tokenizers_output_runs_as_each_prompt_alone(wrapper: Any, side: str, pad: str) -> None:
    own = tokenizer()
    own.pad_token = getattr(own, pad)
    model = made(wrapper, own)
    rows, encoded = own(TEXTS)["input_ids"], own(TEXTS, padding=True, padding_side=side)
    tensors = own(TEXTS, padding=True, padding_side=side, return_tensors="pt")
    kept = tensors["attention_mask"].bool()
    new = [tiny_model().generate(torch.tensor([row]), max_new_tokens=3, do_sample=False) for row in rows]
    for given in (encoded, tensors, dict(tensors)):
        logits, cache = model.run_with_cache(given)
        hooked = model.run_with_hooks(given, fwd_hooks=[(hook_names.router_logits(0), lambda v, hook: v)])
        assert torch.equal(model(given), logits)
        assert torch.equal(hooked, logits)
        assert torch.equal(cache.attention_mask.bool(), kept)
        assert RoutingStats.from_cache(cache).n_tokens == int(kept.sum())
        for row, padded, mask in zip(rows, logits, kept, strict=True):
            torch.testing.assert_close(padded[mask], by_hugging_face(row), atol=1e-4, rtol=1e-4)
        wrote = model.generate(given, max_new_tokens=3, do_sample=False, verbose=False)
        assert wrote[:, -3:].tolist() == [row[0, -3:].tolist() for row in new]
    ragged = model(own(TEXTS))  # not padded: the wrapper pads
    assert ragged.shape == (3, 7, model.cfg.d_vocab)


@WRAPPERS
@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_together_are_each_alone_also_where_padding_is_the_bos(wrapper: Any, side: str) -> None:
    own = tokenizer(side)
    own.pad_token = own.bos_token
    model = made(wrapper, own)
    for prepend_bos in (None, True, False):
        texts = [*TEXTS, "<bos> w4"]
        together, cache = model.run_with_cache(texts, prepend_bos=prepend_bos)
        for text, padded, mask in zip(texts, together, cache.attention_mask.bool(), strict=True):
            alone = model(text, prepend_bos=prepend_bos)[0]
            torch.testing.assert_close(padded[mask], alone, atol=1e-4, rtol=1e-4)


@WRAPPERS
def test_chats_run_as_their_template_writes_them(wrapper: Any) -> None:
    model = made(wrapper)
    row = [1, 5, 6, 1, 7]  # <bos> w1 w2 <bos> w3
    torch.testing.assert_close(model(CHAT)[0], by_hugging_face(row), atol=1e-4, rtol=1e-4)
    assert torch.equal(model(Prompt(CHAT)), model(CHAT))
    assert torch.equal(model(Prompt("w1 w2")), model("w1 w2"))
    marked = Prompt(CHAT, template={"mark": "w9"})
    torch.testing.assert_close(model(marked)[0], by_hugging_face([*row, 13]), atol=1e-4, rtol=1e-4)
    logits, cache = model.run_with_cache([CHAT, "w1", marked])
    assert cache.attention_mask.sum(1).tolist() == [5, 2, 6]
    torch.testing.assert_close(logits[1, -2:], by_hugging_face([1, 5]), atol=1e-4, rtol=1e-4)
    wrote = model.generate(CHAT[:1], max_new_tokens=2, do_sample=False, verbose=False)
    assert isinstance(wrote, str)
    assert wrote.startswith("w1 w2 ")
    model.tokenizer.chat_template = None
    with pytest.raises(DataError, match="chat template"):
        model(CHAT)


@WRAPPERS
def test_a_bos_is_never_doubled(wrapper: Any) -> None:
    model, expected = made(wrapper), by_hugging_face([1, 5, 6])
    for text in ("w1 w2", "<bos> w1 w2", "<bos>w1 w2"):
        assert model.to_tokens(text).tolist() == [[1, 5, 6]]
        torch.testing.assert_close(model(text)[0], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.run_with_cache(text)[0][0], expected, atol=1e-4, rtol=1e-4)
        assert collect_routing(model, text, progress=False).n_tokens == 3
        for generate in (model.generate, getattr(model, "hf_generate", model.generate)):
            wrote = generate(text, max_new_tokens=1, do_sample=False, return_type="tokens")
            assert wrote.shape == (1, 4)
    assert model.to_tokens(["<bos> w1", "w1 w2 w3"]).tolist() == [[0, 0, 1, 5], [1, 5, 6, 7]]
    with pytest.warns(UserWarning, match=r"begins with the tokenizer's BOS \('<bos>'\)"):
        model.to_tokens("<bos> w1")
    assert model.to_tokens("<bos> w1", prepend_bos=False).tolist() == [[1, 5]]  # the text's own stays


@WRAPPERS
def test_what_is_prepended_follows_the_tokenizer_and_has_one_switch(wrapper: Any) -> None:
    for own, adds in ((tokenizer(), True), (without_bos(), False)):
        model = made(wrapper, own)
        assert model.tokenizer is own  # neither loaded again nor copied
        assert model.to_tokens("w1 w2").tolist() == own("w1 w2", return_tensors="pt")["input_ids"].tolist()
        assert model.to_tokens("w1", prepend_bos=True).tolist() == [[1, 5]]
        assert model.to_tokens("w1", prepend_bos=False).tolist() == [[5]]
        for switch, row in ((True, [1, 5, 6]), (False, [5, 6])):
            model.prepend_bos = switch
            expected = by_hugging_face(row)
            torch.testing.assert_close(model("w1 w2")[0], expected, atol=1e-4, rtol=1e-4)
            assert collect_routing(model, "w1 w2", progress=False).n_tokens == len(row)
            wrote = model.generate("w1 w2", max_new_tokens=1, do_sample=False, return_type="tokens")
            assert wrote[0, :-1].tolist() == row
            assert made(wrapper, own, prepend_bos=switch).to_tokens("w1 w2").tolist() == [row]
        assert adds == (made(wrapper, own).to_tokens("w1").shape[1] == 2)


def test_somebody_elses_bridge_keeps_its_own_rule() -> None:
    bridge = plain_bridge(tiny_model(), tokenizer())
    bridge.cfg.default_prepend_bos = False
    model = attach(bridge)
    assert isinstance(model, HookedMoE)
    assert not model.prepend_bos
    assert model.to_tokens("w1").tolist() == [[5]]


@WRAPPERS
def test_a_text_beyond_the_context_is_refused_and_cut_only_on_request(wrapper: Any) -> None:
    model = made(wrapper)
    long = " ".join(["w1"] * (model.cfg.n_ctx + 5))
    for run in (model, model.run_with_cache, lambda text: model.run_with_hooks(text, fwd_hooks=[])):
        for given in (long, [long, "w1"], [{"role": "user", "content": long}], model.tokenizer([long, "w1"])):
            with pytest.raises(DataError, match=f"the model's context is {model.cfg.n_ctx}"):
                run(given)
    assert model.to_tokens(long, truncate=False).shape == (1, model.cfg.n_ctx + 6)
    assert model.to_tokens(long, truncate=True).shape == (1, model.cfg.n_ctx)


def test_a_bridge_that_cuts_says_so() -> None:
    model = made(HookedMoE)
    with pytest.warns(UserWarning, match="is cut to the model's context"):
        model.to_tokens(" ".join(["w1"] * 1000))


@WRAPPERS
def test_dtypes_by_name_and_by_default_the_checkpoints(wrapper: Any, tmp_path: Path) -> None:
    folder = save(tiny_model(dtype=torch.bfloat16), tmp_path, tokenizer())
    load = wrapper.from_pretrained
    for given in ({}, {"dtype": "auto"}, {"dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}):
        model = load(folder, **given)
        assert model.cfg.dtype == torch.bfloat16
        assert {parameter.dtype for parameter in model.original_model.parameters()} == {torch.bfloat16}
    assert load(folder, dtype=torch.float32).cfg.dtype == torch.float32
    assert load(folder, dtype="float32").cfg.dtype == torch.float32


@WRAPPERS
def test_a_tokenizer_made_in_memory_is_taken_as_it_is(wrapper: Any, tmp_path: Path) -> None:
    folder, own = save(tiny_model(), tmp_path), without_bos()
    own.init_kwargs.pop("name_or_path", None)
    own.chat_template = TEMPLATE
    before = dict(own.init_kwargs)
    model = wrapper.from_pretrained(folder, tokenizer=own)
    assert model.tokenizer is own
    assert own.init_kwargs == before
    assert model.to_tokens("w1").tolist() == [[5]]
    assert wrapper.from_pretrained(folder, tokenizer=own, prepend_bos=True).to_tokens("w1").tolist() == [
        [1, 5]
    ]


def test_a_bridge_refuses_quantised_weights_with_the_way_out(tmp_path: Path) -> None:
    folder = save(tiny_model(), tmp_path, tokenizer())
    given: dict[str, Any]
    for given in ({"load_in_4bit": True}, {"quantization_config": object()}):
        with pytest.raises(RuntimeError, match=r"RoutedModel.from_pretrained\(..., "):
            HookedMoE.from_pretrained(folder, **given)
    HookedMoE.from_pretrained(folder, load_in_4bit=False)
    with pytest.raises(RuntimeError, match="dtype must be"):
        HookedMoE.from_pretrained(folder, dtype="float17")


def test_older_names_of_quantisation_become_its_config() -> None:
    from moe_lens.model.loading import with_quantisation

    found = with_quantisation({"load_in_4bit": True, "load_in_8bit": False, "device_map": "cpu"})
    assert found.pop("quantization_config").load_in_4bit
    assert found == {"device_map": "cpu"}
    with pytest.raises(RuntimeError, match="say the same"):
        with_quantisation({"load_in_4bit": True, "quantization_config": object()})
