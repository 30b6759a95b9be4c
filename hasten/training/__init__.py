"""Faster training: one loop, and the techniques that plug in to it."""

from hasten.training.loop import Data, LossFunction, Outcome, Settings, Stage, fit, next_token_loss

__all__ = ["Data", "LossFunction", "Outcome", "Settings", "Stage", "fit", "next_token_loss"]
