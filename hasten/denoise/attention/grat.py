"""GRAT: tokens are grouped into cells, and the queries of a cell read the same few cells.

"Grouping First, Attending Smartly: Training-Free Acceleration for Diffusion Transformers" (arXiv
2505.14687), after the reference code. Positions are applied before tokens are put in the order of
their cells. A cell reads the cells of its row and of its column, and of its frames in a clip, or those
around it. The text is read by all and reads all.

Ours: cells that the grid does not fill are padded; along an axis that is not cut into cells nothing
is compared, or every cell would read every other one in a picture, which has one frame. The reference
code uses a compiled block mask; here each cell gathers the cells that it reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hasten.denoise.attention.patterns import PATTERNS, Patterned, visible
from hasten.technique import (
    Card,
    Claim,
    Contract,
    Loss,
    Phase,
    Resource,
    Rival,
    Slot,
    knob,
    technique,
)


@technique("grat")
@dataclass(frozen=True, kw_only=True)
class Grat(Patterned):
    """Lets the queries of a cell of tokens read a cross of cells, or the cells around it."""

    card: ClassVar[Card] = Card(
        title=(
            "Grouping First, Attending Smartly: Training-Free Acceleration for Diffusion Transformers"
        ),
        paper="grat",
        family="diffusion",
        loss=Loss.LOSSY,
        link="https://arxiv.org/abs/2505.14687",
        year=2025,
        claims=(
            Claim(
                "attention speed-up", 35.8, "FLUX, 8192 x 8192 pictures, one A100, full attention"
            ),
        ),
        neutral={"pattern": "surrounding", "radius": 1000},
        rival=Rival(
            "random_key_blocks(cell={cell}, cell_frames={cell_frames}, pattern={pattern}, "
            "radius={radius}, dense_steps={dense_steps})",
            "psnr",
            "each cell reads as many cells, drawn by chance",
        ),
        saves="attention",
        notes=(
            "A gain in time needs attention to be a large share of it, so many tokens. Where a sample has "
            "no more than a few cells, all are read and nothing changes. Linear attention, as in Sana, "
            "is left as it is."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.ATTENTION,), needs=frozenset({Resource.TOKEN_SET}), phase=Phase.PASS
    )

    cell: int = knob(8, "tokens of a cell's side; smaller reads less and gathers more", low=1)
    cell_frames: int = knob(4, "frames of tokens of a cell, in clips", low=1)
    pattern: str = knob(
        "criss_cross",
        "which cells are read: those of the same row, column or frames; those around",
        choices=PATTERNS,
    )
    radius: int = knob(1, "how many cells away, of those around; higher reads more", low=0)
    dense_steps: int = knob(0, "steps of 50 at the start that read everything", low=0, high=50)

    def seen(self, places: Tensor) -> Tensor:
        """See `Patterned.seen`."""
        return visible(places, self.pattern, self.radius)
