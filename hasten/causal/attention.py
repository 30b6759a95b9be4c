"""The attention function that the causal engine puts into a model for the time of a pass.

Transformers models look their attention up by name (`config._attn_implementation`), so an engine
that registers a function needs to patch nothing. The function asks the pass in flight for the
mask (from original positions, so that evicted, padded and tree-shaped caches are all the same
case) and lets the kv technique watch the attention or choose what is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hasten.errors import SubjectError

if TYPE_CHECKING:
    from hasten.causal.cache import KVCache, LayerCache, PositionTable
    from hasten.causal.slots import KV

NAME = "hasten"
STATIC_NAME = "hasten_static"
# Attention weights computed at once when a technique watches a prompt: on a CPU they stay in a
# core's cache, which is several times faster.
CHUNK_ELEMENTS = {"cpu": 1 << 19}
MAX_CHUNK_ELEMENTS = 1 << 24


@dataclass
class Pass:
    """One forward pass in flight: its cache, its positions and who watches it."""

    cache: KVCache
    positions: Tensor  # (batch, block), -1 for a hole
    tree: Tensor | None = None  # (block, block) bool: row may see column; None is a chain
    kv: KV | None = None
    kv_state: Any = None
    is_prompt: bool = False
    _masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)

    def mask(self, layer: LayerCache, window: int | None) -> Tensor | None:
        """Bool mask (batch, heads or 1, block, length), True where a query may look.

        None where nothing is masked, or where plain causality over an otherwise empty cache is
        all there is (a prompt without padding): the fast cases of every kernel.
        """
        key = (id(layer.table), window)
        if key not in self._masks:
            self._masks[key] = self._build(layer.table, window)
        return self._masks[key]

    def _build(self, table: PositionTable, window: int | None) -> Tensor | None:
        block = self.positions.shape[1]
        windowed = window is not None and bool((self.positions.max() - window + 1) > 0)
        plain = not table.has_holes and not windowed and self.tree is None
        if plain and (block == 1 or table.length == block):
            return None
        keys = table.positions[:, :, None, :]  # (batch, heads or 1, 1, length)
        queries = self.positions[:, None, :, None]  # (batch, 1, block, 1)
        mask = (keys <= queries) & (keys >= 0)
        if windowed:
            assert window is not None
            mask &= queries - keys < window
        if self.tree is not None:
            mask[..., -block:] &= self.tree
        # A hole must see something, or its row becomes NaN and spreads through the values.
        mask[..., -block:] |= torch.eye(block, dtype=torch.bool, device=mask.device)
        return mask


@dataclass
class AttentionView:
    """One layer's attention in one pass, as a kv technique sees it. Nothing is computed unasked."""

    layer_idx: int
    query: Tensor  # (batch, heads, block, head_dim), rotated
    layer: LayerCache  # holds the block's keys and values already
    mask: Tensor | None  # as `Pass.mask`
    scaling: float
    positions: Tensor  # (batch, block)
    is_prompt: bool
    softcap: float | None = None

    @property
    def groups(self) -> int:
        """Query heads that share one KV head."""
        return self.query.shape[1] // self.layer.keys.shape[1]

    def probabilities(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Attention weights of the block's rows start:stop, (batch, heads, rows, length), float32."""
        stop = self.query.shape[2] if stop is None else stop
        return self._weights(start, stop, self.layer.length)

    def _weights(self, start: int, stop: int, length: int) -> Tensor:
        """As `probabilities`, over the first `length` entries; the rows may look at none behind them."""
        query = self.query[:, :, start:stop]
        batch, heads, rows, dim = query.shape
        keys = self.layer.keys[:, :, :length]
        grouped = query.reshape(batch, keys.shape[1], self.groups * rows, dim)
        scores = (grouped.float() @ keys.float().transpose(2, 3)) * self.scaling
        scores = scores.reshape(batch, heads, rows, keys.shape[2])
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.mask is not None:
            mask = self.mask[:, :, start:stop, :length]
            if mask.shape[1] not in (1, heads):
                mask = mask.repeat_interleave(self.groups, dim=1)
            scores = scores.masked_fill(~mask, float("-inf"))
        elif self.query.shape[2] > 1:  # plain causality over an empty cache
            columns = torch.arange(length, device=keys.device)
            row_ids = torch.arange(start, stop, device=keys.device)
            scores = scores.masked_fill(columns[None, :] > row_ids[:, None], float("-inf"))
        return scores.softmax(dim=-1)

    def received(self) -> Tensor:
        """Attention that each entry received, summed over the block's real rows: (batch, heads, length).

        Computed in chunks of rows, so a long prompt never needs its whole attention matrix.
        """
        batch, heads, block, _ = self.query.shape
        length = self.layer.length
        rows = max(1, chunk_elements(self.query.device) // (batch * heads * length))
        total = self.query.new_zeros((batch, heads, length), dtype=torch.float32)
        for start in range(0, block, rows):
            stop = min(start + rows, block)
            end = length - block + stop  # no row looks behind itself in its own block
            weights = self._weights(start, stop, end)
            if self.layer.table.has_holes:
                weights = weights * (self.positions[:, start:stop] >= 0)[:, None, :, None]
            total[..., :end] += weights.sum(dim=2)
        return total


def chunk_elements(device: torch.device) -> int:
    """How many numbers of a large intermediate result are best computed at once."""
    return CHUNK_ELEMENTS.get(device.type, MAX_CHUNK_ELEMENTS)


_IN_FLIGHT: ContextVar[Pass | None] = ContextVar("hasten_pass", default=None)


@contextmanager
def in_flight(current: Pass) -> Iterator[Pass]:
    """Make a pass the one that the attention function serves."""
    token = _IN_FLIGHT.set(current)
    try:
        yield current
    finally:
        _IN_FLIGHT.reset(token)


@contextmanager
def engine_attention(model: PreTrainedModel, name: str = NAME) -> Iterator[None]:
    """Run a model on the engine's attention; its own setting is back afterwards."""
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation_internal
    config._attn_implementation_internal = name
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer; shapes as transformers' attention functions, returns (out, None).

    query is (batch, heads, block, head_dim); key and value (batch, kv_heads, length, head_dim).
    """
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise SubjectError(
            f"{type(module).__name__} uses attention sinks or position biases, which the causal "
            "engine cannot run yet."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    current = _IN_FLIGHT.get()
    assert current is not None, "the engine's attention runs inside a pass only"
    layer_idx = int(module.layer_idx)  # type: ignore[arg-type]
    layer = current.cache.layers[layer_idx]
    mask = current.mask(layer, sliding_window)
    if current.kv is not None:
        view = AttentionView(
            layer_idx, query, layer, mask, scale, current.positions, current.is_prompt, softcap
        )
        chosen = current.kv.read(current.kv_state, view)
        current.kv.observe(current.kv_state, view)
        if chosen is not None:
            return selected(query, key, value, mask, chosen, scale, softcap), None
    if mask is not None and _is_draft(current, query):
        return _grouped(query, key, value, _per_head(mask, query.shape[1]), scale, softcap), None
    return dense(module, query, key, value, mask, scale, softcap), None


def _per_head(mask: Tensor, heads: int) -> Tensor:
    """A mask per KV head as one per query head; one for all heads stays as it is."""
    return (
        mask
        if mask.shape[1] in (1, heads)
        else mask.repeat_interleave(heads // mask.shape[1], dim=1)
    )


def _is_draft(current: Pass, query: Tensor) -> bool:
    """A short masked block on a CPU, where query heads can share KV heads that are not copied.

    `dense` would copy all keys and values once per query head of a group. `model.generate` has no
    such passes, so there are no bits to keep; other devices have no fast kernel for it.
    """
    return query.shape[2] > 1 and not current.is_prompt and query.device.type == "cpu"


def dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention over all entries: (batch, block, heads, head_dim).

    The work is done by transformers' own SDPA function, so that the numbers are those of
    `model.generate` to the last bit.
    """
    block = query.shape[2]
    if mask is not None:
        mask = _per_head(mask, query.shape[1])
    if softcap is not None:
        return _softcapped(query, key, value, mask, scale, softcap).transpose(1, 2).contiguous()
    return sdpa_attention_forward(
        module, query, key, value, mask, scaling=scale, is_causal=mask is None and block > 1
    )[0]


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Gemma 2's capped scores, which fused kernels do not offer."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.float().softmax(dim=-1).to(query.dtype) @ value


def selected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    chosen: Tensor,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention over chosen entries only: (batch, block, heads, head_dim).

    Args:
        chosen: entry indices, -1 for none. (batch, kv_heads or heads, read) reads the same
            entries for the whole block and gathers them, so that the others are never touched;
            (batch, kv_heads or heads, block, read) chooses per query row, as a verified draft
            needs, and masks instead.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    if mask is not None and mask.shape[1] not in (1, heads):
        mask = mask.repeat_interleave(heads // mask.shape[1], dim=1)
    if chosen.dim() == 4:
        picked = torch.zeros(
            (*chosen.shape[:3], key.shape[2] + 1), dtype=torch.bool, device=key.device
        )
        picked.scatter_(3, torch.where(chosen < 0, key.shape[2], chosen), True)
        picked = picked[..., :-1]
        if picked.shape[1] != heads:
            picked = picked.repeat_interleave(heads // picked.shape[1], dim=1)
        if mask is None and query.shape[2] > 1:
            causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device)
            mask = causal.tril(key.shape[2] - query.shape[2])
        mask = picked if mask is None else picked & mask
        return _grouped(query, key, value, mask, scale, softcap)
    source = chosen.clamp(min=0)
    picked_mask = _picked_mask(mask, chosen, source, heads, query.shape[2])
    # What the query heads of one KV head choose lies side by side, so it is gathered at once.
    index = source.reshape(source.shape[0], kv_heads, -1)
    key, value = (
        tensor.gather(2, index[..., None].expand(-1, -1, -1, tensor.shape[3])).view(
            *source.shape, tensor.shape[3]
        )
        for tensor in (key, value)
    )
    return _grouped(query, key, value, picked_mask, scale, softcap)


def _grouped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """SDPA that lets query heads share KV heads: (batch, block, heads, head_dim)."""
    if softcap is not None:
        return _softcapped(query, key, value, mask, scale, softcap).transpose(1, 2).contiguous()
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).contiguous()


def _picked_mask(
    mask: Tensor | None, chosen: Tensor, source: Tensor, heads: int, block: int
) -> Tensor | None:
    """The mask's columns for the gathered entries; None where all of them may be seen."""
    absent = chosen < 0
    if mask is None and block == 1 and not bool(absent.any()):
        return None
    assert mask is not None or block == 1, "a block of several queries always has a mask here"
    repeat = heads // chosen.shape[1]
    seen = ~absent.repeat_interleave(repeat, dim=1)[:, :, None, :].expand(-1, -1, block, -1)
    if mask is None:
        return seen
    full = mask.expand(chosen.shape[0], heads, block, mask.shape[3])
    columns = source.repeat_interleave(repeat, dim=1)[:, :, None, :].expand(-1, -1, block, -1)
    return full.gather(3, columns) & seen


def static_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a compiled pass: the mask comes with the call and no technique takes part."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _grouped(query, key, value, attention_mask, scale, softcap), None


AttentionInterface.register(NAME, attention)
AttentionInterface.register(STATIC_NAME, static_attention)
