"""What a HookedMoE is given: text, chats, a tokenizer's output or tokens, and what is prepended to text.

Text to tokens goes by TransformerLens' names and arguments, and by the rules of `moe_lens.encoding`: what is
prepended follows the tokenizer (in bridges that moe_lens makes; others keep TransformerLens' table), a BOS is
never doubled, and texts give the same tokens together as one by one.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens.encoding import (
    encoded_columns,
    encoded_rows,
    is_encoding,
    padded_rows,
    prompt_ids,
    prompts_among,
    table_of_texts,
    tensor_of,
    text_ids,
)
from moe_lens.errors import DataError, warn
from moe_lens.model.state import as_texts

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge as _Base
else:
    _Base = object


class BridgeReading(_Base):
    """`to_tokens`, `prepend_bos`, and inputs as tensors."""

    @property
    def prepend_bos(self) -> bool:
        """Whether a BOS stands before every text; a call's own `prepend_bos=` takes precedence.

        >>> from moe_lens import organisms
        >>> model = organisms.load("specialised")               # its tokenizer adds one
        >>> model.prepend_bos, model.to_tokens("the").shape
        (True, torch.Size([1, 2]))
        >>> model.prepend_bos = False
        >>> model.to_tokens("the").shape
        torch.Size([1, 1])

        `from_pretrained` and `from_hf` set it to what the tokenizer does by itself. It is TransformerLens'
        `model.cfg.default_prepend_bos`.
        """
        return bool(self.cfg.default_prepend_bos)

    @prepend_bos.setter
    def prepend_bos(self, prepend_bos: bool) -> None:
        self.cfg.default_prepend_bos = bool(prepend_bos)

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """As in TransformerLens; but a text's own BOS gets no second one, and cutting a text gives a warning.

        Args:
            prepend_bos: None as `model.prepend_bos` says.
            truncate: cut what is longer than the model's context.
        """
        texts = as_texts(input)
        if texts is None or self.tokenizer is None:
            return super().to_tokens(input, prepend_bos, padding_side, move_to_device, truncate)
        rows = [self._row(text, prepend_bos) for text in texts]
        if truncate and max(map(len, rows)) > self.cfg.n_ctx:
            warn(
                f"A text of {max(map(len, rows))} tokens is cut to the model's context of {self.cfg.n_ctx}; "
                "shorten it, or pass truncate=False."
            )
            rows = [row[: self.cfg.n_ctx] for row in rows]
        tokens = table_of_texts(self.tokenizer, rows, self._side(padding_side))
        return tokens.to(self.cfg.device) if move_to_device else tokens

    def _row(self, text: str, prepend_bos: bool | None) -> Int[Tensor, "pos"]:
        """A text's tokens alone; without an EOS that the tokenizer appends, as in TransformerLens."""
        tokenizer = self.tokenizer
        ids = text_ids(tokenizer, text, self.prepend_bos if prepend_bos is None else prepend_bos)
        if getattr(self.cfg, "tokenizer_appends_eos", False):
            while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
                ids.pop()
        return torch.tensor(ids, dtype=torch.int64)

    def _side(self, padding_side: str | None) -> str:
        return padding_side or getattr(self.tokenizer, "padding_side", None) or "right"

    def _read(
        self, input: Any, kwargs: dict[str, Any], *, writes: bool = False, tokens: bool = False
    ) -> tuple[Any, dict[str, Any]]:
        """The input of a forward or a generation, and its keywords, as TransformerLens takes them.

        Texts stay texts, unless `tokens`. Chats, prompts with parts and a tokenizer's output become tokens
        with their mask; for a run that `writes`, padding is on the left.
        """
        if is_encoding(input):
            mask = kwargs.get("attention_mask")
            given = input if mask is None else {**input, "attention_mask": mask}
            if not writes and (columns := encoded_columns(given)) is not None:
                return self._masked(*columns, kwargs)
            side = "left" if writes else self._side(kwargs.get("padding_side"))
            return self._padded(encoded_rows(given), side, kwargs)
        prompts = prompts_among(input)
        if prompts is not None:
            if self.tokenizer is None:
                raise DataError("The input is a chat and the model has no tokenizer; give tokens instead.")
            bos = kwargs.get("prepend_bos")
            rows = [self._prompt_row(prompt, bos) for prompt in prompts]
            if writes and kwargs.get("return_type", "input") == "input":
                kwargs = {**kwargs, "return_type": "str"}
            return self._padded(rows, "left" if writes else self._side(kwargs.get("padding_side")), kwargs)
        texts = as_texts(input)
        if texts is None:
            is_list = isinstance(input, list | tuple) and len(input) > 0
            is_numbers = is_list or isinstance(input, np.ndarray | Tensor)
            return (_as_tokens(input) if is_numbers else input), kwargs
        if self.tokenizer is None:
            raise DataError("The input is text and the model has no tokenizer; give tokens instead.")
        rows = [self._row(text, kwargs.get("prepend_bos")) for text in texts]
        self._check_length(max(map(len, rows)))
        if tokens:
            return self._padded(rows, "left", {n: v for n, v in kwargs.items() if n != "prepend_bos"})
        mask = kwargs.get("attention_mask")
        if mask is None and self._padding_is_ambiguous and len({len(row) for row in rows}) > 1:
            side = "left" if writes else self._side(kwargs.get("padding_side"))
            _, own = padded_rows(rows, None, side)
            kwargs = {**kwargs, "attention_mask": own.long().to(self.cfg.device)}
        return input, kwargs

    def _prompt_row(self, prompt: Any, prepend_bos: bool | None) -> Int[Tensor, "pos"]:
        text = prompt if isinstance(prompt, str) else getattr(prompt, "content", None)
        if isinstance(text, str):
            return self._row(text, prepend_bos)
        return torch.tensor(prompt_ids(self.tokenizer, prompt))

    @property
    def _padding_is_ambiguous(self) -> bool:
        """Whether the pad token also stands for something else, so that tokens do not tell padding."""
        tokenizer = self.tokenizer
        marks = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
        return tokenizer.pad_token_id in marks

    def _padded(
        self, rows: list[Int[Tensor, "_"]], side: str, kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        self._check_length(max(map(len, rows)))
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return self._masked(*padded_rows(rows, pad, side), kwargs)

    def _masked(
        self, tokens: Tensor, own: Bool[Tensor, "batch pos"], kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        mask = None if bool(own.all()) else own.long().to(self.cfg.device)
        rest = {name: value for name, value in kwargs.items() if name != "attention_mask"}
        return tokens.to(self.cfg.device), rest if mask is None else {**rest, "attention_mask": mask}

    def _decoded(self, output: Any, alone: bool) -> str | list[str]:
        """The texts of a generation, without special tokens."""
        sequences = getattr(output, "sequences", output)
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in sequences]
        return texts[0] if alone else texts

    def _check_length(self, n_tokens: int) -> None:
        if n_tokens > self.cfg.n_ctx:
            raise DataError(
                f"The input has {n_tokens} tokens, the model's context is {self.cfg.n_ctx}; shorten it."
            )


def follow_tokenizer(bridge: Any, prepend_bos: bool | None) -> None:
    """Let a bridge prepend a BOS to text, or not; None leaves TransformerLens' table."""
    if prepend_bos is not None:
        bridge.cfg.default_prepend_bos = bool(prepend_bos)


def _as_tokens(numbers: Any) -> Tensor:
    try:
        return tensor_of(numbers)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            "The input must be text, chats, a tokenizer's output, or tokens [batch pos] of one length; got "
            f"{type(numbers).__name__} ({error})."
        ) from error
