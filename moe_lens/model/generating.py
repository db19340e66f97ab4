"""Letting a RoutedModel write: TransformerLens' arguments, carried out by Hugging Face's own `generate`."""

from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig

from moe_lens.encoding import prompts_among
from moe_lens.model.reading import Reading, is_written
from moe_lens.model.registration import running_of
from moe_lens.model.wrapper import check_options


class Generating(Reading):
    """`generate`."""

    def generate(
        self,
        input: Any = "",
        max_new_tokens: int = 10,
        *,
        stop_at_eos: bool = True,
        eos_token_id: int | list[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: str | None = "left",
        attention_mask: Any = None,
        return_type: str = "input",
        verbose: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Let the model write, by Hugging Face's own `generate`; the arguments are those of TransformerLens.

        Args:
            input: a text, texts, a chat, chats, tokens [batch pos], or a tokenizer's output.
            stop_at_eos: stop at `eos_token_id`, by default that of the model's generation config.
            return_type: "input" gives text for text and chats, tokens for tokens; "str", "tokens".
            verbose: has no effect; it is there because TransformerLens' tools pass it.
            **kwargs: passed to Hugging Face's `generate` (num_beams, cache_implementation, a streamer...). A
                `generation_config` there takes the place of the arguments on length and sampling here.

        Returns: prompt and what was written.

        Raises:
            HookError: a plan or hooks among the arguments; a `with model.hooks(...)` around it takes them.
        """
        check_options(kwargs)
        input = kwargs.pop("input_ids", input)
        given_config = kwargs.pop("generation_config", None)
        inputs = self._inputs(input, prepend_bos, padding_side, attention_mask, writes=True)
        inputs.pop("position_ids", None)  # Hugging Face's generate makes its own
        inputs.setdefault(
            "attention_mask", torch.ones(inputs[next(iter(inputs))].shape[:2], dtype=torch.long)
        )
        inputs["attention_mask"] = inputs["attention_mask"].to(self.cfg.device)
        sampling: dict[str, Any] = {"do_sample": do_sample}
        if do_sample:
            sampling |= {
                "top_k": top_k or 0,
                "top_p": 1.0 if top_p is None else top_p,
                "temperature": temperature,
            }
        if given_config is None:
            sampling |= {"max_new_tokens": max_new_tokens, "use_cache": use_past_kv_cache}
            given_config = self._generation_config(stop_at_eos, eos_token_id)
        else:
            sampling = {}  # all is said there
        with running_of(self).reading(input):
            output: Any = cast(Any, self.hf_model).generate(
                **inputs,
                generation_config=given_config,
                **{**sampling, **kwargs},
            )
        if return_type == "tokens" or (return_type == "input" and not is_written(input)):
            return output
        sequences = output if isinstance(output, Tensor) else output.sequences
        texts = [self._tokenizer().decode(row, skip_special_tokens=True) for row in sequences]
        alone = isinstance(input, str) or prompts_among(input) == [input]
        return texts[0] if alone and len(texts) == 1 else texts

    def _generation_config(self, stop_at_eos: bool, eos_token_id: Any) -> Any:
        config = deepcopy(getattr(self.hf_model, "generation_config", None)) or GenerationConfig()
        for name in ("top_k", "top_p", "temperature", "max_length", "min_length"):
            setattr(config, name, None)  # what the user asks for, not the checkpoint's defaults
        ends = (eos_token_id if eos_token_id is not None else self.cfg.eos_token_id) if stop_at_eos else None
        config.eos_token_id = ends
        if config.pad_token_id is None:
            pad = getattr(self.tokenizer, "pad_token_id", None)
            first_end = ends[0] if isinstance(ends, list) else ends
            config.pad_token_id = first_end if pad is None else pad
        return config
