"""What a kind of block takes and gives back, read off its code."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass
from functools import cache
from typing import Any


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
