"""What counts as a continuation that parses."""

from __future__ import annotations

import inspect
import random
import textwrap

import pytest

from hasten.measure import parsing
from hasten.measure.parsing import parse_share, parses

PROMPT = "import os\n\n\ndef walk(folder):\n    "


@pytest.mark.parametrize(
    "continuation",
    [
        "return folder\n",
        "return folder\n\n\ndef next_on",  # the last line is cut off: it may be half a name
        "names = []\n    for name in os.listdir(folder):\n",  # a header without its body yet
        "try:\n        os.stat(folder)\n",  # try without except yet
        "items = [\n        1,\n        2,\n",  # an open bracket, judged by grammar
        '"""Walk."""\n    return 1\n    x = """half a str',
        "return folder\n@decorated\n",
        "return '\\d'\n",  # an odd escape is a warning, not an error
        "return folder\r\n    x = 1\r\n",
        "x = (folder +\n         1)\n",
    ],
)
def test_right_so_far(continuation: str) -> None:
    assert parses(PROMPT + continuation, prompt_chars=len(PROMPT)) is True


@pytest.mark.parametrize(
    "continuation",
    [
        "return return\n",
        "return (folder\n\ndef other():\n    pass\n",  # no `def` in brackets
        "x = 1\n      y = 2\n",
        "x = 1 +\n    y = 2\n",
        "x = 'abc\n    y = 2\n",
        "x = )\n",
        "x = \x00\n",
        "((" * 300 + "\n",
        "return folder\n  else:\n",
    ],
)
def test_wrong_before_the_end(continuation: str) -> None:
    assert parses(PROMPT + continuation, prompt_chars=len(PROMPT)) is False


@pytest.mark.parametrize(
    "continuation",
    ["", "ret", "# only a comment\n", '"""never closed,\nso ((( anything goes\nfor ever\n'],
)
def test_nothing_was_said_that_grammar_can_judge(continuation: str) -> None:
    assert parses(PROMPT + continuation, prompt_chars=len(PROMPT)) is False


@pytest.mark.parametrize(
    "prompt",
    [
        "        x = 1\n    y = 2\n",  # a window from the middle of a block
        'def f():\n    """Inside a doc',
        "x = = 1\n",
    ],
)
def test_a_prompt_that_allows_no_judgement(prompt: str) -> None:
    assert parses(prompt + "z = 1\n", prompt_chars=len(prompt)) is None


def test_whole_sources() -> None:
    assert parses("x = 1\n") is True
    assert parses("") is False


def test_real_code_cut_anywhere_parses() -> None:
    """Real continuations must nearly all pass, else the metric measures its own faults."""
    source = inspect.getsource(textwrap) + inspect.getsource(random)
    rng = random.Random(0)
    answers = []
    for _ in range(40):
        cut = rng.randrange(6000, 25_000)
        answers.append(parses(source[:cut], prompt_chars=cut - 500))
    judged = [answer for answer in answers if answer is not None]
    assert len(judged) >= 20
    assert sum(judged) >= 0.9 * len(judged)


def test_parse_share() -> None:
    good, bad = PROMPT + "return 1\n", PROMPT + "return return\n"
    found = parse_share([good, good, bad, "  x\n y\nz\n"], [len(PROMPT)] * 3 + [6])
    assert found.value == pytest.approx(2 / 3)
    assert found.num_units == 3 and found.interval is not None
    with pytest.raises(ValueError, match="not a share"):
        parse_share([])


def test_lines_end_at_newlines_only() -> None:
    assert parsing.line_starts("a\n\x0cb\r\nc") == [0, 2, 6]
