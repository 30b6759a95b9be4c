"""What a benchmark runs on: prompts to time, passages to score, names to retrieve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hasten.errors import HastenError
from hasten.measure.retrieval import RetrievalItem, retrieval_items
from hasten.subject import Subject
from hasten.zoo.corpus import shipped_held_out

NUM_PROMPTS = 4
NUM_PASSAGES = 16
NUM_RETRIEVALS = 24
PROMPT_TOKENS = 512
PASSAGE_TOKENS = 64  # scored after each passage's prompt
RETRIEVAL_CHARS = 1200  # a name lies at least so far back


@dataclass(frozen=True)
class Passage:
    """A prompt and what really followed it: ids (1, length) each, and the continuation's bytes."""

    prompt: Tensor
    continuation: Tensor
    num_bytes: int


@dataclass
class Workload:
    """Everything that every plan of one benchmark is run on.

    Attributes:
        prompts: (1, length) ids, timed.
        max_new_tokens: tokens generated after each prompt.
        passages: held-out text to score; empty where the subject has no tokenizer.
        retrievals: names defined far back that the continuation must recall.
        source: where the text is from, in words.
    """

    prompts: list[Tensor]
    max_new_tokens: int
    passages: list[Passage] = field(default_factory=list)
    retrievals: list[RetrievalItem] = field(default_factory=list)
    source: str = ""


def make_workload(
    subject: Subject,
    *,
    prompts: Sequence[str] | None,
    max_new_tokens: int,
    seed: int,
    quality: bool,
    prompt_tokens: int = PROMPT_TOKENS,
) -> Workload:
    """Choose prompts and passages for a subject; the same for a given seed.

    Text is Python source that no zoo model was trained on. A subject without a tokenizer gets
    random ids, which can be timed and compared but not judged.
    """
    context = subject.context or 4096
    room = context - max_new_tokens
    if room < 1:
        raise HastenError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt in the {context} tokens "
            f"that {subject.name} was made for; give fewer."
        )
    if subject.tokenizer is None:
        if prompts:
            raise HastenError(f"{subject.name} has no tokenizer, so it cannot read a text prompt.")
        return _random_workload(subject, min(prompt_tokens, room), max_new_tokens, seed)
    texts = [file.text for file in shipped_held_out()]
    documents = [_ids(subject, text) for text in texts]
    generator = torch.Generator().manual_seed(seed)
    work = Workload([], max_new_tokens, source="Python standard library, held-out files")
    if prompts:
        work.prompts = [_prompt(subject, text, room) for text in prompts]
        work.source = "prompts as given"
    else:
        length = min(prompt_tokens, room)
        work.prompts = [
            _crop(d, length, generator) for d in _longest(documents, NUM_PROMPTS, generator)
        ]
    if quality:
        work.passages = _passages(subject, documents, context, generator)
        fits = (context - 24) * 2  # two characters a token is a careful guess for code
        work.retrievals = retrieval_items(
            texts,
            count=NUM_RETRIEVALS,
            min_distance_chars=min(RETRIEVAL_CHARS, fits // 2),
            seed=seed,
            max_prompt_chars=min(fits, 4 * RETRIEVAL_CHARS),
        )
    return work


def crops(subject: Subject, count: int, length: int, seed: int) -> list[Tensor]:
    """(1, length) ids of held-out text each, from different files as far as there are."""
    generator = torch.Generator().manual_seed(seed)
    documents = [_ids(subject, file.text) for file in shipped_held_out()]
    long = [document for document in documents if document.numel() >= length]
    return [
        _crop(document, length, generator).to(subject.model.device)
        for document in _longest(long, count, generator)
    ]


def _ids(subject: Subject, text: str) -> Tensor:
    assert subject.tokenizer is not None
    ids = subject.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def _prompt(subject: Subject, text: str, room: int) -> Tensor:
    ids = _ids(subject, text)
    if ids.numel() == 0:
        raise HastenError("A prompt is empty; give at least one token.")
    if ids.numel() > room:
        raise HastenError(
            f"A prompt has {ids.numel()} tokens; with the new ones, {room} fit into {subject.name}."
        )
    return ids[None].to(subject.model.device)


def _random_workload(subject: Subject, length: int, max_new_tokens: int, seed: int) -> Workload:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = subject.model.config.get_text_config(decoder=True).vocab_size
    rows = torch.randint(0, vocabulary, (NUM_PROMPTS, length), generator=generator)
    if subject.form is not None:  # a prompt holds no mask
        rows[rows == subject.form.mask_id] = 0 if subject.form.mask_id else 1
    prompts = [row[None].to(subject.model.device) for row in rows]
    return Workload(prompts, max_new_tokens, source="random ids (the subject has no tokenizer)")


def _longest(documents: list[Tensor], count: int, generator: torch.Generator) -> list[Tensor]:
    """`count` documents, long ones first, repeated where there are too few."""
    ranked = sorted(documents, key=lambda ids: -ids.numel())
    pool = ranked[: max(count, len(ranked) // 2)]
    order = torch.randperm(len(pool), generator=generator).tolist()
    return [pool[order[i % len(order)]] for i in range(count)]


def _crop(document: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """(1, length) ids from somewhere in a document (all of it where it is shorter)."""
    spare = document.numel() - length
    start = int(torch.randint(0, spare + 1, (1,), generator=generator)) if spare > 0 else 0
    return document[None, start : start + length]


def _passages(
    subject: Subject, documents: list[Tensor], context: int, generator: torch.Generator
) -> list[Passage]:
    assert subject.tokenizer is not None
    device = subject.model.device
    length = min(2 * PROMPT_TOKENS, context - PASSAGE_TOKENS)
    found = []
    for document in _longest(documents, NUM_PASSAGES, generator):
        ids = _crop(document, length + PASSAGE_TOKENS, generator).to(device)
        if ids.shape[1] < PASSAGE_TOKENS + 8:
            continue
        continuation = ids[:, -PASSAGE_TOKENS:]
        text = str(subject.tokenizer.decode(continuation[0]))
        found.append(Passage(ids[:, :-PASSAGE_TOKENS], continuation, max(1, len(text.encode()))))
    return found
