"""Plans as data: text, TOML, order, clashes; and the registry behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from hasten import technique as registry
from hasten.causal.slots import KV, Drafter
from hasten.errors import PlanError
from hasten.plan import Plan, conflict
from hasten.technique import Card, Contract, Loss, Phase, Resource, Slot, knob, technique

CARD = Card(title="test", family="test", loss=Loss.LOSSY)


@pytest.fixture(autouse=True)
def toys() -> Any:
    """Three toy techniques that are in the registry for one test."""

    @technique("toy_evict")
    @dataclass(frozen=True, kw_only=True)
    class ToyEvict(KV):
        card: ClassVar[Card] = CARD
        contract: ClassVar[Contract] = Contract(
            slots=(Slot.KV,), changes=frozenset({Resource.KV_ENTRIES}), phase=Phase.STEP
        )
        budget: float = knob(0.25, "share kept", low=0.01, high=1.0)
        mode: str = knob("old", "which go", choices=("old", "new"))
        count: int = knob(4, "how many", low=0)

    @technique("toy_draft")
    @dataclass(frozen=True, kw_only=True)
    class ToyDraft(Drafter):
        card: ClassVar[Card] = CARD
        contract: ClassVar[Contract] = Contract(
            slots=(Slot.DRAFTER,), needs=frozenset({Resource.KV_ENTRIES}), phase=Phase.LOAD
        )

    @technique("toy_other")
    @dataclass(frozen=True, kw_only=True)
    class ToyOther(KV):
        card: ClassVar[Card] = CARD
        contract: ClassVar[Contract] = Contract(slots=(Slot.KV,))

    yield
    for name in ("toy_evict", "toy_draft", "toy_other"):
        registry._REGISTERED.pop(name)


@pytest.mark.parametrize(
    "text", ["", "toy_evict", "toy_evict(budget=0.3)", "toy_evict(mode='new', budget=1.0, count=2)"]
)
def test_text_and_toml_round_trip(text: str) -> None:
    plan = Plan.parse(text)
    assert str(plan) == text
    assert str(Plan.parse(str(plan))) == text
    if text:
        assert str(Plan.from_toml(plan.to_toml())) == text


def test_several_texts_are_one_plan_in_the_order_of_their_phases() -> None:
    plan = Plan.parse("toy_other", "toy_draft")
    assert str(plan) == "toy_other, toy_draft"
    assert [t.name for t in plan.ordered()] == ["toy_draft", "toy_other"]


def test_a_whole_number_is_taken_for_a_float_and_words_need_no_quotes() -> None:
    (toy,) = Plan.parse("toy_evict(budget=1, mode=new)")
    assert toy.knobs == {"budget": 1.0, "mode": "new", "count": 4}
    assert isinstance(toy.knobs["budget"], float)


BAD_PLANS = [
    ("toy_evikt", "Did you mean toy_evict"),
    ("toy_evict(size=3)", "no knob 'size'; its knobs are: budget, mode, count"),
    ("toy_evict(budget='x')", "must be float"),
    ("toy_evict(budget=None)", "must be float"),
    ("toy_evict(count=1.5)", "must be int"),
    ("toy_evict(count=True)", "must be int"),
    ("toy_evict(budget=0)", "out of range; allowed is 0.01 to 1"),
    ("toy_evict(budget=2)", "out of range"),
    ("toy_evict(mode=red)", "not one of 'old', 'new'"),
    ("toy_evict(0.3)", "Cannot read the plan"),
    ("toy_evict(budget=0.3", "Cannot read the plan"),
    ("toy_evict(budget=1+1)", "not a number"),
    ("toy_evict(**x)", "Cannot read the plan"),
    ("3", "Cannot read the plan"),
    ("toy_evict toy_draft", "Cannot read the plan"),
    ("toy_evict, toy_evict", "twice"),
]


@pytest.mark.parametrize(("text", "message"), BAD_PLANS)
def test_a_bad_plan_is_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_clashes_name_both_and_the_slot_or_the_resource() -> None:
    with pytest.raises(PlanError, match=r"toy_evict and toy_other both fill the slot 'kv'"):
        Plan.parse("toy_evict, toy_other")
    with pytest.raises(PlanError, match=r"toy_draft needs a KV cache.*which toy_evict changes"):
        Plan.parse("toy_evict, toy_draft")
    other, draft = Plan.parse("toy_other"), Plan.parse("toy_draft")
    assert conflict(next(iter(other)), next(iter(draft))) is None


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("x = ", "not valid TOML"),
        ("[[technique]]\nbudget = 1.0", "needs a name"),
        ("[plan]\nx = 1", "tables only"),
        ('[[technique]]\nname = "toy_evict"\nsize = 1', "no knob 'size'"),
    ],
)
def test_bad_toml_is_one_clear_error(toml: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_toml(toml)
    assert message in str(caught.value)


def test_names_are_found_by_wildcard_and_family() -> None:
    assert registry.names("toy_*") == ["toy_draft", "toy_evict", "toy_other"]
    assert registry.names("toy_*", engine="masked") == []
    assert registry.names("toy_*", family="test") == ["toy_draft", "toy_evict", "toy_other"]


def test_a_technique_must_declare_itself() -> None:
    with pytest.raises(TypeError, match="frozen dataclass"):

        @technique("toy_bad")
        class Bad(KV):
            card: ClassVar[Card] = CARD

    with pytest.raises(TypeError, match="contract"):

        @technique("toy_bad")
        @dataclass(frozen=True)
        class Worse(KV):
            card: ClassVar[Card] = CARD
