"""A word-level tokenizer: a word is a token, and every sequence begins with <bos>.

<bos> gives attention a place to rest and every prompt the same first token, in training, in plain
transformers and in TransformerLens (whose `to_tokens` prepends it by default).
"""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moe_lens.organisms.words import BOS, EOS, PAD, UNK


def build_tokenizer(vocabulary: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """A tokenizer in which a word's id is its place in `vocabulary`.

    It splits at white space, prepends <bos>, and pads on the left, so that the last position of a batch of
    prompts is the position that answers. `save_pretrained` writes files that `AutoTokenizer` loads offline.
    """
    ids = {word: place for place, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )
