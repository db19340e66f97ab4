"""What a model writes, for people to read: the new text only, and on request its routes.

texts = generate_text(model, prompts, hooks=steer_hooks(plan))
texts, records = generate_text(model, chats, routes=True)
"""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from moe_lens import hook_names
from moe_lens.errors import DataError
from moe_lens.hook_names import Hooks
from moe_lens.model.registration import moe_shape, running_of
from moe_lens.model.state import Pass
from moe_lens.model.wrapper import Model
from moe_lens.shape import MoEShape
from moe_lens.statistics.generation import before_end, generate_recorded, stop_tokens
from moe_lens.statistics.routes import RouteRecord
from moe_lens.text.batching import Prompts, how_many, padded_batches


def generate_text(
    model: Model,
    prompts: Prompts,
    max_new_tokens: int = 64,
    *,
    hooks: Hooks = (),
    batch_size: int = 8,
    routes: bool = False,
    progress: bool = True,
    **options: Any,
) -> Any:
    """What the model writes after each prompt: the new text only, for strings and chats.

    >>> from moe_lens import organisms
    >>> model = organisms.load("specialised")
    >>> prompts = ["Question : what is", "Document : the"]
    >>> texts = generate_text(model, prompts, max_new_tokens=4, progress=False)
    >>> len(texts)
    2
    >>> texts, records = generate_text(model, prompts, max_new_tokens=4, routes=True, progress=False)
    >>> model.tokenizer.decode(records[0].tokens[0]) in texts[0], records[0].indices.shape
    (True, torch.Size([4, 1, 3, 2]))

    Greedy unless `options` say otherwise. Each text is that of the new tokens alone, without special ones (so
    without the space before its first word where the tokenizer drops that at the beginning of a text).

    Args:
        model: a HookedMoE or RoutedModel with a tokenizer.
        prompts: as in `collect_routing`; a chat that does not end with the assistant's words is answered.
        max_new_tokens: how many tokens at most follow each prompt.
        hooks: forward hooks to write under (`steer_hooks(plan)`).
        batch_size: prompts at a time.
        routes: also give the routes of what was written.
        progress: show a progress bar.
        **options: passed to `model.generate`: do_sample, temperature, top_k, top_p, ...

    Returns: a list of texts, one a prompt, in the order given. With `routes` (texts, records): of each prompt
    a `RouteRecord` [layer 1 new k] with weights and tokens, of the new tokens that were routed: all before
    the end-of-sequence token, but not the last of max_new_tokens, which no step reads. None if there is none.

    Raises:
        DataError: as in `collect_generation`; a model without tokenizer; options that give a prompt several
            texts.
    """
    if model.tokenizer is None:
        raise DataError("generate_text needs a tokenizer; collect_generation gives the tokens.")
    if options.get("num_return_sequences", 1) != 1 or options.get("num_beams", 1) != 1:
        raise DataError(
            "generate_text writes one text a prompt; use model.generate for beams and several texts."
        )
    stops, shape = stop_tokens(model), moe_shape(model)
    points = (hook_names.TOPK_INDICES, hook_names.TOPK_WEIGHTS) if routes else ()
    texts: list[str] = []
    records: list[RouteRecord | None] = []
    among = Pass(how_many(prompts))
    with tqdm(total=among.n_prompts, desc="generating", unit="prompt", disable=not progress) as bar:
        for tokens, mask in padded_batches(model, prompts, batch_size):
            rows = list(range(len(texts), len(texts) + len(tokens)))
            with running_of(model).of_prompts(rows, among):
                new, record = generate_recorded(model, tokens, mask, max_new_tokens, hooks, points, **options)
            n_before = before_end(new, stops).sum(1)
            lengths = (n_before + 1).clamp(max=new.shape[1]).tolist()
            written = [row[:length] for row, length in zip(new.cpu(), lengths, strict=True)]
            texts += [model.tokenizer.decode(row, skip_special_tokens=True) for row in written]
            if routes:
                records += _records(shape, new, n_before.clamp(max=new.shape[1] - 1).tolist(), record)
            bar.update(len(tokens))
    among.end(len(texts))
    return (texts, records) if routes else texts


def _records(
    shape: MoEShape, new: Int[Tensor, "batch new"], lengths: list[int], record: dict[str, list[Tensor]]
) -> list[RouteRecord | None]:
    """Of each prompt, the route of its first new tokens, as many as were routed."""
    if not any(lengths):
        return [None] * len(new)
    written: dict[str, list[Tensor]] = {}
    for name, steps in record.items():  # layer after layer
        point = name.rpartition(".")[2]
        written.setdefault(point, []).append(torch.cat([step[:, -1:] for step in steps[1:]], dim=1).cpu())
    indices, weights = (
        torch.stack(written[point]) for point in (hook_names.TOPK_INDICES, hook_names.TOPK_WEIGHTS)
    )
    return [
        RouteRecord(
            shape,
            indices[:, row : row + 1, :length],
            weights[:, row : row + 1, :length],
            new[row : row + 1, :length].cpu().long(),
        )
        if length
        else None
        for row, length in enumerate(lengths)
    ]
