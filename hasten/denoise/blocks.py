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
        """(rows, tokens, hidden) the sample's tokens before the block.

        Some blocks take the text's tokens in the same sequence (`run.layout.offset`).
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
        if not isinstance(output, tuple):
            return output, None
        first, second = output
        return (second, first) if self._form.text_first else (first, second)

    def output(self, hidden: Tensor, text: Tensor | None) -> Any:
        """An output as the block gives it."""
        if self._form.text is None:
            return hidden
        return (text, hidden) if self._form.text_first else (hidden, text)

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


@dataclass(frozen=True)
class Form:
    """What a kind of block takes and gives back.

    Attributes:
        names: of its arguments.
        text: the argument with the tokens that it changes beside the sample's; None without.
        text_first: whether it gives the text's tokens back before the sample's.
    """

    names: tuple[str, ...]
    text: str | None = None
    text_first: bool = False

    @property
    def hidden(self) -> str:
        """The argument with the sample's tokens: always the first."""
        return self.names[0]


@cache
def form(kind: Any) -> Form:
    """The form of a class of blocks, read off its last return statement.

    Diffusers' own register of blocks lacks half of them, and is wrong on some.
    """
    names = tuple(inspect.signature(kind.forward).parameters)[1:]
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):  # made without a file
        return Form(names)
    returns = [node for node in ast.walk(tree) if isinstance(node, ast.Return)]
    value = max(returns, key=lambda node: node.lineno).value if returns else None
    given = [ast.unparse(entry) for entry in value.elts] if isinstance(value, ast.Tuple) else []
    others = [name for name in given if name in names[1:]]
    if len(given) == 2 and names[0] in given and others:
        return Form(names, others[0], text_first=given[0] == others[0])
    return Form(names)


def blocks(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a network, in the order in which they run; none for a U-Net."""
    lists = [getattr(module, name, None) for name in LISTS]
    found = [block for each in lists if isinstance(each, nn.ModuleList) for block in each]
    between = getattr(module, "temporal_transformer_blocks", None)
    if isinstance(between, nn.ModuleList):  # one after each of the others
        return [block for pair in zip(found, between, strict=True) for block in pair]
    return found


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
                for index, layer in enumerate(self._attentions()):
                    stack.enter_context(hooked(layer, NAME + "_attention", self._attention(index)))
            if self._wraps_blocks():
                for index, block in enumerate(self.blocks):
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
        run, count = self.run, len(self.blocks)

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
