"""Which zoo models there are on this machine, and where.

A zoo model is a folder that transformers or Diffusers can open, with a `card.json`. Some ship with
hasten; those that a user trains lie in the user's data folder. Importing this module is cheap.
"""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

from hasten.errors import HastenError
from hasten.home import home
from hasten.zoo.corpus import shipped_held_out

SHIPPED = Path(__file__).parent / "weights"
PIPELINE = "model_index.json"  # what Diffusers knows a pipeline's folder by


def user_path(name: str) -> Path:
    """Where a zoo model that the user trains belongs; it need not exist yet."""
    return home() / "zoo" / name


def names() -> list[str]:
    """All zoo models that can be opened, shipped ones and the user's own, sorted."""
    folders = [SHIPPED, home() / "zoo"]
    return sorted({model.name for folder in folders for model in _models(folder)})


def is_zoo_name(name: str) -> bool:
    """Whether `name` is a zoo model that can be opened."""
    return name in names()


def path(name: str) -> Path:
    """The folder of a zoo model: the shipped one where there is one, else the user's.

    Raises:
        HastenError: where there is no such model here.
    """
    if name not in names():
        raise HastenError(f"no zoo model named {name!r}; {_what_to_do(name)}")
    shipped = SHIPPED / name
    return shipped if _is_model(shipped) else user_path(name)


def part_path(name: str) -> Path:
    """The folder of a part that picture models are made or judged with, such as scenes-judge.

    Raises:
        HastenError: where it is neither shipped nor trained by the user.
    """
    for folder in (SHIPPED / name, user_path(name)):
        if (folder / "card.json").is_file():
            return folder
    raise HastenError(f"{name} is not here; train it first: hasten train {name}")


def is_pipeline(name: str) -> bool:
    """Whether a zoo model is a pipeline of Diffusers.

    Raises:
        HastenError: where there is no such model here.
    """
    return (path(name) / PIPELINE).is_file()


def card(name: str) -> dict[str, Any]:
    """What the model says of itself: data, training, quality, recipe, sha256 of its weights.

    Raises:
        HastenError: where there is no such model or its card cannot be read.
    """
    file = path(name) / "card.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HastenError(f"cannot read {file} ({error}); train the model again") from error
    if not isinstance(content, dict):
        raise HastenError(f"{file} does not hold a card; train the model again")
    return content


def held_out_files(name: str) -> list[str]:
    """Texts that the model never saw in training, in the order of their paths.

    The shipped ones, which are the same on every machine; without those, the files that the
    model's card lists, as they are in this Python.

    Raises:
        HastenError: where there is no such model or none of its files is found.
    """
    listed = card(name).get("data", {}).get("held_out", [])
    shipped = shipped_held_out()
    if shipped:
        return [file.text for file in shipped]
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [root / entry["path"] for entry in listed if (root / entry["path"]).is_file()]
    if not found:
        raise HastenError(
            f"none of the {len(listed)} held-out files of {name} is in {root}; "
            "install hasten with its data files"
        )
    return [file.read_text(encoding="utf-8") for file in sorted(found)]


def _models(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if _is_model(entry)] if folder.is_dir() else []


def _is_model(folder: Path) -> bool:
    # A dot marks a model that is still being written.
    if folder.name.startswith(".") or not (folder / "card.json").is_file():
        return False
    wanted = ("config.json", "model.safetensors")
    return (folder / PIPELINE).is_file() or all((folder / name).is_file() for name in wanted)


def _what_to_do(name: str) -> str:
    from hasten.zoo import recipes  # brings in transformers; only needed for the message

    known = (*recipes.RECIPES, *recipes.pictures.RECIPES)
    if name in known:
        return f"train it first: hasten.zoo.recipes.train({name!r}, {str(user_path(name))!r})"
    return f"there are {', '.join(names()) or 'none'}, and recipes for {', '.join(known)}"
