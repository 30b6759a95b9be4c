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
from hasten.training.masked import mask_in_blocks
from hasten.zoo import recipes
from hasten.zoo.continuations import ROWS, Continuations, write_continuations
from hasten.zoo.corpus import Corpus, FileWindows, default_corpus, tokenize

STEPS = 6


@pytest.fixture(scope="module")
def little() -> Corpus:
    library = default_corpus()
    short = [file for file in library.held_out if 1_000 < file.num_bytes < 3_000]
    return Corpus(library.train[:20], tuple(short[:2]))


def conversion(name: str) -> recipes.Conversion:
    """A recipe's conversion done to the tiny model, for runs of seconds."""
    full = recipes.recipe(name)
    assert isinstance(full, recipes.Conversion)
    settings = replace(
        full.training,
        batch_tokens=256,
        tokens=256 * STEPS,
        stages=(Stage(length=64, share=1.0),),
    )
    assert full.echoes
    echoes = tuple(
        replace(
            echo,
            texts=6,
            prompt=32,
            skip=min(echo.skip, ROWS),
            training=replace(
                echo.training, batch_tokens=256, tokens=256 * 3, stages=settings.stages
            ),
        )
        for echo in full.echoes
    )
    return replace(full, base="code-lm-tiny", training=settings, echoes=echoes)


@pytest.fixture(scope="module")
def tiny() -> recipes.Conversion:
    return conversion("code-dlm")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["code-dlm", "code-dlm-block"])
def test_it_makes_a_model_that_the_masked_engine_opens(
    tmp_path: Path, name: str, little: Corpus
) -> None:
    chosen = conversion(name)
    card = recipes.train(chosen, tmp_path / "dlm", threads=1, corpus=little, quiet=True)
    assert card.training["steps"] == STEPS
    assert [part["steps"] for part in card.training["echoes"]] == [3] * len(chosen.echoes)
    assert [file.name for file in tmp_path.iterdir()] == ["dlm"]  # nothing of the run is left
    assert card.recipe["plan"] == "repr_align" and card.recipe["base"] == "code-lm-tiny"
    assert {"loss", "masked_loss", "nll_at_1", "nll_at_8"} <= card.quality.keys()
    # Nothing is likelier to the base than what it writes itself.
    others = [card.quality[f"nll_at_{count}"] for count in (1, 2, 4, 8)]
    assert 0 < card.quality["nll_of_base"] < min(others)
    assert json.loads((tmp_path / "dlm" / "card.json").read_text())["sha256"] == card.sha256
    fast = hasten.apply(str(tmp_path / "dlm"), "freedave")
    assert isinstance(fast, MaskedModel)
    assert fast.form.block_length == chosen.block_length
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


def test_masks_of_a_continuation_are_those_of_writing_in_blocks() -> None:
    torch.manual_seed(0)
    ids = torch.randint(5, 90, (64, 16 + 128))
    inputs, wanted = mask_in_blocks(ids, 16, mask_id=3)
    assert not bool(wanted[:, :16].any()) and bool(wanted.any(dim=1).all())
    assert bool((inputs[wanted] == 3).all()) and torch.equal(inputs[:, :16], ids[:, :16])
    lengths = set()
    for row, places in zip(inputs, wanted, strict=True):
        last = int(places.nonzero().max())
        hidden = (row == 3).nonzero()[:, 0]
        behind = hidden[hidden > last]
        # Behind the block everything is hidden, and nothing before its first open place is.
        assert behind.numel() == 0 or behind.tolist() == list(range(int(behind[0]), len(row)))
        assert int(hidden[0]) == int(places.nonzero().min())
        lengths.add(last - int(hidden[0]) + 1)
    assert max(lengths) > 64 and min(lengths) <= 16


def test_continuations_begin_with_the_passage_and_are_what_the_model_says(
    tmp_path: Path, little: Corpus
) -> None:
    subject = hasten.open_subject("code-lm-tiny")
    files = FileWindows(tokenize(little.train, subject.tokenizer))
    kept = tmp_path / "texts.safetensors"
    wanted = {"count": 5, "prompt": 24, "length": 39, "quiet": True}
    texts = write_continuations(subject.model, files, kept, **wanted)
    assert texts.shape == (5, 40)
    passages = files.batch(0, 64, 24)[:5, :24]
    assert torch.equal(texts[:, :24].long(), passages)
    greedy = subject.model.generate(passages[:1], max_new_tokens=16, do_sample=False)
    assert torch.equal(texts[0].long(), greedy[0])
    assert torch.equal(write_continuations(subject.model, files, kept, **wanted), texts)
    data = Continuations(texts)
    rows = data.batch(0, 5, 39)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, texts.tolist()))
    assert torch.equal(data.batch(3, 2, 39), data.batch(3, 2, 39))
    with pytest.raises(HastenError, match="length"):
        data.batch(0, 2, 64)
