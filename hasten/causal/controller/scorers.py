"""Step scorers for search: how promising a partial solution is, as a number from 0 to 1.

A scorer takes candidates (all successors of one node at once, so that a reward model can run them
as a batch) and returns one number each. Plans name scorers; a program adds its own with
`register_scorer("mine", function)` before it applies the plan.
"""

from __future__ import annotations

import codeop
import difflib
import math
import warnings
import zlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from hasten.errors import HastenError, PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Candidate:
    """A partial or whole solution to be scored.

    Attributes:
        prompt_ids: ids of the prompt, without padding.
        ids: ids generated after it.
        log_probs: natural logarithm of the model's own probability of each of `ids`, from raw
            logits.
        step_ends: how many of `ids` there were at the end of each step.
        finished: the call's own stop (end of text, a stop string, the length) was met.
        tokenizer: the subject's, if it has one.
    """

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    step_ends: tuple[int, ...]
    finished: bool
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)

    @cached_property
    def prompt(self) -> str:
        """The prompt as text."""
        return decoded(self.tokenizer, self.prompt_ids)

    @cached_property
    def text(self) -> str:
        """The continuation as text, special tokens left out."""
        return decoded(self.tokenizer, self.ids)


Scorer = Callable[[Sequence[Candidate]], Sequence[float]]

_SCORERS: dict[str, Scorer] = {}


def register_scorer(name: str, scorer: Scorer) -> Scorer:
    """Make a scorer known under a name that plans can use; a known name is taken over."""
    if not name.isidentifier():
        raise PlanError(f"A scorer's name must be a plain word, not {name!r}.")
    _SCORERS[name] = scorer
    return scorer


def find_scorer(name: str) -> Scorer:
    """The scorer of that name; an unknown one raises with the nearest ones."""
    if name not in _SCORERS:
        near = difflib.get_close_matches(name, _SCORERS, n=2, cutoff=0.4)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise PlanError(
            f"Unknown scorer {name!r}.{hint} There are {', '.join(sorted(_SCORERS))}; "
            "register_scorer(name, function) adds one."
        )
    return _SCORERS[name]


def scores_of(name: str, scorer: Scorer, candidates: Sequence[Candidate]) -> list[float]:
    """Call a scorer and check what it returns: one number from 0 to 1 for each candidate."""
    values = [float(value) for value in scorer(candidates)]
    if len(values) != len(candidates):
        raise HastenError(
            f"Scorer {name!r} returned {len(values)} numbers for {len(candidates)} candidates."
        )
    for value in values:
        if not 0.0 <= value <= 1.0:  # catches NaN too
            raise HastenError(f"Scorer {name!r} returned {value}; a score must lie from 0 to 1.")
    return values


def decoded(tokenizer: PreTrainedTokenizerBase | None, ids: Sequence[int]) -> str:
    """Text of some ids as it stands, special tokens left out."""
    if tokenizer is None:
        raise HastenError(
            "Scoring or cutting steps by text needs the model's tokenizer, and this model came without one; "
            "give tokenizer= to apply, or use step_border='' and a scorer that reads ids only."
        )
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


# ------------------------------------------------------------------------------- what hasten offers


def parses(candidates: Sequence[Candidate]) -> list[float]:
    """1 while prompt and continuation are the beginning of valid Python, else 0.

    The last line counts once it ends in a newline. A prompt that is wrong already (a window cut
    out of a file, or no Python at all) allows no judgement: 0.5 for all.
    """
    return [_parses(candidate) for candidate in candidates]


def _parses(candidate: Candidate) -> float:
    if not _begins_python(_whole_lines(candidate.prompt)):
        return 0.5
    return float(_begins_python(_whole_lines(candidate.prompt + candidate.text)))


def _whole_lines(text: str) -> str:
    return text[: text.rfind("\n") + 1]


@lru_cache(maxsize=64)
def _begins_python(source: str) -> bool:
    """Whether a source has no error before its end; ending too early is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in strings and the like
            codeop.compile_command(source, "<candidate>", "exec")
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return False
    return True


def likelihood(candidates: Sequence[Candidate]) -> list[float]:
    """The model's own probability per token, averaged geometrically over the whole continuation.

    Averaged over the tokens, so that it can be compared between depths. No verifier: it prefers
    what the model finds easy.
    """
    return [math.exp(math.fsum(c.log_probs) / max(1, len(c.log_probs))) for c in candidates]


def parses_likelihood(candidates: Sequence[Candidate]) -> list[float]:
    """`likelihood`, and 0 for what is no Python any more."""
    pairs = zip(parses(candidates), likelihood(candidates), strict=True)
    return [0.0 if parsed == 0.0 else value for parsed, value in pairs]


def constant(candidates: Sequence[Candidate]) -> list[float]:
    """0.5 for everything: the search goes by path cost and order alone. A rival."""
    return [0.5] * len(candidates)


def chance(candidates: Sequence[Candidate]) -> list[float]:
    """A number that only looks like a score: the same for the same ids, evenly spread. A rival."""
    return [zlib.crc32(array("q", c.ids).tobytes()) / 0xFFFFFFFF for c in candidates]


for _scorer in (parses, likelihood, parses_likelihood, constant, chance):
    register_scorer(_scorer.__name__, _scorer)
