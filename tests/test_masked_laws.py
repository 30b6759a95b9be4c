"""The laws that every masked technique passes by being registered (docs/write-a-technique.md).

Nothing here names a technique: the registry says which there are, their cards and contracts say
what holds for them, and `tests/masked_law_settings.py` is the one table of settings for tiny
models. The reference is static decoding, the empty plan.

A technique that can give slots back is also tested with parts of it switched off. Which knobs do
that is found out, not listed: for each contract that switches can give, the fewest of them (`ways`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten import technique as registry
from hasten.errors import PlanError
from hasten.masked.engine import RUNNERS
from hasten.masked.slots import Guess
from hasten.plan import Plan, conflict
from hasten.technique import Contract, Loss, Technique
from tests import models
from tests.lab import (
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
from tests.masked_law_settings import NO_NEUTRAL, SETTINGS, MaskedLab
from tests.techniques.fillers import MASK, NEVER, prompt

NEW, BLOCK = 16, 8
USUAL: dict[str, Any] = {"max_new_tokens": NEW, "block_length": BLOCK, **NEVER}
DRAWN: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_k": 0}

SLUGS = registry.names(engine="masked")
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shifted": {"shifted": True},
    "blocks": {"block_length": 8},
    "shifted blocks": {"shifted": True, "block_length": 6},
    "mha": {"num_key_value_heads": 4},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"shifted": True},
    "qwen3": {"block_length": 4},
    "mistral": {"sliding_window": None},
}

Knobs = dict[str, Any]
Way = tuple[str, Knobs]


def ways(slug: str) -> list[Way]:
    """A technique with its parts on and off: the fewest switches for each contract that fills a slot.

    The defaults come first. A switch is a knob that is true or false, or has a few choices.
    """
    kind = registry.get(slug)
    switches: dict[str, list[Any]] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        both = (True, False) if isinstance(field.default, bool) else ()
        values = both or field.metadata["knob"].choices
        if values:
            switches[field.name] = sorted(values, key=lambda v, usual=field.default: v != usual)
    found: dict[Contract, Knobs] = {}
    settings = [
        {name: value for name, value in zip(switches, values, strict=True) if value != usual[name]}
        for usual in [{name: values[0] for name, values in switches.items()}]
        for values in product(*switches.values())
    ]
    for knobs in sorted(settings, key=len):
        terms = kind(**knobs).terms()
        if terms.slots:
            found.setdefault(terms, knobs)
    return [(slug, knobs) for knobs in found.values()]


def at_defaults(way: Way) -> Technique:
    slug, knobs = way
    return registry.get(slug)(**knobs)


def said(*some: Way) -> str:
    return str(Plan(tuple(entry for way in some for entry in Plan.parse(at_defaults(way)).entries)))


WAYS = [way for slug in SLUGS for way in ways(slug)]
EXACT = [way for way in WAYS if at_defaults(way).loss_class() is Loss.EXACT]
NEUTRAL = [slug for slug in SLUGS if registry.get(slug).card.neutral is not None]
PAIRS = [pair for pair in combinations(WAYS, 2) if pair[0][0] != pair[1][0]]
LEGAL = [pair for pair in PAIRS if conflict(*map(at_defaults, pair)) is None]
ILLEGAL = [pair for pair in PAIRS if pair not in LEGAL]

each_way = pytest.mark.parametrize("way", WAYS, ids=said)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> MaskedLab:
    lab = MaskedLab(tmp_path_factory.mktemp("masked_laws"))
    for name, overrides in MODELS.items():
        lab.add(name, **overrides)
    for family, overrides in FAMILIES.items():
        lab.add(family, family, **overrides)
    lab.add("bf16", dtype=torch.bfloat16)
    return lab


def one(length: int = 20, seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": prompt(1, length, seed=seed)}


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Three prompts of different lengths, padded on the left."""
    return models.padded([prompt(1, n, seed=seed + n)[0] for n in (20, 9, 14)])


def holes(seed: int = 0) -> dict[str, Tensor]:
    """Texts of different lengths with masks in them, padded on the left."""
    texts = [prompt(1, n, seed=seed + n)[0] for n in (24, 13, 18)]
    for row, text in enumerate(texts):
        text[row + 2 :: 2] = MASK
    return models.padded(texts)


def filled(ids: Tensor, inputs: dict[str, Tensor]) -> bool:
    """Whether a continuation keeps its prompt and leaves no mask."""
    length = inputs["input_ids"].shape[1]
    kept = torch.equal(ids[:, :length], inputs["input_ids"])
    return kept and ids.shape[1] == length + NEW and not bool((ids[:, length:] == MASK).any())


def work(fast: Any) -> tuple[float, float]:
    """Passes and positions of the last call."""
    return fast.activity["passes"], fast.activity["positions"]


# ------------------------------------------------------------------------------------ the table


@pytest.mark.parametrize("slug", SLUGS)
def test_it_says_what_it_is(slug: str) -> None:
    says_what_it_is(slug, "masked", NO_NEUTRAL)


def test_the_tables_hold_known_techniques_with_reasons() -> None:
    assert set(SETTINGS) | set(NO_NEUTRAL) <= set(SLUGS)
    assert all(setting.why for setting in SETTINGS.values())
    for slug, setting in SETTINGS.items():  # so that what is legal at defaults is so in the tests
        kind = registry.get(slug)
        assert kind(**setting.knobs).terms() == kind().terms()
        assert kind(**setting.knobs).loss_class() is kind().loss_class()


@pytest.mark.parametrize("slug", SLUGS)
def test_its_rival_is_a_plan_that_can_be_read(slug: str) -> None:
    rival_can_be_read(slug, "masked")


# -------------------------------------------------------------------------------- off is off


@each_way
def test_off_is_off(lab: MaskedLab, way: Way) -> None:
    slug, knobs = way
    model, technique = lab.model("plain"), lab.technique("plain", slug, **knobs)
    inputs, drawn = batch(), {**USUAL, **DRAWN, "seed": 3}
    state, hooked = snapshot(model), hooks(model)
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    attention, training = model.config._attn_implementation, model.training
    with torch.no_grad():
        before = model(**inputs).logits

    fast: Any = lab.apply("plain", technique)
    first = fast.generate(**inputs, **USUAL)
    activity, peak = fast.activity, fast.peak_cache_bytes
    sampled = fast.generate(**inputs, **drawn)
    fast.infill(**holes())  # another text in between
    assert torch.equal(fast.generate(**inputs, **USUAL), first)
    assert (fast.activity, fast.peak_cache_bytes) == (activity, peak)
    assert torch.equal(fast.generate(**inputs, **drawn), sampled)
    with pytest.raises(PlanError, match="undo"):
        lab.apply("plain", technique)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)  # between calls, too
    fast.undo()
    fast.undo()
    with pytest.raises(PlanError, match="undone"):
        fast.generate(**inputs, **USUAL)
    with pytest.raises(PlanError, match="undone"):
        fast.infill(**holes())

    after = snapshot(model)
    assert state.keys() == after.keys()
    assert all(torch.equal(state[name], after[name]) for name in state)
    assert hooks(model) == hooked
    assert model.config.to_dict() == config and model.generation_config.to_dict() == generation
    assert (model.config._attn_implementation, model.training) == (attention, training)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    plain = lab.plain_kept("plain", inputs, **USUAL)
    assert torch.equal(lab.plain("plain", inputs, **USUAL), plain)


# ------------------------------------------------------------------------- neutral is neutral


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("slug", NEUTRAL)
def test_neutral_is_neutral(lab: MaskedLab, slug: str, name: str) -> None:
    """Bit for bit what static decoding does, pass by pass, for the same work."""
    inputs = batch()

    def everything(fast: Any, **arguments: Any) -> list[Tensor]:
        """The text after every pass, and how sure each pass was of the masks it looked at."""
        block = arguments.pop("block")
        settings = {"max_new_tokens": NEW, **NEVER, **arguments}
        run, _ = fast._generation(inputs["input_ids"], inputs["attention_mask"], block, settings)
        run.trace, sure, guessed = [], [], run._guess

        def note(tokens: Tensor, *args: Any, **kwargs: Any) -> Guess:
            guess = guessed(tokens, *args, **kwargs)
            sure.append(guess.confidence[(tokens == MASK) & (guess.confidence > 0)])
            return guess

        run._guess = note
        fast._execute(run)
        assert not counters(fast, slug), "it did nothing, so it counts nothing"
        return [*run.trace, *sure]

    for arguments in ({"block": BLOCK}, {"block": NEW, "seed": 5, **DRAWN}):
        with lab.apply(name) as plain:
            wanted = everything(plain, **arguments)
            spent = work(plain)
        with lab.apply(name, lab.technique(name, slug, neutral=True)) as fast:
            found = everything(fast, **arguments)
            assert work(fast) == spent
        assert all(torch.equal(*both) for both in zip(found, wanted, strict=True))


# ---------------------------------------------------------------------------------- on is on


@pytest.mark.parametrize("name", ["plain", "shifted", "blocks"])
@each_way
def test_on_is_on(lab: MaskedLab, way: Way, name: str) -> None:
    """Each part that can stand alone counts what it does, and changes the text or the work."""
    slug, knobs = way
    plain = lab.plain_kept(name, one(), **USUAL)
    with lab.apply(name, lab.technique(name, slug, **knobs)) as fast:
        ids = fast.generate(**one(), **USUAL)
        own = counters(fast, slug)
        assert own and all(value > 0 for value in own.values()), fast.activity
        assert all(isinstance(value, (int, float)) for value in fast.activity.values())
        assert filled(ids, one()) and fast.activity["emitted"] == NEW
        static = (NEW, NEW * (20 + NEW))
        assert work(fast) != static or not torch.equal(ids, plain)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("slug", SLUGS)
def test_families(lab: MaskedLab, slug: str, family: str) -> None:
    technique = lab.technique(family, slug)
    with lab.apply(family, technique) as fast:
        ids = fast.generate(**batch(), **USUAL)
        assert filled(ids, batch()) and counters(fast, slug)
    if technique.loss_class() is Loss.EXACT:
        assert torch.equal(ids, lab.plain_kept(family, batch(), **USUAL))


@pytest.mark.parametrize("end", [{}, {"eos_token_id": 17}], ids=["no end", "an end"])
@pytest.mark.parametrize("slug", SLUGS)
def test_a_stream_is_the_text(lab: MaskedLab, slug: str, end: dict[str, int]) -> None:
    with lab.apply("plain", lab.technique("plain", slug)) as fast:
        if end:
            end = {"eos_token_id": early_end(fast.generate(**one(), **USUAL), 20)}
        settings = {**USUAL, **end}
        ids = fast.generate(**one(), **settings)
        activity = fast.activity
        assert torch.equal(torch.cat(list(fast.stream(**one(), **settings))), ids[0, 20:])
        assert fast.activity == activity


@pytest.mark.parametrize("slug", SLUGS)
def test_it_writes_the_same_on_every_runner(
    lab: MaskedLab, slug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hasten.masked.runners.compiled.BACKEND", "eager")  # quick, and as exact
    assert registry.get(slug).contract.runners == set(RUNNERS.kinds)
    texts = []
    for runner in RUNNERS.kinds:
        with lab.apply("plain", lab.technique("plain", slug), runner=runner) as fast:
            texts.append(fast.generate(**one(), **USUAL))
    assert torch.equal(*texts)


# --------------------------------------------------------------------------- the class holds


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", EXACT, ids=said)
def test_exact_is_static_decoding(lab: MaskedLab, way: Way, name: str) -> None:
    slug, knobs = way
    calls: list[tuple[dict[str, Tensor], dict[str, Any]]] = [
        (batch(1), {}),
        (batch(2), {"block_length": NEW}),
        (batch(3), {"block_length": 4, "repetition_penalty": 1.3}),
        (one(1, seed=4), {"block_length": 1}),
        *((batch(seed), {**DRAWN, "seed": seed}) for seed in range(3)),
        (one(7), {**DRAWN, "temperature": 2.0, "top_k": 20, "seed": 5}),
    ]
    with lab.apply(name) as plain:
        wanted = [plain.generate(**inputs, **{**USUAL, **more}) for inputs, more in calls]
        text = plain.infill(**holes(), block_length=6)
    with lab.apply(name, lab.technique(name, slug, **knobs)) as fast:
        for (inputs, more), ids in zip(calls, wanted, strict=True):
            assert torch.equal(fast.generate(**inputs, **{**USUAL, **more}), ids), more
        assert torch.equal(fast.infill(**holes(), block_length=6), text)


# --------------------------------------------------------------------------------- it survives


@pytest.mark.parametrize("name", ["plain", "shifted", "blocks"])
@each_way
def test_padded_batches_whose_rows_end_early(lab: MaskedLab, way: Way, name: str) -> None:
    (slug, knobs), inputs = way, batch()
    technique = lab.technique(name, slug, **knobs)
    with lab.apply(name, technique) as fast:
        free = fast.generate(**inputs, **USUAL)
        assert filled(free, inputs)
        end = early_end(free, 20)
        ids = fast.generate(**inputs, **{**USUAL, "eos_token_id": end})
    assert ids.dtype == torch.long and filled(ids, inputs)
    assert all(padded_behind(row, 20, end) for row in ids)
    assert bool((ids[:, 20:] == end).any())
    if technique.loss_class() is Loss.EXACT:
        plain = lab.plain_kept(name, inputs, **{**USUAL, "eos_token_id": end})
        assert torch.equal(ids, plain)


@pytest.mark.parametrize("name", ["plain", "shifted blocks"])
@each_way
def test_infilling_keeps_what_is_given(lab: MaskedLab, way: Way, name: str) -> None:
    slug, knobs = way
    given = holes()["input_ids"]
    with lab.apply(name, lab.technique(name, slug, **knobs)) as fast:
        for block in (None, 6):
            ids = fast.infill(**holes(), block_length=block)
            assert ids.shape == given.shape and not bool((ids == MASK).any())
            assert torch.equal(ids[given != MASK], given[given != MASK])
            assert fast.activity["emitted"] == int((given == MASK).sum())


@pytest.mark.parametrize("slug", SLUGS)
def test_bf16(lab: MaskedLab, slug: str) -> None:
    with lab.apply("bf16", lab.technique("bf16", slug)) as fast:
        ids = fast.generate(**batch(), **USUAL)
        assert counters(fast, slug)
        assert torch.equal(fast.generate(**batch(), **USUAL), ids)
        fast.generate(**batch(), **{**USUAL, **DRAWN, "seed": 1})
    assert filled(ids, batch())


@pytest.mark.parametrize("slug", SLUGS)
def test_plans_survive_text_and_toml(slug: str) -> None:
    for plan in [*one_knob_plans(slug), *(Plan.parse(at_defaults(way)) for way in ways(slug))]:
        survives_text_and_toml(plan)


@pytest.mark.parametrize("slug", SLUGS)
def test_a_saved_plan_gives_the_same_text(lab: MaskedLab, slug: str, tmp_path: Path) -> None:
    model = lab.model("shifted")
    with lab.apply("shifted", lab.technique("shifted", slug)) as fast:
        wanted, activity = fast.generate(**batch(), **USUAL), fast.activity
        plan = fast.plan
        hasten.save(fast, tmp_path)
    with hasten.load(tmp_path, model) as again:
        assert again.plan == plan
        assert torch.equal(again.generate(**batch(), **USUAL), wanted)
        assert again.activity == activity


# ------------------------------------------------------------------- valid and invalid chains


def spelled(pair: tuple[Way, Way]) -> str:
    return said(pair[0]) + " + " + said(pair[1])


@pytest.mark.parametrize("pair", LEGAL, ids=spelled)
def test_legal_pairs_compose(lab: MaskedLab, pair: tuple[Way, Way]) -> None:
    inputs = batch()
    for name in ("plain", "shifted"):
        techniques = [lab.technique(name, slug, **knobs) for slug, knobs in pair]
        with lab.apply(name, *techniques) as fast:
            ids, activity = fast.generate(**inputs, **USUAL), fast.activity
            for technique in techniques:
                assert counters(fast, technique.name), activity
            assert torch.equal(fast.generate(**inputs, **USUAL), ids)
            assert fast.activity == activity
            fast.infill(**holes())
        assert filled(ids, inputs)
        # What is exact changes nothing of what the other one gives alone.
        for technique, other in (techniques, techniques[::-1]):
            if technique.loss_class() is Loss.EXACT:
                with lab.apply(name, other) as alone:
                    assert torch.equal(alone.generate(**inputs, **USUAL), ids)


def quiet_pairs(lab: MaskedLab) -> Iterator[list[Technique]]:
    """Pairs that may stand together once those that are not exact are at their neutral knobs."""
    for slugs in combinations(SLUGS, 2):
        exact = [registry.get(slug)().loss_class() is Loss.EXACT for slug in slugs]
        if all(was or slug in NEUTRAL for slug, was in zip(slugs, exact, strict=True)):
            pair = [
                lab.technique("plain", slug, neutral=not was)
                for slug, was in zip(slugs, exact, strict=True)
            ]
            if conflict(*pair) is None:
                yield pair


def test_neutral_techniques_stand_in_nobodys_way(lab: MaskedLab) -> None:
    wanted = lab.plain_kept("plain", batch(), **USUAL)
    for pair in quiet_pairs(lab):
        with lab.apply("plain", *pair) as fast:
            assert torch.equal(fast.generate(**batch(), **USUAL), wanted)


@pytest.mark.parametrize("pair", ILLEGAL, ids=spelled)
def test_illegal_pairs_are_one_clear_error(pair: tuple[Way, Way]) -> None:
    refused_together(*map(at_defaults, pair))


def test_there_are_pairs_of_both_kinds() -> None:
    assert LEGAL and ILLEGAL


def test_a_technique_stands_in_a_plan_once() -> None:
    for slug in SLUGS:
        with pytest.raises(PlanError, match="twice"):
            Plan.parse(slug, slug)


def test_conflicts_follow_from_contracts_alone() -> None:
    """Renaming both techniques changes no verdict."""
    for pair in PAIRS:
        assert verdict_without_names(*map(at_defaults, pair)) == (pair in LEGAL)
