"""Learning to write in blocks: a text and its branches in one sequence say what each would alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from hasten.errors import HastenError
from hasten.masked.attention import undirected
from hasten.masked.denoiser import Denoiser
from hasten.subject import MaskedForm
from hasten.training.blocks import BlockLoss, Layout
from hasten.training.loop import Settings, Stage, fit
from hasten.zoo.continuations import Continuations
from tests.techniques.fillers import MASK, filler, prompt

SIZE, PROMPT, LENGTH = 4, 8, 24


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_each_branch_says_what_decoding_hears(ahead: int) -> None:
    model = filler(block_length=SIZE, shifted=True, sharp=1.0)
    loss = BlockLoss(MASK, prompt=PROMPT, block_length=SIZE, ahead=ahead)
    layout, ids = loss.layout(LENGTH), prompt(2, LENGTH)
    inputs, wanted = loss.hide(ids, layout)
    with torch.no_grad(), undirected(model, layout.visible[None, None]):
        said = model(
            input_ids=inputs,
            position_ids=layout.places[None].expand_as(inputs),
            use_cache=False,
        ).logits[:, layout.source]
    said[..., MASK] = -torch.inf
    plain = Denoiser(model, MaskedForm(MASK, True, SIZE))
    assert int(layout.branch.max()) + 1 == (LENGTH - PROMPT) // SIZE
    for branch in range(int(layout.branch.max()) + 1):
        own = layout.branch == branch
        places = layout.places[own]
        first = PROMPT + branch * SIZE
        assert places.tolist() == list(range(first, min(first + (1 + ahead) * SIZE, LENGTH)))
        text = ids.clone()
        text[:, first:] = MASK
        text[:, places] = inputs[:, own]
        torch.testing.assert_close(said[:, own], plain.read(text, places).logits, rtol=0, atol=1e-5)
        # All of what is ahead is hidden, and of its block some.
        behind = layout.ahead[own] > 0
        assert bool((text[:, places[behind]] == MASK).all())
    assert bool((inputs[:, :LENGTH] == ids).all()) and not bool(wanted[:, :LENGTH].any())


def test_the_loss_is_the_weighted_mean_of_what_is_hidden() -> None:
    model, ids = filler(sharp=1.0), prompt(2, LENGTH + 1)
    loss = BlockLoss(MASK, prompt=PROMPT, block_length=SIZE, ahead=1, fading=0.5)
    layout = loss.layout(LENGTH)
    torch.manual_seed(3)
    found, _ = loss(model, ids)
    torch.manual_seed(3)
    inputs, wanted = loss.hide(ids[:, :-1], layout)
    with torch.no_grad(), undirected(model, layout.visible[None, None]):
        logits = model(
            input_ids=inputs, position_ids=layout.places[None].expand_as(inputs), use_cache=False
        ).logits
    total = weight = 0.0
    for row, place in wanted.nonzero().tolist():
        token = ids[row, layout.places[place]]
        nats = cross_entropy(logits[row, layout.source[place]], token)
        share = 0.5 if int(layout.ahead[place]) else 1.0
        total, weight = total + share * float(nats), weight + share
    assert float(found.detach()) == pytest.approx(total / weight, rel=1e-4)


def test_it_learns_to_write_what_it_saw() -> None:
    model = filler(sharp=1.0)
    texts = prompt(4, LENGTH + 1, seed=2)
    settings = Settings(
        tokens=60 * 8 * LENGTH,
        batch_tokens=8 * LENGTH,
        stages=(Stage(length=LENGTH, share=1.0),),
        autocast=False,
        compile=False,
    )
    loss = BlockLoss(MASK, prompt=PROMPT, block_length=SIZE, ahead=1)
    outcome = fit(model, Continuations(texts), settings, loss, quiet=True)
    assert outcome.losses[-1] < 0.3 * outcome.losses[0]


@pytest.mark.parametrize(("length", "prompt_length"), [(22, 8), (24, 6), (24, 24), (24, 0)])
def test_lengths_that_blocks_do_not_fill(length: int, prompt_length: int) -> None:
    with pytest.raises(HastenError, match="multiples"):
        Layout.of(length, prompt_length, SIZE, 1)
