"""Masked models for tests: random ones, one that learnt a small language, and a look inside runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from hasten.masked.attention import undirected
from hasten.masked.engine import MaskedModel
from hasten.masked.run import Run
from hasten.masked.slots import Guess
from tests import models

MASK = models.VOCABULARY - 1
NEVER: dict[str, Any] = {"eos_token_id": -1}

PERIOD = 4  # of the small language: four letters, said again and again
LETTERS = 24


def filler(
    family: str = "llama",
    *,
    shifted: bool = False,
    sharp: float = 4.0,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """A random model that fills masks; `sharp` scales its logits, so that it is sure of some."""
    model = models.tiny_model(family, seed=seed, **overrides)
    model.config.is_causal = False
    model.config.mask_token_id = MASK
    model.config.shifted_logits = shifted
    with torch.no_grad():
        model.lm_head.weight *= sharp
    return model


def prompt(batch: int = 1, length: int = 12, *, seed: int = 0) -> Tensor:
    """Random ids (batch, length) without the mask."""
    return models.prompt(batch, length, seed=seed, vocabulary=MASK)


@dataclass
class Record:
    """What a run did: the text before and after each pass, and what the pass said."""

    run: Run
    before: list[Tensor] = field(default_factory=list)
    guesses: list[Guess] = field(default_factory=list)

    @property
    def after(self) -> list[Tensor]:
        assert self.run.trace is not None
        return self.run.trace


def record(
    fast: MaskedModel,
    ids: Tensor,
    new: int = 24,
    *,
    mask: Tensor | None = None,
    block: int | None = None,
    **arguments: Any,
) -> Record:
    """Generate `new` ids and note every pass."""
    run, _ = fast._generation(ids, mask, block, {"max_new_tokens": new, **NEVER, **arguments})
    run.trace = []
    noted = Record(run)
    look = run.look

    def note() -> Guess:
        noted.before.append(run.tokens.clone())
        noted.guesses.append(look())
        return noted.guesses[-1]

    run.look = note  # type: ignore[method-assign]
    fast._execute(run)
    return noted


def sentences(count: int, length: int, generator: torch.Generator) -> Tensor:
    """(count, length) ids of the small language."""
    words = torch.randint(1, 1 + LETTERS, (count, PERIOD), generator=generator)
    return words.repeat(1, -(-length // PERIOD))[:, :length]


@cache
def speaker(length: int = 32, steps: int = 300, rows: int = 32) -> PreTrainedModel:
    """A model that learnt the small language by filling masks and by reading; do not change it.

    It is also asked for the letters that it sees, so that it says something sensible of them.
    """
    with torch.random.fork_rng():
        model = filler(sharp=1.0, hidden_size=64, intermediate_size=128, initializer_range=0.05)
        generator = torch.Generator().manual_seed(1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
        for _ in range(steps):
            text = sentences(rows, length, generator)
            share = torch.rand((rows, 1), generator=generator).clamp(min=0.05)
            hidden = torch.rand(text.shape, generator=generator) < share
            with undirected(model):
                logits = model(input_ids=text.masked_fill(hidden, MASK), use_cache=False).logits
            loss = cross_entropy(logits[hidden], text[hidden])
            loss = loss + 0.5 * cross_entropy(logits[~hidden], text[~hidden])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def consistency(text: Tensor) -> float:
    """Share of letters that are what most of their places of the period say: 1 for a sentence."""
    folded = text[:, : text.shape[1] // PERIOD * PERIOD].unflatten(1, (-1, PERIOD))
    return float((folded == folded.mode(dim=1, keepdim=True).values).float().mean())
