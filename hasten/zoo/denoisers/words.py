"""Word-level tokenizers for captions: one entry for each word that scenes are described with."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hasten.zoo.scenes.scene import COLOURS, FILLS, MOTIONS, SHAPES, SIZES, TONES

PAD, START, END, UNKNOWN = "<pad>", "<start>", "<end>", "<unknown>"
SILENT = ("a", "an", "the", "of", "on", "ground", "standing")  # say nothing; not given a token

WORDS = (
    *SHAPES,
    *COLOURS,
    *SIZES,
    *FILLS,
    *TONES,
    *MOTIONS,
    "above",
    "below",
    "and",
    "moving",
)
VOCABULARY = (PAD, START, END, UNKNOWN, *WORDS)


def word_tokenizer(
    *, start: bool, end: bool, padding_side: str, max_length: int
) -> PreTrainedTokenizerFast:
    """A tokenizer over VOCABULARY; silent words and punctuation are left out.

    Args:
        start, end: put that token before or after each text. An empty text must have one of them.
        padding_side: "left" or "right".
        max_length: tokens that the text encoder takes.
    """
    ids = {word: place for place, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(rf"\b({'|'.join(SILENT)})\b|[.,;!?]"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = f"{START} $A" if start else "$A"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{template} {END}" if end else template,
        special_tokens=[(START, ids[START]), (END, ids[END])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side=padding_side,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
