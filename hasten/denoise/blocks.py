"""What is inside a network: its blocks, their layers and attention, and each pass through one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hasten.denoise.block.form import Form, form
from hasten.denoise.network import unpack

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
