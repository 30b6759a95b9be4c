"""Runners execute a forward pass of the causal engine: the same interface, other machinery."""

from hasten.causal.runners.base import Block, Output, Runner
from hasten.causal.runners.compiled import CompiledRunner
from hasten.causal.runners.eager import EagerRunner

__all__ = ["Block", "CompiledRunner", "EagerRunner", "Output", "Runner"]
