"""Texts written for moe_lens, on which a split model is held against its dense one: 13 short ones a register.

No split is fitted or trained on them (`split_corpus` has what is), and no large model can have read them.
"""

import json
import math
from importlib import resources
from typing import Any, Final, cast

import torch
from jaxtyping import Int
from torch import Tensor

from moe_lens.organisms.split_corpus import REGISTERS, Register

_FILE: Final = "held_out.json"
N_TEXTS: Final = 13
"""Of each register."""


def held_out_tokens(tokenizer: Any) -> dict[Register, list[Int[Tensor, "1 _"]]]:
    """The held-out texts as tokens, by register: prose, code, and one question with its answer for chat.

    Args:
        tokenizer: of a Hugging Face model, with a chat template.
    """
    content = json.loads(resources.files("moe_lens.organisms").joinpath(_FILE).read_text(encoding="utf-8"))
    texts: dict[Register, list[str]] = {"prose": content["prose"], "code": content["code"], "chat": []}
    for question, answer in content["chat"]:
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        texts["chat"].append(tokenizer.apply_chat_template(chat, tokenize=False))
    return {
        register: [
            torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]]) for text in texts[register]
        ]
        for register in REGISTERS
    }


def perplexities(model: Any, tokens: dict[Register, list[Int[Tensor, "1 _"]]]) -> dict[Register, float]:
    """exp of the mean negative log-likelihood (nats) of each register's tokens but the first of each text.

    Args:
        model: a causal language model of transformers.
        tokens: from `held_out_tokens`.
    """
    result: dict[Register, float] = {}
    for register, texts in tokens.items():
        total, count = 0.0, 0
        for text in texts:
            with torch.no_grad():
                logits = cast(Any, model)(input_ids=text, use_cache=False).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, text[0, 1:], reduction="sum").item()
            count += text.shape[1] - 1
        result[register] = math.exp(total / count)
    return result
