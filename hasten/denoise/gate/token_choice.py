"""Blocks that run on some of the tokens and keep what they made of the others before."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.denoise.blocks import BlockCall
from hasten.denoise.layout import Layout
from hasten.denoise.run import Run
from hasten.denoise.state.tokens import Subset

CELL = 3
"""One token of each cell of so many by so many is computed at every step, chosen by chance."""


class TokenCache:
    """Which tokens a step computes, and what each block made of all of them.

    Args:
        name: of the technique, for its counters.
        interval: so many steps after the blocks made all tokens, they make all of them again.
        share: so much of the tokens may ask for their computation, at most.
    """

    def __init__(self, name: str, interval: int, share: float) -> None:
        self.name = name
        self.interval = interval
        self.made: dict[tuple[int, int], Tensor] = {}
        self.score: Tensor | None = None  # of each place of the sample, (1, ...)
        self.share = share
        self.luck = torch.Generator()
        self.kept: dict[int, Tensor | None] = {}  # for each number of tokens that blocks see
        self.records = self.prunes = False
        self.last_skip: int | None = None

    def choose(self, score: Tensor, luck: torch.Generator) -> None:
        """Tokens whose score is not below zero are computed at the next step, the highest first.

        Args:
            score: (batch, ...) of each value of the sample, in its shape.
        """
        self.score, self.luck = score.mean(dim=0, keepdim=True), luck

    def begin_step(self, run: Run, inside: range) -> None:
        """A step that runs: whether blocks see all tokens, and whether what they make is kept."""
        self.kept = {}
        self.records = self.share > 0.0 and run.index in inside
        since = inside.start if self.last_skip is None else self.last_skip + 1
        whole = (run.index - since) % self.interval == 0
        self.prunes = self.records and not whole and self.score is not None

    def skipped(self, index: int) -> None:
        """A step that did not run."""
        self.last_skip, self.score = index, None

    def block(self, run: Run, call: BlockCall) -> Any:
        """The block's output: of the chosen tokens now, of the others as it was before."""
        if not self.records:
            return call.compute()
        key, tokens = (call.branch, call.index), call.hidden.shape[1]
        before = self.made.get(key)
        kept = self._kept(run, tokens) if self.prunes else None
        if kept is None or before is None or before.shape != call.hidden.shape:
            output = call.compute()
            self.made[key] = call.parts(output)[0]
            return output
        shorten(call, kept)
        hidden, text = call.parts(call.compute())
        whole = before.index_copy(1, kept, hidden)
        self.made[key] = whole
        return call.output(whole, text)

    def _kept(self, run: Run, tokens: int) -> Tensor | None:
        """(kept,) tokens that are computed; None where the sample has not so many places."""
        if tokens not in self.kept:
            assert self.score is not None
            score = _of_tokens(self.score, run.layout, tokens)
            if score is None:
                self.kept[tokens] = None
            else:
                chosen = _one_of_each_cell(run.layout.grid(tokens), tokens, self.luck)
                wanted = score.topk(round(self.share * tokens)).indices
                chosen[wanted[score[wanted] >= 0.0].cpu()] = True
                self.kept[tokens] = chosen.nonzero()[:, 0].to(score.device)
                run.activity[f"{self.name}.tokens_kept"] += int(chosen.sum())
                run.activity[f"{self.name}.tokens_left_out"] += int((~chosen).sum())
        return self.kept[tokens]


def shorten(call: BlockCall, kept: Tensor) -> None:
    """Leave all tokens but some out of what a block is given: positions and masks as well."""
    whole = torch.arange(call.hidden.shape[1])
    call.hidden = call.hidden.index_select(1, kept.to(call.hidden.device))
    Subset(kept, whole).cut_arguments(call)


def _of_tokens(score: Tensor, layout: Layout, tokens: int) -> Tensor | None:
    """(tokens,) the mean over each token's place, of a (1, ...) score of each value."""
    if score.ndim == 3:  # already cut into tokens
        return score.mean(dim=-1)[0] if score.shape[1] == tokens else None
    for size in layout.sizes:
        grid = Layout((size,), layout.patch).grid(tokens)
        if grid is None:
            continue
        axis = 1 if score.ndim == 4 or tuple(score.shape[2:]) == size else 2
        places = score.mean(dim=axis).reshape(1, 1, *size)
        return F.adaptive_avg_pool3d(places, grid).flatten()
    return None


def _one_of_each_cell(
    grid: tuple[int, int, int] | None, tokens: int, luck: torch.Generator
) -> Tensor:
    """(tokens,) True for one token of each cell of a grid, chosen by chance."""
    if grid is None:
        return torch.rand(tokens, generator=luck) < 1 / CELL**2
    frames, height, width = grid
    rows, columns = -(-height // CELL), -(-width // CELL)
    chosen = torch.zeros(frames, height, width, dtype=torch.bool)
    frame, row, column = torch.meshgrid(
        torch.arange(frames), torch.arange(rows), torch.arange(columns), indexing="ij"
    )
    down = torch.randint(CELL, row.shape, generator=luck)
    right = torch.randint(CELL, row.shape, generator=luck)
    row = (row * CELL + down).clamp(max=height - 1)
    column = (column * CELL + right).clamp(max=width - 1)
    chosen[frame, row, column] = True
    return chosen.flatten()
