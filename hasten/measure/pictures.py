"""Pictures of several plans side by side, as a piece of a page that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SIDE = 128  # pixels that a small picture is drawn at, at least
MOST_FRAMES = 4  # of a clip, one beside the other


@dataclass(frozen=True)
class Samples:
    """What each plan made of the same noise.

    Attributes:
        captions: what each picture should show.
        of: by plan, (pictures, [frames,] height, width, 3) values from 0 to 1.
    """

    captions: Sequence[str]
    of: Mapping[str, Array]

    def html(self, notes: Mapping[str, str] | None = None) -> str:
        """A grid: a row for each plan, a column for each caption.

        Args:
            notes: what stands under a plan's name, such as its speed and its quality.
        """
        cells = ['<div class="who"></div>']
        cells += [f'<div class="caption">{escape(words)}</div>' for words in self.captions]
        for name, pictures in self.of.items():
            note = (notes or {}).get(name, "")
            said = f"<span>{escape(note)}</span>" if note else ""
            # A long plan is broken where it may be, and not in the middle of a word.
            shown = escape(name).replace("(", "(<wbr>").replace("=", "=<wbr>")
            cells.append(f'<div class="who"><b>{shown}</b>{said}</div>')
            cells += [
                image(picture, f"{name}: {words}")
                for picture, words in zip(pictures, self.captions, strict=True)
            ]
        columns = len(self.captions)
        return f'<div class="samples" style="--columns: {columns}">{"".join(cells)}</div>'


def image(picture: Array, words: str) -> str:
    """An image element that holds a picture (height, width, 3), or frames of a clip in a row."""
    from PIL import Image

    if picture.ndim == 4:
        chosen = np.linspace(0, len(picture) - 1, min(len(picture), MOST_FRAMES)).round()
        picture = np.concatenate([picture[int(number)] for number in chosen], axis=1)
    pixels = (picture.clip(0, 1) * 255).round().astype(np.uint8)
    drawn: Any = Image.fromarray(pixels)
    times = max(1, -(-SIDE // drawn.height))
    held = BytesIO()
    drawn.save(held, format="PNG", optimize=True)
    text = base64.b64encode(held.getvalue()).decode("ascii")
    return (
        f'<img alt="{escape(words)}" width="{times * drawn.width}" height="{times * drawn.height}" '
        f'src="data:image/png;base64,{text}">'
    )
