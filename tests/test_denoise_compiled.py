"""The compiled runner of pipelines, and every technique that claims to run on it.

The registry says which do. Each is held to what it does on the eager runner: the same picture but
for rounding, the same counters, and blocks that run as whole graphs of few kinds. A backend that
runs a captured graph as it is stands for the real compiler, which would take minutes; one test has
that one too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters as dynamo

import hasten
from hasten import technique as registry
from hasten.benchmark.calls import Picture
from hasten.denoise import compiled
from hasten.denoise.engine import DenoiseModel
from hasten.denoise.shares import measure_shares
from hasten.errors import PlanError, SubjectError
from hasten.plan import Plan
from hasten.subject import open_subject
from hasten.technique import Parts
from tests import pipelines
from tests.denoise_law_settings import SETTINGS

STEPS = 12
SLUGS = registry.names(engine="denoise")
CLAIMING = [slug for slug in SLUGS if "compiled" in registry.get(slug).contract.runners]
SIZES = 3  # of a sample on its way, at the most; each is a graph for each number of rows

# Techniques that act inside a block, where a graph would have to be cut or made anew.
INSIDE = ("adaspa", "faster_cache", "grat", "harmonica", "pyramid_attention_broadcast")
INSIDE += ("random_key_blocks", "taylorseer_cache")


class Graphs:
    """A backend of `torch.compile` that runs what was captured, and counts."""

    def __init__(self) -> None:
        self.made = self.ran = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.made += 1

        def run(*args: Any) -> Any:
            self.ran += 1
            return graph.forward(*args)

        return run


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """Counted graphs; nothing that a test before has captured."""
    torch._dynamo.reset()
    dynamo.clear()
    found = Graphs()
    monkeypatch.setattr(compiled, "BACKEND", found)
    yield found
    torch._dynamo.reset()


def plan_of(slug: str) -> Plan:
    knobs = dict(SETTINGS[slug].knobs) if slug in SETTINGS else {}
    return Plan.parse(registry.get(slug)(**knobs))


def parts_of(pipe: Any, family: str, plan: Plan) -> dict[str, Parts]:
    """Trained parts, hardly trained."""
    if not any(technique.trained for technique in plan):
        return {}
    given = pipelines.call(family)
    prompts = [given.pop("prompt")] if "prompt" in given else given.pop("class_labels")
    for name in ("generator", "output_type", "class_labels"):
        given.pop(name, None)
    given["num_inference_steps"] = STEPS
    return hasten.prepare(pipe, plan, prompts=prompts, arguments=given, steps=2, write=False)


def drawn(family: str, plan: Plan, runner: str, **more: Any) -> tuple[Tensor, dict[str, int]]:
    """The picture that a plan makes on a runner, and its counters."""
    pipe = pipelines.tiny(family)
    parts = parts_of(pipe, family, plan)
    with hasten.apply(pipe, plan, runner=runner, parts=parts) as fast:
        assert isinstance(fast, DenoiseModel) and fast.runner == runner
        made = fast(**pipelines.call(family, num_inference_steps=STEPS, **more))
        return pipelines.picture(made), dict(fast.activity)


def home(plan: Plan) -> str:
    """The family that a plan is tried on: a tiny DiT, where it suits that."""
    try:
        for technique in plan:
            technique.check(pipelines.tiny("dit"))  # type: ignore[attr-defined]
    except SubjectError:
        return "sd3"
    return "dit"


# ----------------------------------------------------------------------------- who claims it
def test_what_acts_inside_a_block_does_not_claim_it() -> None:
    assert set(INSIDE) <= set(SLUGS)
    assert set(SLUGS) - set(CLAIMING) == set(INSIDE)


@pytest.mark.parametrize("slug", INSIDE)
def test_what_does_not_claim_it_is_refused_in_one_line(slug: str) -> None:
    with pytest.raises(PlanError, match=f"{slug} does not run on the 'compiled' runner") as caught:
        hasten.apply(pipelines.tiny("dit"), slug, runner="compiled")
    assert "\n" not in str(caught.value)


def test_knobs_may_take_the_claim_back() -> None:
    for text in ("sada(tokens=0.5)", "auto_diffusion(layers=0.5)"):
        (technique,) = Plan.parse(text)
        assert technique.terms().runners == {"eager"}


# ------------------------------------------------------------------------------- who holds it
@pytest.mark.slow
@pytest.mark.parametrize("slug", ["", *CLAIMING])
def test_it_makes_the_same_picture(slug: str, graphs: Graphs) -> None:
    plan = plan_of(slug) if slug else Plan(())
    family = home(plan)
    wanted, eager = drawn(family, plan, "eager")
    assert not graphs.ran
    found, activity = drawn(family, plan, "compiled")
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert activity == eager
    assert activity["calls"] < 2 * STEPS or slug in ("", "rollover_budget_forcing")
    # It really ran in graphs: whole blocks, of few kinds, nothing cut.
    assert graphs.ran >= activity["calls"]
    assert graphs.made <= 2 * SIZES and not dynamo["graph_break"]


@pytest.mark.slow
def test_a_u_net_is_one_graph(graphs: Graphs) -> None:
    plan = Plan.parse("reuse_always")
    wanted, eager = drawn("unet", plan, "eager")
    found, activity = drawn("unet", plan, "compiled")
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert activity == eager and graphs.ran == activity["calls"] and graphs.made == 1


@pytest.mark.slow
def test_a_plan_of_several(graphs: Graphs) -> None:
    plan = Plan.parse("delta_dit, adaptive_guidance(threshold=0.0)")
    wanted, eager = drawn("dit", plan, "eager")
    found, activity = drawn("dit", plan, "compiled")
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert activity == eager and graphs.made <= 4


def test_no_trace_is_left(graphs: Graphs) -> None:
    pipe = pipelines.tiny("dit")
    before = [set(vars(block)) for block in pipe.transformer.transformer_blocks]
    with hasten.apply(pipe, "", runner="compiled") as fast:
        fast(**pipelines.call("dit"))
    assert graphs.made > 0
    assert [set(vars(block)) for block in pipe.transformer.transformer_blocks] == before


def test_operations_are_counted_as_on_the_eager_runner(graphs: Graphs) -> None:
    picture = Picture({"class_labels": [3], "num_inference_steps": 2}, seed=0)
    subject = open_subject(pipelines.tiny("dit"))
    flops = [
        measure_shares(
            DenoiseModel(subject, Plan(()), runner=runner, exclusive=False), picture.call
        ).flops
        for runner in compiled.RUNNERS
    ]
    assert flops[0] == flops[1] > 0 and graphs.ran > 0


@pytest.mark.slow
def test_with_the_real_compiler() -> None:
    """Its kernels round differently, so the picture is the same but for the last bits."""
    torch._dynamo.reset()
    plan = Plan.parse("zeus")
    wanted, eager = drawn("dit", plan, "eager")
    found, activity = drawn("dit", plan, "compiled")
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
    assert activity == eager and not torch.equal(found, wanted)
