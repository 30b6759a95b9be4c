"""The laws that every causal technique passes by being registered (docs/write-a-technique.md).

Nothing here names a technique: the registry says which there are, their cards and contracts say
what holds for them, and `tests/law_settings.py` is the one table of settings for tiny models.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten import parts as parts_on_disk
from hasten import technique as registry
from hasten.causal.engine import RUNNERS, CausalModel
from hasten.errors import HastenError, PlanError
from hasten.plan import Plan, conflict
from hasten.technique import Loss, Technique
from tests import models
from tests.lab import (
    Lab,
    counters,
    early_end,
    hooks,
    one_knob_plans,
    padded_behind,
    refused_together,
    rival_can_be_read,
    says_what_it_is,
    snapshot,
    survives_text_and_toml,
    verdict_without_names,
)
from tests.law_settings import NO_NEUTRAL, SETTINGS

NEVER = -1  # an end-of-text id that no model gives
GREEDY = {"do_sample": False, "eos_token_id": NEVER}
NEW = 20


def is_causal(slug: str) -> bool:
    """Whether the laws are about this technique; one that cannot be imported is, and fails."""
    try:
        return any(slot.engine == "causal" for slot in registry.get(slug).contract.slots)
    except HastenError:
        return True


SLUGS = [slug for slug in registry.names() if is_causal(slug)]
BUILT = [slug for slug in SLUGS if slug in registry._REGISTERED]  # the others fail by the first law
PAIRS = list(combinations(BUILT, 2))
MODELS = ["gqa", "mha"]


def having(**wanted: Any) -> list[str]:
    """Slugs whose card has these values; True and False stand for set and not set."""
    found = []
    for slug in BUILT:
        card = registry.get(slug).card
        if all(
            bool(getattr(card, key)) == value
            if isinstance(value, bool)
            else getattr(card, key) in value
            for key, value in wanted.items()
        ):
            found.append(slug)
    return found


SAME_IDS = having(loss=(Loss.EXACT, Loss.DISTRIBUTION))  # in greedy decoding
LOSSY = having(loss=(Loss.LOSSY,))
NEUTRAL = having(neutral=True)
TRAINED = having(trained=True)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    lab = Lab(tmp_path_factory.mktemp("laws"))
    lab.add("gqa")
    lab.add("mha", num_key_value_heads=4)
    lab.add("bf16", dtype=torch.bfloat16)
    lab.add("other", seed=1)
    return lab


def repeating(length: int, seed: int) -> Tensor:
    """Ids (length,) that repeat a random stretch, so that there is something to look up."""
    return models.prompt(1, 16, seed=seed)[0].repeat(math.ceil(length / 16))[:length]


def one(length: int = 48, seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": repeating(length, seed)[None]}


def batch() -> dict[str, Tensor]:
    return models.padded([repeating(length, length) for length in (40, 48, 21)])


# ------------------------------------------------------------------------------------ the table


@pytest.mark.parametrize("slug", SLUGS)
def test_it_can_be_imported_and_says_what_it_is(slug: str) -> None:
    says_what_it_is(slug, "causal", NO_NEUTRAL)


def test_the_tables_hold_known_techniques_with_reasons() -> None:
    assert set(SETTINGS) | set(NO_NEUTRAL) <= set(registry.names())
    assert all(setting.why for setting in SETTINGS.values())


@pytest.mark.parametrize("slug", BUILT)
def test_its_rival_is_a_plan_that_can_be_read(slug: str) -> None:
    rival_can_be_read(slug, "causal")


# -------------------------------------------------------------------------------- off is off


@pytest.mark.parametrize("slug", BUILT)
def test_off_is_off(lab: Lab, slug: str) -> None:
    model, technique = lab.model("gqa"), lab.technique("gqa", slug)
    lab.parts("gqa", technique)
    inputs, arguments = batch(), {"max_new_tokens": NEW, **GREEDY}
    sampled = {**arguments, "do_sample": True, "seed": 3}
    state, hooked = snapshot(model), hooks(model)
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    attention, training = model.config._attn_implementation, model.training
    before = model.generate(**inputs, **arguments)

    fast = lab.apply("gqa", technique)
    first = fast.generate(**inputs, **arguments)
    activity = fast.activity
    assert torch.equal(fast.generate(**inputs, **arguments), first)
    assert fast.activity == activity
    assert torch.equal(fast.generate(**inputs, **sampled), fast.generate(**inputs, **sampled))
    with pytest.raises(PlanError, match="undo"):
        lab.apply("gqa", technique)
    fast.undo()
    fast.undo()
    with pytest.raises(PlanError, match="undone"):
        fast.generate(**inputs, **arguments)

    after = snapshot(model)
    assert state.keys() == after.keys()
    assert all(torch.equal(state[name], after[name]) for name in state)
    assert hooks(model) == hooked
    assert model.config.to_dict() == config and model.generation_config.to_dict() == generation
    assert (model.config._attn_implementation, model.training) == (attention, training)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(model.generate(**inputs, **arguments), before)
    assert torch.equal(lab.plain("gqa", inputs, **arguments), before)


# ------------------------------------------------------------------------- neutral is neutral


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("slug", NEUTRAL)
def test_neutral_is_neutral(lab: Lab, slug: str, name: str) -> None:
    inputs, arguments = batch(), {"max_new_tokens": NEW, **GREEDY}
    continuation = models.prompt(3, 12, seed=5)

    def everything(fast: CausalModel) -> tuple[Tensor, Tensor]:
        ids = fast.generate(**inputs, **arguments)
        assert not counters(fast, slug), "it did nothing, so it counts nothing"
        score = fast.score(inputs["input_ids"], continuation, inputs["attention_mask"], logits=True)
        assert score.logits is not None
        return ids, score.logits

    with lab.apply(name) as plain:
        wanted_ids, wanted = everything(plain)
    with lab.apply(name, lab.technique(name, slug, neutral=True)) as fast:
        ids, logits = everything(fast)
    assert torch.equal(ids, wanted_ids)
    assert torch.equal(logits, wanted)


# ---------------------------------------------------------------------------------- on is on


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("slug", BUILT)
def test_on_is_on(lab: Lab, slug: str, name: str) -> None:
    with lab.apply(name, lab.technique(name, slug)) as fast:
        ids = fast.generate(**one(), max_new_tokens=NEW, **GREEDY)
        own = counters(fast, slug)
        assert own and any(value > 0 for value in own.values()), fast.activity
        assert all(isinstance(value, (int, float)) for value in fast.activity.values())
        assert ids.shape == (1, 48 + NEW)


@pytest.mark.parametrize("slug", BUILT)
def test_streams_and_scores(lab: Lab, slug: str) -> None:
    arguments = {"max_new_tokens": NEW, **GREEDY}
    continuation = models.prompt(1, 12, seed=5)
    with lab.apply("gqa") as plain:
        wanted = plain.score(**one(), continuation=continuation, logits=True)
    with lab.apply("gqa", lab.technique("gqa", slug)) as fast:
        ids = fast.generate(**one(), **arguments)
        assert torch.equal(torch.cat(list(fast.stream(**one(), **arguments))), ids[0, 48:])
        score = fast.score(**one(), continuation=continuation, logits=True)
    assert score.nll.shape == (1, 12) and bool(score.nll.isfinite().all())
    assert score.logits is not None and wanted.logits is not None
    if slug in SAME_IDS:
        assert torch.equal(score.logits, wanted.logits)


@pytest.mark.parametrize("slug", BUILT)
def test_a_runner_that_cannot_carry_it_is_refused(lab: Lab, slug: str) -> None:
    for runner in set(RUNNERS.kinds) - registry.get(slug).contract.runners:
        with pytest.raises(PlanError, match=f"{slug} does not run on the '{runner}' runner"):
            lab.apply("gqa", lab.technique("gqa", slug), runner=runner)


# --------------------------------------------------------------------------- the class holds


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("slug", SAME_IDS)
def test_exact_is_exact(lab: Lab, slug: str, name: str) -> None:
    calls = [
        (one(length, length), {"max_new_tokens": 32, **GREEDY, **more})
        for length, more in (
            (48, {}),
            (31, {}),
            (17, {"repetition_penalty": 1.3}),
            (5, {}),
            (1, {}),
        )
    ]
    wanted = [lab.plain(name, inputs, **arguments) for inputs, arguments in calls]
    with lab.apply(name, lab.technique(name, slug)) as fast:
        for (inputs, arguments), ids in zip(calls, wanted, strict=True):
            assert torch.equal(fast.generate(**inputs, **arguments), ids)


@pytest.mark.parametrize("slug", SAME_IDS)
def test_the_distribution_is_the_models_own(lab: Lab, slug: str) -> None:
    """All continuations in a language of twelve words, counted beside their probabilities."""
    words, length, rows = 12, 3, 8192
    # Weaker logits than usual, so that most continuations can happen.
    name = lab.add("twelve", alphabet="\n abcdeftx=", vocab_size=words, initializer_range=0.12)
    prompt = repeating(12, 2).remainder(words)[None]
    every = torch.cartesian_prod(*[torch.arange(words)] * length)
    with lab.apply(name) as plain:
        nll = plain.score(prompt.expand(len(every), -1), every).nll.sum(dim=1)
    expected = nll.double().neg().exp() * rows
    assert expected.sum().item() == pytest.approx(rows, rel=1e-4)

    arguments = {"max_new_tokens": length, "do_sample": True, "top_k": 0, "eos_token_id": NEVER}
    with lab.apply(name, lab.technique(name, slug)) as fast:
        ids = fast.generate(prompt.expand(rows, -1), seed=11, **arguments)[:, prompt.shape[1] :]
        assert counters(fast, slug)
    observed = torch.zeros(words**length, dtype=torch.float64)
    place = (ids * words ** torch.arange(length - 1, -1, -1)).sum(dim=1)
    observed.scatter_add_(0, place, torch.ones(rows, dtype=torch.float64))
    assert chi_squared(observed, expected) > 1e-3


def chi_squared(observed: Tensor, expected: Tensor) -> float:
    """p-value of Pearson's test; outcomes that are expected less than five times are one outcome."""
    rare = expected < 5
    observed = torch.cat((observed[~rare], observed[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    kept = expected > 0
    statistic = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = torch.tensor((int(kept.sum()) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


# --------------------------------------------------------------------------------- it survives


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("slug", BUILT)
def test_padded_batches_whose_rows_end_early(lab: Lab, slug: str, name: str) -> None:
    inputs, prompt = batch(), batch()["input_ids"]
    free = lab.plain(name, inputs, max_new_tokens=NEW, **GREEDY)
    arguments = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": early_end(free, 48)}
    wanted = lab.plain(name, inputs, **arguments)
    with lab.apply(name, lab.technique(name, slug)) as fast:
        ids = fast.generate(**inputs, **arguments)
        assert ids.dtype == torch.long and ids.shape[0] == 3 and 49 <= ids.shape[1] <= 48 + NEW
        assert torch.equal(ids[:, :48], prompt)
        assert all(padded_behind(row, 48, arguments["eos_token_id"]) for row in ids)
        if slug in SAME_IDS:
            assert torch.equal(ids, wanted)


@pytest.mark.parametrize("slug", BUILT)
def test_bf16(lab: Lab, slug: str) -> None:
    inputs, arguments = batch(), {"max_new_tokens": NEW, **GREEDY}
    with lab.apply("bf16", lab.technique("bf16", slug)) as fast:
        ids = fast.generate(**inputs, **arguments)
        assert counters(fast, slug)
    assert ids.shape == (3, 48 + NEW)
    if slug not in SAME_IDS:
        return
    with lab.apply("bf16") as plain:
        wanted = plain.generate(**inputs, **arguments)
        score = plain.score(
            inputs["input_ids"], wanted[:, 48:], inputs["attention_mask"], logits=True
        )
    assert score.logits is not None
    for row, (found, right) in enumerate(zip(ids[:, 48:], wanted[:, 48:], strict=True)):
        differ = (found != right).nonzero()
        if len(
            differ
        ):  # a tie closer than bfloat16 can tell, which a wider pass may round otherwise
            at = int(differ[0])
            logits = score.logits[row, at]
            gap = logits.max() - logits[found[at]]
            assert gap <= 2**-6 * logits.abs().max(), f"row {row}, token {at}: apart by {gap:.3f}"


@pytest.mark.parametrize("slug", TRAINED)
def test_parts_survive_saving_and_know_their_model(lab: Lab, slug: str, data_folder: Any) -> None:
    technique = lab.technique("gqa", slug)
    parts = lab.parts("gqa", technique)
    inputs, arguments = batch(), {"max_new_tokens": NEW, **GREEDY}
    with lab.apply("gqa", technique) as fast:
        wanted = fast.generate(**inputs, **arguments)
    mine = parts_on_disk.model_hash(lab.model("gqa"))
    theirs = parts_on_disk.model_hash(lab.model("other"))
    path = parts_on_disk.default_path(technique, mine)
    assert data_folder in path.parents

    with pytest.raises(PlanError, match="has no trained part"):
        hasten.apply(lab.model("gqa"), technique)
    parts_on_disk.save(path, technique, parts[slug], mine)
    try:
        loaded = parts_on_disk.load(path, technique, mine)
        assert loaded.keys() == parts[slug].keys()
        assert all(torch.equal(loaded[key], value) for key, value in parts[slug].items())
        with hasten.apply(lab.model("gqa"), technique) as fast:  # found where prepare puts them
            assert torch.equal(fast.generate(**inputs, **arguments), wanted)
        with pytest.raises(PlanError, match="another model"):
            parts_on_disk.load(path, technique, theirs)
        with pytest.raises(PlanError, match="has no trained part"):
            hasten.apply(lab.model("other"), technique)
    finally:
        path.unlink()


@pytest.mark.parametrize("slug", BUILT)
def test_plans_survive_text_and_toml(slug: str) -> None:
    for plan in one_knob_plans(slug):
        survives_text_and_toml(plan)


# ------------------------------------------------------------------- valid and invalid chains


def at_defaults(slug: str) -> Technique:
    return registry.get(slug)()


LEGAL = [pair for pair in PAIRS if conflict(*map(at_defaults, pair)) is None]
ILLEGAL = [pair for pair in PAIRS if pair not in LEGAL]


@pytest.mark.parametrize("pair", LEGAL, ids=" + ".join)
def test_legal_pairs_compose(lab: Lab, pair: tuple[str, str]) -> None:
    inputs, arguments = batch(), {"max_new_tokens": 12, **GREEDY}
    wanted = lab.plain_kept("gqa", inputs, **arguments)
    with lab.apply("gqa", *(lab.technique("gqa", slug) for slug in pair)) as fast:
        ids = fast.generate(**inputs, **arguments)
        assert ids.shape == (3, 60) and torch.equal(ids[:, :48], inputs["input_ids"])
        again = fast.generate(**inputs, **arguments)
        assert torch.equal(ids, again)
    # At a neutral setting neither stands in the other's way.
    if all(slug in SAME_IDS or slug in NEUTRAL for slug in pair):
        calm = [lab.technique("gqa", slug, neutral=slug not in SAME_IDS) for slug in pair]
        with lab.apply("gqa", *calm) as fast:
            assert torch.equal(fast.generate(**inputs, **arguments), wanted)


@pytest.mark.parametrize("pair", ILLEGAL, ids=" + ".join)
def test_illegal_pairs_are_one_clear_error(pair: tuple[str, str]) -> None:
    refused_together(*map(at_defaults, pair))


def test_a_technique_stands_in_a_plan_once() -> None:
    for slug in BUILT:
        with pytest.raises(PlanError, match="twice"):
            Plan.parse(slug, slug)


def test_conflicts_follow_from_contracts_alone() -> None:
    """Renaming both techniques changes no verdict."""
    for pair in PAIRS:
        assert verdict_without_names(*map(at_defaults, pair)) == (pair in LEGAL)
