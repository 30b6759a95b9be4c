"""Tables for the terminal: nothing is cut short, nothing crashes, every number is labelled."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from rich.console import Console
from rich.table import Table

from hasten.measure import view
from hasten.measure.ledger import Entry
from hasten.measure.tables import bench_table, ledger_table, limits_table, pairs_table

DASH = view.DASH


@pytest.fixture
def result() -> dict[str, Any]:
    """Invented figures (see the note inside the file)."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("measure_sample.json").read_text())
    return found


def shown(table: Table, width: int = 120, *, colours: bool = False) -> str:
    file = io.StringIO()
    system: Literal["standard"] | None = "standard" if colours else None
    Console(file=file, width=width, force_terminal=colours, color_system=system).print(table)
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 120, 200])
def test_figures_are_whole_at_any_width(result: dict[str, Any], width: int) -> None:
    words = shown(bench_table(result), width)
    assert "…" not in words
    assert all(len(line) <= width for line in words.splitlines())
    for figure in ("1.62x", f"1.55{DASH}1.70", f"331{DASH}352", "41 %", "3.90x", "98.1 %",
                   "697 MiB", "MiB"):  # fmt: skip
        assert figure in words
    for label in ("measured", "modelled"):
        assert label in words


def test_figures_of_pictures_are_whole_in_80_columns() -> None:
    """Their rates and qualities are wider than those of texts."""
    rate = {"images_per_second": {"median": 0.924, "iqr": [0.91, 0.957]}, "peak_bytes": 502e6}
    row = {
        "plan": "reuse_always(interval=3)",
        "ratio": {"median": 12.6, "low": 12.43, "high": 12.65},
        "ceiling": 37.79,
        "ceiling_detail": {"label": "measured"},
        "loss_class": "lossy",
        "quality": {"psnr": {"value": 79.3, "interval": [56.0, 100.0], "unit": "dB"}},
    }
    words = shown(bench_table({"baseline": rate, "rows": [row | rate]}), 80)
    assert all(len(line) <= 80 for line in words.splitlines())
    for figure in (
        "479 MiB",
        f"0.910{DASH}0.957",
        f"12.43{DASH}12.65",
        "79.3 dB",
        f"56.0{DASH}100.0",
    ):
        assert figure in words


def test_measured_and_modelled_ceilings_never_share_a_column(result: dict[str, Any]) -> None:
    headings = [str(column.header) for column in bench_table(result).columns]
    ceilings = [heading for heading in headings if heading.startswith("ceiling")]
    assert [heading.split("\n")[-1] for heading in ceilings] == ["modelled", "measured"]
    del result["rows"][2]
    headings = [str(column.header) for column in bench_table(result).columns]
    assert sum(heading.startswith("ceiling") for heading in headings) == 1


def test_verdicts_reasons_proofs_and_conditions(result: dict[str, Any]) -> None:
    words = " ".join(shown(bench_table(result), 200).split())
    for verdict in ("faster", "no gain", "inactive", "broken", "proof failed", "not proved"):
        assert verdict in words
    assert "the prompt is only 6 % of the time here" in words
    for condition in ("Example CPU", "torch 0.0-test", "threads 2", "seed 0", "--pairs"):
        assert condition in words
    assert "preliminary" not in words
    result["quick"] = True
    assert "preliminary" in shown(bench_table(result), 200)


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"rows": [{}]},
        {"rows": None, "baseline": 3},
        {"rows": [{"plan": "[red]x[/red]", "ratio": {"median": 1.1}, "quality": {"kl": None}}]},
        {"rows": [{"ceiling": float("inf"), "reached": "much", "proof": True}, 7]},
    ],
)
def test_missing_pieces_read_as_a_dash(broken: dict[str, Any]) -> None:
    words = shown(bench_table(broken))
    assert DASH in words and "None" not in words and "nan" not in words
    if broken.get("rows") and broken["rows"][0].get("plan"):
        assert "[red]x[/red]" in words  # a plan is text, not markup
        assert "no interval" in words  # and its ratio must not look certain


def test_pairs(result: dict[str, Any]) -> None:
    words = shown(pairs_table(result))
    for figure in ("alpha + beta", "1.79x", "sub-additive", "refused", "both change the cache"):
        assert figure in words
    shown(pairs_table({}))


def test_limits(result: dict[str, Any]) -> None:
    words = shown(limits_table(result["limits"]))
    for figure in ("34 GB/s", "171 GB/s", "102 Gop/s", "unsupported", "0.750 µs", "measured"):
        assert figure in words
    assert "cores busy" not in words
    assert "cores busy" in shown(limits_table({**result["limits"], "other_load": 1.4}))
    assert DASH in shown(limits_table({}))


def ledger_entry(row: dict[str, Any], **fields: Any) -> Entry:
    values: dict[str, Any] = {
        "plan": "alpha(budget=0.25)",
        "techniques": ("alpha",),
        "subject": "test-data-model",
        "subject_hash": "feed",
        "command": "",
        "threads": 2,
        "seed": 0,
        "row": row,
    }
    return Entry(**{**values, **fields})


def test_ledger_shows_claims_and_greys_what_is_stale(result: dict[str, Any]) -> None:
    card = SimpleNamespace(
        claims=[SimpleNamespace(what="speed-up", value=2.46, where="another model")]
    )
    row = result["rows"][0]
    words = shown(ledger_table([ledger_entry(row)], {"alpha": card}), 160)
    for figure in ("1.12x", "98.1 %", "speed-up 2.46x (another model)", "cited", "measured"):
        assert figure in words
    assert "another machine" not in words
    stale = ledger_table([ledger_entry(row, fingerprint="elsewhere")], {"alpha": card})
    assert "another machine" in shown(stale, 160)
    assert "\x1b[2m" in shown(stale, 160, colours=True)
    assert stale.rows[0].style == "dim"


def test_ledger_of_several_techniques_says_whose_claim_it_is(result: dict[str, Any]) -> None:
    cards = {name: {"claims": [{"what": "speed-up", "value": 2}]} for name in ("a", "b")}
    both = ledger_entry(result["rows"][0], techniques=("a", "gone", "b"))
    words = shown(ledger_table([both], cards), 160)
    assert "a: speed-up 2.00x" in words and "b: speed-up 2.00x" in words
    assert "hasten bench" in shown(ledger_table([]))
    shown(ledger_table([ledger_entry({})]))
