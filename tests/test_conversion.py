"""The recipe that makes a model which fills masks out of one that reads left to right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hasten
from hasten.errors import HastenError
from hasten.masked.engine import MaskedModel
from hasten.training import Stage
from hasten.zoo import recipes
from hasten.zoo.corpus import Corpus, default_corpus

STEPS = 6


@pytest.fixture(scope="module")
def little() -> Corpus:
    library = default_corpus()
    short = [file for file in library.held_out if 1_000 < file.num_bytes < 3_000]
    return Corpus(library.train[:20], tuple(short[:2]))


@pytest.fixture(scope="module")
def tiny() -> recipes.Conversion:
    """A conversion of the tiny model, for runs of seconds."""
    full = recipes.recipe("code-dlm")
    assert isinstance(full, recipes.Conversion)
    settings = replace(
        full.training,
        batch_tokens=256,
        tokens=256 * STEPS,
        stages=(Stage(length=64, share=1.0),),
    )
    return replace(full, base="code-lm-tiny", training=settings)


@pytest.mark.slow
def test_it_makes_a_model_that_the_masked_engine_opens(
    tmp_path: Path, tiny: recipes.Conversion, little: Corpus
) -> None:
    card = recipes.train(tiny, tmp_path / "dlm", threads=1, corpus=little, quiet=True)
    assert card.training["steps"] == STEPS
    assert card.recipe["plan"] == "repr_align" and card.recipe["base"] == "code-lm-tiny"
    assert {"loss", "masked_loss"} <= card.quality.keys()
    assert json.loads((tmp_path / "dlm" / "card.json").read_text())["sha256"] == card.sha256
    fast = hasten.apply(str(tmp_path / "dlm"), "freedave")
    assert isinstance(fast, MaskedModel)
    assert fast.form.shifted and fast.subject.tokenizer is not None
    assert fast.subject.tokenizer.mask_token_id == fast.form.mask_id
    ids = fast.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8)
    assert isinstance(ids, torch.Tensor)
    assert ids.shape == (1, 11) and not bool((ids == fast.form.mask_id).any())


@pytest.mark.slow
def test_another_plan_stands_in_for_the_recipes_own(
    tmp_path: Path, tiny: recipes.Conversion, little: Corpus
) -> None:
    plain = recipes.train(
        tiny, tmp_path / "plain", corpus=little, quiet=True, plan="repr_align(weight=0)"
    )
    aligned = recipes.train(tiny, tmp_path / "aligned", corpus=little, quiet=True)
    assert plain.recipe["plan"] == "repr_align(weight=0.0)"
    assert plain.sha256 != aligned.sha256


def test_what_training_cannot_take_is_refused(
    tmp_path: Path, tiny: recipes.Conversion, little: Corpus
) -> None:
    with pytest.raises(HastenError, match="no loss term"):
        recipes.train(tiny, tmp_path / "a", corpus=little, plan="medusa")
    with pytest.raises(HastenError, match="takes no techniques"):
        recipes.train("code-lm-tiny", tmp_path / "b", corpus=little, plan="repr_align")
    assert not any(tmp_path.iterdir())
