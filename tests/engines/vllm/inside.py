"""What runs in vLLM's own environment: `python inside.py CHECKPOINT OUT.json JOB... [-- {"engine": "options"}]`.

It knows vLLM and moe_lens' plugin, and nothing of the tests: it reads requests, runs them in one engine, and
writes what came out for a test in the main environment to judge.
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from moe_lens import SteeringPlan
from moe_lens.engines.vllm import check_llm, plan_args, stats_args

ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 160,
    "max_num_seqs": 16,
    "gpu_memory_utilization": 0.3,
    "kv_cache_memory_bytes": 64 * 2**20,
    "seed": 0,
    "enforce_eager": True,
    "disable_log_stats": True,
}


def sampling(extra: dict[str, Any], n_new: int, **options: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0, max_tokens=n_new, ignore_eos=True, logprobs=0, extra_args=extra, **options
    )


def arguments(case: dict[str, Any]) -> dict[str, Any]:
    """Of a case of requests.json; its plan without the name of the model that it was made for."""
    plan = case["plan"] and SteeringPlan(
        case["plan"]["activate"], case["plan"]["deactivate"], case["plan"]["epsilon"]
    )
    return plan_args(plan or None, strength=case["strength"], positions=case["positions"])


def new_text(output: Any) -> tuple[list[int], list[float]]:
    best = output.outputs[0]
    return list(best.token_ids), [
        row[token].logprob for row, token in zip(best.logprobs, best.token_ids, strict=True)
    ]


def mixed(llm: Any, given: dict[str, Any]) -> Any:
    """Every prompt in every case, all in one call, in random order."""
    todo = [(c, p) for c in range(len(given["cases"])) for p in range(len(given["prompts"]))]
    random.Random(0).shuffle(todo)
    outputs = llm.generate(
        [{"prompt_token_ids": given["prompts"][p]} for _, p in todo],
        [sampling(arguments(given["cases"][c]), given["n_new"]) for c, _ in todo],
        use_tqdm=False,
    )
    found: list[Any] = [{"tokens": {}, "logprobs": {}} for _ in given["cases"]]
    for (c, p), output in zip(todo, outputs, strict=True):
        found[c]["tokens"][p], found[c]["logprobs"][p] = new_text(output)
    return [{key: [part[p] for p in sorted(part)] for key, part in case.items()} for case in found]


def counted(llm: Any, given: dict[str, Any], folder: Path) -> Any:
    """The routing of all prompts in all cases, interleaved: in files, read by the test."""
    llm.generate(
        [{"prompt_token_ids": prompt} for prompt in given["prompts"] for _ in given["cases"]],
        [
            sampling({**arguments(case), **stats_args(f"case {c}", p)}, 3)
            for p in range(len(given["prompts"]))
            for c, case in enumerate(given["cases"])
        ],
        use_tqdm=False,
    )
    names = llm.collective_rpc("moe_lens_names")
    for c in range(len(given["cases"])):
        llm.collective_rpc("moe_lens_save", args=(f"case {c}", str(folder / f"case{c}.safetensors")))
    ranks = llm.collective_rpc("moe_lens_stats", args=("case 1",))
    for c in range(len(given["cases"])):
        llm.collective_rpc("moe_lens_forget", args=(f"case {c}",))
    left = llm.collective_rpc("moe_lens_names")
    return {"names": names, "same on ranks": all(rank == ranks[0] for rank in ranks), "left": left}


JOBS = {"mixed": mixed, "counted": counted}


def main() -> None:
    from vllm import LLM

    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    checkpoint, out, *jobs = sys.argv[1:at]
    options = json.loads(sys.argv[at + 1]) if at < len(sys.argv) else {}
    given = json.loads((Path(checkpoint) / "requests.json").read_text())
    start = time.monotonic()
    llm = LLM(model=checkpoint, **{**ENGINE, **options})
    found: dict[str, Any] = {"model": check_llm(llm)}
    print("engine up after", round(time.monotonic() - start, 1), flush=True)
    for name in jobs:
        extra = {"folder": Path(out).parent} if name in ("counted",) else {}
        found[name] = JOBS[name](llm, given, **extra)
        print(name, "done after", round(time.monotonic() - start, 1), flush=True)
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
