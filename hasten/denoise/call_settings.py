"""What of a pipeline's call trained parts may depend on: steps, guidance, size and scheduler."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch

from hasten.denoise.inputs import COUNT, SIZES

KINDS = ("steps", "guidance", "size", "scheduler")
"""What `Technique.part_settings` may name."""

WALK = ("strength", "timesteps", "sigmas")
"""Arguments of a call that say which of the scheduler's timesteps are walked."""


def settings_of(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of a call by kind, each with the arguments that make it; ready for JSON.

    An argument that is left out counts as its default. A size that the pipeline works out by itself
    is None, which is another setting than the same size in numbers: to call it the same would be a
    guess.

    Args:
        arguments: of the pipeline's call, by name; others than those of interest are left alone.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    given = {name: arguments.get(name, parameter.default) for name, parameter in known.items()}
    guidance = {
        name: float(value)
        for name, value in given.items()
        if ("guidance" in name or "cfg" in name) and isinstance(value, (bool, int, float))
    }
    if "true_cfg_scale" in guidance:  # then only a negative prompt turns the guidance on
        guidance["negative_prompt"] = any(
            given.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds")
        )
    return {
        "steps": {COUNT: given[COUNT]} if COUNT in given else {},
        "guidance": guidance,
        "size": {name: given[name] for name in (*SIZES, "video_length") if name in given},
        "scheduler": {"scheduler": _named(pipe.scheduler)}
        | {name: _plain(given[name]) for name in WALK if given.get(name) is not None},
    }


def steps_left_out(pipe: Any, steps: int, arguments: Mapping[str, Any]) -> int:
    """How many of the scheduler's timesteps a call will leave out at the start.

    Pipelines that begin with a picture do, by their argument strength; each rounds in its own way,
    so it is asked. The scheduler must have made its timesteps.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    if "strength" not in known or not hasattr(pipe, "get_timesteps"):
        return 0
    times = pipe.scheduler.timesteps
    given = {
        "num_inference_steps": steps,
        "strength": arguments.get("strength", known["strength"].default),
        "device": times.device,
        "timesteps": times,
    }
    taken = inspect.signature(pipe.get_timesteps).parameters
    if any(p.default is p.empty and name not in given for name, p in taken.items()):
        return 0  # it reads strength in another way; whoever asks sees where the loop begins
    walked, *_ = pipe.get_timesteps(**{k: v for k, v in given.items() if k in taken})
    return steps - len(walked)


def _plain(value: Any) -> Any:
    """Numbers of any kind as JSON has them; of anything else the pipeline itself says what is wrong."""
    try:
        return torch.as_tensor(value).tolist()
    except (TypeError, ValueError, RuntimeError):
        return str(value)


def _named(scheduler: Any) -> str:
    """The scheduler's class, with a digest of its settings."""
    own = {k: v for k, v in getattr(scheduler, "config", {}).items() if not k.startswith("_")}
    text = json.dumps(own, sort_keys=True, default=str)
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    return f"{type(scheduler).__name__} ({digest})"
