"""What a Hugging Face model is given: text, texts, tokens or embeddings, as its keyword arguments.

Text to tokens and back goes by TransformerLens' names, with the tokenizer as it is, and by the rules of
`moe_lens.encoding`. `prepend_bos=None`, the default everywhere, means `model.prepend_bos`; where that is
None, too, the tokenizer is followed: what `tokenizer(text)` gives.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformer_lens.utilities.position_ids import accepts_mask_derived_position_ids
from transformer_lens.utilities.slice import Slice

from moe_lens.checks import looks_padded, may_be_padded
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
from moe_lens.model.registration import running_of
from moe_lens.model.state import as_texts


class Reading:
    """`to_tokens` and its relatives, and what the Hugging Face model in a RoutedModel is given."""

    tokenizer: Any
    cfg: Any
    hf_model: nn.Module
    prepend_bos: bool | None = None
    """Whether a BOS stands before every text; None: as the tokenizer does by itself."""

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = False,
    ) -> Int[Tensor, "batch pos"]:
        """Tokens of a text, or of several, padded to the longest (on the tokenizer's side if None).

        Args:
            prepend_bos: True with one BOS before each text, False with none (but for a text's own); None as
                `model.prepend_bos` says.
            truncate: cut what is longer than the model's context; otherwise it is left to whoever runs it.

        Raises:
            DataError: no tokenizer, no text, no pad token for texts of several lengths, or no BOS token.
        """
        texts = as_texts(input)
        if texts is None:
            raise DataError(f"to_tokens needs a text or a list of texts; got {input!r}.")
        rows = [torch.tensor(self._ids(text, prepend_bos)) for text in texts]
        if truncate:
            rows = [row[: self.cfg.n_ctx] for row in rows]
        tokenizer = self._tokenizer()
        tokens = table_of_texts(tokenizer, rows, padding_side or tokenizer.padding_side)
        return tokens.to(self.cfg.device) if move_to_device else tokens

    def to_string(self, tokens: Any) -> str | list[str]:
        """The text of tokens [pos], or the texts of tokens [batch pos], special tokens included."""
        rows = torch.as_tensor(tokens)
        if rows.ndim == 2:
            return [self._tokenizer().decode(row) for row in rows]
        return self._tokenizer().decode(rows.reshape(-1))

    def to_str_tokens(self, input: Any, prepend_bos: bool | None = None) -> list[str]:
        """The text of each token of one text, or of tokens [pos]."""
        ids = self._ids(input, prepend_bos) if isinstance(input, str) else torch.as_tensor(input).reshape(-1)
        return [self._tokenizer().decode([int(token)]) for token in ids]

    def to_single_token(self, string: str) -> int:
        """The token that is this text. Raises DataError where it takes several."""
        ids = self._tokenizer()(string, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise DataError(f"{string!r} is {len(ids)} tokens, not one. Mind the space before a word.")
        return int(ids[0])

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise DataError("This model has no tokenizer; give tokens, or pass tokenizer= when you wrap it.")
        return self.tokenizer

    def _ids(self, text: str, prepend_bos: bool | None) -> list[int]:
        return text_ids(self._tokenizer(), text, self.prepend_bos if prepend_bos is None else prepend_bos)

    def _inputs(
        self,
        input: Any,
        prepend_bos: bool | None,
        padding_side: str | None,
        attention_mask: Any,
        *,
        writes: bool = False,
    ) -> dict[str, Any]:
        """Keyword arguments for the Hugging Face model; what `writes` reads is padded on the left."""
        if is_encoding(input):
            input, attention_mask = self._encoded(input, padding_side, attention_mask, writes)
        elif (prompts := prompts_among(input)) is not None:
            rows = [self._prompt_row(prompt, prepend_bos) for prompt in prompts]
            input, attention_mask = self._together(rows, padding_side)
        if as_texts(input) is not None:
            input, attention_mask = self._read(input, prepend_bos, padding_side, attention_mask)
        tokens = _as_tensor(input).to(self.cfg.device)
        if tokens.is_floating_point():
            inputs: dict[str, Any] = {"inputs_embeds": tokens}
        else:
            tokens = tokens[None] if tokens.ndim == 1 else tokens
            if attention_mask is None and not running_of(self).generating:
                _warn_of_padding(self.tokenizer, tokens)
            inputs = {"input_ids": tokens}
        if attention_mask is not None:
            mask = torch.as_tensor(attention_mask).to(tokens.device)
            inputs["attention_mask"] = mask
            if mask.ndim == 2 and "input_ids" in inputs:
                inputs |= _position_ids(mask, tokens, self.hf_model)
        return inputs

    def _read(
        self, texts: str | list[str], prepend_bos: bool | None, padding_side: str | None, mask: Any
    ) -> tuple[Int[Tensor, "batch pos"], Any]:
        """Tokens of texts, and their mask where some are padded."""
        rows = [torch.tensor(self._ids(text, prepend_bos)) for text in as_texts(texts) or ()]
        tokens, own = self._together(rows, padding_side)
        return tokens, own if mask is None else mask

    def _encoded(
        self, encoding: Mapping[str, Any], padding_side: str | None, mask: Any, writes: bool
    ) -> tuple[Int[Tensor, "batch pos"], Any]:
        """A tokenizer's output: its columns as they stand, or with padding on the left for what writes."""
        given = encoding if mask is None else {**encoding, "attention_mask": mask}
        columns = None if writes else encoded_columns(given)
        if columns is None:
            return self._together(encoded_rows(given), "left" if writes else padding_side)
        tokens, own = columns
        return tokens, None if bool(own.all()) else own.long()

    def _prompt_row(self, prompt: Any, prepend_bos: bool | None) -> Int[Tensor, "pos"]:
        bos = self.prepend_bos if prepend_bos is None else prepend_bos
        return torch.tensor(prompt_ids(self._tokenizer(), prompt, bos))

    def _together(
        self, rows: list[Int[Tensor, "_"]], padding_side: str | None
    ) -> tuple[Int[Tensor, "batch pos"], Any]:
        """Tokens of prompts, and their mask where some are padded."""
        self._check_length(max(map(len, rows)))
        side = padding_side or getattr(self.tokenizer, "padding_side", "right")
        tokens, own = padded_rows(rows, getattr(self.tokenizer, "pad_token_id", None), side)
        return tokens, None if bool(own.all()) else own.long()

    def _check_length(self, n_tokens: int) -> None:
        if n_tokens > self.cfg.n_ctx:
            raise DataError(
                f"The input has {n_tokens} tokens, the model's context is {self.cfg.n_ctx}; shorten it."
            )

    def _own_tokens(self, input: Any, kwargs: dict[str, Any]) -> Bool[Tensor, "batch pos"] | None:
        """Which positions are not padding; None where that is not known or does not matter (one string)."""
        mask = kwargs.get("attention_mask")
        several = isinstance(input, list) and len(input) > 1 and isinstance(input[0], str)
        if is_encoding(input) or prompts_among(input) is not None or (several and mask is None):
            given = self._inputs(input, kwargs.get("prepend_bos"), kwargs.get("padding_side"), mask)
            input, mask = given["input_ids"], given.get("attention_mask")
            mask = torch.ones_like(input) if mask is None else mask
        elif mask is None and (numbers := as_numbers(input)) is not None:
            rows = numbers if numbers.ndim == 2 else numbers[None]
            mask = None if may_be_padded(self.tokenizer, rows) else torch.ones_like(rows)
        if mask is None:
            return None
        pos_slice = Slice.unwrap(kwargs.get("pos_slice"))
        mask = torch.as_tensor(mask)
        return (mask if kwargs.get("pos_slice") is None else pos_slice.apply(mask, dim=1)).bool()


def is_written(input: Any) -> bool:
    """Whether an input is words: a text or chat, or several."""
    return as_texts(input) is not None or prompts_among(input) is not None


def as_numbers(input: Any) -> Int[Tensor, "*batch pos"] | None:
    """Tokens, as a tensor or as lists; None for anything else."""
    if is_encoding(input) or is_written(input) or input is None:
        return None
    tensor = _as_tensor(input)
    return None if tensor.is_floating_point() else tensor


def _as_tensor(input: Any) -> Tensor:
    try:
        tensor = tensor_of(input)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"The input must be text, texts, tokens or embeddings; got {input!r}.") from error
    if not tensor.numel() or tensor.dtype == torch.bool or tensor.ndim not in (1, 2, 3):
        raise DataError(
            f"The input must be tokens [pos] or [batch pos], or embeddings [batch pos d_model]; got "
            f"{tensor.dtype} of shape {tuple(tensor.shape)}."
        )
    return tensor


def _warn_of_padding(tokenizer: Any, tokens: Tensor) -> None:
    if looks_padded(tokenizer, tokens):
        warn(
            "Some rows of these tokens begin or end with the padding token, without an attention_mask: "
            "the model reads padding as text. Pass attention_mask=, or the prompts as a list of strings."
        )


def _position_ids(
    mask: Int[Tensor, "batch total"], tokens: Int[Tensor, "batch pos"], hf_model: nn.Module
) -> dict[str, Tensor]:
    """Positions counted from each prompt's own first token, where padding shifts them."""
    n_pos, positions = tokens.shape[1], mask.long().cumsum(-1) - 1
    columns = torch.arange(mask.shape[1], device=mask.device)
    shifted = ((positions != columns) & (mask != 0)).any(dim=1, keepdim=True)
    if not bool(shifted.any()) or not accepts_mask_derived_position_ids(hf_model):
        return {}
    positions = torch.where(shifted, positions.masked_fill(mask == 0, 1), columns)
    return {"position_ids": positions[:, -n_pos:]}
