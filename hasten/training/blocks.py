"""The objective of block diffusion: write blocks from left to right, and each block in any order.

What a model reads while it writes a block is the finished text before it, the block with some places
open, and nothing behind. So one text gives as many cases as it has blocks. They are laid out in one
sequence: the text itself, and then for every block a *branch*, which holds that block partly masked
and the blocks after it as masks only. A branch sees the text before its block and itself, so the text
is computed once for all of its branches.

Source: Block Diffusion (arXiv 2503.09573), whose sequence holds each noisy block once. Inferred: the
blocks after it, which teach the model to guess ahead of the block in hand, as drafts need.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from hasten.errors import HastenError
from hasten.masked.attention import undirected


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a text and of its branches stand in one sequence of `rows`.

    Attributes:
        places: (rows,) the place in the text that each row is about.
        branch: (rows,) the branch that each row belongs to; -1 for the text itself.
        ahead: (rows,) how many blocks behind its branch's own block a row is; 0 in the text.
        source: (rows,) the row whose output predicts this one: that of the place before.
        visible: (rows, rows) bool, True where a row may look.
    """

    places: Tensor
    branch: Tensor
    ahead: Tensor
    source: Tensor
    visible: Tensor

    @classmethod
    def of(cls, length: int, prompt: int, block_length: int, ahead: int) -> Layout:
        """The layout of texts of one length.

        Args:
            length: tokens of a text.
            prompt: tokens at its beginning that have no branches; at least one block.
            ahead: blocks of masks behind the block of each branch.

        Raises:
            HastenError: where blocks do not fill the prompt and the text.
        """
        if length % block_length or prompt % block_length or not 0 < prompt < length:
            raise HastenError(
                f"a text of {length} tokens with a prompt of {prompt} cannot be cut into blocks of "
                f"{block_length}; give multiples of it, and a prompt that is shorter than the text"
            )
        places = [torch.arange(length)]
        branch = [torch.full((length,), -1)]
        for number, first in enumerate(range(prompt, length, block_length)):
            end = min(first + (1 + ahead) * block_length, length)
            places.append(torch.arange(first, end))
            branch.append(torch.full((end - first,), number))
        place, of = torch.cat(places), torch.cat(branch)
        block, own = place // block_length, prompt // block_length + of
        text = of < 0
        # The place before a branch's first one is in the text.
        source = torch.arange(len(place)) - 1
        first_rows = ~text & (place == own * block_length)
        source[first_rows] = place[first_rows] - 1
        looks_at_text = text & (block <= torch.where(text, block, own - 1)[:, None])
        looks_at_branch = ~text & (of == of[:, None]) & (block <= block[:, None])
        return cls(
            place, of, torch.where(text, 0, block - own), source, looks_at_text | looks_at_branch
        )


class BlockLoss:
    """`loss_fn` of `training.loop.fit`: the cross-entropy of what is hidden in all branches.

    In each branch the tokens of its block are hidden at a ratio of their own, drawn evenly from 0 to
    1, and all of those behind. The state at a place predicts the next one, as in `MaskedLoss`.

    Args:
        prompt, block_length, ahead: as `Layout.of`.
        fading: weight of a block of masks beside that of the block before it.
    """

    def __init__(
        self, mask_id: int, *, prompt: int, block_length: int, ahead: int, fading: float = 0.6
    ) -> None:
        self.mask_id = mask_id
        self.prompt = prompt
        self.block_length = block_length
        self.ahead = ahead
        self.fading = fading
        self._layouts: dict[int, Layout] = {}

    def layout(self, length: int) -> Layout:
        """The layout of texts of that length, made once."""
        if length not in self._layouts:
            self._layouts[length] = Layout.of(length, self.prompt, self.block_length, self.ahead)
        return self._layouts[length]

    def hide(self, ids: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """What the model reads (rows, layout rows), and True where it has to predict.

        Args:
            ids: (rows, length).
        """
        num_branches = int(layout.branch.max()) + 1
        draws = torch.rand(ids.shape[0], len(layout.places))
        ratio = torch.rand(ids.shape[0], num_branches)[:, layout.branch.clamp(min=0)]
        hidden = (layout.ahead > 0) | ((layout.branch >= 0) & (draws <= ratio))
        hidden = hidden.to(ids.device)
        return ids[:, layout.places].masked_fill(hidden, self.mask_id), hidden

    def __call__(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        """`batch` (rows, length + 1); the last token is left out."""
        assert isinstance(model, PreTrainedModel)
        ids = batch[:, :-1]
        layout = self.layout(ids.shape[1])
        inputs, wanted = self.hide(ids, layout)
        with undirected(model, layout.visible.to(ids.device)[None, None]):
            states = model.base_model(
                input_ids=inputs,
                position_ids=layout.places.to(ids.device)[None].expand_as(inputs),
                use_cache=False,
            ).last_hidden_state
        states = states[:, layout.source][wanted]
        logits = model.get_output_embeddings()(states).float()  # type: ignore[misc]
        losses = cross_entropy(logits, ids[:, layout.places][wanted], reduction="none")
        weights = (self.fading**layout.ahead).to(ids.device).expand_as(wanted)[wanted]
        return (weights * losses).sum() / weights.sum(), {}
