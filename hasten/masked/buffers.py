"""What both ways of keeping keys and values have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.causal.cache import Handover

ALL_LAYERS = slice(None)


class Buffers(Handover):
    """Keys and values of all positions of a text, of all layers in one tensor.

    A pass writes what it computed and reads what it may see: an eager one layer after layer
    (`exchange`), a compiled one reads `states` itself and hands over all layers at its end (`write`).

    Attributes:
        states: (layers, 2, batch, kv_heads, capacity, head_dim), keys and values; None before the
            first pass.
        length: positions of the text; what `states` holds beyond them is never read.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.states: Tensor | None = None
        self.length = length
        self._shape = (0, 0)

    @property
    def is_empty(self) -> bool:
        """Nothing was computed yet."""
        return self.states is None

    def expect_model(self, num_layers: int, capacity_step: int = 1) -> None:
        """Told by a runner before its first pass: what room to make.

        Args:
            capacity_step: the capacity is rounded up to a multiple of this.
        """
        self._shape = (num_layers, -(-self.length // capacity_step) * capacity_step)

    def room(self, fresh: Tensor) -> Tensor:
        """The buffers, made now where there are none, for states (..., batch, kv_heads, rows, dim)."""
        if self.states is None:
            layers, capacity = self._shape
            batch, heads, _, dim = fresh.shape[-4:]
            # Zeros, not empty: a compiled pass reads the unused part (masked), where a NaN spreads.
            self.states = fresh.new_zeros(layers, 2, batch, heads, capacity, dim)
        return self.states

    def write(self, layer: int | slice, fresh: Tensor) -> None:
        """Keep what a pass computed.

        Args:
            layer: one of them, or `ALL_LAYERS`.
            fresh: (2, batch, kv_heads, rows, head_dim), with all layers in front where it is of all.
        """
        raise NotImplementedError

    def read(self, layer: int) -> Tensor:
        """(2, batch, kv_heads, columns, head_dim), what the pass in flight reads in a layer."""
        raise NotImplementedError

    def columns(self, visible: Tensor | None, rows: int) -> tuple[Tensor | None, Tensor | None]:
        """The pass in flight's mask, cut into what it reads of the buffers and of its own rows.

        Args:
            visible: bool (batch or 1, 1, rows, columns) over what `read` gives; None hides nothing.
            rows: rows of the pass.

        Returns:
            Both bool, (batch or 1, 1, rows or 1, buffer columns) and (batch or 1, 1, rows, rows).
            The first is None where no buffer is read, the second where all rows see each other.
        """
        raise NotImplementedError

    def exchange(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See `Handover.exchange`."""
        self.write(layer, torch.stack((keys, values)))
        keys, values = self.read(layer).unbind(0)
        return keys, values

    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return 0 if self.states is None else self.states.nbytes
