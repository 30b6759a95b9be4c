"""The tokenizer that all code models of the zoo share: byte-level BPE with 4,096 entries."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"


def train_tokenizer(
    texts: Iterable[str], *, vocabulary_size: int = VOCABULARY_SIZE, context: int = 2048
) -> PreTrainedTokenizerFast:
    """Learn merges from `texts` (the training split only) and wrap them for transformers.

    Byte-level, so any text round-trips; no token is added before or after a text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        model_max_length=context,
        padding_side="left",  # generation continues at the right end
        clean_up_tokenization_spaces=False,
    )
