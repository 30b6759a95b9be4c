"""Samples next steps of a text, a few at once, from a forked call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.causal.controller.scorers import decoded
from hasten.causal.run import Run

FENCE = "```"
Watch = Callable[[Sequence[Run]], None]


@dataclass
class Step:
    """One sampled step.

    Attributes:
        tokens: (1, length) everything from the prompt, left padding included, to the step's end.
        log_probs: natural logarithm of the model's raw probability of each token of the step.
        is_last: the call's own rules stopped here (end of text, a stop string, the length).
        run: the call as it stands after the step, one row with caches of its own; None after the
            last one, or where caches are not kept.
    """

    tokens: Tensor
    log_probs: list[float]
    is_last: bool
    run: Run | None


@dataclass(frozen=True)
class Border:
    """Where a step ends: behind a text, after a number of tokens, or where the call stops.

    The text counts after something that is not blank, so that empty lines are no steps, and not
    inside a ``` block that the continuation opened.
    """

    text: str
    max_tokens: int

    def is_reached(self, run: Run, row: int, start: int) -> bool:
        """Whether the step that began at column `start` of a row is over."""
        stop = int(run.lengths[row])
        if bool(run.finished[row]) or stop - start >= self.max_tokens:
            return True
        if not self.text:
            return False
        if self.text not in decoded(run.tokenizer, run.tokens[row, start:stop].tolist()).lstrip():
            return False
        text = decoded(run.tokenizer, run.tokens[row, run.prompt_length : stop].tolist())
        return text.count(FENCE) % 2 == 0


def sample_steps(
    run: Run, num: int, border: Border, *, most: int, keep_caches: bool, watch: Watch
) -> list[Step]:
    """Sample `num` steps from a one-row call that has nothing pending, in the order of sampling.

    They run as one batch, which a row leaves at the end of its step. `run` itself stays as it is.

    Args:
        most: tokens that all steps together may have, `num` at least; the steps that are still
            going when the next pass would exceed it end where they are.
        watch: called with the forks alive at a time, so that their caches can be counted.
    """
    start = int(run.lengths[0])
    twin = run.fork(_rows(run, [0] * num))
    assert twin.last is not None
    twin.decide(None, twin.last)
    samples = list(range(num))  # which sample each row of the batch is
    log_probs: list[list[float]] = [[] for _ in samples]
    steps: dict[int, Step] = {}
    while True:
        most -= twin.batch
        for sample, value in zip(samples, _newest_log_probs(twin), strict=True):
            log_probs[sample].append(value)
        going = [row for row in range(twin.batch) if not border.is_reached(twin, row, start)]
        if len(going) > most:
            going = []
        for row in sorted(set(range(twin.batch)).difference(going)):
            steps[samples[row]] = _cut_out(twin, row, log_probs[samples[row]], keep_caches)
        watch([twin, *(step.run for step in steps.values() if step.run is not None)])
        if not going:
            return [steps[sample] for sample in range(num)]
        if len(going) < twin.batch:
            twin = twin.fork(_rows(run, going))
            samples = [samples[row] for row in going]
        twin.step()


def _cut_out(twin: Run, row: int, log_probs: list[float], keep_caches: bool) -> Step:
    is_last = bool(twin.finished[row])
    kept = twin.fork(_rows(twin, [row])) if keep_caches and not is_last else None
    return Step(
        twin.tokens[row : row + 1, : int(twin.lengths[row])].clone(), log_probs, is_last, kept
    )


def _rows(run: Run, rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.long, device=run.device)


def _newest_log_probs(run: Run) -> list[float]:
    assert run.last is not None
    newest = run.tokens.gather(1, run.lengths[:, None] - 1)
    return run.last.logits[:, 0].float().log_softmax(dim=-1).gather(1, newest)[:, 0].tolist()
