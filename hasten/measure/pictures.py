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

    def html(self) -> str:
        """A strip of pictures for each plan; captions stand under the first."""
        strips = []
        for place, (name, pictures) in enumerate(self.of.items()):
            figures = "".join(
                f"<figure>{image(picture, words)}"
                + ("" if place else f"<figcaption>{escape(words)}</figcaption>")
                + "</figure>"
                for picture, words in zip(pictures, self.captions, strict=True)
            )
            strips.append(f'<h3>{escape(name)}</h3><div class="strip">{figures}</div>')
        return "".join(strips)


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
