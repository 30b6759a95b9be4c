"""Results become JSON, and nothing else does."""

from __future__ import annotations

import enum
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from hasten.measure.clock import Spread
from hasten.measure.plain import plain


class Colour(enum.Enum):
    RED = "red"


@dataclass(frozen=True)
class Point:
    x: float
    names: tuple[str, ...]


def test_everything_becomes_json() -> None:
    value = {
        1: Point(math.nan, ("a",)),
        "numpy": [np.float32(0.5), np.int64(3), np.bool_(True), np.array([1.0, math.inf])],
        "torch": torch.tensor([[1, 2]]),
        "set": {3, 1, 2},
        "enum": Colour.RED,
        "path": Path("a/b"),
        "own": Spread(1.0, (0.5, 2.0)),
        "none": None,
    }
    found = plain(value)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found == {
        "1": {"x": None, "names": ["a"]},
        "numpy": [0.5, 3, True, [1.0, None]],
        "torch": [[1, 2]],
        "set": [1, 2, 3],
        "enum": "red",
        "path": "a/b",
        "own": {"median": 1.0, "iqr": [0.5, 2.0]},
        "none": None,
    }


def test_what_cannot_be_read_back_is_refused() -> None:
    for value in (object(), b"bytes", Point, lambda: None):
        with pytest.raises(TypeError, match="cannot be written"):
            plain({"x": value})
