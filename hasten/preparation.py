"""What a technique gets when it trains or calibrates its parts: the model, text, and a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hasten.errors import HastenError
from hasten.plan import Plan
from hasten.subject import Subject
from hasten.technique import Parts, Technique

Tick = Callable[[int, int, str], None]
"""Called with (done, total, message) so that a progress bar can move."""


def _no_tick(done: int, total: int, message: str) -> None:
    """Progress that nobody watches."""


@dataclass
class Preparation:
    """Everything that `Technique.prepare` may use.

    Attributes:
        subject: the model (frozen: `prepare` must leave its weights as they are) and tokenizer.
        texts: documents to train or calibrate on; never held-out ones.
        steps: optimiser steps, or None for the technique's own default.
        seed: every random choice follows from it.
        tick: to be called after each step.
        prompts: what a Diffusers pipeline learns from: texts, or names or numbers of classes.
        arguments: further arguments of the pipeline's call, such as its size or guidance scale.
    """

    subject: Subject
    texts: list[str]
    steps: int | None = None
    seed: int = 0
    tick: Tick = field(default=_no_tick)
    prompts: list[Any] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)

    def draw(self, count: int, generator: torch.Generator) -> list[Any]:
        """So many prompts by chance, each as often as any other.

        Raises:
            HastenError: where no prompts were given.
        """
        if not self.prompts:
            raise HastenError(
                f"Preparing {self.subject.name} needs prompts; give prompts=[...] (or --text on the command "
                "line)."
            )
        rounds = -(-count // len(self.prompts))
        orders = [torch.randperm(len(self.prompts), generator=generator) for _ in range(rounds)]
        return [self.prompts[int(i)] for i in torch.cat(orders)[:count]]

    def stream(self) -> Tensor:
        """All texts as one stream of ids, (tokens,), an end-of-text token between documents."""
        tokenizer = self.subject.tokenizer
        if tokenizer is None:
            raise HastenError(
                f"{self.subject.name} has no tokenizer, and preparing needs one; give tokenizer=."
            )
        ids: list[int] = []
        for text in self.texts:
            ids += tokenizer(text, add_special_tokens=False)["input_ids"]
            if tokenizer.eos_token_id is not None:
                ids.append(int(tokenizer.eos_token_id))
        return torch.tensor(ids, dtype=torch.long)

    def batches(self, *, length: int, batch: int, steps: int) -> Iterator[Tensor]:
        """`steps` random crops of the stream, (batch, length) ids each; the same for a given seed."""
        stream = self.stream()
        if stream.numel() < length + 1:
            raise HastenError(
                f"Preparing needs at least {length + 1} tokens of text; {stream.numel()} were given."
            )
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(steps):
            starts = torch.randint(0, stream.numel() - length, (batch,), generator=generator)
            yield torch.stack([stream[s : s + length] for s in starts.tolist()]).to(
                self.subject.model.device
            )


def names_steps(technique: Technique) -> bool:
    """Whether a technique's parts hold for one number of sampler steps, which its knob `steps` says."""
    return technique.trained and "steps" in technique.part_knobs


def prepare(plan: Plan, preparation: Preparation) -> dict[str, Parts]:
    """Train what the plan's techniques need, whatever the engine; the weights stay as they are.

    Returns:
        The parts of each technique that needs some, by its name.
    """
    return {t.name: t.prepare(_suited(preparation, t)) for t in plan if t.trained}


def _suited(preparation: Preparation, technique: Technique) -> Preparation:
    """What a technique gets that says itself how many steps are made."""
    if not names_steps(technique):
        return preparation
    arguments = {k: v for k, v in preparation.arguments.items() if k != "num_inference_steps"}
    return replace(preparation, arguments=arguments)
