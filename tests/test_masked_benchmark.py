"""The benchmark of masked models, on a tiny random checkpoint with a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import hasten
from hasten.errors import HastenError
from hasten.measure.ledger import Ledger
from tests import models

MASK = 95
OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "rounds": 5, "prompts": ["def f(x):", "import a"]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = models.tiny_model()
    model.config.is_causal, model.config.mask_token_id = False, MASK
    folder: Path = tmp_path_factory.mktemp("tiny_masked")
    model.save_pretrained(folder)
    models.tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def result(checkpoint: str) -> dict[str, Any]:
    return hasten.bench(
        checkpoint, "freedave", beside=["confidence_threshold(threshold=0.05)"], **OPTIONS
    ).to_dict()


def test_the_object_is_that_of_every_benchmark(result: dict[str, Any]) -> None:
    assert {"machine", "versions", "command", "subject", "limits", "pairs"} <= set(result)
    assert result["subject"]["engine"] == "masked"
    baseline = result["baseline"]
    assert baseline["passes"] == 2 * 8 and baseline["tokens_per_second"]["median"] > 0
    assert 0 < baseline["limit_fraction"] < 1
    (row,), (rival,) = result["rows"], result["beside"]
    assert row["plan"] == "freedave" and rival["plan"].startswith("confidence_threshold")
    for found in (row, rival):
        assert found["activity"]["emitted"] == 16 and found["passes_ratio"] >= 1
        assert found["verdict"] in ("faster", "no gain", "inactive")


def test_lossless_is_proved_and_lossy_is_judged(result: dict[str, Any]) -> None:
    (row,), (rival,) = result["rows"], result["beside"]
    assert row["loss_class"] == "exact" and row["proof"]["passed"]
    assert "static decoding" in row["proof"]["detail"]
    assert row["quality"]["agreement"]["value"] == 1.0
    assert rival["loss_class"] == "lossy" and "infilling" in rival["quality"]


def test_the_table_and_the_report_show_it(result: dict[str, Any], tmp_path: Path) -> None:
    from hasten.benchmark import BenchResult

    found = BenchResult(result)
    assert found.table().row_count == 3
    assert "freedave" in found.save_report(tmp_path / "report.html").read_text()


def test_it_is_in_the_ledger(result: dict[str, Any]) -> None:
    assert {entry.plan for entry in Ledger().entries(technique="freedave")} == {"freedave"}


def test_techniques_of_another_engine_are_refused(checkpoint: str) -> None:
    with pytest.raises(HastenError, match="runs on the masked one"):
        hasten.bench(checkpoint, "medusa", **OPTIONS)


def test_a_block_length_is_kept_to_and_checked() -> None:
    model = "code-dlm"
    for wrong, words in ((5, "does not divide"), (0, "whole number")):
        with pytest.raises(HastenError, match=words):
            hasten.bench(model, max_new_tokens=8, block_length=wrong, record=False)
    with pytest.raises(HastenError, match="fill masks"):
        hasten.bench("code-lm-tiny", block_length=4, record=False)
    found = hasten.bench(
        model,
        "freedave",
        runner="eager",
        max_new_tokens=8,
        block_length=1,
        rounds=5,
        quality=False,
        record=False,
    ).to_dict()
    assert found["workload"]["block_length"] == 1 and found["rows"][0]["proof"]["passed"]
