"""Number formats, and looking into results that may lack anything."""

from __future__ import annotations

import math

import pytest

from hasten.measure import view


def test_look_and_number() -> None:
    data = {"a": {"b": [1.5, "x", None, True, math.nan]}}
    assert view.number(data, "a", "b", 0) == 1.5
    for place in (1, 2, 3, 4, 5, -9):
        assert view.number(data, "a", "b", place) is None
    assert view.look(data, "a", "b", "c") is None
    assert view.look("text", 0) is None
    assert view.objects({"rows": [{}, 1, None, {"a": 1}]}, "rows") == [{}, {"a": 1}]
    assert view.objects({"rows": "text"}, "rows") == []


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), (0.01234, "0.0123"), (12.345, "12.3"), (99.5, "99.5"), (12345.6, "12,346"),
     (1.0, "1"), (3e-7, "3.0e-07"), (-2.5, "-2.50"), (None, view.DASH), (math.inf, view.DASH)],
)  # fmt: skip
def test_plain_number(value: float | None, words: str) -> None:
    assert view.plain_number(value) == words


def test_units() -> None:
    assert view.times(1.625) == "1.62x" and view.times(250.0) == "250x"
    assert view.percent(0.434) == "43 %" and view.percent(0.004) == "0.4 %"
    assert view.percent(-0.36) == "\N{MINUS SIGN}36 %" and view.percent(0.0) == "0 %"
    assert view.recovery_words(0.9961) == "99.6 %"
    assert view.size(512) == "512 B" and view.size(5 * 2**20) == "5 MiB"
    assert view.size(7 * 2**40) == "7 TiB"
    assert view.rate(3.4e10, "B/s") == "34 GB/s" and view.rate(5e15, "B/s") == "5,000 TB/s"
    assert view.span(1.0, None) == view.DASH
    for form in (view.times, view.percent, view.size, view.recovery_words):
        assert form(None) == view.DASH


def test_limit_fraction_of_a_row() -> None:
    result = {"baseline": {"tokens_per_second": {"median": 100.0}, "limit_fraction": 0.5}}
    row = {"tokens_per_second": {"median": 150.0}}
    assert view.rate_limit(result) == 200.0
    assert view.limit_fraction(result, row) == 0.75
    assert view.limit_fraction(result, {"limit_fraction": 0.6}) == 0.6
    assert view.limit_fraction({}, row) is None


def test_quality_is_read_in_any_shape() -> None:
    row = {
        "quality": {
            "agreement": {"share": 0.5, "identical": False},
            "kl": 0.1,
            "retrieval": {"value": 0.4, "recovery": 0.8, "interval": [0.5, 1.1], "num_units": 30},
            "perplexity": {"value": 7.0, "recovery": None},
        }
    }
    names = [quality.metric for quality in view.qualities(row)]
    assert names == ["perplexity", "retrieval", "agreement", "kl"]
    main = view.main_quality(row)
    assert main is not None and (main.metric, main.low, main.high) == ("retrieval", 0.5, 1.1)
    assert main.remarks == "30 units"
    assert view.qualities(row)[2].value == 0.5
    assert view.qualities(row)[2].remarks == "identical: no"
    assert view.main_quality({"quality": {}}) is None


@pytest.mark.parametrize(
    ("identical", "words"),
    [
        (0, "8 units"),
        (3, "8 units, 3 left out of the mean, being identical to the original's"),
        (8, "8 units, all identical to the original's"),
    ],
)
def test_identical_pictures_are_said(identical: int, words: str) -> None:
    entry = {"value": 30.0, "unit": "dB", "num_units": 8, "num_identical": identical}
    (quality,) = view.qualities({"quality": {"psnr": entry}})
    assert quality.remarks == words and quality.words == "30 dB"


def test_claims() -> None:
    assert (
        view.claim_words({"what": "speed-up", "value": 2.3, "where": "there"})
        == "speed-up 2.30x (there)"
    )
    assert view.claim_words({"what": "accuracy kept", "value": 0.99}) == "accuracy kept 0.990"
    assert view.claim_words({"what": "lossless", "value": None}) == "lossless"


def test_preliminary() -> None:
    assert view.is_preliminary({"rows": [{"ratio": {"rounds": 4}}]})
    assert view.is_preliminary({"quick": True})
    assert not view.is_preliminary({"rows": [{"ratio": {"rounds": 5}}, {}]})
    assert view.coverage([{"ratio": {"coverage": 0.9375}}, {}]) == "94 %"
    assert view.coverage([]) == "95 %"
