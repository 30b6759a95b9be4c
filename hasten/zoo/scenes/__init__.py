"""Procedural scenes: coloured shapes, drawn from a seed, rendered, described, read back, judged.

They serve the zoo's picture models as training data and every benchmark of them as judge, so that
no picture and no network has to be downloaded.
"""

from hasten.zoo.scenes.caption import caption, prompts, questions
from hasten.zoo.scenes.judge import Judge, features, frechet, load_judge, perceptual
from hasten.zoo.scenes.reader import Attributes, attributes, compare, mean_attributes, read
from hasten.zoo.scenes.render import coverage, masks, render, render_clips
from hasten.zoo.scenes.scene import Ground, Object, Scene, draw, draw_many

__all__ = [
    "Scene",
    "Object",
    "Ground",
    "draw",
    "draw_many",
    "render",
    "render_clips",
    "masks",
    "coverage",
    "caption",
    "questions",
    "prompts",
    "read",
    "attributes",
    "compare",
    "mean_attributes",
    "Attributes",
    "Judge",
    "load_judge",
    "features",
    "frechet",
    "perceptual",
]
