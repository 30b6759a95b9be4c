"""Opening Diffusers pipelines; importing this module does not import Diffusers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from hasten.denoise.network import NETWORKS
from hasten.errors import SubjectError

INDEX = "model_index.json"
EXTRA = "pip install 'hasten[diffusion]'"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


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

    Args:
        dtype: of all parts; "auto" takes what the network that removes noise is stored in.

    Raises:
        SubjectError: where Diffusers is missing, or a file is missing or damaged.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise SubjectError(
            f"{shown} is a Diffusers pipeline, and that library is not installed; {EXTRA}."
        ) from error
    _follow_transformers()
    try:
        folder = Path(source)
        if not folder.is_dir():
            folder = Path(DiffusionPipeline.download(source, use_safetensors=True))
        index = _read_index(folder / INDEX)
        for file in sorted(folder.glob("*/*.safetensors")):
            _check_weights(file)
        options = {
            "dtype": stored_dtype(folder) if isinstance(dtype, str) else dtype,
            "use_safetensors": True,
            "local_files_only": True,
        }
        models = _models(folder, index, options, shown)
        pipe = DiffusionPipeline.from_pretrained(
            folder, trust_remote_code=False, **models, **options
        )
    except SubjectError:
        raise
    except Exception as error:  # a damaged file raises whatever its reader does
        raise SubjectError(
            f"Cannot open {shown} as a Diffusers pipeline: {_reason(error)}."
        ) from error
    pipe.set_progress_bar_config(leave=False)
    if device is not None or torch.cuda.is_available():
        pipe = pipe.to(device or "cuda")
    return pipe


def _follow_transformers() -> None:
    """Keep Diffusers from bars and warnings where transformers was told to keep from them."""
    from diffusers.utils import logging
    from transformers.utils import logging as told

    if told.get_verbosity() >= told.ERROR:
        logging.set_verbosity_error()
    if not told.is_progress_bar_enabled():
        logging.disable_progress_bar()


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """No progress bar of a pipeline's own, for a while."""
    had = "_progress_bar_config" in vars(pipe)
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        if had:
            pipe.set_progress_bar_config(**before)
        else:
            del pipe._progress_bar_config


def _reason(error: Exception) -> str:
    """The first sentence of what was said."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "`low_cpu_mem_usage` cannot be False" in text:  # what Diffusers says of some networks
        return f"it needs the accelerate library; {EXTRA}"
    return text.split(". ")[0].rstrip(".")


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype in which a pipeline's network is stored."""
    for name in NETWORKS:
        for file in sorted((folder / name).glob("*.safetensors")):
            with safe_open(str(file), framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118 -- it is no dictionary
                    found = _DTYPES.get(weights.get_slice(key).get_dtype())
                    if found is not None:
                        return found
    return torch.float32


def _read_index(path: Path) -> dict[str, Any]:
    import diffusers

    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SubjectError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(index, dict) or "_class_name" not in index:
        raise SubjectError(f"{path} names no pipeline class (_class_name).")
    name = index["_class_name"]
    if not isinstance(name, str):
        raise SubjectError(f"{path} asks for code of its own ({name}), which hasten does not run.")
    if not hasattr(diffusers, name):
        raise SubjectError(
            f"{path} names the pipeline {name}, which Diffusers {diffusers.__version__} does not have."
        )
    return index


def _check_weights(file: Path) -> None:
    try:
        with safe_open(str(file), framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise SubjectError(f"{file} is damaged or cut short ({error}); copy it again.") from error


def _models(
    folder: Path, index: dict[str, Any], options: dict[str, Any], shown: str
) -> dict[str, nn.Module]:
    """The parts that are models of Diffusers, each with every weight that its config asks for."""
    import diffusers

    found: dict[str, nn.Module] = {}
    for name, entry in index.items():
        if not (isinstance(entry, list) and len(entry) == 2 and entry[0]):
            continue  # a setting, or a part that it does without
        if not (folder / name).is_dir():
            raise SubjectError(f"{shown} has no folder {name}, which its {INDEX} names.")
        kind: Any = getattr(diffusers, str(entry[1]), None)
        if entry[0] != "diffusers" or not _is_model(kind):
            continue
        if not list((folder / name).glob("*.safetensors")):
            raise SubjectError(
                f"{folder / name} holds no .safetensors file; hasten loads no other kind of weights."
            )
        # What is missing would be filled with whatever lies in memory, so ask for the list.
        model, loading = kind.from_pretrained(folder / name, output_loading_info=True, **options)
        missing = sorted(loading["missing_keys"])
        if missing:
            raise SubjectError(
                f"{shown}: {name} lacks {len(missing)} of the weights that its config.json asks for, "
                f"{missing[0]} among them; get the whole checkpoint."
            )
        found[name] = model
    return found


def _is_model(kind: Any) -> bool:
    from diffusers import ModelMixin

    return isinstance(kind, type) and issubclass(kind, ModelMixin)
