"""Can a model still find a name that was defined far back? Test items from real source files.

A prompt ends just before a name is used again. The name occurs further back in the prompt, but not
near its end, so a cache that has lost the distant part cannot spell it.
"""

from __future__ import annotations

import ast
import builtins
import io
import keyword
import random
import tokenize
import warnings
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from hasten.measure.parsing import line_starts

Kind = Literal["import", "function", "class", "attribute", "constant"]

MIN_NAME_CHARS = 4
"""Shorter names are guessed too easily."""


@dataclass(frozen=True)
class RetrievalItem:
    """A prompt and what must follow it.

    `expected` is the rest of `name` after the letters that the prompt already gives, with a space
    before it where the source has one: prompts never end in a space, which most tokenizers keep
    with the word that follows. `distance_chars` is how far before the end of the prompt the name
    last stood, counted from the end of that occurrence.
    """

    prompt: str
    expected: str
    name: str
    kind: Kind
    distance_chars: int
    source_index: int


def retrieved(item: RetrievalItem, continuation: str) -> bool:
    """Whether a continuation of the prompt starts with exactly the expected name.

    A longer identifier that only begins with the name does not count.
    """
    # Where the space went to the continuation, a model may give more of it than the source.
    text, wanted = continuation, item.expected
    if wanted.startswith(" "):
        if not text.startswith(" "):
            return False
        text, wanted = text.lstrip(" "), wanted.lstrip(" ")
    after = text[len(wanted) : len(wanted) + 1]
    return text.startswith(wanted) and not (after == "_" or after.isalnum())


def retrieval_items(
    texts: Sequence[str],
    *,
    count: int,
    min_distance_chars: int,
    seed: int,
    given_letters: int = 0,
    max_prompt_chars: int | None = None,
) -> list[RetrievalItem]:
    """Up to `count` items from Python sources; fewer where the texts hold no more.

    Names are imports, functions, classes, attributes of self and module-level constants that the
    file itself defines. Left out: names shorter than four letters, builtins, dunders, names that
    also occur in more than a tenth of the other texts (a trained model knows those by heart), and
    uses at the start of a line. The name occurs nowhere in the last `min_distance_chars` of the
    prompt, not even inside a longer word or a comment, and does occur before that.

    `given_letters` of the name end the prompt (0: none). `max_prompt_chars` bounds the prompt,
    which then starts at a top-level statement that still leaves the name inside. Each name is used
    once per text, and texts take turns; the choice depends on `seed` alone. Texts that do not
    parse are skipped.
    """
    if count < 0 or min_distance_chars < 0 or given_letters < 0:
        raise ValueError("count, distance and given letters must not be negative")
    rng = random.Random(seed)
    sources = [_Source.read(text) for text in texts]
    common = _common_names(sources)
    queues: list[list[RetrievalItem]] = []
    for index, source in enumerate(sources):
        if source is None:
            continue
        uses = [use for use in source.uses if use.name not in common]
        rng.shuffle(uses)
        found: list[RetrievalItem] = []
        seen: set[str] = set()
        for use in uses:
            if len(found) == count:
                break
            if use.name in seen:
                continue
            item = source.item(use, index, min_distance_chars, given_letters, max_prompt_chars)
            if item is not None:
                seen.add(use.name)
                found.append(item)
        queues.append(found)
    rng.shuffle(queues)
    items: list[RetrievalItem] = []
    depth = 0
    while len(items) < count and any(depth < len(queue) for queue in queues):
        items += [queue[depth] for queue in queues if depth < len(queue)]
        depth += 1
    return items[:count]


@dataclass(frozen=True)
class _Use:
    name: str
    kind: Kind
    offset: int


@dataclass(frozen=True)
class _Source:
    """One parsed text: where its own names stand, and where its top-level statements start."""

    text: str
    names: frozenset[str]
    uses: tuple[_Use, ...]
    statement_starts: tuple[int, ...]

    @classmethod
    def read(cls, text: str) -> _Source | None:
        """Parse and tokenize; None where the text is not Python."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(text)
            tokens = list(tokenize.generate_tokens(io.StringIO(text, newline="").readline))
        except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError):
            return None
        starts = line_starts(text)
        kinds = _defined_names(tree)
        uses = []
        for before, token in pairwise(tokens):
            if token.type != tokenize.NAME or token.string not in kinds:
                continue
            kind, defined_line = kinds[token.string]
            if token.start[0] <= defined_line or before.string in _DEFINING:
                continue
            # An attribute follows a dot; the other kinds do not, or they are another object's.
            dotted = before.string == "."
            line_start = before.end[0] != token.start[0] or before.type in _LAYOUT
            if line_start or dotted != (kind == "attribute"):
                continue
            uses.append(_Use(token.string, kind, starts[token.start[0] - 1] + token.start[1]))
        return cls(
            text=text,
            names=frozenset(token.string for token in tokens if token.type == tokenize.NAME),
            uses=tuple(uses),
            # A decorated definition starts at its first decorator.
            statement_starts=tuple(
                starts[min([node.lineno, *_decorator_lines(node)]) - 1] for node in tree.body
            ),
        )

    def item(
        self,
        use: _Use,
        index: int,
        min_distance: int,
        given: int,
        max_prompt: int | None,
    ) -> RetrievalItem | None:
        """The item that ends at this use, or None where a rule forbids it."""
        given = min(given, len(use.name) - 1)
        cut = use.offset + given
        lead = ""
        if given == 0:
            while self.text[cut - 1 : cut] == " ":
                lead, cut = " ", cut - 1
        last = self.text.rfind(use.name, 0, use.offset)
        distance = cut - (last + len(use.name))
        if last < 0 or distance < min_distance:
            return None
        start = 0
        if max_prompt is not None and cut > max_prompt:
            # The first top-level statement from which the prompt is short enough.
            place = bisect_left(self.statement_starts, cut - max_prompt)
            if place == len(self.statement_starts):
                return None
            start = self.statement_starts[place]
        if not self._stands_within(use.name, start, use.offset):
            return None
        prompt = self.text[start:cut]
        return RetrievalItem(prompt, lead + use.name[given:], use.name, use.kind, distance, index)

    def _stands_within(self, name: str, start: int, end: int) -> bool:
        """Whether the name occurs in this stretch as a word of its own."""
        place = self.text.find(name, start, end)
        while place >= 0:
            before = self.text[place - 1 : place] if place else ""
            after = self.text[place + len(name) : place + len(name) + 1]
            if not _is_word(before) and not _is_word(after):
                return True
            place = self.text.find(name, place + 1, end)
        return False


_LAYOUT = {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT}


_DEFINING = {"def", "class", "import", "as"}


def _is_word(character: str) -> bool:
    return character == "_" or character.isalnum()


def _defined_names(tree: ast.Module) -> dict[str, tuple[Kind, int]]:
    """Names that the file defines: what they are, and the line of the first definition."""
    found: dict[str, tuple[Kind, int]] = {}

    def add(name: str, kind: Kind, line: int) -> None:
        telling = len(name) >= MIN_NAME_CHARS and not name.startswith("__")
        if not telling or keyword.iskeyword(name) or hasattr(builtins, name):
            return
        if name not in found or line < found[name][1]:
            found[name] = (kind, line)

    methods: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                add(alias.asname or alias.name.partition(".")[0], "import", node.lineno)
        elif isinstance(node, ast.ClassDef):
            add(node.name, "class", node.lineno)
            methods.update(id(member) for member in node.body)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            # Methods are reached through an object, plain functions by their bare name. A class
            # comes before its members here, since ast.walk goes level by level.
            add(node.name, "attribute" if id(node) in methods else "function", node.lineno)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        ):
            add(node.attr, "attribute", node.lineno)
    for statement in tree.body:
        targets: list[ast.expr] = []
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        for target in targets:
            if isinstance(target, ast.Name):
                add(target.id, "constant", target.lineno)
    return found


def _decorator_lines(node: ast.stmt) -> list[int]:
    return [decorator.lineno for decorator in getattr(node, "decorator_list", [])]


def _common_names(sources: Sequence[_Source | None]) -> set[str]:
    """Names that occur in more than a tenth of the other texts, at least in one."""
    counts: dict[str, int] = {}
    for source in sources:
        for name in source.names if source else ():
            counts[name] = counts.get(name, 0) + 1
    allowed = max(1, (len(sources) - 1) // 10 + 1)
    return {name for name, number in counts.items() if number > allowed}
