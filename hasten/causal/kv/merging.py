"""Folding evicted entries into those that stay.

Keys are merged as they lie in the cache, rotated for different positions; that distorts attention
a little, the less the nearer (or the more alike) the entries are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.causal.attention import chunk_elements
from hasten.causal.cache import LayerCache


def nearest_anchor(anchors: Tensor) -> Tensor:
    """Index of the nearest True entry for every entry, the earlier of two; -1 where there is none.

    Args:
        anchors: (..., length) bool.
    """
    length = anchors.shape[-1]
    here = torch.arange(length, device=anchors.device).expand(anchors.shape)
    far = 2 * length  # farther than any real distance
    before = here.masked_fill(~anchors, -far).cummax(dim=-1).values
    behind = here.masked_fill(~anchors, far).flip(-1).cummin(dim=-1).values.flip(-1)
    nearest = torch.where(here - before <= behind - here, before, behind)
    return nearest.masked_fill(~anchors.any(dim=-1, keepdim=True), -1)


def average_into(layer: LayerCache, target: Tensor) -> None:
    """Make each entry that others are sent to the mean of itself and them, keys and values alike.

    The mean is taken over differences to the receiving entry, so that equal entries stay what they
    are to the last bit.

    Args:
        target: (batch, heads or 1, length) index that each entry is sent to; its own stays put.
    """
    target = target.expand(layer.keys.shape[:3])
    counts = torch.zeros(target.shape, device=target.device)
    counts = counts.scatter_add_(2, target, torch.ones_like(counts)).clamp(min=1)[..., None]
    for part in (layer.keys, layer.values):
        whole = part.float()
        index = target[..., None].expand_as(whole)
        drift = torch.zeros_like(whole).scatter_add_(2, index, whole - whole.gather(2, index))
        part.copy_(whole + drift / counts)


def most_similar(
    keys: Tensor, evicted: Tensor, absent: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine similarity to, and index of, the kept key that is most like each evicted one.

    Args:
        keys: (batch, heads, length, head_dim).
        evicted: (batch, heads, evicted) indices, -1 for none (its result means nothing).
        absent: (batch, heads or 1, length) bool, True for holes.

    Returns:
        two of (batch, heads, evicted): similarities (float32) and indices.
    """
    units = F.normalize(keys.float(), dim=-1)
    length = keys.shape[2]
    closed = torch.zeros((*keys.shape[:2], length + 1), dtype=torch.bool, device=keys.device)
    closed = closed.scatter_(2, torch.where(evicted < 0, length, evicted), True)[..., :length]
    if absent is not None:
        closed = closed | absent
    rows = max(1, chunk_elements(keys.device) // max(1, closed.numel()))
    found = []
    for part in evicted.split(rows, dim=2):
        index = part.clamp(min=0)[..., None].expand(-1, -1, -1, keys.shape[3])
        alike = units.gather(2, index) @ units.transpose(2, 3)
        found.append(alike.masked_fill(closed[:, :, None], -math.inf).max(dim=-1))
    return torch.cat([f.values for f in found], dim=2), torch.cat([f.indices for f in found], dim=2)


def fold_into(
    layer: LayerCache, evicted: Tensor, target: Tensor, weight: Tensor, counted: Tensor, own: float
) -> None:
    """Weighted merge: x_t = (own * x_t + sum of weight_i * x_i) / (own + sum of counted_i).

    Args:
        evicted: (batch, heads, evicted) entries to fold, -1 for none.
        target: (batch, heads, evicted) entry that each goes into.
        weight: (batch, heads, evicted) factor of each; 0 discards it.
        counted: (batch, heads, evicted) what each adds to the divisor; 0 discards it.
        own: weight of the receiving entry.
    """
    source = evicted.clamp(min=0)
    if evicted.shape[2] == 1:  # a decoding step: touch one entry per head
        divisor = own + counted[..., None]
        for part in (layer.keys, layer.values):
            into = target[..., None].expand(-1, -1, -1, part.shape[3])
            index = source[..., None].expand(-1, -1, -1, part.shape[3])
            old = part.gather(2, into).float()
            new = (own * old + weight[..., None] * part.gather(2, index)) / divisor
            part.scatter_(2, into, torch.where(counted[..., None] > 0, new, old).to(part.dtype))
        return
    divisor = torch.zeros(layer.keys.shape[:3], device=target.device).scatter_add_(
        2, target, counted
    )
    for part in (layer.keys, layer.values):
        into = target[..., None].expand(-1, -1, -1, part.shape[3])
        index = source[..., None].expand(-1, -1, -1, part.shape[3])
        coming = weight[..., None] * part.gather(2, index)
        total = (own * part.float()).scatter_add_(2, into, coming)
        merged = total / (own + divisor)[..., None]
        part.copy_(torch.where(divisor[..., None] > 0, merged, part.float()))
