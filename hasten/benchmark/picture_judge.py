"""Pictures of a plan beside the original's from the same noise, and the proof of its class."""

from __future__ import annotations

from typing import Any

import numpy as np

from hasten.benchmark.calls import Array
from hasten.benchmark.judge import estimate_entry
from hasten.benchmark.scenes import SceneJudge
from hasten.measure.image_quality import psnr, ssim
from hasten.measure.stats import bootstrap_interval, recovery
from hasten.technique import Loss

BROKEN_DB = 10.0  # a lossy plan whose pictures are less like the original's than this is broken


def compare(ours: Array, original: Array, judge: SceneJudge | None, seed: int) -> dict[str, Any]:
    """The quality block of a row.

    Args:
        ours, original: (count, [frames,] height, width, channels) values from 0 to 1.
        judge: of scenes that captions ask for; None where pictures are of anything else.
    """
    found = {
        "psnr": _paired(psnr(ours, original), "dB", seed),
        "ssim": _paired(ssim(ours, original), "", seed),
    }
    if judge is None:
        return found
    found["perceptual"] = _paired(judge.perceptual(ours, original), "", seed)
    found["frechet"] = {
        "value": judge.frechet(ours),
        "original": judge.frechet(original),
        "num_units": len(ours),
    }
    scores, theirs = judge.attributes(ours), judge.attributes(original)
    kept = recovery(scores, theirs, higher_is_better=True, seed=seed)
    entry = estimate_entry(float(np.mean(scores)), float(np.mean(theirs)), kept)
    found["attributes"] = entry | {"num_units": len(ours)}
    return found


def _paired(values: Array, unit: str, seed: int) -> dict[str, Any]:
    interval = bootstrap_interval(values, np.mean, seed=seed)
    entry = {"value": float(values.mean()), "interval": list(interval) if interval else None}
    return entry | {"num_units": len(values)} | ({"unit": unit} if unit else {})


def prove(loss: Loss, quality: dict[str, Any], same: bool) -> dict[str, Any]:
    """Proof that a plan keeps to its loss class."""
    decibels = quality.get("psnr", {}).get("value")
    if loss is not Loss.LOSSY:
        word = "the same" if same else "not the same"
        return {"passed": same, "detail": f"pictures are {word}, bit for bit"}
    if decibels is None:
        return {"passed": True, "detail": "lossy; no pictures were compared"}
    return {
        "passed": bool(decibels >= BROKEN_DB),
        "detail": f"lossy; {decibels:.1f} dB to the original's pictures from the same noise",
    }
