"""Trained parts of techniques on disk: safetensors that name the model they belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import nn

import hasten.zoo.catalogue as zoo
from hasten.errors import HastenError, PlanError
from hasten.home import atomic_write, home
from hasten.plan import Plan
from hasten.technique import Parts, Technique

if TYPE_CHECKING:
    from hasten.subject import Subject

SAMPLED = 16_384  # values of each tensor that enter the hash


def model_hash(model: nn.Module) -> str:
    """Hash of a model's weights: names, shapes and an even sample of each tensor's values.

    The values enter as bfloat16 rounded from float32, so that a checkpoint has the same hash in
    whichever of both dtypes it is opened.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLED)
        values = flat[::step].to(torch.bfloat16).cpu().contiguous()
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def part_knobs(technique: Technique) -> dict[str, object]:
    """The knobs on which the technique's parts depend (`Technique.part_knobs`)."""
    return {name: technique.knobs[name] for name in technique.part_knobs}


def save(path: Path, technique: Technique, parts: Parts, belongs_to: str) -> None:
    """Write parts to one file, or nothing."""
    metadata = {
        "technique": technique.name,
        "knobs": json.dumps(part_knobs(technique), sort_keys=True),
        "model": belongs_to,
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in parts.items()}
    atomic_write(path, to_safetensors(tensors, metadata=metadata))


def load(path: Path, technique: Technique, belongs_to: str) -> Parts:
    """Read parts back; parts of another model, technique or knobs are refused."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            _check_belonging(path, metadata, technique, belongs_to)
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise HastenError(f"{path} is not a readable safetensors file: {error}.") from error


def _check_belonging(
    path: Path, metadata: dict[str, str], technique: Technique, belongs_to: str
) -> None:
    if metadata.get("technique") != technique.name:
        raise PlanError(
            f"{path} holds parts of {metadata.get('technique')!r}, not of {technique.name!r}."
        )
    if metadata.get("model") != belongs_to:
        raise PlanError(
            f"{path} was trained for another model ({metadata.get('model')}, this one is {belongs_to}); "
            f"run `prepare` for this model."
        )
    knobs = json.loads(metadata.get("knobs", "{}"))
    if knobs != part_knobs(technique):
        raise PlanError(f"{path} was trained with {knobs}, not with {part_knobs(technique)}.")


def default_path(technique: Technique, belongs_to: str) -> Path:
    """Where `prepare` puts parts: in the user's data folder, by model and by knobs."""
    text = json.dumps(part_knobs(technique), sort_keys=True)
    suffix = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    return home() / "parts" / belongs_to / f"{technique.name}-{suffix}.safetensors"


def find(technique: Technique, belongs_to: str) -> Parts | None:
    """Parts for this model and these knobs: the user's own first, then those shipped with the zoo."""
    for path in _candidates(technique, belongs_to):
        try:
            return load(path, technique, belongs_to)
        except PlanError:
            continue  # another model's or other knobs'
    return None


def parts_for(technique: Technique, subject: Subject, given: Mapping[str, Parts]) -> Parts:
    """The parts that a technique needs on a model: those given, else those on disk.

    Raises:
        PlanError: where it needs some and there are none.
    """
    if technique.name in given:
        return given[technique.name]
    if not technique.trained:
        return {}
    found = find(technique, subject.hash)
    if found is None:
        written = str(Plan.parse(technique))
        option = written if written == technique.name else f'"{written}"'
        raise PlanError(
            f"{written} has no trained part for {subject.name}; train one with "
            f"`hasten prepare {subject.name} --with {option}` or hasten.prepare(...)."
        )
    return found


def _candidates(technique: Technique, belongs_to: str) -> Iterator[Path]:
    own = default_path(technique, belongs_to)
    if own.is_file():
        yield own
    for name in zoo.names():
        folder = zoo.path(name) / "parts"
        yield from sorted(folder.glob(f"{technique.name}*.safetensors"))
