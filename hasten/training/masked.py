"""The objective of masked diffusion: predict the tokens that random masks hide, all at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from hasten.masked.attention import undirected
from hasten.training.slots import LossTerm, Step

RATIOS = (0.15, 0.5, 0.85)  # at which a model is judged
BLOCKS = (16, 32, 64, 128)  # lengths in which continuations are written


def mask_at(ids: Tensor, ratio: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """Hide each token with its row's chance; at least one of each row and never the first.

    The first token stays because a model whose state at i predicts token i + 1 cannot say it.

    Args:
        ids: (rows, length), length of 2 or more.
        ratio: (rows,) chance of each token.

    Returns:
        What the model reads (rows, length), and True where it has to predict.
    """
    draws = torch.rand(ids.shape, device=ids.device)
    draws[:, 0] = 2.0
    wanted = draws <= torch.maximum(ratio[:, None], draws.min(dim=1, keepdim=True).values)
    return ids.masked_fill(wanted, mask_id), wanted


def mask_in_blocks(ids: Tensor, prompt: int, mask_id: int) -> tuple[Tensor, Tensor]:
    """Hide what is hidden while a continuation is written block by block.

    For each row a length of blocks is drawn, and one of them: what stands before it is there, some
    of its tokens are, at a ratio drawn evenly, and nothing behind it is. Only its own tokens are to
    be predicted.

    Args:
        ids: (rows, prompt + continuation).

    Returns:
        As `mask_at`.
    """
    rows, new = ids.shape[0], ids.shape[1] - prompt
    lengths = torch.tensor([n for n in BLOCKS if n <= new] or [new], device=ids.device)
    length = lengths[torch.randint(len(lengths), (rows, 1), device=ids.device)]
    count = (new + length - 1) // length
    first = prompt + length * (torch.rand(rows, 1, device=ids.device) * count).long()
    places = torch.arange(ids.shape[1], device=ids.device)
    inside = (places >= first) & (places < first + length)
    draws = torch.rand(ids.shape, device=ids.device).masked_fill(~inside, 2.0)
    ratio = torch.rand(rows, 1, device=ids.device)
    wanted = draws <= torch.maximum(ratio, draws.min(dim=1, keepdim=True).values)
    return ids.masked_fill(wanted | (places >= first + length), mask_id), wanted


class MaskedLoss:
    """`loss_fn` of `training.loop.fit`: masked cross-entropy, and the terms of techniques.

    Each row is masked at its own ratio, drawn evenly from 0 to 1. The model sees both ways; its
    state at position i predicts token i + 1, as it did when it was autoregressive.

    Args:
        prompt: tokens that each row begins with and that are never hidden; the rest is hidden as in
            writing block by block. 0 hides anywhere.
        block_length: the model sees its own block of so many tokens and those before; None sees all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mask_id: int,
        terms: Sequence[LossTerm] = (),
        *,
        prompt: int = 0,
        block_length: int | None = None,
    ) -> None:
        self.mask_id = mask_id
        self.prompt = prompt
        self.block_length = block_length
        self.terms = [(term, term.begin(model)) for term in terms]

    def __call__(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        """`batch` (rows, length + 1); the last token is left out."""
        ids = batch[:, :-1]
        if self.prompt:
            inputs, wanted = mask_in_blocks(ids, self.prompt, self.mask_id)
        else:
            ratio = torch.rand(ids.shape[0], device=ids.device)
            inputs, wanted = mask_at(ids, ratio, self.mask_id)
        assert isinstance(model, PreTrainedModel)
        loss, hidden = masked_loss(
            model, ids, inputs, wanted, hidden=bool(self.terms), block_length=self.block_length
        )
        step = Step(ids, inputs, wanted, hidden)
        total = loss
        for term, state in self.terms:
            total = total + term.term(state, step)
        return total, {}


@torch.no_grad()
def masked_quality(
    model: nn.Module,
    ids: Tensor,
    mask_id: int,
    *,
    ratios: Sequence[float] = RATIOS,
    block_length: int | None = None,
) -> dict[str, float]:
    """Masked cross-entropy in nats at fixed ratios, with masks that are the same each time.

    Args:
        ids: (rows, length).
        block_length: as `MaskedLoss`.

    Returns:
        "masked_loss_15" and so on for each ratio in percent, and "masked_loss", their mean.
    """
    assert isinstance(model, PreTrainedModel)
    found = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for ratio in ratios:
            inputs, wanted = mask_at(ids, torch.full((ids.shape[0],), ratio), mask_id)
            losses = [
                float(
                    masked_loss(
                        model,
                        *(part.to(model.device) for part in batch),
                        block_length=block_length,
                    )[0]
                )
                for batch in zip(ids.split(16), inputs.split(16), wanted.split(16), strict=True)
            ]
            found[f"masked_loss_{round(100 * ratio)}"] = sum(losses) / len(losses)
    return {"masked_loss": sum(found.values()) / len(found), **found}


def masked_loss(
    model: PreTrainedModel,
    ids: Tensor,
    inputs: Tensor,
    wanted: Tensor,
    *,
    hidden: bool = False,
    block_length: int | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Mean cross-entropy of the wanted tokens in nats, and the states of all layers if asked for.

    Args:
        ids, inputs, wanted: as `training.slots.Step`.
        block_length: as `MaskedLoss`.
    """
    visible = None
    if block_length is not None:
        block = torch.arange(ids.shape[1], device=ids.device) // block_length
        visible = (block <= block[:, None])[None, None]
    with undirected(model, visible):
        output = model.base_model(input_ids=inputs, output_hidden_states=hidden, use_cache=False)
    place = wanted[:, 1:]
    # Only the states that are needed go through the large output layer.
    states = output.last_hidden_state[:, :-1][place]
    logits = model.get_output_embeddings()(states)  # type: ignore[misc]
    return cross_entropy(logits.float(), ids[:, 1:][place]), output.hidden_states or ()
