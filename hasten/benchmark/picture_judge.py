"""Pictures of a plan beside the original's from the same noise, and the proof of its class."""

from __future__ import annotations

from typing import Any

import numpy as np

from hasten.benchmark.calls import Array
from hasten.benchmark.judge import estimate_entry
from hasten.benchmark.scenes import SceneJudge
from hasten.measure.image_quality import MOST_DB, differing, psnr, ssim
from hasten.measure.stats import bootstrap_interval, recovery
from hasten.technique import Loss

BROKEN_DB = 10.0  # a lossy plan whose pictures are less like the original's than this is broken


def compare(ours: Array, original: Array, judge: SceneJudge | None, seed: int) -> dict[str, Any]:
    """The quality block of a row.

    "psnr" is the mean over the pictures that differ from the original's, with how many do not
    ("num_identical"); every other entry is over all pictures.

    Args:
        ours, original: (count, [frames,] height, width, channels) values from 0 to 1.
        judge: of scenes that captions ask for; None where pictures are of anything else.
    """
    decibels = psnr(ours, original)
    found = {
        "psnr": _paired(differing(decibels), "dB", seed)
        | {"num_units": len(decibels), "num_identical": int((decibels >= MOST_DB).sum())},
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
    likeness = quality.get("psnr", {})
    decibels, identical = likeness.get("value"), likeness.get("num_identical", 0)
    if loss is not Loss.LOSSY:
        word = "the same" if same else "not the same"
        return {"passed": same, "detail": f"pictures are {word}, bit for bit"}
    if decibels is None:
        return {"passed": True, "detail": "lossy; no pictures were compared"}
    words = f"lossy; {decibels:.1f} dB to the original's pictures from the same noise"
    if identical:
        words += f", {identical} of {likeness['num_units']} identical"
    # What leaves most pictures as they are is not broken, whatever became of the others.
    return {
        "passed": bool(decibels >= BROKEN_DB or 2 * identical > likeness["num_units"]),
        "detail": words,
    }
