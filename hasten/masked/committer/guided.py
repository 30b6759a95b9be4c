"""A small autoregressive model beside a masked one: how likely is each drafted token from the left?

The text is the same column by column in both, so the guide's cache holds columns: each reading runs
those behind what is kept, of all rows of the batch, and afterwards keeps what will not change any
more. A row that is ahead of the others is read again there, which changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import hasten.zoo.catalogue as zoo
from hasten.causal.companion import AUTO, Companion, own_tokenizer
from hasten.causal.runners import Block, EagerRunner
from hasten.errors import HastenError, PlanError
from hasten.masked.run import Run
from hasten.subject import Subject, masked_form, open_subject

SMALL = "code-lm-small"  # what "auto" means


class Reader:
    """A guide during one call.

    Attributes:
        seen: columns in the cache, which hold fixed tokens in every row.
        vocabulary: ids that the guide knows, from 0.
    """

    def __init__(self, guide: Companion, run: Run, *, technique: str) -> None:
        if guide.context is not None and run.length > guide.context:
            raise HastenError(
                f"{technique}: the text is {run.length} tokens long; the guide {guide.name} was made for "
                f"{guide.context}. Shorten the prompt or max_new_tokens."
            )
        self.runner = guide.runner(EagerRunner)
        self.cache = self.runner.new_cache(run.batch, run.length)
        self.pads = run.pads
        self.vocabulary = int(self.runner.config.vocab_size)
        self.seen = 0

    def read(self, tokens: Tensor, count: int) -> Tensor:
        """What stands behind each of the last `count` columns: logits (batch, count, vocabulary), float32.

        Args:
            tokens: (batch, width) ids up to the last column that is read, drafts among them. A token
                that the guide does not know is read as id 0.
        """
        new = tokens[:, self.seen :]
        columns = torch.arange(self.seen, tokens.shape[1], device=tokens.device)
        positions = (columns - self.pads[:, None]).clamp(min=-1)
        block = Block(
            new.masked_fill(new >= self.vocabulary, 0),
            positions,
            num_logits=count,
            has_holes=bool((positions < 0).any()),
            is_prompt=self.seen == 0,
        )
        return self.runner.forward(block, self.cache).logits.float()

    def keep(self, columns: int) -> None:
        """End the reading and keep the text's first `columns`; what was read behind them is dropped."""
        self.cache.commit(num_kept=columns - self.seen)
        self.seen = columns


def approved(
    logits: Tensor, drafts: Tensor, rule: str, *, top_k: int, threshold: float, ratio: float
) -> Tensor:
    """(batch, places) bool, which drafted ids pass a rule of FreeCache.

    Args:
        logits: (batch, places, vocabulary) of the guide.
        drafts: (batch, places) ids; one that the guide does not know never passes.
        rule: "deterministic" (its best), "top_k" (among its best few), "threshold" (likelier than
            that), "relative" (among its best few, and at least `ratio` as likely as its best).
    """
    probs = logits.softmax(dim=-1)
    known = drafts < logits.shape[2]
    chance = probs.gather(2, drafts.masked_fill(~known, 0)[..., None])
    likely = (probs > chance).sum(dim=-1) < top_k
    chance = chance[..., 0]
    passed = {
        "deterministic": lambda: drafts == probs.argmax(dim=-1),
        "top_k": lambda: likely,
        "threshold": lambda: chance > threshold,
        "relative": lambda: likely & (chance >= ratio * probs.amax(dim=-1)),
    }[rule]()
    return passed & known


def open_guide(model: PreTrainedModel, wanted: str, *, technique: str) -> Companion:
    """Open an autoregressive model with a masked one's tokens, in its dtype and on its device.

    Args:
        wanted: zoo name, checkpoint folder or hub id; "auto" takes the zoo's code-lm-small.

    Raises:
        PlanError: where it is no autoregressive model, or has other tokens.
        SubjectError: where it cannot be opened.
    """
    name = SMALL if wanted == AUTO else wanted
    if wanted == AUTO and not zoo.is_zoo_name(SMALL):
        raise PlanError(
            f"{technique}: {SMALL}, which guide='{AUTO}' stands for, is not here; train it first."
        )
    subject = open_subject(name, dtype=model.dtype, device=model.device)
    if subject.engine != "causal":
        raise PlanError(
            f"{technique}: {name} fills masks too; the guide must read from left to right. Name an "
            "autoregressive model."
        )
    if not _same_words(model, subject):
        raise PlanError(
            f"{technique}: {name} has another tokenizer than the model; name an autoregressive model with "
            f'the same one: {technique}(guide="folder"), or leave it out with {technique}(guided=False).'
        )
    return Companion(subject.model, name)


def _same_words(model: PreTrainedModel, second: Subject) -> bool:
    """Whether two models share their tokens, but for added ones that only one of them has (a mask)."""
    own, theirs = own_tokenizer(model), second.tokenizer
    if own is None or theirs is None:  # sizes are all there is; a mask at the end does not count
        form = masked_form(model)
        ours, others = (_vocab_size(m) for m in (model, second.model))
        return ours == others or (form is not None and form.mask_id == others == ours - 1)
    ours_, others_ = own.get_vocab(), theirs.get_vocab()
    added = own.get_added_vocab().keys() | theirs.get_added_vocab().keys()
    same_ids = all(ours_[word] == others_[word] for word in ours_.keys() & others_.keys())
    return same_ids and not (ours_.keys() ^ others_.keys()) - added


def _vocab_size(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True).vocab_size
