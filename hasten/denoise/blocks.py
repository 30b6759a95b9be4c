"""Listening inside a network: its transformer blocks, their layers, and their attention."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hasten.denoise.network import hooked
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
    """One block's forward pass.

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
        """(rows, tokens, hidden) the sample's tokens before the block."""
        return self._get("hidden_states", 0)

    @hidden.setter
    def hidden(self, value: Tensor) -> None:
        self._set("hidden_states", 0, value)

    @property
    def text(self) -> Tensor | None:
        """(rows, text, hidden) the text's tokens, where the block changes them too."""
        return self._get("encoder_hidden_states", 1) if self._text_at is not None else None

    def parts(self, output: Any) -> tuple[Tensor, Tensor | None]:
        """The sample's tokens and the text's in a block's output."""
        if not isinstance(output, tuple):
            return output, None
        text = None if self._text_at is None else output[self._text_at]
        return output[self._hidden_at], text

    def output(self, hidden: Tensor, text: Tensor | None) -> Any:
        """An output as the block gives it."""
        if not self._is_tuple:
            return hidden
        made: list[Any] = [None] * (1 if self._text_at is None else 2)
        made[self._hidden_at] = hidden
        if self._text_at is not None:
            made[self._text_at] = text
        return tuple(made)

    def _get(self, name: str, place: int) -> Any:
        return self.kwargs[name] if name in self.kwargs else self.args[place]

    def _set(self, name: str, place: int, value: Any) -> None:
        if name in self.kwargs:
            self.kwargs[name] = value
        else:
            self.args = (*self.args[:place], value, *self.args[place + 1 :])

    @property
    def _hidden_at(self) -> int:
        return _places(type(self.module))[0]

    @property
    def _text_at(self) -> int | None:
        return _places(type(self.module))[1]

    @property
    def _is_tuple(self) -> bool:
        return _places(type(self.module))[1] is not None


@dataclass
class AttentionCall:
    """One scaled-dot-product attention over the sample's own tokens.

    Attributes:
        layer: which attention layer of the network, in order.
        arguments: those of `scaled_dot_product_attention`, by name.
    """

    layer: int
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


@cache
def _places(kind: type[nn.Module]) -> tuple[int, int | None]:
    """Where a block's output holds the sample's tokens and the text's, as Diffusers registers it."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    try:
        known = TransformerBlockRegistry.get(kind)
    except ValueError:
        return _places_by_name(kind)
    return known.return_hidden_states_index, known.return_encoder_hidden_states_index


def _places_by_name(kind: type[nn.Module]) -> tuple[int, int | None]:
    """The same for a block that Diffusers does not register, by the names that it returns."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):  # made without a file
        return 0, None
    for node in ast.walk(tree):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
            names = [entry.id if isinstance(entry, ast.Name) else "" for entry in node.value.elts]
            if len(names) == 2 and {"hidden_states", "encoder_hidden_states"} == set(names):
                return names.index("hidden_states"), names.index("encoder_hidden_states")
    return 0, None


def blocks(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a network, in the order in which they run; none for a U-Net."""
    return [
        block
        for name in LISTS
        if isinstance(found := getattr(module, name, None), nn.ModuleList)
        for block in found
    ]


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
                found = [m for m in self.module.modules() if is_attention(m) and _reads_itself(m)]
                for index, layer in enumerate(found):
                    stack.enter_context(hooked(layer, NAME + "_attention", self._attention(index)))
            if self._wraps_blocks():
                for index, block in enumerate(self.blocks):
                    stack.enter_context(hooked(block, NAME, self._block(index)))
            yield

    def _wraps_blocks(self) -> bool:
        """Whether a technique of the plan does anything at a block."""
        block, state = self.run.slots.block, self.run.slots.state
        return (block is not None and type(block[0]).block is not Block.block) or (
            state is not None and type(state[0]).wrap_blocks is not State.wrap_blocks
        )

    def _block(self, index: int) -> Callable[..., Any]:
        run, count = self.run, len(self.blocks)

        def forward(module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
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
            assert run.slots.block is not None
            state = run.state(run.slots.block)
            return run.slots.block[0].sublayer(state, run, key, lambda: original(*args, **kwargs))

        return forward

    def _attention(self, index: int) -> Callable[..., Any]:
        run = self.run

        def forward(module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
            with _Attending(run, index):
                return original(*args, **kwargs)

        return forward


def _reads_itself(module: nn.Module) -> bool:
    """Whether queries and keys are of the same tokens; attention to the text alone is not."""
    return not getattr(module, "is_cross_attention", False)


class _Attending(TorchFunctionMode):
    """Hands each scaled-dot-product attention of one layer to the plan's technique.

    It works on every attention processor, since all of them end in this one function of torch.
    """

    def __init__(self, run: Run, layer: int) -> None:
        super().__init__()
        self.run = run
        self.layer = layer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        call = AttentionCall(self.layer, {**dict(zip(names, args, strict=False)), **(kwargs or {})})
        run, entry = self.run, self.run.slots.attention
        assert entry is not None
        if call.query.shape[-2] != call.key.shape[-2]:
            return call.dense()  # to the text
        return entry[0].attend(run.state(entry), run, call)
