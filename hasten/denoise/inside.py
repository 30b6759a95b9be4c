"""Listening inside a network, where a technique of the plan asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from hasten.denoise.blocks import (
    AttentionCall,
    BlockCall,
    blocks,
    is_attention,
    layers,
    sublayers,
)
from hasten.denoise.network import hooked
from hasten.denoise.slots import Block, State

if TYPE_CHECKING:
    from hasten.denoise.run import Run

NAME = "hasten_inside"


class Inside:
    """What a plan does inside one network."""

    def __init__(self, run: Run, module: nn.Module) -> None:
        self.run = run
        self.module = module
        self.blocks = blocks(module)
        self.layers = layers(module)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Listen where a technique asks for it, and nowhere else."""
        slots = self.run.slots
        with ExitStack() as stack:
            if slots.block is not None and slots.block[0].sublayers:
                for index, block in enumerate(self.blocks):
                    for name, layer in sublayers(block):
                        stack.enter_context(hooked(layer, NAME, self._sublayer((index, name))))
            if slots.attention is not None:
                for index, layer in enumerate(self._attentions()):
                    stack.enter_context(hooked(layer, NAME + "_attention", self._attention(index)))
            if self._wraps_blocks():
                for index, block in enumerate(self.layers):
                    stack.enter_context(hooked(block, NAME, self._block(index)))
            yield

    def _attentions(self) -> list[nn.Module]:
        """The layers that attend over the sample's tokens; those that read the text alone are not."""
        return [
            layer
            for part in self.blocks or [self.module]
            for name, layer in part.named_modules()
            if is_attention(layer) and _reads_itself(name, layer)
        ]

    def _wraps_blocks(self) -> bool:
        """Whether a technique of the plan does anything at a block."""
        block, state = self.run.slots.block, self.run.slots.state
        return (block is not None and type(block[0]).block is not Block.block) or (
            state is not None and type(state[0]).wrap_blocks is not State.wrap_blocks
        )

    def _block(self, index: int) -> Callable[..., Any]:
        run, count = self.run, len(self.layers)

        def forward(module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
            if run.looking:
                return original(*args, **kwargs)
            call = BlockCall(index, count, module, args, kwargs, run.call.branch, original)
            if run.slots.block is None:
                assert run.slots.state is not None
                return run.slots.state[0].wrap_blocks(run.state(run.slots.state), run, call)
            if run.slots.state is None:
                return run.slots.block[0].block(run.state(run.slots.block), run, call)
            entry = run.slots.block

            def reusing(*args: Any, **kwargs: Any) -> Any:
                inner = BlockCall(index, count, module, args, kwargs, call.branch, original)
                return entry[0].block(run.state(entry), run, inner)

            call.original = reusing
            return run.slots.state[0].wrap_blocks(run.state(run.slots.state), run, call)

        return forward

    def _sublayer(self, key: tuple[int, str]) -> Callable[..., Any]:
        run = self.run

        def forward(module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
            if run.looking:
                return original(*args, **kwargs)
            assert run.slots.block is not None
            state = run.state(run.slots.block)
            return run.slots.block[0].sublayer(state, run, key, lambda: original(*args, **kwargs))

        return forward

    def _attention(self, index: int) -> Callable[..., Any]:
        run = self.run

        def forward(module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
            if run.looking:
                return original(*args, **kwargs)
            with _Attending(run, index):
                return original(*args, **kwargs)

        return forward


def _reads_itself(name: str, module: nn.Module) -> bool:
    """Whether queries and keys are of the same tokens; attention to the text alone is not."""
    # Where a layer does not say so, Diffusers' usual names for it do.
    named = name.endswith("attn2") or "cross" in name
    return not getattr(module, "is_cross_attention", named)


class _Attending(TorchFunctionMode):
    """Hands each scaled-dot-product attention of one layer to the plan's technique.

    It works on every attention processor, since all of them end in this one function of torch.
    """

    def __init__(self, run: Run, layer: int) -> None:
        super().__init__()
        self.run = run
        self.layer = layer
        self.turn = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        call = AttentionCall(self.layer, self.turn, given)
        run, entry = self.run, self.run.slots.attention
        assert entry is not None
        if call.query.shape[-2] != call.key.shape[-2]:
            return call.dense()  # to the text
        self.turn += 1
        return entry[0].attend(run.state(entry), run, call)
