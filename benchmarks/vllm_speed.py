"""What plans and statistics cost in vLLM: CPU seconds ÷ those of the same engine without moe_lens.

    .venv-vllm/bin/python benchmarks/vllm_speed.py [--hidden 512] [--rounds 5]      # `make env-vllm` first

One engine in this process, one thread, eager, float32: an OLMoE with random weights (8 layers of 32 experts,
k = 4), 32 requests of 64 prompt and 48 new tokens, 16 at a time. All ways run in turn, each once before any
counts; given are the median over rounds of the ratio within a round, and the smallest and largest.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
N_LAYERS, N_EXPERTS, TOP_K, N_PROMPT, N_NEW, N_REQUESTS = 8, 32, 4, 64, 48, 32


def engine(hidden: int, folder: str) -> Any:
    """An engine with random weights."""
    from transformers import OlmoeConfig
    from vllm import LLM

    OlmoeConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=hidden // 2,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        num_experts=N_EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=256,
        architectures=["OlmoeForCausalLM"],
    ).save_pretrained(folder)
    return LLM(
        model=folder,
        load_format="dummy",
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=16,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.3,
        kv_cache_memory_bytes=256 * 2**20,
    )


def runner_of(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


@contextmanager
def without_moe_lens(llm: Any) -> Iterator[None]:
    """vLLM as it is: the layers find no tables."""
    runner = runner_of(llm)
    tables, runner.moe_lens = runner.moe_lens, None
    kept = {}
    for number, layer in tables.layers.items():
        kept[number] = layer._buffers.pop("moe_lens_sign"), layer.router.moe_lens_records
        layer.router.moe_lens_records = None
    try:
        yield
    finally:
        for number, layer in tables.layers.items():
            layer._buffers["moe_lens_sign"], layer.router.moe_lens_records = kept[number]
        runner.moe_lens = tables


def ways() -> dict[str, list[dict[str, Any]]]:
    """Name -> the arguments of each request."""
    from moe_lens import SteeringPlan
    from moe_lens.engines import plan_args, stats_args

    plans = [
        plan_args(
            SteeringPlan(
                activate=[(layer, (n + layer) % N_EXPERTS) for layer in range(N_LAYERS)],
                deactivate=[
                    (layer, (n + layer + 7 + i) % N_EXPERTS) for layer in range(N_LAYERS) for i in range(6)
                ],
            )
        )
        for n in range(8)
    ]
    numbers = range(N_REQUESTS)
    return {
        "vLLM without moe_lens": [{} for _ in numbers],
        "no plan": [{} for _ in numbers],
        "one plan for all requests": [plans[0] for _ in numbers],
        "one plan, soft": [{**plans[0], "moe_strength": 1.0} for _ in numbers],
        "eight plans mixed": [plans[n % 8] for n in numbers],
        "no plan, statistics per prompt": [stats_args("s", n) for n in numbers],
    }


def seconds(llm: Any, prompts: Any, arguments: list[dict[str, Any]]) -> float:
    """CPU seconds of this process."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0.0, max_tokens=N_NEW, ignore_eos=True, detokenize=False, extra_args=one or None
        )
        for one in arguments
    ]
    start = time.process_time()
    llm.generate(prompts, params, use_tqdm=False)
    return time.process_time() - start


def main(hidden: int, rounds: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 1024, (N_REQUESTS, N_PROMPT), generator=generator).tolist()
    prompts = [{"prompt_token_ids": row} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        llm = engine(hidden, str(Path(folder) / "olmoe"))
    taken: dict[str, list[float]] = {name: [] for name in ways()}
    for number in range(rounds + 1):
        for name, arguments in ways().items():
            if name == "vLLM without moe_lens":
                with without_moe_lens(llm):
                    spent = seconds(llm, prompts, arguments)
            else:
                spent = seconds(llm, prompts, arguments)
            if number:
                taken[name].append(spent)
        llm.collective_rpc("moe_lens_forget", args=("s",))
    first = taken["vLLM without moe_lens"]
    print(f"hidden {hidden}, {rounds} rounds\n\n| way | CPU s | ÷ vLLM without moe_lens |\n|---|---|---|")
    for name, spent in taken.items():
        ratios = [mine / other for mine, other in zip(spent, first, strict=True)]
        print(
            f"| {name} | {statistics.median(spent):.2f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) |"
        )


if __name__ == "__main__":
    os.environ.update(VARIABLES)  # before vLLM is imported
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    main(given.hidden, given.rounds)
