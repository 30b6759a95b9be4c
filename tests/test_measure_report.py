"""The HTML report: complete, self-contained, and never brought down by a missing piece."""

from __future__ import annotations

import copy
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hasten.errors import HastenError
from hasten.measure.plots import canvas
from hasten.measure.report import headline, report_html, write_report

pytest.importorskip("matplotlib")


@pytest.fixture
def result() -> dict[str, Any]:
    """Invented figures (see the note inside the file)."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("measure_sample.json").read_text())
    return found


@pytest.fixture(scope="module")
def page() -> str:
    """The report of the sample, made once."""
    return report_html(json.loads(Path(__file__).with_name("measure_sample.json").read_text()))


class Checker(HTMLParser):
    """Collects tags and ids, and sees that what opens is closed."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker


def test_it_is_well_formed_and_ids_are_unique(page: str) -> None:
    checker = checked(page)
    assert len(set(checker.ids)) == len(checker.ids)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', page))
    assert used <= set(checker.ids)


def test_it_needs_nothing_from_elsewhere(page: str) -> None:
    assert not checked(page).tags & {"script", "link", "img", "iframe", "object", "embed"}
    assert "@import" not in page and "@font-face" not in page and "url(http" not in page
    addresses = set(re.findall(r"https?://[^\"' >)]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert str(Path.home()) not in page


def test_it_adapts_to_dark_and_narrow_screens(page: str) -> None:
    assert "prefers-color-scheme: dark" in page
    assert page.count('class="plot wide"') == page.count('class="plot narrow"') == 6
    # All colours are the page's own, so that they change with it.
    assert not re.search(r"#0101[0-9a-f]{2}", page)
    assert "var(--ink)" in page


def test_it_shows_every_part(page: str) -> None:
    words = " ".join(checked(page).words)
    for heading in (
        "Results", "Speed beside the ceiling", "Tokens per second", "Quality against speed",
        "Memory", "Quality in full", "Activity", "Proofs", "Claims beside measurements", "Pairs",
        "Limits of the machine", "Conditions",
    ):  # fmt: skip
        assert heading in words
    for figure in ("1.62x", "1.55\N{EN DASH}1.70", "98.1 %", "2.30x", "48,210", "3.90x", "697 MiB"):
        assert figure in words
    for condition in ("Example CPU (test data)", "torch 0.0-test", "hasten bench test-data-model"):
        assert condition in words
    assert {"measured", "modelled", "cited"} <= set(words.split())


def test_every_column_of_numbers_is_labelled(page: str) -> None:
    for heading in re.findall(r'<th class="n">(.*?)</th>', page):
        assert re.search(r'class="pill">(measured|modelled|cited)<', heading), heading


def test_the_headline_is_careful(result: dict[str, Any]) -> None:
    words = headline(result)
    assert words.startswith("beta runs at 1.62x") and "1.55\N{EN DASH}1.70" in words
    assert "alpha + beta" not in words
    result["rows"][1]["proof"]["passed"] = False  # a fast plan that is not exact wins nothing
    assert headline(result).startswith("alpha(budget=0.25) runs at 1.12x")
    result["rows"][0]["proof"] = None
    assert "was not proved" in headline(result)
    assert headline({"rows": result["rows"][2:]}).startswith("None of the plans")
    assert headline({}) == "No plan was measured."


def test_few_rounds_are_called_preliminary(result: dict[str, Any], page: str) -> None:
    assert "Preliminary" not in page
    result["rows"] = result["rows"][:1]
    result["rows"][0]["ratio"] |= {"rounds": 3, "coverage": 0.75}
    few = report_html(result)
    assert "Preliminary" in few and "75 % interval" in few


def test_claims_of_a_whole_plan_get_no_ratio(result: dict[str, Any]) -> None:
    claims = [
        {"technique": name, "what": "speed-up", "value": 9.0, "where": "x"} for name in ("p", "q")
    ]
    result["rows"] = [result["rows"][1] | {"plan": "p", "claims": claims[:1]}]
    result["rows"].append(result["rows"][0] | {"plan": "p + q", "claims": claims})
    page = report_html(result)
    section = page[page.index("Claims beside") : page.index("Pairs")]
    assert section.count("9.00x") == 2  # that of p once, though two rows carry it
    assert section.count("1.62x") == 1


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"rows": [{}]},
        {"rows": None, "baseline": 3, "limits": [], "pairs": "no", "machine": []},
        {"rows": [{"plan": "p", "ratio": {"median": 1.2}}, None, 3]},
        {"rows": [{"plan": "p", "ratio": {"median": float("nan"), "low": "x"}, "activity": 3}]},
        {"rows": [{"plan": "p", "ratio": {"median": 9.0, "low": 8.0, "high": 10.0},
                   "ceiling": 500.0, "quality": {"perplexity": None, "kl": 0.1}}]},
        {"rows": [{"plan": "p" * 300, "ratio": {"median": 0.01},
                   "tokens_per_second": {"median": 1.0}}],
         "baseline": {"tokens_per_second": {"median": 100.0}, "limit_fraction": 0.001}},
        {"pairs": [{"a": "x", "b": "y"}, {"a": "x"}, {}]},
    ],
)  # fmt: skip
def test_missing_pieces_never_crash(broken: dict[str, Any]) -> None:
    checked(report_html(broken))


def test_each_piece_may_be_missing(result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    result["rows"] = result["rows"][:1]
    result["pairs"] = result["pairs"][:1]
    with monkeypatch.context() as patch:
        patch.setattr(canvas, "_inline", lambda figure, *_: "<svg></svg>")  # drawn, not written
        for key in list(result):
            checked(report_html({k: v for k, v in result.items() if k != key}))
    bare = copy.deepcopy(result)
    for key in list(bare["rows"][0]):
        bare["rows"][0][key] = None
    page = report_html(bare)
    assert "None" not in " ".join(checked(page).words).replace("None of the plans", "")


def test_what_was_typed_is_text(result: dict[str, Any]) -> None:
    evil = "<script>alert(1)</script> $x_1$ \"'& {0}"
    result["subject"]["name"] = result["command"] = evil
    result["rows"][1] |= {"plan": evil, "reason": evil, "activity": {evil: 1}}
    result["pairs"][0]["a"] = evil
    page = report_html(result)
    assert "<script" not in page and "&lt;script&gt;" in page
    checked(page)


def test_it_is_written_whole(result: dict[str, Any], tmp_path: Path) -> None:
    target = write_report(result, tmp_path / "out" / "report.html")
    assert target.read_text(encoding="utf-8").endswith("</html>\n")
    (tmp_path / "file").write_text("")
    with pytest.raises(HastenError, match="cannot write"):
        write_report(result, tmp_path / "file" / "report.html")


def test_without_matplotlib_the_extra_is_named(
    result: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(HastenError, match=r"hasten\[report\]"):
        write_report(result, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []
