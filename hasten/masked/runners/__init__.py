"""What executes a pass of the masked engine."""

from hasten.masked.runners.base import Look, Runner, Said
from hasten.masked.runners.compiled import CompiledRunner
from hasten.masked.runners.eager import EagerRunner

__all__ = ["CompiledRunner", "EagerRunner", "Look", "Runner", "Said"]
