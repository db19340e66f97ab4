"""What an edited router logit does here, in TransformerLens alone and in nnsight.

    python benchmarks/alternatives.py          # pip install nnsight for its rows

Each tool raises expert 3's router logit in layer 1 of the shipped model "specialised" by 100 on every token,
or puts the expert first among the chosen. What then runs is read off the block of experts itself, by a plain
PyTorch hook.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_lens import detach, hook_names, organisms

LAYER, EXPERT = 1, 3
PROMPT = "Question : what is the capital of Eldria ? Answer :"


def raised(logits: Tensor, hook: Any = None) -> Tensor:
    return logits + 100 * torch.nn.functional.one_hot(torch.tensor(EXPERT), logits.shape[-1])


def put_first(indices: Tensor, hook: Any = None) -> Tensor:
    return torch.cat([torch.full_like(indices[..., :1], EXPERT), indices[..., 1:]], dim=-1)


class WhatRan:
    """The experts and weights with which a layer's experts were called last."""

    def __init__(self, hf_model: Any):
        experts = hf_model.model.layers[LAYER].mlp.experts
        inner = next(module for module in experts.modules() if type(module).__name__ == "OlmoeExperts")
        inner.register_forward_pre_hook(lambda module, args: setattr(self, "args", args))

    def row(self, tool: str, logits: Tensor, before: Tensor) -> str:
        _, indices, weights = self.args
        chosen = indices == EXPERT
        weight = (weights * chosen).sum(-1).mean()
        change = (logits - before).abs().max()
        return f"| {tool} | {chosen.any(-1).float().mean():.2f} | {weight:.2f} | {change:.2f} |"


def bridge_rows() -> list[str]:
    model = organisms.load("specialised")
    ran, before = WhatRan(model.original_model), model(PROMPT)

    def edited(tool: str, name: str, edit: Callable[..., Tensor]) -> str:
        return ran.row(f"{tool}: `{name}`", model.run_with_hooks(PROMPT, fwd_hooks=[(name, edit)]), before)

    rows = [
        ran.row("nothing edited", before, before),
        edited("moe_lens", hook_names.router_logits(LAYER), raised),
        edited("moe_lens", hook_names.topk_indices(LAYER), put_first),
    ]
    detach(model)
    return [
        *rows,
        edited("TransformerLens", f"blocks.{LAYER}.mlp.gate.hook_out", raised),
        edited("TransformerLens", f"blocks.{LAYER}.mlp.hook_expert_indices", put_first),
    ]


def nnsight_rows() -> list[str]:
    try:
        from nnsight import LanguageModel  # pyright: ignore[reportMissingImports]
    except ImportError:
        return ["| nnsight | not installed | | |"]
    folder = organisms.path("specialised")
    hf_model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ran, tokens = WhatRan(hf_model.eval()), tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    before, model = hf_model(tokens).logits, LanguageModel(hf_model, tokenizer=tokenizer)
    gate, rows = model.model.layers[LAYER].mlp.gate, []
    with model.trace(tokens):
        logits, weights, indices = gate.output
        gate.output = (raised(logits), weights, indices)
        after = model.lm_head.output.save()
    rows.append(ran.row("nnsight: `gate.output[0]`", after, before))
    with model.trace(tokens):
        logits, weights, indices = gate.output
        gate.output = (logits, weights, put_first(indices))
        after = model.lm_head.output.save()
    rows.append(ran.row("nnsight: `gate.output[2]`", after, before))
    with model.trace(tokens):
        gate.source.F_linear_0.output = raised(gate.source.F_linear_0.output)
        after = model.lm_head.output.save()
    return [*rows, ran.row("nnsight: `gate.source.F_linear_0.output`", after, before)]


if __name__ == "__main__":
    print("| edit | share of tokens on which the expert ran | its mean weight | largest change of a logit |")
    print("|---|---|---|---|")
    with torch.no_grad():
        print("\n".join(bridge_rows() + nnsight_rows()))
