"""Does a generated piece of Python parse? What counts is said at `parses`."""

from __future__ import annotations

import ast
import io
import tokenize
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from hasten.measure.stats import Estimate, proportion

# CPython's own switch behind the interactive prompt (codeop): an input that is right so far but
# ends too early raises "incomplete input" instead of the ordinary error.
_ALLOW_INCOMPLETE = 0x4000


def parses(source: str, *, prompt_chars: int = 0) -> bool | None:
    """Whether a Python continuation is well-formed as far as it goes.

    `source` is prompt and continuation together, `prompt_chars` the length of the prompt. A
    continuation that was cut off by a token limit is not to blame for its end, so:

    * the last line is dropped unless it ends in a newline: it may be half a name;
    * the rest must have no syntax error before its end. Ending too early is forgiven (an open
      bracket, a block header without its body, `try` without `except`), anything else is not;
    * something must have been said that grammar can judge: a statement completed inside the
      continuation (a newline outside brackets and strings), or whole lines of an open bracket. A
      quote that is opened and never closed would otherwise swallow any rubbish. Continuations need
      room for that: 64 tokens or more.

    True or False; None where the prompt allows no judgement, which is then so for every model: it
    is already wrong (a window that starts in the middle of a block) or ends inside a docstring,
    where anything goes.
    """
    prompt = source[:prompt_chars]
    if _grammar(prompt[: prompt.rfind("\n") + 1]) == "wrong" or _scan(prompt).ends_in == "string":
        return None
    whole_lines = source[: source.rfind("\n") + 1]
    if _grammar(whole_lines) == "wrong":
        return False
    scan = _scan(whole_lines)
    if scan.ends_in == "bracket" and len(whole_lines) > prompt_chars:
        return True
    return any(end > prompt_chars for end in scan.statement_ends)


def parse_share(sources: Iterable[str], prompt_chars: Iterable[int] | None = None) -> Estimate:
    """Share of continuations that parse, with Wilson's interval, over those that can be judged.

    To compare two models use the answers of `parses` in pairs (`stats.recovery_of_shares`).
    Raises ValueError where none can be judged.
    """
    texts = list(sources)
    lengths = [0] * len(texts) if prompt_chars is None else list(prompt_chars)
    pairs = zip(texts, lengths, strict=True)
    answers = [parses(text, prompt_chars=length) for text, length in pairs]
    judged = [answer for answer in answers if answer is not None]
    return proportion(sum(judged), len(judged))


def _grammar(source: str) -> str:
    """ "complete", "incomplete" (right so far) or "wrong"."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in strings are not our business
            compile(source, "<text>", "exec", flags=ast.PyCF_ONLY_AST | _ALLOW_INCOMPLETE)
    except SyntaxError as error:
        return "incomplete" if error.msg == "incomplete input" else "wrong"
    except (ValueError, RecursionError, MemoryError):  # null bytes, endless nesting
        return "wrong"
    return "complete"


@dataclass(frozen=True)
class _Scan:
    """Offsets just after each newline that ends a statement, and where the text ends."""

    statement_ends: tuple[int, ...]
    ends_in: Literal["code", "bracket", "string"]


def _scan(source: str) -> _Scan:
    starts = line_starts(source)
    found: list[int] = []
    ends_in: Literal["code", "bracket", "string"] = "code"
    try:
        for token in tokenize.generate_tokens(io.StringIO(source, newline="").readline):
            if token.type == tokenize.NEWLINE and token.string:
                row, column = token.end
                found.append(starts[row - 1] + column)
    except (tokenize.TokenError, SyntaxError) as error:
        # "EOF in multi-line string" or "... statement" in Python 3.11; "unterminated triple-quoted
        # string literal" in later ones.
        message = str(error)
        if "string" in message:
            ends_in = "string"
        elif "EOF" in message:
            ends_in = "bracket"
    return _Scan(tuple(found), ends_in)


def line_starts(text: str) -> list[int]:
    """Offset of the first character of each line, as `tokenize` counts lines.

    Only a newline ends a line here: str.splitlines also breaks at form feeds and the like.
    """
    starts = [0]
    place = text.find("\n")
    while place >= 0:
        starts.append(place + 1)
        place = text.find("\n", place + 1)
    return starts
