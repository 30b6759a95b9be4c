"""A draft model: exact sampling, its own cache, and which models it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hasten
from hasten.causal.drafter.draft_model import LANE
from hasten.causal.run import Run
from hasten.errors import HastenError, PlanError
from hasten.measure.stats import goodness_of_fit
from hasten.zoo import catalogue
from tests import models

NEVER = -1  # an end-of-text id that no model gives
Folder = Callable[..., Path]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """`folder(seed=1, ...)`: a checkpoint folder of a tiny model; `noise` blurs the model of seed 0."""
    made: dict[str, Path] = {}

    def make(*, noise: float | None = None, **arguments: object) -> Path:
        key = f"{noise} {arguments}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("draft")
            model = models.tiny_model(**arguments)
            generator = torch.Generator().manual_seed(9)
            with torch.no_grad():
                for weight in model.parameters():
                    weight += (noise or 0.0) * torch.randn(weight.shape, generator=generator)
            model.save_pretrained(made[key])
        return made[key]

    return make


def several(rows: int = 3) -> dict[str, Tensor]:
    return models.padded([models.prompt(1, 9 + 4 * row, seed=row)[0] for row in range(rows)])


# ----------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("num_draft", [1, 3, 6])
@pytest.mark.parametrize(
    "draft", [{}, {"noise": 0.02}, {"seed": 1}], ids=["same", "similar", "stranger"]
)
def test_greedy_ids_stay_the_same(folder: Folder, draft: dict[str, float], num_draft: int) -> None:
    model = models.tiny_model()
    arguments = {"max_new_tokens": 32, "eos_token_id": NEVER}
    expected = model.generate(**several(), **arguments)
    with hasten.apply(
        model, f"draft_model(draft='{folder(**draft)}', num_draft={num_draft})"
    ) as fast:
        assert torch.equal(fast.generate(**several(), **arguments), expected)
        assert torch.equal(
            fast.generate(models.prompt(), **arguments),
            model.generate(models.prompt(), **arguments),
        )


def test_rows_that_end_at_different_times(folder: Folder) -> None:
    model = models.tiny_model()
    free = model.generate(**several(), max_new_tokens=32, eos_token_id=NEVER)
    with hasten.apply(model, f"draft_model(draft='{folder(noise=0.02)}')") as fast:
        for token in {int(free[0, 25]), int(free[1, 30]), int(free[2, 41])}:
            arguments = {"max_new_tokens": 32, "eos_token_id": token, "pad_token_id": 0}
            assert torch.equal(
                fast.generate(**several(), **arguments), model.generate(**several(), **arguments)
            )


def test_a_penalty_counts_the_drafted_tokens_too(folder: Folder) -> None:
    model = models.tiny_model()
    arguments = {"max_new_tokens": 32, "eos_token_id": NEVER, "repetition_penalty": 1.7}
    with hasten.apply(model, f"draft_model(draft='{folder()}')") as fast:
        assert torch.equal(
            fast.generate(**several(), **arguments), model.generate(**several(), **arguments)
        )
        assert fast.activity["draft_model.accepted"] == 3 * 32 - 3 * fast.activity["passes"]


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_an_identical_draft_model_is_always_right(folder: Folder, sample: bool) -> None:
    with hasten.apply(models.tiny_model(), f"draft_model(draft='{folder()}', num_draft=4)") as fast:
        fast.generate(
            **several(), max_new_tokens=31, do_sample=sample, top_k=0, seed=2, eos_token_id=NEVER
        )
        assert fast.activity["passes"] == 1 + 6  # the prompt gives one token, every pass five
        assert fast.activity["draft_model.drafted"] == 3 * 6 * 4
        assert fast.activity["draft_model.accepted"] == 3 * 6 * 4


@pytest.mark.parametrize("draft", [{"noise": 0.05}, {"seed": 1}], ids=["similar", "stranger"])
@pytest.mark.parametrize(
    "settings", [{"top_k": 0, "temperature": 0.8}, {"top_k": 3}, {"top_p": 0.7}]
)
def test_sampling_keeps_the_distribution(
    folder: Folder, draft: dict[str, float], settings: dict[str, float]
) -> None:
    size, new, draws = 5, 3, 4000
    shape = {"vocab_size": size, "initializer_range": 0.4}
    model = models.tiny_model(**shape)
    ids = models.prompt(1, 6, vocabulary=size)
    arguments = {"max_new_tokens": new, "do_sample": True, "eos_token_id": NEVER, **settings}
    with hasten.apply(model) as plain:  # its processors say what the distribution is
        run = plain._run(ids, None, arguments)
        expected, sequences = torch.ones(1), ids
        for _ in range(new):
            probs = run.sampler.scores(model(sequences).logits[:, -1], None).softmax(dim=-1)
            expected = (expected[:, None] * probs).flatten()
            following = torch.arange(size).repeat(len(sequences))[:, None]
            sequences = torch.cat((sequences.repeat_interleave(size, 0), following), dim=1)
    with hasten.apply(
        model, f"draft_model(draft='{folder(**shape, **draft)}', num_draft=2)"
    ) as fast:
        out = fast.generate(ids.expand(draws, -1), seed=5, **arguments)
        accepted, drafted = (
            fast.activity[f"draft_model.{what}"] for what in ("accepted", "drafted")
        )
        assert 0 < accepted < drafted
    counts = torch.bincount(
        (out[:, -new:] * torch.tensor([size**2, size, 1])).sum(1), minlength=size**new
    )
    assert goodness_of_fit(counts.tolist(), expected.tolist()).passes()


# ---------------------------------------------------------------------------------- its own cache


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_draft_models_cache_is_that_of_a_fresh_prompt(folder: Folder, family: str) -> None:
    model, inputs = models.tiny_model(family), several()
    with hasten.apply(model, f"draft_model(draft='{folder(family=family, noise=0.02)}')") as fast:
        run = fast._run(
            inputs["input_ids"],
            inputs["attention_mask"],
            {"max_new_tokens": 30, "eos_token_id": NEVER},
        )
        for technique, bound in run.slots.entries():
            run.states[id(technique)] = technique.begin(run, bound)
        run.prefill()
        while int(run.lengths.max()) < 40:
            run.step()
            check_lane(run)
        assert len(set(run.lengths.tolist())) > 1, "the rows should have accepted different numbers"


def check_lane(run: Run) -> None:
    """Each row's cache holds what the draft model alone makes of the row's tokens."""
    lane = run.lanes[LANE]
    for row in range(run.batch):
        filled = int(lane.filled[row])
        assert int(run.lengths[row]) - filled in (1, 2)
        tokens = run.tokens[row : row + 1, int(run.pads[row]) : filled]
        fresh = lane.runner.model(tokens, use_cache=True).past_key_values
        for ours, theirs in zip(lane.cache.layers, fresh.layers, strict=True):
            real = ours.positions[row, 0] >= 0
            assert ours.positions[row, 0, real].tolist() == list(range(tokens.shape[1]))
            torch.testing.assert_close(
                ours.keys[row, :, real], theirs.keys[0], atol=1e-5, rtol=1e-5
            )
            torch.testing.assert_close(
                ours.values[row, :, real], theirs.values[0], atol=1e-5, rtol=1e-5
            )


def test_its_cache_counts_in_the_peak(folder: Folder) -> None:
    model = models.tiny_model()
    with hasten.apply(model) as plain:
        plain.generate(models.prompt(), max_new_tokens=20, eos_token_id=NEVER)
        alone = plain.peak_cache_bytes
    with hasten.apply(model, f"draft_model(draft='{folder(seed=1)}')") as fast:
        fast.generate(models.prompt(), max_new_tokens=20, eos_token_id=NEVER)
        assert fast.peak_cache_bytes == 2 * alone


# ------------------------------------------------------------------------- which models it takes


def test_another_vocabulary_is_refused(folder: Folder, tmp_path: Path) -> None:
    model = models.tiny_model()
    with pytest.raises(PlanError, match=r"draft_model: .* vocabulary of 80 tokens .* 96"):
        hasten.apply(model, f"draft_model(draft='{folder(vocab_size=80)}')")
    ours, theirs = (models.save_checkpoint(tmp_path / name) for name in ("ours", "theirs"))
    tokenizer = theirs / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"a"', '"ä"'), encoding="utf-8")
    with pytest.raises(PlanError, match=r"draft_model: .* another tokenizer"):
        hasten.apply(ours, f"draft_model(draft='{theirs}')")
    hasten.apply(ours, f"draft_model(draft='{ours}')").undo()


def test_a_draft_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HastenError, match="no folder"):
        hasten.apply(models.tiny_model(), f"draft_model(draft='{tmp_path / 'none'}')")


def test_a_draft_model_made_for_less_context_is_refused(folder: Folder) -> None:
    draft = folder(max_position_embeddings=32)
    with (
        hasten.apply(models.tiny_model(), f"draft_model(draft='{draft}')") as fast,
        pytest.raises(HastenError, match=r"may need 36 tokens.* for 32"),
    ):
        fast.generate(models.prompt(), max_new_tokens=20)


def test_auto_knows_only_the_zoos_pair() -> None:
    with pytest.raises(PlanError, match="draft='auto' knows a smaller model only for code-lm"):
        hasten.apply(models.tiny_model(), "draft_model")


@pytest.mark.zoo
def test_auto_takes_the_small_model_of_the_zoo(zoo: Callable[[str], Path]) -> None:
    zoo("code-lm-small")
    with hasten.apply(zoo("code-lm"), "draft_model") as fast:
        (_, bound), *_ = fast.bound
        assert Path(bound.model.name_or_path) == catalogue.path("code-lm-small")
        text = catalogue.held_out_files("code-lm")[1][:800]
        ids = fast.subject.tokenizer(text, return_tensors="pt")["input_ids"]
        expected = fast.subject.model.generate(ids, max_new_tokens=48, do_sample=False)
        assert torch.equal(fast.generate(ids, max_new_tokens=48, do_sample=False), expected)
        assert fast.activity["draft_model.accepted"] > 0.2 * fast.activity["draft_model.drafted"]
