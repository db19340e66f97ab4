"""Tiny checkpoints for vLLM, requests to it, and what a `RoutedModel` answers: made here, read over there.

vLLM lives in an environment of its own, so that all goes through a folder: one of each model with its
checkpoint, `requests.json` (prompts, and cases: plan, strength, positions) and `expected.json`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_lens import RoutedModel, SteeringPlan, collect_routing, steer_hooks
from tests.tiny_models import VOCAB_SIZE, tiny_model, tokenizer

N_NEW = 6
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "max_position_embeddings": 192,
}
"""Heads of 32: vLLM's attention on CPUs takes no smaller ones."""
MODELS: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False},
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "head_dim": 32,
        "moe_intermediate_size": 64,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 1,
    },
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 32},
}


def prompts(seed: int = 0) -> list[list[int]]:
    """Twenty of five lengths; equal lengths run together, so that no padding comes in."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (5, 9, 14, 23, 40)
    rows = [torch.randint(4, VOCAB_SIZE, (4, length), generator=generator).tolist() for length in lengths]
    return [row for group in rows for row in group]


def cases(model: RoutedModel) -> list[dict[str, Any]]:
    """What requests want: nothing, and plans of every kind that travels."""
    layers, k = model.moe_shape.layers, model.moe_shape.top_k
    first = SteeringPlan(
        activate=[(layer, (layer + i) % 8) for layer in layers for i in range(k - 1)],
        deactivate=[(layer, (layer + 4 + i) % 8) for layer in layers for i in range(2)],
        shape=model.moe_shape,
    )
    second = SteeringPlan(deactivate=[(layers[-1], e) for e in range(4)], epsilon=0.5)
    third = SteeringPlan(activate=[(layers[0], 5)], deactivate=[(layers[1], 0), (layers[1], 7)])
    return [
        {"plan": None, "strength": None, "positions": None},
        {"plan": first.to_json(), "strength": None, "positions": None},
        {"plan": second.to_json(), "strength": None, "positions": None},
        {"plan": first.to_json(), "strength": 1.5, "positions": None},
        {"plan": first.to_json(), "strength": None, "positions": "generated"},
        {"plan": third.to_json(), "strength": None, "positions": "prompt"},
    ]


def hooks_of(case: dict[str, Any]) -> Any:
    """The hooks of a case."""
    if case["plan"] is None:
        return []
    content = case["plan"]
    plan = SteeringPlan(content["activate"], content["deactivate"], content["epsilon"])
    return steer_hooks(plan, positions=case["positions"], strength=case["strength"])


def written(model: RoutedModel, rows: Tensor, hooks: Any) -> tuple[Tensor, Tensor]:
    """New tokens [batch new], and the log-probability of each."""
    hf: Any = model.original_model
    hf.generation_config.eos_token_id = None
    with model.hooks(hooks):
        out = hf.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            max_new_tokens=N_NEW,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=0,
        )
    new = out.sequences[:, rows.shape[1] :]
    logprobs = torch.stack(out.logits, dim=1).log_softmax(-1).gather(-1, new[..., None])[..., 0]
    return new, logprobs


def answers(model: RoutedModel, given: list[list[int]], case: dict[str, Any]) -> dict[str, Any]:
    """What the model writes after each prompt, and the routing of the prompts."""
    hooks = hooks_of(case)
    tokens, logprobs = [], []
    for length in sorted({len(row) for row in given}):
        new, logs = written(model, torch.tensor([row for row in given if len(row) == length]), hooks)
        tokens += new.tolist()
        logprobs += logs.tolist()
    stats = collect_routing(model, given, batch_size=1, hooks=hooks, per_prompt=True, progress=False)
    assert stats.per_prompt is not None
    assert stats.entropy_sums is not None
    return {
        "tokens": tokens,
        "logprobs": logprobs,
        "counts": stats.per_prompt.counts.tolist(),
        "probability_sums": stats.per_prompt.probability_sums.tolist(),
        "weight_sums": stats.weight_sums.tolist(),
        "entropy_sums": stats.entropy_sums.tolist(),
    }


def make(folder: Path, name: str) -> RoutedModel:
    """Write the checkpoint, the requests and what is expected of one model into its folder."""
    hf = tiny_model(name, **SIZES, **MODELS[name])
    hf.save_pretrained(folder / name)
    tokenizer().save_pretrained(folder / name)
    model = RoutedModel.from_pretrained(str(folder / name), dtype=torch.float32)
    given = prompts()
    wanted = cases(model)
    requests = {"prompts": given, "cases": wanted, "n_new": N_NEW}
    (folder / name / "requests.json").write_text(json.dumps(requests))
    expected = [answers(model, given, case) for case in wanted]
    (folder / name / "expected.json").write_text(json.dumps(expected))
    return model


if __name__ == "__main__":  # by hand: python -m tests.engines.vllm.expected FOLDER
    import sys

    for each in MODELS:
        make(Path(sys.argv[1]), each)
