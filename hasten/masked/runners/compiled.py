"""Passes through `torch.compile`: static shapes, a few fixed widths, weights laid out for the kernels.

A pass is padded to one of a few widths. It reads the buffers whole, under a mask, and its own rows
behind them, and hands out what it computed of them; so one graph serves a pass over one block, a
tree of drafts and the rows of a window. The choice of the likeliest tokens is part of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from hasten.causal.attention import engine_attention
from hasten.causal.cache import Handover
from hasten.masked.attention import check_plain
from hasten.masked.buffers import ALL_LAYERS
from hasten.masked.runners.base import Look, Said
from hasten.masked.runners.eager import EagerRunner

NAME = "hasten_masked_compiled"
NARROW = 96  # passes of up to so many rows give logits of all of them
MAX_WIDTH = 1024  # wider passes run eagerly: arithmetic is all that they cost
MAX_GRAPHS = 64  # widths times capacities and batches, over all models of a process
BACKEND: Any = "inductor"  # of torch.compile; tests take a quicker one

# On a processor most of a narrow pass is not arithmetic but the libraries' way to it: weights that
# are packed anew each time, and a kernel that is chosen at each call. As constants they are packed
# once. Where the machine multiplies tiles of bfloat16, generated products are several times faster
# still than the library's, for as many rows as fit into a few tiles.
_CONSTANTS = {"freezing": True}
_TILES = {
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP",
    "autotune_num_choices_displayed": 0,
}

_NUMBERS = itertools.count()  # of runners; memory of a model that is gone may be another's


class CompiledRunner(EagerRunner):
    """`torch.compile` around the model's forward pass, one graph per width and capacity.

    The first pass of each width compiles, which takes up to a minute. Logits differ from the eager
    runner's in the last bits, because fused kernels round differently. The first pass over a text
    with a cache runs eagerly: its length is the prompt's, which differs from call to call.
    """

    name: ClassVar[str] = "compiled"
    capacity_step: ClassVar[int] = 128

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        # A look at each of a model's modules before each pass takes a tenth of it. What could change
        # in them is told to the graph: `_state`.
        options: dict[str, Any] = {
            "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe
        }
        self._pass = torch.compile(
            self._static_pass, dynamic=False, backend=BACKEND, options=options
        )
        self._graphs: set[tuple[object, ...]] = set()
        self._number = next(_NUMBERS)
        self.begin()

    def begin(self) -> None:
        """See `Runner.begin`: graphs hold weights as constants, so changed ones need new graphs."""
        weights = tuple((w.data_ptr(), w._version) for w in self.model.parameters())
        self._state = abs(hash((self._number, weights, self.model.training)))

    @torch.no_grad()
    def read(self, look: Look) -> Said:
        """See `Runner.read`."""
        cache, width = look.cache, _width(look.tokens.shape[1])
        begins = cache is not None and cache.is_empty
        if begins or look.embeddings is not None or width > MAX_WIDTH:
            return super().read(look)
        rows = look.tokens.shape[1]
        older, fresh = (None, look.visible) if cache is None else cache.columns(look.visible, rows)
        buffers = None if cache is None or older is None else cache.states
        mask = _mask(older, fresh, rows, width, 0 if buffers is None else buffers.shape[-2])
        narrow = width <= NARROW
        kept = torch.arange(width, device=look.kept.device) if narrow else _kept(look.kept)
        tokens, positions = _padded(look.tokens, width), _padded(look.positions, width)
        keeps = cache is not None
        shapes = (tokens.shape, mask.shape, kept.shape, keeps, self._state)
        with engine_attention(self.model, NAME), self._compiling(shapes, tokens):
            *said, states = self._pass(
                tokens, positions, mask, buffers, kept, look.mask_id, keeps, self._state
            )
        if cache is not None and states is not None:
            cache.write(ALL_LAYERS, states[..., :rows, :])
        if narrow:
            return Said(*(part.index_select(1, look.kept) for part in said))
        return Said(*said)[:, : len(look.kept)]

    def _static_pass(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor,
        buffers: Tensor | None,
        kept: Tensor,
        mask_id: int,
        keeps: bool,
        state: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        # Read, or the compiler would take a graph to hold for every state.
        assert state >= 0
        view = _View(buffers)
        config = self.model.config.get_text_config(decoder=True)
        heads = config.num_attention_heads
        groups = heads // (getattr(config, "num_key_value_heads", None) or heads)
        bias = torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask, -torch.inf)
        logits = self.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=bias.repeat(1, 1, groups, 1),
            past_key_values=view,
            use_cache=True,
            logits_to_keep=kept,
        ).logits
        said = Said.of(logits, mask_id)
        return said.logits, said.best, said.chance, torch.stack(view.fresh) if keeps else None

    def _settings(self, tokens: Tensor) -> dict[str, Any]:
        tiled = self.model.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
        return _CONSTANTS | (_TILES if tiled and tokens.shape[1] <= NARROW else {})

    @contextmanager
    def _compiling(self, shapes: tuple[object, ...], tokens: Tensor) -> Iterator[None]:
        """Settings of the compiler, entered only where a pass is of shapes not seen before."""
        if shapes in self._graphs:
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS))
            if tokens.device.type == "cpu":
                stack.enter_context(torch._inductor.config.patch(self._settings(tokens)))
            yield
        self._graphs.add(shapes)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer in a compiled pass; shapes as in `masked.attention.attention`.

    Queries that share keys become rows of one head, so that these are read once.

    Args:
        attention_mask: (batch or 1, 1, groups * rows, length), added to the scores.
    """
    check_plain(module, kwargs)
    groups = query.shape[1] // key.shape[1]
    rows = query.unflatten(1, (-1, groups)).flatten(2, 3)
    out = nn.functional.scaled_dot_product_attention(
        rows, key, value, attn_mask=attention_mask, scale=scaling
    )
    out = out.unflatten(2, (groups, -1)).flatten(1, 2)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention)


class _View(Handover):
    """The buffers of a text as a compiled pass sees them: whole, with its own rows behind them."""

    def __init__(self, buffers: Tensor | None) -> None:
        super().__init__()
        self.buffers = buffers
        self.fresh: list[Tensor] = []

    def exchange(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See `Handover.exchange`; what is handed over is noted in `fresh`."""
        self.fresh.append(torch.stack((keys, values)))
        if self.buffers is None:
            return keys, values
        older_keys, older_values = self.buffers[layer].unbind(0)
        return torch.cat((older_keys, keys), dim=2), torch.cat((older_values, values), dim=2)


def _width(rows: int) -> int:
    """The compiled width of so many rows."""
    step = 8 if rows <= 8 else 32 if rows <= NARROW else 64
    return -(-rows // step) * step


def _kept(rows: Tensor) -> Tensor:
    """Indices (kept,), the last one repeated up to a round number."""
    return _padded(rows[None], _width(len(rows)))[0]


def _padded(tensor: Tensor, width: int) -> Tensor:
    """A fresh (batch, width) copy of (batch, rows), its last column repeated.

    Fresh, because a compiled graph is tied to strides as well as to shapes.
    """
    out = tensor.new_empty((tensor.shape[0], width))
    rows = tensor.shape[1]
    out[:, :rows] = tensor
    out[:, rows:] = tensor[:, -1:]
    return out


def _mask(
    older: Tensor | None, fresh: Tensor | None, rows: int, width: int, capacity: int
) -> Tensor:
    """Bool mask (batch or 1, 1, width, capacity + width) of parts as `Buffers.columns` gives them."""
    parts = [part for part in (older, fresh) if part is not None]
    batch = max((part.shape[0] for part in parts), default=1)
    device = parts[0].device if parts else None
    mask = torch.zeros((batch, 1, width, capacity + width), dtype=torch.bool, device=device)
    if older is not None:
        mask[:, :, :rows, : older.shape[-1]] = older
    mask[:, :, :rows, capacity : capacity + rows] = True if fresh is None else fresh
    mask[:, :, rows:, capacity] = True  # what pads sees something, or it becomes NaN
    return mask
