"""Listening inside a network: its transformer blocks, their layers, and their attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hasten.denoise.block.form import Form, form
from hasten.denoise.network import hooked, unpack
from hasten.denoise.slots import Block, State

if TYPE_CHECKING:
    from hasten.denoise.run import Run

NAME = "hasten_inside"
LISTS = (
    "transformer_blocks",
    "joint_transformer_blocks",
    "double_stream_blocks",
    "double_blocks",
    "visual_transformer_blocks",
    "single_transformer_blocks",
    "single_stream_blocks",
    "blocks",
    "layers",
)
"""What networks call their lists of blocks, in the order in which they run."""


@dataclass
class BlockCall:
    """One forward pass of a block, or of a layer of a U-Net (`layers`).

    Attributes:
        index: which block, counted through all lists.
        count: how many there are.
        module: the block.
        args, kwargs: what it is given; may be changed before `compute`.
        branch: which of the step's network calls it belongs to.
    """

    index: int
    count: int
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    branch: int
    original: Callable[..., Any]

    def compute(self) -> Any:
        """Run the block."""
        return self.original(*self.args, **self.kwargs)

    @property
    def hidden(self) -> Tensor:
        """(rows, tokens, hidden) the sample's tokens before the block.

        Some blocks take the text's tokens in the same sequence (`run.layout.offset`). Layers of a
        U-Net take (rows, channels, height, width).
        """
        return self._get(self._form.hidden)

    @hidden.setter
    def hidden(self, value: Tensor) -> None:
        name = self._form.hidden
        if name in self.kwargs:
            self.kwargs[name] = value
        else:
            self.args = (value, *self.args[1:])

    @property
    def text(self) -> Tensor | None:
        """(rows, text, hidden) the text's tokens, where the block changes them too."""
        return None if self._form.text is None else self._get(self._form.text)

    def parts(self, output: Any) -> tuple[Tensor, Tensor | None]:
        """The sample's tokens and the text's in a block's output."""
        if self._form.text is None:
            return unpack(output)[0], None
        first, second = output
        return (second, first) if self._form.text_first else (first, second)

    def output(self, hidden: Tensor, text: Tensor | None) -> Any:
        """An output as the block gives it."""
        if self._form.text is not None:
            return (text, hidden) if self._form.text_first else (hidden, text)
        if "return_dict" not in self._form.names:
            return hidden
        if self.kwargs.get("return_dict") is False:
            return (hidden,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=hidden)

    def _get(self, name: str) -> Any:
        return self.kwargs[name] if name in self.kwargs else self.args[self._form.names.index(name)]

    @property
    def _form(self) -> Form:
        inner: Any = getattr(self.module, "block", None)  # some blocks are a case around another
        kind: Any = type(inner or self.module)
        return form(kind)


@dataclass
class AttentionCall:
    """One scaled-dot-product attention over the sample's own tokens.

    Attributes:
        layer: which attention layer of the network, in order.
        turn: which attention of that layer, where it attends for each row on its own.
        arguments: those of `scaled_dot_product_attention`, by name.
    """

    layer: int
    turn: int
    arguments: dict[str, Any]

    @property
    def query(self) -> Tensor:
        """(batch, heads, length, head_dim), positions already applied."""
        return self.arguments["query"]

    @property
    def key(self) -> Tensor:
        """(batch, heads, length, head_dim)."""
        return self.arguments["key"]

    @property
    def value(self) -> Tensor:
        """(batch, heads, length, head_dim)."""
        return self.arguments["value"]

    @property
    def mask(self) -> Tensor | None:
        """What the network masks, as torch takes it; usually padding of the text."""
        return self.arguments.get("attn_mask")

    def dense(self) -> Tensor:
        """(batch, heads, length, head_dim) the network's own attention."""
        return F.scaled_dot_product_attention(**self.arguments)


def blocks(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a network, in the order in which they run; none for a U-Net."""
    lists = [getattr(module, name, None) for name in LISTS]
    found = [block for each in lists if isinstance(each, nn.ModuleList) for block in each]
    between = getattr(module, "temporal_transformer_blocks", None)
    if isinstance(between, nn.ModuleList):  # one after each of the others
        return [block for pair in zip(found, between, strict=True) for block in pair]
    return found


def layers(module: nn.Module) -> list[nn.Module]:
    """What a network's output may do without, in the order in which it runs.

    These are transformer blocks; of a U-Net, which has none, the residual and attention layers of
    its stages, but no layer that changes the size of the sample.
    """
    found = blocks(module)
    if found:
        return found
    for name in ("down_blocks", "mid_block", "up_blocks"):
        part = getattr(module, name, None)
        for stage in part if isinstance(part, nn.ModuleList) else [part]:
            pairs = zip_longest(_listed(stage, "resnets"), _listed(stage, "attentions"))
            for residual, attention in pairs:
                resizes = getattr(residual, "up", False) or getattr(residual, "down", False)
                if hasattr(residual, "conv_shortcut") and not resizes:
                    found.append(residual)
                if attention is not None:
                    found.append(attention)
    return found


def _listed(stage: Any, name: str) -> list[Any]:
    found = getattr(stage, name, None)
    return list(found) if isinstance(found, nn.ModuleList) else []


def sublayers(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The attention and feed-forward layers of a block."""
    for name, module in block.named_children():
        kind = type(module).__name__
        if is_attention(module) or name == "ff" or kind.endswith(("FeedForward", "MLP", "Mlp")):
            yield name, module


def is_attention(module: nn.Module) -> bool:
    """Whether it is one of Diffusers' attention modules."""
    return hasattr(module, "processor") or hasattr(module, "set_processor")


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
