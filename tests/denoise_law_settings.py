"""Settings of denoise techniques for tiny random pipelines and few steps.

A technique that is not listed is tested at its defaults. Whoever adds a row says why.
"""

from __future__ import annotations

from tests.law_settings import Setting

UNSURE = "outputs of random networks change much from step to step"
SMALL = "the pictures of tiny pipelines have 64 tokens and fewer"

SETTINGS: dict[str, Setting] = {
    "adaptive_guidance": Setting(
        {"threshold": 0.0}, "the branches of random networks hardly agree"
    ),
    "adaspa": Setting({"block": 4}, SMALL),
    "auto_diffusion": Setting(
        {"population": 3, "samples": 2, "batch": 2},
        "a search of full size draws thousands of pictures",
    ),
    "easy_cache": Setting({"threshold": 10.0}, UNSURE),
    "first_block_cache": Setting({"threshold": 10.0}, UNSURE),
    "grat": Setting({"cell": 2, "cell_frames": 1}, SMALL),
    "harmonica": Setting({"steps": 12}, "its table is for as many steps as the laws make"),
    "mag_cache": Setting({"threshold": 10.0}, UNSURE),
    "rollover_budget_forcing": Setting(
        {"budget": 24, "chains": 1, "draws": 3, "steps": 4, "walk": 3},
        "the paper's budget is 500 network calls",
    ),
    "random_key_blocks": Setting({"cell": 2, "cell_frames": 1}, SMALL),
    "sea_cache": Setting({"threshold": 10.0}, UNSURE),
}

NO_NEUTRAL: dict[str, str] = {
    "auto_diffusion": "its list has a length of its own, whatever the call asks for",
}
"""Lossy techniques without a neutral setting, and why there is none."""
