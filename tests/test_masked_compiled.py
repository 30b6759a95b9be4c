"""The compiled runner of the masked engine: the same texts, from graphs of a few fixed sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hasten
from hasten.errors import PlanError
from hasten.masked.runners import CompiledRunner, EagerRunner, Look
from hasten.masked.runners.compiled import _width
from tests import models
from tests.techniques.fillers import MASK, filler, prompt
from tests.techniques.fillers import NEVER as NO_END

SIZE = 4
FORMS = {
    "sees everything": {},
    "shifted": {"shifted": True},
    "sees blocks": {"block_length": SIZE},
    "sees blocks, shifted": {"block_length": SIZE, "shifted": True},
}
PLANS = (
    "",
    "saber",
    "freedave(num_draft=6)",
    "dinfer(cache='dual')",
    "dinfer(cache='prefix')",
    "freecache(guided=False)",
)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are traced and then run as they are, which takes no compiler and no time."""
    monkeypatch.setattr("hasten.masked.runners.compiled.BACKEND", "eager")


def ragged() -> dict[str, Tensor]:
    return models.padded([prompt(1, n, seed=n)[0] for n in (11, 8, 13)])


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("form", FORMS)
def test_it_writes_what_the_eager_runner_writes(form: str, plan: str) -> None:
    model = filler(**FORMS[form], sharp=8.0)
    plans = [plan] if plan else []
    found = {}
    for runner in ("eager", "compiled"):
        with hasten.apply(model, *plans, runner=runner) as fast:
            assert fast.runner.name == runner
            many = fast.generate(**ragged(), max_new_tokens=16, block_length=8, **NO_END)
            one = fast.generate(prompt(1, 9), max_new_tokens=16, block_length=8, **NO_END)
            holes = prompt(2, 20)
            holes[:, 5:11] = MASK
            found[runner] = (many, one, fast.infill(holes), fast.activity)
    for ours, theirs in zip(found["compiled"][:3], found["eager"][:3], strict=True):
        assert torch.equal(ours, theirs)
    assert found["compiled"][3] == found["eager"][3]


@pytest.mark.usefixtures("traced")
def test_passes_of_many_sizes_share_a_few_graphs() -> None:
    model = filler(block_length=SIZE, sharp=8.0)
    with hasten.apply(model, "freedave(num_draft=6)", runner="compiled") as fast:
        for length in range(8, 30, 3):
            fast.generate(prompt(1, length), max_new_tokens=24, **NO_END)
        assert isinstance(fast.runner, CompiledRunner)
        widths = {shapes[0] for shapes in fast.runner._graphs}
        assert len(fast.runner._graphs) == len(widths) <= 4
    assert [_width(n) for n in (1, 8, 9, 17, 33, 96, 97, 300)] == [8, 8, 32, 32, 64, 96, 128, 320]


@pytest.mark.usefixtures("traced")
def test_a_weight_that_changes_is_seen() -> None:
    model = filler(block_length=SIZE, sharp=8.0)
    settings = {"max_new_tokens": 12, **NO_END}

    def written(runner: str) -> Tensor:
        with hasten.apply(model, runner=runner) as fast:
            out = fast.generate(prompt(1, 9), **settings)
            assert isinstance(out, Tensor)
            return out

    before = written("compiled")
    with torch.no_grad():
        for weight in model.model.layers[0].mlp.parameters():
            weight.mul_(-1.0)
    after = written("compiled")
    assert not torch.equal(before, after)
    assert torch.equal(after, written("eager"))


@pytest.mark.usefixtures("traced")
def test_a_model_in_the_place_of_another_gets_its_own_graphs() -> None:
    settings = {"max_new_tokens": 12, **NO_END}
    for seed in range(6):  # each may lie where the one before it lay
        model = filler(block_length=SIZE, sharp=8.0, seed=seed)
        texts = []
        for runner in ("compiled", "eager"):
            with hasten.apply(model, runner=runner) as fast:
                texts.append(fast.generate(prompt(1, 9), **settings))
        assert torch.equal(*texts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_graph_says_what_the_model_says(dtype: torch.dtype) -> None:
    """With the real compiler, weights as constants and, where the machine has them, tiles."""
    model = filler(block_length=SIZE, sharp=1.0).to(dtype)
    tokens = prompt(1, 20)
    tokens[:, 12:] = MASK
    blocks = torch.arange(20) // SIZE
    visible = (blocks[:, None] >= blocks)[None, None]
    look = Look(tokens, torch.arange(20)[None], torch.arange(12, 20), MASK, visible)
    with torch.no_grad():  # two tokens that are always as likely as each other
        model.get_output_embeddings().weight[7] = model.get_output_embeddings().weight[3]
    eager, compiled = (kind(model).read(look) for kind in (EagerRunner, CompiledRunner))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(compiled.logits, eager.logits, rtol=0, atol=tolerance)
    assert torch.equal(compiled.best, eager.best)
    for said in (eager, compiled):
        assert said.logits.dtype == torch.float32
        assert bool((said.logits[..., MASK] == -torch.inf).all())
        assert torch.equal(said.best, said.logits.argmax(dim=-1))
        likely = said.logits.softmax(dim=-1).amax(dim=-1)
        torch.testing.assert_close(said.chance, likely, rtol=1e-5, atol=1e-6)


def test_of_equally_likely_tokens_a_compiled_graph_takes_the_first_too() -> None:
    model = filler(block_length=SIZE)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(0.25)
    tokens = prompt(1, 20)
    for width in (8, 20):
        look = Look(tokens[:, :width], torch.arange(width)[None], torch.arange(width), MASK)
        said = CompiledRunner(model).read(look)
        assert not bool(said.best.any()) and MASK != 0
        vocabulary = said.logits.shape[-1]
        expected = torch.full_like(said.chance, 1 / (vocabulary - 1))
        torch.testing.assert_close(said.chance, expected, rtol=1e-5, atol=0)


def test_another_runner_is_refused() -> None:
    with pytest.raises(PlanError, match="warp"):
        hasten.apply(filler(), runner="warp")
