"""How much likelihood of held-out code a plan loses on a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

import hasten
from hasten.measure.parsing import parses
from hasten.subject import Subject, open_subject
from hasten.zoo.corpus import shipped_held_out

MODEL = "code-lm-small"
PROMPT = 256
CONTINUATION = 48
ITEMS = 24


@dataclass
class Losses:
    """Mean negative log-likelihood (items,) of the same continuations under several plans."""

    of: dict[str, Tensor]

    def surely_less(self, plan: str, rival: str) -> bool:
        """Whether a plan loses less than its rival by more than two standard errors, item by item."""
        return self.advantage(plan, rival) > 2.0

    def advantage(self, plan: str, rival: str) -> float:
        """Mean paired difference in standard errors."""
        difference = self.of[rival] - self.of[plan]
        return float(difference.mean() / (difference.std() / len(difference) ** 0.5))


@cache
def subject() -> Subject:
    """The trained model, opened once."""
    return open_subject(MODEL)


@cache
def items() -> Tensor:
    """(items, PROMPT + CONTINUATION) ids from different places of held-out files."""
    length = PROMPT + CONTINUATION
    tokenizer = subject().tokenizer
    assert tokenizer is not None
    found = []
    for file in sorted(shipped_held_out(), key=lambda file: file.path):
        ids = torch.tensor(
            tokenizer(file.text, add_special_tokens=False, verbose=False)["input_ids"]
        )
        found += [ids[start : start + length] for start in range(0, len(ids) - length, 3 * length)]
    places = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:ITEMS]
    return torch.stack([found[place] for place in places.tolist()])


@cache
def function_beginnings(count: int) -> list[str]:
    """Beginnings of top-level functions in held-out files, right as far as they go."""
    found: list[str] = []
    for file in sorted(shipped_held_out(), key=lambda file: file.path):
        for start in range(0, len(file.text), 1500):
            at = file.text.find("\ndef ", start)
            piece = file.text[at + 1 : at + 401]
            piece = piece[: piece.rfind("\n")]
            judged = at >= 0 and parses(piece + "\nx\n", prompt_chars=len(piece)) is not None
            if judged and piece not in found:
                found.append(piece)
    return found[:: len(found) // count][:count]


@cache
def loss(plan: str) -> Tensor:
    """Negative log-likelihood (items,) under a plan, in one batch: rows do not depend on each other."""
    with hasten.apply(subject(), plan) as fast:
        return fast.score(items()[:, :PROMPT], items()[:, PROMPT:]).nll.double().mean(dim=1)


def losses(*plans: str) -> Losses:
    """Score all items under each plan."""
    return Losses({plan: loss(plan) for plan in plans})
