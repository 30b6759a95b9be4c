"""A tiny model trained for a few seconds, for what random weights cannot show."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hasten.preparation import Preparation
from hasten.subject import Subject
from tests.models import EOS, texts, tiny_model, tiny_tokenizer

LENGTH = 96
TRAINING = texts(64, seed=1)
HELD_OUT = texts(12, seed=2)  # other programs by the same rule


@cache
def trained_llama() -> PreTrainedModel:
    """Four layers that know the made-up programs of `tests.models.texts`. Leave its weights alone."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    model = tiny_model(
        **shape, initializer_range=0.05, max_position_embeddings=192, eos_token_id=None
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for ids in preparation(model).batches(length=LENGTH, batch=8, steps=120):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def preparation(model: PreTrainedModel, steps: int | None = None) -> Preparation:
    """What a technique gets to train on the made-up programs."""
    return Preparation(Subject(model, "trained_llama", tokenizer=tiny_tokenizer()), TRAINING, steps)


def held_out(batch: int, length: int) -> Tensor:
    """Unseen ids (batch, length) from the start of each program."""
    tokenizer = tiny_tokenizer()
    rows = [tokenizer(text)["input_ids"][:length] for text in HELD_OUT[:batch]]
    ids = torch.tensor(rows)
    assert (ids != EOS).all()
    return ids
