"""Recording dense routing weights: `record_dense`, of the last token of each prompt."""

from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from moe_lens import hook_names
from moe_lens.errors import HookError
from moe_lens.hook_names import HookList, Hooks, hook_list
from moe_lens.model.registration import moe_shape, routing_layers, running_of
from moe_lens.model.state import Pass
from moe_lens.model.wrapper import Model, check_hooked
from moe_lens.routers.dense import dense_weights, no_dense_weights
from moe_lens.statistics.dense import DenseRoutes
from moe_lens.text.batching import Prompts, chunks_to_pad, how_many, pad_sequences, padding, token_sequences


def record_dense(
    model: Model, prompts: Prompts, *, batch_size: int = 8, hooks: Hooks = (), progress: bool = True
) -> DenseRoutes:
    """How much each of all experts would count for the last token of each prompt, in every MoE layer.

    >>> from moe_lens import organisms, record_dense
    >>> records = record_dense(organisms.load("specialised"), ["Question : what is"], progress=False)
    >>> records.weights.sum(-1).flatten().round(decimals=4).tolist()            # softmax in each of 4 layers
    [1.0, 1.0, 1.0, 1.0]

    Args:
        model: a HookedMoE or RoutedModel.
        prompts: strings, chats or tokens; see `moe_lens.text.Prompts`.
        batch_size: prompts a forward.
        hooks: forward hooks to run under; what they make of router logits is recorded.
        progress: show a progress bar.

    Raises:
        DataError: no prompts, or an empty one.
        HookError: a layer whose router has no dense weights (`moe_lens.routers.no_dense_weights`).
    """
    check_hooked(model)
    for layer, moe in routing_layers(model).items():
        if (reason := no_dense_weights(moe.rule)) is not None:
            raise HookError(f"Layer {layer} has no dense routing weights: {reason}.")
    shape = moe_shape(model)
    found: dict[int, list[Tensor]] = {layer: [] for layer in shape.layers}

    def keep(logits: Tensor, hook: Any) -> None:
        last = logits[:, -1].detach()
        found[hook_names.layer_of(hook.name)].append(dense_weights(hook.rule, last).cpu())

    points: HookList = [(hook_names.router_logits(layer), keep) for layer in shape.layers]
    among, done = Pass(how_many(prompts)), 0
    bar = tqdm(total=among.n_prompts, desc="dense routes", unit="prompt", disable=not progress)
    with torch.no_grad(), model.hooks([*hook_list(hooks), *points]), bar:
        numbered = enumerate(token_sequences(model, prompts))
        for chunk in chunks_to_pad(model, numbered, batch_size, lambda item: len(item[1])):
            tokens, mask = pad_sequences(model, [sequence for _, sequence in chunk])
            with running_of(model).of_prompts([number for number, _ in chunk], among):
                model(tokens, return_type=None, **padding(mask))
            done += len(tokens)
            bar.update(len(tokens))
    among.end(done)
    return DenseRoutes(shape, torch.stack([torch.cat(found[layer]) for layer in shape.layers]))
