"""What both ways of keeping keys and values have in common."""

from __future__ import annotations

from torch import Tensor
from transformers import Cache


class Buffers(Cache):
    """Keys and values (batch, kv_heads, length, head_dim) of all positions, a pair for each layer."""

    def __init__(self) -> None:
        super().__init__(layers=[])  # type: ignore[misc]
        self.buffers: list[tuple[Tensor, Tensor]] = []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are always given, so nobody needs to know."""
        return 0

    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.buffers)
