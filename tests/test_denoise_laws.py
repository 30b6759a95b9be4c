"""The laws that every denoise technique passes by being registered (docs/write-a-technique.md).

Nothing here names a technique: the registry says which there are, their cards and contracts say
what holds for them, and `tests/denoise_law_settings.py` is the one table of settings for tiny random
pipelines. The reference is the pipeline as it is.

Not every technique suits every pipeline. One that does not says so when it is applied, in one line;
each has to suit several.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import cache, wraps
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten import applied
from hasten import technique as registry
from hasten.denoise.engine import DenoiseModel
from hasten.denoise.network import networks
from hasten.errors import HastenError, PlanError, SubjectError
from hasten.plan import Plan, conflict
from hasten.technique import Parts, Technique
from tests import pipelines
from tests.denoise_law_settings import NO_NEUTRAL, SETTINGS
from tests.lab import (
    counters,
    hooks,
    one_knob_plans,
    refused_together,
    rival_can_be_read,
    says_what_it_is,
    snapshot,
    survives_text_and_toml,
    verdict_without_names,
)

STEPS = 12
SLUGS = registry.names(engine="denoise")
FAMILIES = ("sd3", "cogview4", "unet", "dit", "wan", "ltx")
FEWEST = 2  # families that each technique has to suit


@pytest.fixture(autouse=True)
def nothing_applied() -> Iterator[None]:
    """A test that fails leaves its plan on a pipeline that others share."""
    yield
    applied._APPLIED.clear()


@cache
def pipe(family: str) -> Any:
    return pipelines.tiny(family)


def made(slug: str, **more: Any) -> Technique:
    """A technique at the laws' setting."""
    knobs = dict(SETTINGS[slug].knobs) if slug in SETTINGS else {}
    return registry.get(slug)(**{**knobs, **more})


@cache
def _parts(family: str, text: str) -> dict[str, Parts]:
    technique = next(iter(Plan.parse(text)))
    if not technique.card.trained:
        return {}
    given = pipelines.call(family, num_inference_steps=STEPS)
    named = {key: value for key, value in given.items() if key not in _OF_ONE_CALL}
    prompts = [given["prompt"]] if "prompt" in given else list(given["class_labels"])
    return hasten.prepare(
        pipe(family), technique, prompts=prompts, arguments=named, steps=2, write=False
    )


_OF_ONE_CALL = ("generator", "prompt", "class_labels", "output_type", "num_inference_steps")


def parts(family: str, *techniques: Technique) -> dict[str, Parts]:
    """Trained parts, hardly trained."""
    found: dict[str, Parts] = {}
    for technique in techniques:
        found |= _parts(family, str(Plan.parse(technique)))
    return found


def put(family: str, *techniques: Technique) -> DenoiseModel:
    fast = hasten.apply(pipe(family), *techniques, parts=parts(family, *techniques))
    assert isinstance(fast, DenoiseModel)
    return fast


def suits(family: str, technique: Technique) -> bool:
    """Whether a pipeline has what a technique needs; what does not is refused in one line."""
    try:
        with put(family, technique) as fast:
            draw(fast, family)
    except SubjectError as error:
        assert "\n" not in str(error) and technique.name in str(error)
        return False
    return True


@cache
def homes(slug: str) -> tuple[str, ...]:
    """Families that a technique suits."""
    return tuple(family for family in FAMILIES if suits(family, made(slug)))


def draw(model: Any, family: str, *, seed: int = 0, **more: Any) -> Tensor:
    """The picture that a pipeline makes, with a plan or without."""
    given = pipelines.call(family, seed=seed, num_inference_steps=STEPS, **more)
    return pipelines.picture(model(**given))


@cache
def plain(family: str) -> Tensor:
    return draw(pipe(family), family)


def work(fast: DenoiseModel) -> tuple[float, float]:
    return fast.activity.get("calls", 0), fast.activity.get("rows", 0)


# ------------------------------------------------------------------------------------ the table


@pytest.mark.parametrize("slug", SLUGS)
def test_it_says_what_it_is(slug: str) -> None:
    says_what_it_is(slug, "denoise", NO_NEUTRAL)


def test_the_tables_hold_known_techniques_with_reasons() -> None:
    assert set(SETTINGS) | set(NO_NEUTRAL) <= set(SLUGS)
    assert all(setting.why for setting in SETTINGS.values())


@pytest.mark.parametrize("slug", SLUGS)
def test_its_rival_is_a_plan_that_can_be_read(slug: str) -> None:
    rival_can_be_read(slug, "denoise")


@pytest.mark.parametrize("slug", SLUGS)
def test_it_suits_several_families(slug: str) -> None:
    assert len(homes(slug)) >= FEWEST, homes(slug)


# -------------------------------------------------------------------------------- off is off


@pytest.mark.parametrize("slug", SLUGS)
def test_off_is_off(slug: str) -> None:
    family = homes(slug)[0]
    model, wanted = pipe(family), plain(family)
    network = networks(model)[0]
    state, hooked = snapshot(network), hooks(network)
    inside, scheduler = set(vars(network)), set(vars(model.scheduler))
    config = dict(model.scheduler.config)
    fast = put(family, made(slug))
    first, activity = draw(fast, family), fast.activity
    draw(fast, family, seed=1)  # another picture in between
    assert torch.equal(draw(fast, family), first) and fast.activity == activity
    with pytest.raises(PlanError, match="undo"):
        put(family, made(slug))
    assert torch.equal(draw(model, family), wanted)  # the pipeline itself is untouched
    with pytest.raises(TypeError):
        fast(no_such_argument=1)  # a call that fails leaves no trace either
    fast.undo()
    fast.undo()
    with pytest.raises(PlanError, match="undone"):
        draw(fast, family)
    after = snapshot(network)
    assert state.keys() == after.keys() and hooks(network) == hooked
    assert all(torch.equal(state[name], after[name]) for name in state)
    assert set(vars(network)) <= inside | {"_diffusers_hook"}  # which the pipeline itself leaves
    assert set(vars(model.scheduler)) == scheduler and dict(model.scheduler.config) == config
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert torch.equal(draw(model, family), wanted)


class EnoughError(Exception):
    """Ends a call on its way."""


@pytest.mark.parametrize("slug", SLUGS)
def test_calls_that_end_early_or_make_other_steps_leave_nothing(slug: str) -> None:
    """The sample has the same shape each time, so nothing but the new call can tell them apart."""
    family = homes(slug)[0]
    with put(family, made(slug)) as fast:
        wanted, activity = draw(fast, family), fast.activity
        ended = 0
        for last in (1, 4):
            handle = _ending(networks(pipe(family))[0], last)
            try:
                draw(fast, family, seed=1)
            except EnoughError:
                ended += 1
            finally:
                handle.remove()
            assert torch.equal(draw(fast, family), wanted) and fast.activity == activity
        assert ended
        for steps in (STEPS - 5, STEPS + 3):
            with suppress(HastenError):  # some have parts for one number of steps only
                fast(**pipelines.call(family, seed=1, num_inference_steps=steps))
            assert torch.equal(draw(fast, family), wanted) and fast.activity == activity


def _ending(network: Any, last: int) -> Any:
    """Let a network's calls end with an error after so many."""
    calls: list[int] = []

    def count(module: Any, args: Any) -> None:
        calls.append(1)
        if len(calls) > last:
            raise EnoughError

    return network.register_forward_pre_hook(count)


@pytest.mark.parametrize("slug", SLUGS)
def test_a_second_loop_in_one_call_begins_anew(slug: str) -> None:
    """As in pipelines that make a clip chunk by chunk: all that is remembered is of this loop."""
    family = homes(slug)[0]
    with put(family, made(slug)) as fast:
        wanted = draw(fast, family)
    technique = made(slug)
    twice = _walking_twice(pipelines.tiny(family))
    with hasten.apply(twice, technique, parts=parts(family, technique)) as fast:
        assert torch.equal(draw(fast, family), wanted)


def _walking_twice(model: Any) -> Any:
    """The pipeline, that makes another picture first in each call."""
    kind = type(model)

    @wraps(kind.__call__)
    def twice(self: Any, **given: Any) -> Any:
        generator = given["generator"]
        seed = generator.initial_seed()
        generator.manual_seed(seed + 1)
        kind.__call__(self, **given)
        generator.manual_seed(seed)
        return kind.__call__(self, **given)

    model.__class__ = type(kind.__name__, (kind,), {"__call__": twice})
    return model


# ------------------------------------------------------------------------- neutral is neutral


def neutral(slug: str) -> Technique:
    return made(slug, **(registry.get(slug).card.neutral or {}))


@pytest.mark.parametrize("slug", [s for s in SLUGS if registry.get(s).card.neutral is not None])
def test_neutral_is_neutral(slug: str) -> None:
    """Bit for bit what the pipeline does, for the same work."""
    tried = [family for family in FAMILIES if suits(family, neutral(slug))]
    assert len(tried) >= FEWEST
    for family in tried:
        with hasten.apply(pipe(family)) as bare:
            assert isinstance(bare, DenoiseModel)
            assert torch.equal(draw(bare, family), plain(family))
            spent = work(bare)
        with put(family, neutral(slug)) as fast:
            assert torch.equal(draw(fast, family), plain(family)), family
            assert work(fast) == spent, family
            assert not counters(fast, slug), "it did nothing, so it counts nothing"


# ---------------------------------------------------------------------------------- on is on


@pytest.mark.parametrize("slug", SLUGS)
def test_on_is_on(slug: str) -> None:
    """It counts what it does, and changes the picture or the work; or it does neither, and says so.

    Not every random network gives every technique something to do, but most do.
    """
    active = 0
    for family in homes(slug):
        with hasten.apply(pipe(family)) as bare:
            assert isinstance(bare, DenoiseModel)
            draw(bare, family)
            spent = work(bare)
        with put(family, made(slug)) as fast:
            picture = draw(fast, family)
            own = counters(fast, slug)
            same = torch.equal(picture, plain(family)) and work(fast) == spent
            assert bool(own) != same, (family, fast.activity)
            assert all(value > 0 for value in own.values()), (family, own)
            assert all(isinstance(value, (int, float)) for value in fast.activity.values())
            assert picture.shape == plain(family).shape and bool(picture.isfinite().all())
            active += bool(own)
    assert active >= FEWEST


@pytest.mark.parametrize("slug", SLUGS)
def test_no_guidance_and_few_steps(slug: str) -> None:
    """A picture comes of it, or one line that says why not."""
    for family in homes(slug)[:2]:
        with put(family, made(slug)) as fast:
            for steps in (1, 2, 3):
                given = pipelines.call(family, num_inference_steps=steps, guidance_scale=1.0)
                try:
                    picture = pipelines.picture(fast(**given))
                except HastenError as error:
                    assert "\n" not in str(error) and slug in str(error)
                else:
                    assert bool(picture.isfinite().all())


# --------------------------------------------------------------------------------- it survives


@pytest.mark.parametrize("slug", SLUGS)
def test_batches(slug: str) -> None:
    family = homes(slug)[0]
    given = pipelines.call(family, num_inference_steps=STEPS)
    for key in ("prompt", "negative_prompt"):
        if key in given:
            given[key] = [given[key], "another one"]
    if "class_labels" in given:
        given["class_labels"] = [1, 2]
    with put(family, made(slug)) as fast:
        pictures = pipelines.picture(fast(**given))
        assert counters(fast, slug)
    assert len(pictures) == 2 and bool(pictures.isfinite().all())


@pytest.mark.parametrize("slug", SLUGS)
def test_bf16(slug: str) -> None:
    family = homes(slug)[0]
    model = pipelines.tiny(family, dtype=torch.bfloat16)
    technique = made(slug)
    parts_ = parts(family, technique)
    with hasten.apply(model, technique, parts=parts_) as fast:
        assert isinstance(fast, DenoiseModel)
        picture = draw(fast, family)
        assert counters(fast, slug) and bool(picture.isfinite().all())
        assert torch.equal(draw(fast, family), picture)


@pytest.mark.parametrize("slug", SLUGS)
def test_plans_survive_text_and_toml(slug: str) -> None:
    for plan in one_knob_plans(slug):
        survives_text_and_toml(plan)


@pytest.mark.parametrize("slug", SLUGS)
def test_a_saved_plan_gives_the_same_picture(slug: str, tmp_path: Path) -> None:
    family = homes(slug)[0]
    with put(family, made(slug)) as fast:
        wanted, plan = draw(fast, family), fast.plan
        hasten.save(fast, tmp_path)
    with hasten.load(tmp_path, pipe(family)) as again:
        assert again.plan == plan
        assert torch.equal(draw(again, family), wanted)


# ------------------------------------------------------------------- valid and invalid chains

PAIRS = list(combinations(SLUGS, 2))
LEGAL = [pair for pair in PAIRS if conflict(*map(made, pair)) is None]
ILLEGAL = [pair for pair in PAIRS if pair not in LEGAL]


@pytest.mark.parametrize("pair", LEGAL, ids=" + ".join)
def test_legal_pairs_compose(pair: tuple[str, str]) -> None:
    both = [family for family in homes(pair[0]) if family in homes(pair[1])]
    for family in both[:1]:
        with put(family, *map(made, pair)) as fast:
            picture = draw(fast, family)
            activity = fast.activity
            assert bool(picture.isfinite().all()) and picture.shape == plain(family).shape
            assert torch.equal(draw(fast, family), picture) and fast.activity == activity


def quiet_pairs() -> Iterator[tuple[Technique, Technique]]:
    for pair in combinations([s for s in SLUGS if registry.get(s).card.neutral is not None], 2):
        first, second = map(neutral, pair)
        if conflict(first, second) is None:
            yield first, second


def test_neutral_techniques_stand_in_nobodys_way() -> None:
    for first, second in quiet_pairs():
        family = "sd3"
        if suits(family, first) and suits(family, second):
            with put(family, first, second) as fast:
                assert torch.equal(draw(fast, family), plain(family)), (first, second)


@pytest.mark.parametrize("pair", ILLEGAL, ids=" + ".join)
def test_illegal_pairs_are_one_clear_error(pair: tuple[str, str]) -> None:
    refused_together(*map(made, pair))


def test_there_are_pairs_of_both_kinds() -> None:
    assert LEGAL and ILLEGAL


def test_conflicts_follow_from_contracts_alone() -> None:
    """Renaming both techniques changes no verdict."""
    for pair in PAIRS:
        assert verdict_without_names(*map(made, pair)) == (pair in LEGAL)
