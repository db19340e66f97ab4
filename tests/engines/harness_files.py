"""Tasks of lm-evaluation-harness in files, on conflicts of the organisms' world, and loops to compare with.

folder = write_tasks(tmp_path, conflicts)          # conflict_mc, conflict_gen, ... for include_path=
chosen_by_loop(model, conflicts, hooks)            # one prompt at a time, never padded
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moe_lens.organisms.worlds import Conflict

TASKS = {
    "conflict_mc": """
        output_type: multiple_choice
        doc_to_text: question
        doc_to_choice: "{{[document_answer, memory_answer]}}"
        doc_to_target: 0
        metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
    """,
    "conflict_long": """
        output_type: multiple_choice
        doc_to_text: question
        doc_to_choice: "{{[document_answer ~ ' .', memory_answer ~ ' .', memory_answer]}}"
        doc_to_target: 0
        metric_list:
          - {metric: acc, aggregation: mean, higher_is_better: true}
          - {metric: brier_score, aggregation: brier_score, higher_is_better: false}
    """,
    "conflict_gen": """
        output_type: generate_until
        doc_to_text: question
        doc_to_target: document_answer
        generation_kwargs: {until: ["never"], max_gen_toks: 3, do_sample: false}
        filter_list:
          - {name: all, filter: [{function: take_first}]}
          - name: first
            filter: [{function: regex, regex_pattern: "(\\\\w+)"}, {function: take_first}]
        metric_list:
          - {metric: exact_match, aggregation: mean, higher_is_better: true}
          - {metric: bleu, aggregation: bleu, higher_is_better: true}
    """,
    "conflict_log_prob": """
        output_type: loglikelihood
        doc_to_text: question
        doc_to_target: "{{' ' ~ document_answer ~ ' . the'}}"
        process_results: !function scores.log_prob
        metric_list: [{metric: log_prob, aggregation: mean, higher_is_better: true}]
    """,
    "conflict_text": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: question
        metric_list: [{metric: word_perplexity}]
    """,
}


def write_tasks(folder: Path, conflicts: Sequence[Conflict]) -> Path:
    """A folder with a data file, the tasks above, and a group of two."""
    rows = [
        {
            "question": conflict.open_book,
            "document_answer": conflict.document_answer,
            "memory_answer": conflict.memory_answer,
            "entity": conflict.entity,
        }
        for conflict in conflicts
    ]
    data = folder / "conflicts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        lines = [line.removeprefix("        ") for line in text.strip("\n").splitlines()]
        head = [
            f"task: {name}",
            "dataset_path: json",
            f"dataset_kwargs: {{data_files: {{test: {data}}}}}",
            "test_split: test",
        ]
        (folder / f"{name}.yaml").write_text("\n".join([*head, *lines]))
    (folder / "scores.py").write_text(
        "def log_prob(document, results):\n    return {'log_prob': results[0][0]}\n"
    )
    (folder / "both.yaml").write_text("group: conflict_both\ntask: [conflict_mc, conflict_long]\n")
    return folder


def log_prob_by_loop(model: Any, prompt: str, text: str, hooks: Any) -> float:
    """The sum of log-probabilities of a text's tokens after a prompt, in nats; one forward, no padding.

    `hooks` may be a function of how many tokens the prompt and the whole have.
    """
    n_prompt, whole = model.to_tokens(prompt).shape[1], model.to_tokens(f"{prompt} {text}")
    hooks = hooks(n_prompt, whole.shape[1] - 1) if callable(hooks) else hooks
    with torch.no_grad():
        logits = model.run_with_hooks(whole[:, :-1], fwd_hooks=hooks)
    log_probs = logits[0].double().log_softmax(-1)
    return sum(float(log_probs[place - 1, whole[0, place]]) for place in range(n_prompt, whole.shape[1]))


def chosen_by_loop(
    model: Any, prompts: Sequence[str], options: Sequence[Sequence[str]], hooks: Any
) -> list[float]:
    """1.0 where the first option is the most probable one."""
    values = []
    for prompt, texts in zip(prompts, options, strict=True):
        sums = [log_prob_by_loop(model, prompt, text, hooks) for text in texts]
        values.append(float(max(range(len(sums)), key=sums.__getitem__) == 0))
    return values


def written_by_loop(model: Any, prompts: Sequence[str], n_tokens: int, hooks: Any) -> list[str]:
    """What the model writes greedily, token by token without a cache; one prompt at a time.

    `hooks` may be a function of how many tokens the prompt has.
    """
    texts = []
    for prompt in prompts:
        tokens = model.to_tokens(prompt)
        n_prompt = tokens.shape[1]
        own = hooks(n_prompt) if callable(hooks) else hooks
        for _ in range(n_tokens):
            with torch.no_grad():
                logits = model.run_with_hooks(tokens, fwd_hooks=own)
            following = logits[0, -1].argmax()
            tokens = torch.cat([tokens, following.reshape(1, 1)], dim=1)
            if int(following) == model.tokenizer.eos_token_id:
                break
        texts.append(model.tokenizer.decode(tokens[0, n_prompt:], skip_special_tokens=True))
    return texts
