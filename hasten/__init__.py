"""Make a model faster, and prove it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.api import apply, load, prepare, save
    from hasten.benchmark.driver import bench
    from hasten.plan import Plan
    from hasten.subject import open_subject

__version__ = "0.1.0"
__all__ = ["Plan", "apply", "bench", "load", "open_subject", "prepare", "save"]

_HOMES = {
    "apply": "hasten.api",
    "load": "hasten.api",
    "prepare": "hasten.api",
    "save": "hasten.api",
    "bench": "hasten.benchmark.driver",
    "Plan": "hasten.plan",
    "open_subject": "hasten.subject",
}


def __getattr__(name: str) -> Any:
    """Import a verb when it is first used, so that `import hasten` costs nothing."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'hasten' has no attribute {name!r}")
