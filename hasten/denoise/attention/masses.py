"""How much of the softmax each block of keys gets from each block of queries."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.denoise.attention.sparse import Cells, Sequences

HELD = 2**20  # scores at a time; they should fit a processor's cache


@dataclass(frozen=True)
class Masses:
    """What a search finds.

    Attributes:
        blocks: (items, query blocks, key blocks) softmax mass, summed over the queries of a block.
        text: (items, query blocks) that of the text.
        lse: (items, query blocks, size) log of the sum of a query's exponentiated scores.
        output: (items, query blocks, size, head_dim) the attention itself, where the pass made it too.
    """

    blocks: Tensor
    text: Tensor
    lse: Tensor
    output: Tensor | None = None


def search(parts: Sequences, cells: Cells, lse: Tensor | None = None) -> Masses:
    """Softmax mass block by block.

    Without `lse` it is found first, and the masses are exact: those of a query sum to 1. With that of
    an earlier step one pass makes masses and output together: the output is exact, whatever `lse` is,
    and the masses of each query are scaled by how far `lse` is off.

    Args:
        parts: an attention call, taken apart.
        lse: (items, query blocks, size) of an earlier step.
    """
    items, blocks, size, _ = parts.query.shape
    keys = torch.cat([parts.key.flatten(1, 2), parts.text_key], dim=1).float()
    step = max(1, HELD // max(1, items * size * keys.shape[1]))
    found = [
        _search(
            parts,
            cells,
            keys,
            slice(at, at + step),
            None if lse is None else lse[:, at : at + step],
        )
        for at in range(0, blocks, step)
    ]
    outputs = [one.output for one in found if one.output is not None]
    return Masses(
        torch.cat([one.blocks for one in found], dim=1),
        torch.cat([one.text for one in found], dim=1),
        torch.cat([one.lse for one in found], dim=1),
        torch.cat(outputs, dim=1) if outputs else None,
    )


def _search(
    parts: Sequences, cells: Cells, keys: Tensor, rows: slice, lse: Tensor | None
) -> Masses:
    query = parts.query[:, rows].float()
    scores = query.flatten(1, 2) @ keys.transpose(1, 2) * parts.scale
    bias = _bias(parts)
    scores = scores if bias is None else scores + bias[:, None]
    scores = scores.unflatten(1, query.shape[1:3])
    fused = lse is not None
    exact = scores.logsumexp(dim=-1) if lse is None else lse
    chance = (scores - exact[..., None]).exp()
    sums = chance.sum(dim=-1, keepdim=True)
    if fused and not bool(((sums > 0) & (sums < math.inf)).all()):
        # So far off that numbers ran over: as without it, but with the output.
        exact = scores.logsumexp(dim=-1)
        chance = (scores - exact[..., None]).exp()
        sums = chance.sum(dim=-1, keepdim=True)
    output = None
    if fused:
        values = torch.cat([parts.value.flatten(1, 2), parts.text_value], dim=1).float()
        output = (chance.flatten(1, 2) @ values).unflatten(1, query.shape[1:3]) / sums
        output = output.to(parts.query.dtype)
    if cells.valid is not None:
        chance = chance * cells.valid[rows][..., None]
    summed = chance.sum(dim=2)
    own = parts.key.shape[1] * parts.key.shape[2]
    blocks = summed[..., :own].unflatten(-1, parts.key.shape[1:3]).sum(dim=-1)
    return Masses(blocks, summed[..., own:].sum(dim=-1), exact, output)


def _bias(parts: Sequences) -> Tensor | None:
    """(items, keys) what is added to the scores of each key, the text's behind the sample's."""
    if parts.bias is None:
        return None
    text = parts.text_bias
    if text is None:
        text = parts.bias.new_zeros(parts.text_key.shape[:2])
    return torch.cat([parts.bias.flatten(1, 2), text], dim=1).float()


def pooled(parts: Sequences, cells: Cells) -> Tensor:
    """(items, query blocks, key blocks) an estimate of the masses, by the mean query and key of blocks."""

    def mean(tensor: Tensor) -> Tensor:
        if cells.valid is None:
            return tensor.float().mean(dim=2)
        weights = cells.valid[..., None].float()
        return (tensor.float() * weights).sum(dim=2) / weights.sum(dim=1)

    scores = mean(parts.query) @ mean(parts.key).transpose(1, 2) * parts.scale
    return scores.softmax(dim=-1)


def best_blocks(masses: Tensor, count: int) -> Tensor:
    """(items, query blocks, count) key blocks by falling mass; a query block's own comes first."""
    ranked = masses.clone()
    own = torch.arange(masses.shape[1], device=masses.device)
    ranked[:, own, own] = math.inf
    return ranked.topk(count, dim=-1).indices


def recall(masses: Masses, count: int, cells: Cells) -> Tensor:
    """(items,) share of the softmax that the best `count` blocks of each row and the text get."""
    kept = masses.blocks.gather(-1, best_blocks(masses.blocks, count)).sum(dim=-1) + masses.text
    queries = cells.size if cells.valid is None else cells.valid.sum(dim=1).to(kept.device)
    return (kept / queries).mean(dim=-1)


def budgets(recalls: Tensor, count: int, blocks: int) -> Tensor:
    """(batch, heads) how many blocks each head keeps, `count` on average over the heads.

    The half of the heads that lose least keep half as many less as could be left out or kept, and the
    other half as many more; of an odd number of heads the middle one keeps `count`.

    Args:
        recalls: (batch, heads) share of the softmax at `count` blocks.
    """
    heads = recalls.shape[1]
    shift = min(count - 1, blocks - count, round(min(count, blocks - count) / 2))
    order = recalls.argsort(dim=1, descending=True, stable=True)
    place = order.argsort(dim=1)
    kept = torch.full_like(place, count)
    kept = torch.where(place < heads // 2, count - shift, kept)
    return torch.where(place >= heads - heads // 2, count + shift, kept)
