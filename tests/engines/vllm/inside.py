"""What runs in vLLM's own environment: `python inside.py CHECKPOINT OUT.json JOB... -- {"option": ...}`.

It knows vLLM and moe_lens' plugin, and nothing of the tests: it reads requests, runs them in one engine, and
writes what came out for a test in the main environment to judge.
"""

import json
import os
import random
import re
import sys
import time
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from moe_lens import SteeringPlan
from moe_lens.engines import check_llm, collect_vllm, plan_args, stats_args
from moe_lens.engines.vllm.runner_v2 import FIELDS, NEEDED

ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 160,
    "max_num_seqs": 16,
    "gpu_memory_utilization": 0.3,
    "kv_cache_memory_bytes": 64 * 2**20,
    "seed": 0,
    "enforce_eager": True,
    "disable_log_stats": False,
    "enable_prefix_caching": True,
    "block_size": 32,  # the default on CPUs is longer than any prompt here, and nothing would be cached
}


def sampling(extra: dict[str, Any], n_new: int, **options: Any) -> Any:
    return import_module("vllm").SamplingParams(
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


def prefix(llm: Any, given: dict[str, Any]) -> Any:
    """A long prompt under different plans, one after the other, beside the same with caches of their own."""
    prompt = (given["prompts"][-1][::-1] * 3)[:90]  # backwards: no other job has begun a prompt like this
    found = []
    for number, case in enumerate([0, 1, 2, 0, 1]):
        asked = sampling(arguments(given["cases"][case]), given["n_new"])
        shared, alone = (
            llm.generate([{"prompt_token_ids": prompt, **salt}], asked, use_tqdm=False)[0]
            for salt in ({}, {"cache_salt": f"alone {number}"})
        )
        parts = {"cached": shared.num_cached_tokens, "cached alone": alone.num_cached_tokens}
        found.append({**parts, "shared": new_text(shared), "alone": new_text(alone)})
    return found


def refused(llm: Any, given: dict[str, Any]) -> Any:
    """Requests that must not be served, what was said of each, and whether the engine still serves."""
    plan, wrong = arguments(given["cases"][1]), {}
    layer, expert = SteeringPlan(deactivate=[(77, 0)]), SteeringPlan(deactivate=[(0, 70)])
    other = {
        **given["cases"][1]["plan"],
        "shape": {"model": "m", "layers": [0, 1, 2, 3], "n_experts": 64, "top_k": 8},
    }
    asked = {
        "layer": plan_args(layer),
        "expert": plan_args(expert),
        "shape": {"moe_plan": json.dumps({key: value for key, value in other.items() if key != "digest"})},
        "damage": {"moe_plan": json.dumps({**given["cases"][1]["plan"], "epsilon": 0.02})},
        "name": {"moe_plan": "nobody"},
        "path": {"moe_plan": "../secret"},
        "brace": {"moe_plan": "{"},
        "number": {"moe_plan": 3},
        "key": {**plan, "moe_plans": "doc"},
        "strength": {**plan, "moe_strength": -1},
        "no plan": {"moe_strength": 1.0},
        "positions": {**plan, "moe_positions": "last"},
        "span": {"moe_stats": "s", "moe_span": [3, 1]},
        "long span": {"moe_stats": "s", "moe_span": [0, 1000]},
    }
    for name, extra in asked.items():
        try:
            llm.generate([{"prompt_token_ids": given["prompts"][0]}], sampling(extra, 2), use_tqdm=False)
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"
    after = llm.generate(
        [{"prompt_token_ids": given["prompts"][0]}], sampling({}, given["n_new"]), use_tqdm=False
    )
    return {"refusals": wrong, "asked": list(asked), "after": new_text(after[0])}


def collected(llm: Any, given: dict[str, Any], folder: Path) -> Any:
    """`collect_vllm` on texts, with spans and a plan; the prefix cache has seen all of it before."""
    texts = [" ".join(f"w{token - 4}" for token in prompt) for prompt in given["prompts"]]
    content = given["cases"][1]["plan"]
    plan = SteeringPlan(content["activate"], content["deactivate"], content["epsilon"])
    for name, span in (("all", None), ("last", "last"), ("slice", slice(2, 4))):
        stats = collect_vllm(llm, texts, span=span, plan=plan, progress=False)
        stats.save(folder / f"collected {name}.safetensors")
    return {"texts": texts, "left": llm.collective_rpc("moe_lens_names")}


def preempted(llm: Any, given: dict[str, Any], folder: Path) -> Any:
    """Long answers to all prompts, in an engine too small for that: requests are thrown out and run again."""
    case = arguments(given["cases"][1])
    llm.generate(
        [{"prompt_token_ids": prompt} for prompt in given["prompts"]],
        [sampling({**case, **stats_args("p", n)}, 100) for n in range(len(given["prompts"]))],
        use_tqdm=False,
    )
    llm.collective_rpc("moe_lens_save", args=("p", str(folder / "preempted.safetensors")))
    llm.collective_rpc("moe_lens_forget", args=("p",))
    metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    return {"preemptions": metrics["vllm:num_preemptions"]}


def page(llm: Any, given: dict[str, Any], folder: Path) -> Any:
    """The code of docs/vllm.md, on this engine in place of the model that it names."""
    text = (Path(__file__).parents[3] / "docs" / "vllm.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```\n(from .*?)```", text, re.DOTALL) if "LLM(" not in block]
    names: dict[str, Any] = {"llm": llm}
    here = Path.cwd()
    os.chdir(folder)
    try:
        for block in blocks:
            exec(compile(block, "vllm.md", "exec"), names)
    finally:
        os.chdir(here)
    return {"blocks": len(blocks), "texts": [new.outputs[0].text for new in names["outputs"]]}


def runner_v2(llm: Any, given: dict[str, Any]) -> Any:
    """What the plugin uses of vLLM's model runner V2, which no CPU can run, and vLLM does not have."""
    worker = "vllm.v1.worker.gpu"
    runner = import_module(f"{worker}.model_runner").GPUModelRunner
    batch = {field.name for field in fields(import_module(f"{worker}.input_batch").InputBatch)}
    request = import_module("vllm.v1.core.sched.output").NewRequestData
    of_request = {field.name for field in fields(request)} | set(vars(request))
    return {
        "missing": [
            *(name for name in NEEDED if not hasattr(runner, name)),
            *(name for name in FIELDS if name not in batch),
            *({"req_id", "sampling_params", "prompt_len"} - of_request),
        ]
    }


JOBS: dict[str, Any] = {
    **{"mixed": mixed, "counted": counted, "prefix": prefix},
    "runner_v2": runner_v2,
    **{"refused": refused, "collected": collected, "preempted": preempted, "page": page},
}
IN_FOLDER = ("counted", "collected", "preempted", "page")
"""Those that write files beside the output."""


def main() -> None:
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    checkpoint, out, *jobs = sys.argv[1:at]
    options = json.loads(sys.argv[at + 1]) if at < len(sys.argv) else {}
    given = json.loads((Path(checkpoint) / "requests.json").read_text())
    start = time.monotonic()
    llm = import_module("vllm").LLM(model=checkpoint, **{**ENGINE, **options})
    found: dict[str, Any] = {"model": check_llm(llm)}
    print("engine up after", round(time.monotonic() - start, 1), flush=True)
    for name in jobs:
        extra = {"folder": Path(out).parent} if name in IN_FOLDER else {}
        found[name] = JOBS[name](llm, given, **extra)
        print(name, "done after", round(time.monotonic() - start, 1), flush=True)
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
