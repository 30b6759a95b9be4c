"""What a language model itself writes after the beginnings of texts, as something to learn from.

A model that fills many masks at once cannot choose between continuations that are all likely: it
mixes them. What another model wrote greedily leaves less to choose (sequence-level distillation, Kim
and Rush 2016; Gu et al. 2018 found it decisive for writing in parallel).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel

from hasten.errors import HastenError
from hasten.home import atomic_write
from hasten.zoo.corpus import FileWindows

ROWS = 64  # written at once


class Continuations:
    """Texts of one length, each a prompt and what a model wrote after it.

    A batch is a pure function of its index, as that of `PackedTokens`.
    """

    def __init__(self, texts: Tensor, seed: int = 0) -> None:
        """`texts`: (texts, length + 1) ids."""
        self.texts = texts
        self._seed = seed
        self.num_tokens = texts.numel()

    def batch(self, index: int, rows: int, length: int) -> Tensor:
        """Batch number `index`: ids (rows, length + 1), int64, of texts of just that length.

        Raises:
            HastenError: for another length.
        """
        if length + 1 != self.texts.shape[1]:
            raise HastenError(
                f"the continuations have {self.texts.shape[1]} tokens; a stage of length {length} needs "
                f"{length + 1}"
            )
        found = []
        for row in range(index * rows, (index + 1) * rows):
            epoch, place = divmod(row, len(self.texts))
            found.append(self.texts[int(self._order(epoch)[place])])
        return torch.stack(found).long()

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        return torch.randperm(len(self.texts), generator=generator)


@torch.no_grad()
def write_continuations(
    model: PreTrainedModel,
    files: FileWindows,
    kept: Path,
    *,
    count: int,
    prompt: int,
    length: int,
    skip: int = 0,
    quiet: bool = False,
) -> Tensor:
    """Let a model continue passages greedily: ids (count, length + 1), beginning with the passage.

    Args:
        kept: where they are kept for a run that resumes; read instead where it is there.
        prompt: tokens of each passage.
        skip: passages to leave out, at the beginning; a multiple of `ROWS`.
        quiet: draws no bar on standard error.
    """
    if kept.is_file():
        texts = load_file(kept)["texts"]
        if texts.shape == (count, length + 1):
            return texts
    parts: list[Tensor] = []
    console = Console(stderr=True, quiet=quiet)
    assert skip % ROWS == 0
    indices = range(skip // ROWS, -(-(skip + count) // ROWS))
    for index in track(indices, "writing texts", console=console, disable=quiet):
        passages = files.batch(index, ROWS, prompt)[:, :prompt].to(model.device)
        new = length + 1 - prompt
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        out: Any = model.generate(passages, **settings)  # type: ignore[operator]
        parts.append(out.to(torch.int32).cpu())
    texts = torch.cat(parts)[:count].contiguous()
    atomic_write(kept, save({"texts": texts}))
    return texts
