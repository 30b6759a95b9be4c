"""The benchmark of Diffusers pipelines, on tiny random ones; and what its report shows."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest

import hasten
from hasten.benchmark.calls import arguments_of
from hasten.benchmark.driver import BenchResult, _record
from hasten.benchmark.picture_judge import BROKEN_DB, compare, prove
from hasten.errors import HastenError
from hasten.measure.curves import series_of
from hasten.measure.ledger import Ledger, is_stale
from hasten.measure.pictures import Samples
from hasten.measure.plots.canvas import INK
from hasten.technique import Loss
from tests import pipelines

STEPS = 12


@pytest.fixture(scope="module")
def result() -> BenchResult:
    return hasten.bench(
        pipelines.tiny("sd3"),
        "reuse_always(interval=3)",
        "fixed_guidance_cut",
        runner="eager",
        steps=STEPS,
        pictures=3,
        rounds=5,
        beside=["fewer_steps", "easy_cache(threshold=0)", "fewer_steps(share=0.25)"],
        record=False,
    )


def test_a_row_says_what_was_measured(result: BenchResult) -> None:
    data = result.to_dict()
    assert [row["plan"] for row in data["rows"]] == [
        "reuse_always(interval=3)",
        "fixed_guidance_cut",
        "reuse_always(interval=3), fixed_guidance_cut",
    ]
    baseline = data["baseline"]
    assert baseline["activity"]["calls"] == 2 * STEPS  # of both timed pictures
    assert baseline["images_per_second"]["median"] > 0 and baseline["peak_bytes"] > 0
    shares = baseline["shares"]
    assert 0 < shares["attention"] < shares["blocks"] < shares["calls"] <= 1
    assert shares["guidance"] == pytest.approx(shares["calls"] / 2) and shares["flops"] > 0
    for row in data["rows"]:
        assert {"psnr", "ssim"} <= row["quality"].keys()
        assert row["loss_class"] == "lossy" and row["ceiling"] > 1
        assert row["verdict"] in ("faster", "no gain", "broken")
    both = data["rows"][-1]
    assert both["ceiling_detail"]["label"] == "measured" and both["calls_ratio"] > 3


def test_what_does_nothing_is_called_inactive(result: BenchResult) -> None:
    row = result.to_dict()["beside"][1]
    assert row["verdict"] == "inactive" and row["quality"]["psnr"]["value"] == 100.0
    assert row["calls_ratio"] == 1.0


def test_the_report_shows_pictures_side_by_side(result: BenchResult, tmp_path: Path) -> None:
    assert result.samples is not None
    assert [pictures.shape[0] for pictures in result.samples.of.values()] == [3] * 7
    page = result.save_report(tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64") == 21
    assert page.count('class="who"') == 8 and page.count('class="caption"') == 3
    assert "pictures/s" in page and "psnr" in page and "Tokens" not in page
    for row in [
        *result.data["rows"],
        *result.data["beside"],
    ]:  # under each name: how fast, how like
        assert f"{row['ratio']['median']:.2f}x, " in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    result.show()


def test_the_report_joins_a_technique_at_several_knobs(result: BenchResult, tmp_path: Path) -> None:
    """Speed against fidelity: the baseline of fewer steps is one dashed line."""
    series = {one.name: one for one in series_of(result.data)}
    steps = series["fewer_steps"]
    assert steps.is_baseline and len(steps.points) == 2 and steps.colour == INK
    assert {steps.label(point) for point in steps.points} == {"0.5", "0.25"}
    assert not series["easy_cache"].is_baseline
    page = result.save_report(tmp_path / "report.html").read_text()
    assert "stroke-dasharray" in page and ">baseline, by share<" in page


def test_clips_are_shown_as_frames() -> None:
    clips = np.zeros((1, 9, 8, 8, 3))
    page = Samples(["a <moving> thing"], {"baseline": clips}).html()
    assert 'width="512" height="128"' in page and "&lt;moving&gt;" in page


def test_identical_pictures_do_not_lift_the_mean() -> None:
    original = np.random.default_rng(0).random((8, 16, 16, 3))
    ours = original.copy()
    ours[3:] += 0.1  # five of eight differ, by 20 dB
    quality = compare(ours, original, None, seed=0)
    assert quality["psnr"]["value"] == pytest.approx(20.0)
    assert quality["psnr"]["num_units"] == 8 and quality["psnr"]["num_identical"] == 3
    proof = prove(Loss.LOSSY, quality, same=False)
    assert proof["passed"] and "3 of 8 identical" in proof["detail"]
    same = compare(original, original, None, seed=0)["psnr"]
    assert same["value"] == 100.0 and same["num_identical"] == 8
    assert compare(original + 0.1, original, None, seed=0)["psnr"]["num_identical"] == 0


def test_what_leaves_most_pictures_alone_is_not_broken() -> None:
    original = np.full((8, 16, 16, 3), 0.5)
    for differing, passed in ((3, True), (4, False)):
        ours = original.copy()
        ours[:differing] += 0.4  # 8 dB
        quality = compare(ours, original, None, seed=0)
        assert quality["psnr"]["value"] < BROKEN_DB
        assert prove(Loss.LOSSY, quality, same=False)["passed"] is passed


def test_the_ledger_keeps_what_a_pipeline_depends_on(
    result: BenchResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path))
    _record(result.to_dict())
    entries = Ledger().entries()
    assert len(entries) == 6
    for entry in entries:
        assert entry.versions["diffusers"] == diffusers.__version__ and not is_stale(entry)


def test_arguments_of_a_call() -> None:
    words = arguments_of(pipelines.tiny("sd3"), "a cat", 7, 3.5)
    assert words == {"prompt": "a cat", "num_inference_steps": 7, "guidance_scale": 3.5}
    labels = arguments_of(pipelines.tiny("dit"), "5", 7, None)
    assert labels == {"class_labels": [5], "num_inference_steps": 7}
    with pytest.raises(HastenError, match="takes neither"):
        arguments_of(pipelines.tiny("ddpm"), "a cat", 7, None)


def test_language_models_do_not_go_with_pictures(tmp_path: Path) -> None:
    with pytest.raises(HastenError, match="denoise engine"):
        hasten.bench("code-lm-tiny", "zeus", record=False)
    with pytest.raises(HastenError, match="causal engine"):
        hasten.bench(pipelines.tiny("sd3"), "medusa", record=False)
