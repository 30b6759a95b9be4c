"""Trained parts of techniques on disk: safetensors that name the model they belong to.

Parts of pipelines may depend on settings of the call too, such as its guidance scale
(`Technique.part_settings`). Those then stand in the file, and parts for different ones stand beside
each other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

import hasten.zoo.catalogue as zoo
from hasten.errors import HastenError, PlanError
from hasten.home import atomic_write, home
from hasten.plan import Plan
from hasten.technique import Parts, Technique

if TYPE_CHECKING:
    from hasten.subject import Subject

SAMPLED = 16_384  # values of each tensor that enter the hash

Settings = Mapping[str, Mapping[str, Any]]
"""Settings of a pipeline's call: by kind, the arguments that make it (`denoise.call_settings`)."""


class Stored(dict[str, Tensor]):
    """Parts as they were read from a file.

    Attributes:
        settings: those of the call that they were made for, as far as they depend on them; None
            where the file does not say.
    """

    def __init__(self, tensors: Parts, settings: Settings | None) -> None:
        super().__init__(tensors)
        self.settings = settings


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


def part_settings(technique: Technique, settings: Settings) -> dict[str, Mapping[str, Any]]:
    """Those settings of a call on which the technique's parts depend (`Technique.part_settings`)."""
    return {kind: settings[kind] for kind in technique.part_settings}


def save(
    path: Path,
    technique: Technique,
    parts: Parts,
    belongs_to: str,
    settings: Settings | None = None,
) -> None:
    """Write parts to one file, or nothing.

    Args:
        settings: of the call that they were made for; by default those of the file that they were
            read from.
    """
    metadata = {
        "technique": technique.name,
        "knobs": json.dumps(part_knobs(technique), sort_keys=True),
        "model": belongs_to,
    }
    if settings is None and isinstance(parts, Stored):
        settings = parts.settings
    if settings is not None and technique.part_settings:
        metadata["settings"] = json.dumps(part_settings(technique, settings), sort_keys=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in parts.items()}
    atomic_write(path, to_safetensors(tensors, metadata=metadata))


def load(path: Path, technique: Technique, belongs_to: str) -> Stored:
    """Read parts back; parts of another model, technique or knobs are refused."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            _check_belonging(path, metadata, technique, belongs_to)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            settings = metadata.get("settings")
            return Stored(tensors, None if settings is None else json.loads(settings))
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


def default_path(technique: Technique, belongs_to: str, settings: Settings | None = None) -> Path:
    """Where `prepare` puts parts: in the user's data folder, by model, by knobs and by settings."""
    name = f"{technique.name}-{_digest(part_knobs(technique))}"
    if settings is not None and technique.part_settings:
        name += f"-{_digest(part_settings(technique, settings))}"
    return home() / "parts" / belongs_to / f"{name}.safetensors"


def _digest(what: Mapping[str, Any]) -> str:
    text = json.dumps(what, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def find(technique: Technique, belongs_to: str, settings: Settings | None = None) -> Stored | None:
    """Parts for this model and these knobs: the user's own first, then those shipped with the zoo.

    Args:
        settings: of the call that they are for; None takes parts for any settings. Files that do
            not say what they were made for are passed over where that matters.
    """
    for path in _candidates(technique, belongs_to):
        try:
            found = load(path, technique, belongs_to)
        except PlanError:
            continue  # another model's or other knobs'
        if not technique.part_settings:
            return found
        if found.settings is not None and (
            settings is None or found.settings == part_settings(technique, settings)
        ):
            return found
    return None


def parts_for_call(
    technique: Technique, subject: Subject, parts: Parts, settings: Settings
) -> Parts:
    """The parts with which a call of these settings is made; `parts` themselves where they fit.

    Parts that the caller handed over are used as they are. In the place of others, which were read
    from a file, those on disk are looked for that were made for such a call.

    Raises:
        PlanError: where the parts are for other settings, and there are none for these.
    """
    if not isinstance(parts, Stored) or parts.settings is None or not technique.part_settings:
        return parts
    wanted = part_settings(technique, settings)
    if parts.settings == wanted:
        return parts
    found = find(technique, subject.hash, settings)
    if found is None:
        raise PlanError(
            f"{technique.name}'s trained part for {subject.name} is for {_shown(parts.settings, wanted)}, and this "
            f"call has {_shown(wanted, parts.settings)}; call it with the former, or train a part for the latter "
            "with `hasten prepare` or hasten.prepare(..., arguments=...)."
        )
    return found


def _shown(settings: Settings, other: Settings) -> str:
    """In words, what settings have that others have not."""
    flat, against = (
        {name: value for kind in each.values() for name, value in kind.items()}
        for each in (settings, other)
    )
    differing = {k: v for k, v in flat.items() if k not in against or against[k] != v}
    return ", ".join(f"{name}={value}" for name, value in differing.items()) or "no such setting"


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
    yield from sorted(own.parent.glob(f"{own.stem}*.safetensors"))
    for name in zoo.names():
        folder = zoo.path(name) / "parts"
        yield from sorted(folder.glob(f"{technique.name}*.safetensors"))
