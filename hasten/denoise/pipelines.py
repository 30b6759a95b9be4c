"""Opening Diffusers pipelines; importing this module does not import Diffusers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from hasten.errors import SubjectError

INDEX = "model_index.json"
EXTRA = "pip install 'hasten[diffusion]'"


def is_pipeline(what: Any) -> bool:
    """Whether it is a live Diffusers pipeline."""
    diffusers = sys.modules.get("diffusers")  # there is no pipeline where it was not imported
    return diffusers is not None and isinstance(what, diffusers.DiffusionPipeline)


def is_pipeline_folder(source: str) -> bool:
    """Whether a folder, or a repository of the hub, holds a pipeline."""
    if Path(source).is_dir():
        return (Path(source) / INDEX).is_file()
    if source.count("/") != 1:
        return False
    from huggingface_hub import file_exists, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(source, INDEX), str):
        return True
    try:
        return bool(file_exists(source, INDEX))
    except Exception:  # offline, or no such repository: whoever opens it says so
        return False


def load(source: str, shown: str, *, dtype: torch.dtype | str = "auto", device: Any = None) -> Any:
    """Open a pipeline from a folder or the hub, with no code but that of Diffusers and transformers.

    Raises:
        SubjectError: where Diffusers is missing, or a file is missing or damaged.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise SubjectError(
            f"{shown} is a Diffusers pipeline, and that library is not installed; {EXTRA}."
        ) from error
    if Path(source).is_dir():
        _check_index(Path(source) / INDEX)
    options: dict[str, Any] = {} if isinstance(dtype, str) else {"torch_dtype": dtype}
    try:
        pipe = DiffusionPipeline.from_pretrained(
            source,
            local_files_only=Path(source).is_dir(),
            use_safetensors=True,
            trust_remote_code=False,
            **options,
        )
    except Exception as error:  # a damaged file raises whatever its reader does
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise SubjectError(f"Cannot open {shown} as a Diffusers pipeline: {reason}.") from error
    pipe.set_progress_bar_config(leave=False)
    if device is not None or torch.cuda.is_available():
        pipe = pipe.to(device or "cuda")
    return pipe


def _check_index(path: Path) -> None:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SubjectError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(index, dict) or "_class_name" not in index:
        raise SubjectError(f"{path} names no pipeline class (_class_name).")
