"""Retrieval items: what a prompt holds, and where."""

from __future__ import annotations

import argparse
import inspect
import re
import textwrap
import zipfile
from functools import cache

import pytest

from hasten.measure.parsing import parses
from hasten.measure.retrieval import RetrievalItem, retrieval_items, retrieved

FAR = 1000


@cache
def sources() -> tuple[str, ...]:
    return tuple(inspect.getsource(module) for module in (argparse, textwrap, zipfile))


@cache
def items(**options: int) -> tuple[RetrievalItem, ...]:
    return tuple(retrieval_items(sources(), count=40, min_distance_chars=FAR, seed=0, **options))


def test_the_name_is_far_back_and_nowhere_near() -> None:
    assert len(items()) == 40
    for item in items():
        assert re.search(rf"\b{item.name}\b", item.prompt[:-FAR])
        assert item.name not in item.prompt[-FAR:]
        assert item.distance_chars >= FAR


def test_prompt_and_answer_are_the_source() -> None:
    for item in items():
        source = sources()[item.source_index]
        assert source.startswith(item.prompt)  # without a bound the prompt is the file so far
        assert source[len(item.prompt) :].lstrip(" ").startswith(item.expected.strip())
        assert not item.prompt.endswith(" ")
        assert retrieved(item, source[len(item.prompt) :][:80])


def test_bounded_prompts_start_at_a_statement() -> None:
    bounded = items(max_prompt_chars=3000)
    assert len(bounded) >= 20
    for item in bounded:
        assert len(item.prompt) <= 3000
        assert not item.prompt[0].isspace()
        assert re.search(rf"\b{item.name}\b", item.prompt[:-FAR])
        assert parses(item.prompt + "\n", prompt_chars=len(item.prompt)) is not None


def test_given_letters() -> None:
    for item in items(given_letters=2):
        assert item.prompt.endswith(item.name[:2])
        assert item.expected == item.name[2:]
        assert retrieved(item, item.expected + "(x)")


def test_the_choice_depends_on_the_seed_alone() -> None:
    again = retrieval_items(sources(), count=40, min_distance_chars=FAR, seed=0)
    other = retrieval_items(sources(), count=40, min_distance_chars=FAR, seed=1)
    assert tuple(again) == items()
    assert other != again


def test_texts_take_turns_and_names_come_once() -> None:
    few = retrieval_items(sources(), count=6, min_distance_chars=FAR, seed=0)
    assert {item.source_index for item in few} == {0, 1, 2} or len(few) == 6
    pairs = [(item.source_index, item.name) for item in items()]
    assert len(set(pairs)) == len(pairs)


FILLER = "".join(f"filler_{i} = {i}\n" for i in range(100))


def names_of(text: str, **options: int) -> dict[str, str]:
    found = retrieval_items([text], count=99, min_distance_chars=500, seed=0, **options)
    return {item.name: item.kind for item in found}


def test_kinds() -> None:
    text = (
        "import collections as containers\nLIMIT_VALUE = 3\n"
        "def first_helper():\n    pass\n"
        "class SomeThing:\n    def __init__(self):\n        self.attribute_here = 1\n"
        + FILLER
        + "x = (containers, LIMIT_VALUE, first_helper(), SomeThing().attribute_here)\n"
    )
    assert names_of(text) == {
        "containers": "import",
        "LIMIT_VALUE": "constant",
        "first_helper": "function",
        "SomeThing": "class",
        "attribute_here": "attribute",
    }


@pytest.mark.parametrize(
    "text",
    [
        "secret_name = 1\n"
        + FILLER
        + "# secret_name\nx = secret_name\n",  # a comment gives it away
        "secret_name = 1\n"
        + FILLER
        + "my_secret_names = 2\nx = secret_name\n",  # so does a longer one
        FILLER + "x = secret_name\nsecret_name = 1\n",  # used before it is defined
        "__all__ = ['secret_name']\n"
        + FILLER
        + "def secret_name(): pass\n",  # the definition itself
        "abc = 1\n" + FILLER + "x = abc\n",  # too short
        "print_ = print\n" + FILLER + "x = print\n",  # a builtin
        "secret_name = 1\n" + FILLER + "secret_name += 1\n",  # at the start of a line
        "secret_name = 1\n" + FILLER + "x = (\n",  # no Python
        "secret_name = 1\nx = secret_name\n",  # near
    ],
)
def test_what_is_left_out(text: str) -> None:
    assert "secret_name" not in names_of(text)
    assert names_of(text).keys() <= {"print_"}


def test_names_that_every_file_has_are_left_out() -> None:
    text = "logger_name = 1\nown_name_{} = 2\n" + FILLER + "x = (logger_name, own_name_{})\n"
    texts = [text.replace("{}", letter) for letter in "abc"]
    found = retrieval_items(texts, count=99, min_distance_chars=500, seed=0)
    assert {item.name for item in found} == {"own_name_a", "own_name_b", "own_name_c"}


def item(expected: str) -> RetrievalItem:
    return RetrievalItem("prompt", expected, expected.strip(), "constant", 0, 0)


def test_retrieved() -> None:
    assert retrieved(item("name"), "name")
    assert retrieved(item("name"), "name(1)")
    assert not retrieved(item("name"), "names")
    assert not retrieved(item("name"), "name_2")
    assert not retrieved(item("name"), "nam")
    assert not retrieved(item("name"), " name")  # the space is already in the prompt
    assert retrieved(item(" name"), " name)")
    assert retrieved(item(" name"), "  name")
    assert not retrieved(item(" name"), "name")


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="negative"):
        retrieval_items([], count=-1, min_distance_chars=0, seed=0)
    assert retrieval_items([], count=5, min_distance_chars=0, seed=0) == []
