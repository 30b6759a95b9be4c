"""The denoise engine on tiny pipelines of many families: nothing changes unless a technique does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import diffusers
import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.denoise.blocks import BlockCall, blocks
from hasten.denoise.engine import DenoiseModel
from hasten.denoise.guidance import find_guidance, like
from hasten.denoise.layout import Layout
from hasten.denoise.network import Call, hooked, networks, unpack
from hasten.denoise.run import Run, Step
from hasten.denoise.slots import Attention, Block, Gate, Guider, Schedule, State
from hasten.errors import HastenError, PlanError
from hasten.technique import Card, Contract, Loss, Slot, Technique
from tests.pipelines import FAMILIES, VARIANTS, call, picture, tiny

STEPS = 4
TRANSFORMERS = [name for name in FAMILIES if name not in ("unet", "sdxl", "ddpm")]
UNGUIDED = ("flux", "hunyuan_video", "ddpm", "flux_img2img", "flux_inpaint")
APART = ("cogview4", "wan", "chroma", "flux2", "qwenimage", "lumina2")  # one call for each branch


def toy(slot: Slot) -> Callable[[Any], Any]:
    """A technique that no registry knows."""

    def declare(cls: Any) -> Any:
        cls.name, cls.contract = cls.__name__.lower(), Contract(slots=(slot,))
        cls.card = Card(title=cls.__name__, family="toy", loss=Loss.LOSSY)
        return dataclass(frozen=True, kw_only=True)(cls)

    return declare


@toy(Slot.GATE)
class Skip(Gate):
    """Puts the last output in the place of those of some steps."""

    at: str = "1 3"

    def begin(self, run: Run, bound: Any) -> dict[int, Tensor]:
        return {}

    def decide(self, state: dict[int, Tensor], run: Run, call: Call) -> bool:
        return str(run.index) not in self.at.split()

    def observe(self, state: dict[int, Tensor], run: Run, call: Call, output: Tensor) -> None:
        state[call.branch] = output

    def predict(self, state: dict[int, Tensor], run: Run, call: Call) -> Tensor:
        return state[call.branch]


@toy(Slot.GUIDER)
class Cut(Guider):
    """Guides the first steps only."""

    first: int = 2

    def begin(self, run: Run, bound: Any) -> list[Tensor]:
        return []

    def wanted(self, state: list[Tensor], run: Run, call: Call) -> Tensor:
        assert run.guidance is not None
        samples = call.rows // 2 if run.guidance.batched else call.rows
        return torch.full((samples,), run.index < self.first)

    def compare(
        self, state: list[Tensor], run: Run, conditional: Tensor, unconditional: Tensor, step: Step
    ) -> None:
        if len(state) < run.index + 1:
            state.append(conditional)

    def missing(self, state: list[Tensor], run: Run, conditional: Tensor) -> Tensor:
        if len(state) < run.index + 1:
            state.append(conditional)
        return conditional


@dataclass
class Seen:
    """What a technique saw inside the network."""

    blocks: list[BlockCall] = field(default_factory=list)
    layers: list[tuple[int, str]] = field(default_factory=list)


@toy(Slot.BLOCK)
class Rebuild(Block):
    """Takes each block's output apart and puts it together again."""

    sublayers: ClassVar[bool] = True

    def begin(self, run: Run, bound: Any) -> Seen:
        return Seen()

    def block(self, state: Seen, run: Run, call: BlockCall) -> Any:
        state.blocks.append(call)
        call.hidden = call.hidden.clone()
        output = call.compute()
        hidden, text = call.parts(output)
        assert hidden.shape == call.hidden.shape
        assert text is None or call.text is None or text.shape == call.text.shape
        made = call.output(hidden, text)
        assert type(made) is type(output)
        return made

    def sublayer(self, state: Seen, run: Run, key: tuple[int, str], compute: Any) -> Any:
        state.layers.append(key)
        return compute()


@toy(Slot.ATTENTION)
class Dense(Attention):
    """The network's own attention."""

    def begin(self, run: Run, bound: Any) -> list[Any]:
        return []

    def attend(self, state: list[Any], run: Run, call: Any) -> Tensor:
        length = call.query.shape[-2]
        state.append((run.index, run.call.branch, call.layer, call.turn, length, run.layout))
        run.layout.place(length)  # looks into the network the first time
        return call.dense()


def apply(pipe: Any, technique: Technique | str) -> tuple[DenoiseModel, Run]:
    fast = hasten.apply(pipe, technique)
    assert isinstance(fast, DenoiseModel)
    return fast, fast.start()


@cache
def pipe_of(name: str) -> Any:
    """A family's pipeline; no plan leaves anything in it, so one serves many tests."""
    return tiny(name)


def made_by(name: str, technique: Technique | str = "", **more: Any) -> tuple[Tensor, Any]:
    """A family's picture under a technique, and the run with what it remembers."""
    fast, run = apply(pipe_of(name), technique)
    run.trace = []
    with fast:
        return picture(fast._execute(run, **call(name, **more))), run


@cache
def whole(name: str) -> Tensor:
    """What a family's own pipeline makes."""
    return picture(pipe_of(name)(**call(name)))


def plain(name: str, **more: Any) -> Tensor:
    return picture(pipe_of(name)(**call(name, **more))) if more else whole(name)


@cache
def guided(name: str) -> tuple[Tensor, Run]:
    """The same with a guider that leaves nothing out."""
    return made_by(name, Cut(first=99))


def state_of(run: Run) -> Any:
    (state,) = run.states.values()
    return state


def trace(pipe: Any) -> Any:
    """Everything by which the engine could be noticed in a pipeline."""
    parts = [pipe.scheduler, *(m for n in networks(pipe) for m in n.modules())]
    return [
        (type(part), sorted(vars(part)), str(getattr(part, "config", "")))
        + (
            (len(part._forward_hooks), len(part._forward_pre_hooks))
            if isinstance(part, nn.Module)
            else ()
        )
        for part in parts
    ]


# ------------------------------------------------------------------------------- an empty plan
@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_an_empty_plan_changes_nothing(name: str) -> None:
    pipe = pipe_of(name)
    expected = whole(name)
    before = trace(pipe)
    with hasten.apply(pipe, "") as fast:
        made = picture(fast(**call(name)))
    assert torch.equal(made, expected)
    assert trace(pipe) == before
    steps = 6 if name in VARIANTS else STEPS
    calls = steps * (2 if name in APART else 1)
    rows = steps * (1 if name in UNGUIDED else 2)
    assert fast.activity == {"calls": calls, "rows": rows, "steps": steps}
    assert 0.0 < fast.network_seconds < fast.seconds


SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "PNDMScheduler",
    "LCMScheduler",
)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_an_empty_plan_changes_nothing_with_any_scheduler(scheduler: str) -> None:
    name, arguments = "unet", {"num_inference_steps": 6}
    expected = picture(tiny(name, scheduler=scheduler)(**call(name, **arguments)))
    pipe = tiny(name, scheduler=scheduler)
    fast, run = apply(pipe, Skip(at=""))
    assert torch.equal(picture(fast._execute(run, **call(name, **arguments))), expected)
    assert run.activity["steps"] == run.activity["calls"] == run.num_steps


@pytest.mark.parametrize("name", ["dit", "sd3", "unet", "wan", "flux"])
def test_batches_and_calls_without_guidance(name: str) -> None:
    several = {"class_labels": [7, 9]} if name == "dit" else {"num_images_per_prompt": 2}
    several = {"num_videos_per_prompt": 2} if name == "wan" else several
    made, run = made_by(name, **several)
    assert torch.equal(made, plain(name, **several))
    assert run.activity["rows"] == STEPS * (2 if name == "flux" else 4)
    made, run = made_by(name, guidance_scale=1.0)
    assert torch.equal(made, plain(name, guidance_scale=1.0))
    assert run.activity["rows"] == STEPS


def test_the_pipelines_callback_and_progress_bar_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tiny("sd3")
    pipe.set_progress_bar_config(disable=False)
    seen: list[int] = []

    def note(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return {"latents": tensors["latents"] + 0.01}

    expected = plain("sd3", callback_on_step_end=note)
    with hasten.apply(pipe, "") as fast:
        made = picture(fast(**call("sd3", callback_on_step_end=note)))
    assert torch.equal(made, expected)
    assert seen == 2 * list(range(STEPS))
    assert "4/4" in capsys.readouterr().err


@pytest.mark.parametrize("technique", ["", Skip(), Rebuild(), Dense()], ids=str)
def test_a_call_that_fails_leaves_no_trace(technique: Any) -> None:
    pipe = tiny("flux")
    before = trace(pipe)

    def stop(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("enough")

    fast = hasten.apply(pipe, technique)
    with pytest.raises(RuntimeError, match="enough"):
        fast(**call("flux", callback_on_step_end=stop))
    assert [kinds[:2] for kinds in trace(pipe)[1:]] == [kinds[:2] for kinds in before[1:]]
    assert type(pipe.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    assert "step" not in vars(pipe.scheduler)
    assert fast.activity["steps"] == 1
    fast.undo()
    assert torch.equal(picture(pipe(**call("flux"))), plain("flux"))


CACHES: dict[str, tuple[str, Callable[[], Any]]] = {
    "first block": ("flux", lambda: diffusers.FirstBlockCacheConfig(threshold=5.0)),
    "taylor": ("flux", lambda: diffusers.TaylorSeerCacheConfig(cache_interval=2)),
    "pyramid": (
        "flux",
        lambda: diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1001),
            current_timestep_callback=lambda: 500,
        ),
    ),
    "first block, two branches": ("wan", lambda: diffusers.FirstBlockCacheConfig(threshold=0.5)),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("technique", ["", Rebuild(), Dense()], ids=str)
def test_caches_of_diffusers_go_on_under_a_plan(cache: str, technique: Any) -> None:
    name, config = CACHES[cache]

    def cached() -> Any:
        pipe = tiny(name)
        pipe.transformer.enable_cache(config())
        return pipe

    expected = picture(cached()(**call(name, num_inference_steps=8)))
    assert not torch.equal(expected, plain(name, num_inference_steps=8))
    pipe = cached()
    with hasten.apply(pipe, technique) as fast:
        made = picture(fast(**call(name, num_inference_steps=8)))
    assert torch.equal(made, expected)
    pipe.transformer.disable_cache()
    assert torch.equal(picture(pipe(**call(name))), plain(name))


def test_two_networks_take_turns() -> None:
    other = tiny("wan").transformer
    with torch.no_grad():
        other.proj_out.weight.mul_(1.5)
    parts = {"transformer_2": other}

    def pipe() -> Any:
        made = tiny("wan", **parts)
        made.register_to_config(boundary_ratio=0.6)
        return made

    expected = picture(pipe()(**call("wan")))
    assert not torch.equal(expected, plain("wan"))
    fast, run = apply(pipe(), Rebuild())
    assert torch.equal(picture(fast._execute(run, **call("wan"))), expected)
    assert {id(each.module) for each in state_of(run).blocks} == {
        id(block) for network in networks(fast.pipe) for block in blocks(network)
    }
    assert run.activity["calls"] == 2 * STEPS


def test_a_network_that_is_compiled_as_a_whole() -> None:
    pipe = tiny("sd3")
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    # Compiling takes long and is torch's affair; ours is the case in which the network then stands.
    with torch.compiler.set_stance("force_eager"), hasten.apply(pipe, Cut(first=2)) as fast:
        fast(**call("sd3"))
    assert fast.activity["rows"] == STEPS + 2
    made, _ = made_by("sd3", Cut(first=2))
    with torch.compiler.set_stance("force_eager"), hasten.apply(pipe, Cut(first=2)) as fast:
        assert torch.equal(picture(fast(**call("sd3"))), made)


def test_copies_of_the_scheduler_are_their_own() -> None:
    """Pipelines with sound step it with a copy of the scheduler."""
    pipe = tiny("sd3")
    copies: list[Any] = []

    def note(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        copies.append(copy.deepcopy(pipe.scheduler))
        before = pipe.scheduler.step_index
        if step < 2:
            copies[-1].step(tensors["latents"], time, tensors["latents"])
            assert copies[-1].step_index == before + 1 and pipe.scheduler.step_index == before
        return tensors

    arguments = {"callback_on_step_end": note, "num_inference_steps": 3}
    with hasten.apply(pipe, "") as fast:
        made = picture(fast(**call("sd3", **arguments)))
    assert fast.activity["steps"] == 3 == len(copies)
    assert torch.equal(made, plain("sd3", num_inference_steps=3))


# --------------------------------------------------------------------------------- plans on, off
def test_one_plan_at_a_time_and_none_after_undo() -> None:
    pipe = tiny("dit")
    fast = hasten.apply(pipe, "")
    with pytest.raises(PlanError, match="has the plan"):
        hasten.apply(pipe, "")
    fast.undo()
    with pytest.raises(PlanError, match="was undone"):
        fast(**call("dit"))
    hasten.apply(pipe, "").undo()


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, 1001])
def test_a_number_of_steps_that_is_none(steps: Any) -> None:
    with (
        hasten.apply(tiny("dit"), "") as fast,
        pytest.raises(HastenError, match="allowed is 1 to 1000"),
    ):
        fast(**call("dit", num_inference_steps=steps))


# --------------------------------------------------------------------------------------- gates
@pytest.mark.parametrize("name", [*FAMILIES, "sd3_inpaint"])
def test_a_gate_skips_all_calls_of_a_step(name: str) -> None:
    made, run = made_by(name, Skip(at="1 3"))
    assert not torch.equal(made, plain(name))
    steps, each = (6 if name in VARIANTS else STEPS), (2 if name in APART else 1)
    assert run.activity["skipped"] == 2 * each
    assert run.activity["calls"] == (steps - 2) * each
    assert run.activity["rows"] == (steps - 2) * (1 if name in UNGUIDED else 2)


def test_a_call_remembers_nothing_of_the_one_before() -> None:
    with hasten.apply(tiny("dit"), Skip(at="1 3")) as fast:
        first, second = (picture(fast(**call("dit"))) for _ in range(2))
    assert torch.equal(first, second)


def test_the_first_call_runs_whatever_a_gate_says() -> None:
    _, run = made_by("sd3", Skip(at="0"))
    assert run.activity["calls"] == STEPS and "skipped" not in run.activity


def test_a_skipped_step_is_a_step_with_the_output_of_the_last_one() -> None:
    """The solver goes on from what it is given: checked beside a loop of our own."""
    _, run = made_by("sd3", Skip(at="1"))
    first, second = run.trace[:2]
    assert torch.equal(first.output, second.output) and first.ran and not second.ran
    sigmas = run.scheduler.sigmas
    assert second.result is not None
    torch.testing.assert_close(
        second.result, second.sample + (sigmas[2] - sigmas[1]) * first.output
    )


@pytest.mark.parametrize("name", [*VARIANTS])
def test_pipelines_that_begin_with_a_picture_say_how_many_steps_there_are(name: str) -> None:
    @toy(Slot.GATE)
    class Last(Gate):
        def begin(self, run: Run, bound: Any) -> list[Any]:
            return []

        def decide(self, state: list[Any], run: Run, call: Call) -> bool:
            state.append((run.first, run.index, run.num_steps, run.is_last))
            return True

    some = ("DDIMScheduler", "HeunDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler")
    for scheduler in some if "unet" in name else (None,):
        fast, run = apply(tiny(name, scheduler=scheduler), Last())
        fast._execute(run, **call(name))
        noted = [] if not run.states else state_of(run)
        steps = run.activity["steps"]
        assert [each[1:] for each in noted] == [
            (i, steps, i == steps - 1) for i in range(1, steps)
        ], scheduler
        assert {each[0] for each in noted} == {len(fast.pipe.scheduler.timesteps) - steps}


# ----------------------------------------------------------------------------------- guidance
EXPECTED = {
    "dit": (True, 0, 3.0, 1.0),
    "z_image": (True, 0, 4.0, -1.0),
    "lumina2": (False, 0, 3.0, -1.0),
    **dict.fromkeys(("cogview4", "wan", "chroma", "flux2", "qwenimage"), (False, 0, 3.0, 1.0)),
}


@pytest.mark.parametrize("name", [n for n in [*FAMILIES, *VARIANTS] if n not in UNGUIDED])
def test_guidance_is_found_out(name: str) -> None:
    made, run = guided(name)
    assert torch.equal(made, plain(name))
    found = run.guidance
    assert found is not None
    batched, conditional, scale, sign = EXPECTED.get(name, (True, 1, 3.0, 1.0))
    assert (found.batched, found.conditional, found.sign) == (batched, conditional, sign)
    assert found.scale == pytest.approx(scale, rel=1e-3)


@pytest.mark.parametrize("name", UNGUIDED)
def test_there_is_no_guidance_to_find(name: str) -> None:
    made, run = made_by(name, Cut(first=0))
    assert run.guidance is None and "left_out" not in run.activity
    assert torch.equal(made, plain(name))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("unet", {"guidance_rescale": 0.7}),
        ("flux", {"negative_prompt": "blurred", "true_cfg_scale": 3.0}),
        ("z_image", {"cfg_normalization": True}),
        ("hunyuan_video", {"negative_prompt": "blurred", "true_cfg_scale": 3.0}),
    ],
)
def test_other_ways_to_guide(name: str, arguments: dict[str, Any]) -> None:
    _, run = made_by(name, Cut(first=99), **arguments)
    assert run.guidance is not None
    assert run.guidance.scale == pytest.approx(4.0 if name == "z_image" else 3.0, rel=1e-3)
    assert run.guidance.conditional == (1 if name == "unet" else 0)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in UNGUIDED])
def test_without_its_other_branch_guidance_gives_the_conditional_output(name: str) -> None:
    first = 2
    _, full = guided(name)
    _, run = made_by(name, Cut(first=first))
    assert run.trace is not None and full.trace is not None
    assert run.guidance is not None
    for step, conditional in zip(run.trace, state_of(run), strict=True):
        samples = step.output[: len(conditional)]
        if step.index >= first:
            expected = run.guidance.sign * like(conditional, samples)
            torch.testing.assert_close(like(samples, samples), expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(step.output, full.trace[step.index].output)
    # The first step without starts from the same sample, so its output is the whole run's branch.
    torch.testing.assert_close(state_of(run)[first], state_of(full)[first], rtol=1e-4, atol=1e-5)
    apart = name in APART
    assert run.activity["calls"] == STEPS + (first if apart else 0)
    assert run.activity["rows"] == STEPS + first
    assert run.activity["left_out"] == STEPS - first


def test_guidance_that_stops_on_its_own_is_left_alone() -> None:
    """The pipeline guides for a part of the way: two samples are then no two branches."""

    def stop(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
            return {"prompt_embeds": tensors["prompt_embeds"]}
        return {}

    arguments: dict[str, Any] = {
        "prompt": ["a red circle", "two"],
        "negative_prompt": ["blurred", "grey"],
        "callback_on_step_end": stop,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    made, run = made_by("unet", Cut(first=2), **arguments)
    assert torch.equal(made, plain("unet", **arguments))
    assert run.activity["rows"] == 4 + 4 + 2 + 2 and "left_out" not in run.activity


def test_guidance_of_made_up_outputs() -> None:
    torch.manual_seed(0)
    shape = (2, 4, 8, 8)
    first, second = torch.randn(shape), torch.randn(shape)
    mixed = first + 5.0 * (second - first)
    for combined, sign in ((mixed, 1.0), (-mixed, -1.0), (mixed * 0.6, 1.0)):
        found = find_guidance([torch.cat([first, second])], combined)
        assert found is not None and found.batched and found.conditional == 1
        assert found.scale == pytest.approx(5.0, rel=1e-3) and found.sign == sign
    renormed = mixed * second.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True)
    found = find_guidance([second, first], -renormed)
    assert found is not None and not found.batched and found.conditional == 0
    assert found.scale == pytest.approx(5.0, rel=1e-3) and found.sign == -1.0
    # A variance beside the output, and samples that are kept twice, as in DiT.
    wide = torch.cat([torch.cat([second, first]), torch.randn(4, 4, 8, 8)], dim=1)
    found = find_guidance([wide], torch.cat([mixed, mixed]))
    assert found is not None and found.conditional == 0
    assert find_guidance([torch.cat([first, second])], torch.randn(shape)) is None
    assert find_guidance([torch.cat([first, first])], first) is None
    assert find_guidance([first, first], first) is None
    assert find_guidance([first], first) is None
    assert find_guidance([first, second, first], first) is None
    half = [t.bfloat16() for t in (first, second)]
    found = find_guidance(half, half[0] + 5.0 * (half[1] - half[0]))
    assert found is not None and found.scale == pytest.approx(5.0, rel=1e-2)


# ------------------------------------------------------------------------------ blocks and layers
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_blocks_taken_apart_and_put_together(name: str) -> None:
    made, run = made_by(name, Rebuild())
    assert torch.equal(made, plain(name))
    seen = state_of(run)
    every = [block for network in networks(run.pipe) for block in blocks(network)]
    assert len(every) >= 2 and len(seen.blocks) == len(every) * run.activity["calls"]
    # In the order of their numbers, each of which is one module.
    assert [each.index for each in seen.blocks[: len(every)]] == list(range(len(every)))
    assert [each.module for each in seen.blocks[: len(every)]] == every
    assert {each.count for each in seen.blocks} == {len(every)}
    assert len(set(seen.layers)) >= 2 * len(every) - 2
    once = seen.layers[: len(seen.layers) // run.activity["calls"]]
    assert seen.layers == once * run.activity["calls"]


JOINT = {
    "sd3": 0,
    "flux": 16,
    "cogview4": 16,
    "cogvideox": 16,
    "auraflow": 24,
    "chroma": 16,
    "flux2": 16,
    "qwenimage": None,  # as long as the prompt
    "z_image": 0,
    "lumina2": None,
    "mochi": 0,
    "hunyuan_video": 0,
}
"""Families that attend over the sample's tokens and the text's at once: how many tokens come first."""

GRIDS = {
    "dit": (1, 4, 4),
    "pixart": (1, 8, 8),
    "hunyuandit": (1, 8, 8),
    "wan": (2, 2, 2),
    "ltx": (3, 8, 8),
    "allegro": (2, 1, 1),
    **dict.fromkeys(("sd3", "flux", "cogview4", "auraflow", "chroma", "flux2"), (1, 8, 8)),
    **dict.fromkeys(("z_image", "lumina2"), (1, 8, 8)),
    "qwenimage": (1, 4, 4),
    "cogvideox": (2, 2, 2),
    "mochi": (2, 1, 1),
    "hunyuan_video": (2, 2, 2),
    "unet": (1, 8, 8),
    "sdxl": (1, 8, 8),
    "ddpm": (1, 8, 8),
}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("sana", "latte")])
def test_attention_is_seen_once_in_each_layer_with_its_grid(name: str) -> None:
    made, run = made_by(name, Dense())
    assert torch.equal(made, plain(name))
    seen = state_of(run)
    assert len({each[:4] for each in seen}) == len(seen)
    layers = {layer for _, _, layer, _, _, _ in seen}
    assert layers == set(range(len(layers)))
    turns = 2 if name == "mochi" else 1  # it attends for each row on its own
    assert len(seen) == len(layers) * run.activity["calls"] * turns
    for *_, length, layout in seen:
        place = layout.place(length)
        assert place is not None
        offset, grid = place
        assert offset == layout.offset(length)
        assert grid == GRIDS[name]
        if name not in JOINT:
            assert offset == 0 and layout.grid(length) == grid
        elif JOINT[name] is None:
            assert offset == length - grid[1] * grid[2]
        else:
            assert offset == JOINT[name] and layout.grid(length) is None


def test_attention_within_single_frames() -> None:
    made, run = made_by("latte", Dense())
    assert torch.equal(made, plain("latte"))
    grids = {length: layout.grid(length) for *_, length, layout in state_of(run)}
    assert grids[16] == (1, 4, 4)


def test_linear_attention_is_no_attention_over_keys() -> None:
    made, run = made_by("sana", Dense())
    assert torch.equal(made, plain("sana")) and state_of(run) == []


def test_prompts_of_different_lengths_have_no_one_place() -> None:
    """Lumina joins each row's own text without its padding."""
    prompts = {"prompt": ["a red circle", "a"], "negative_prompt": ["blurred", "c"]}
    made, run = made_by("lumina2", Dense(), **prompts)
    assert torch.equal(made, plain("lumina2", **prompts))
    places = [layout.place(length) for _, branch, *_, length, layout in state_of(run) if branch]
    assert places and set(places) == {None}


@pytest.mark.parametrize("technique", [Rebuild(), Skip(at="")], ids=str)
def test_looking_for_tokens_asks_no_technique(technique: Technique) -> None:
    """The forward passes that find the sample's tokens are not the pipeline's."""

    @toy(Slot.STATE)
    class Look(State):
        def receive(self, state: Any, run: Run, call: Call, output: Tensor) -> Tensor:
            assert run.layout.place(80) == (16, (1, 8, 8))
            return output

    fast, run = apply(tiny("flux"), "")
    run.slots = run.slots.fill([(technique, None), (Look(), None)])
    made = picture(fast._execute(run, **call("flux")))
    assert torch.equal(made, plain("flux"))
    assert run.activity["calls"] == STEPS


# ----------------------------------------------------------------------------- sizes, rows, shapes
def test_states_begin_anew_where_the_sample_changes_its_size() -> None:
    begun: list[int] = []

    @toy(Slot.GATE)
    class Count(Gate):
        def begin(self, run: Run, bound: Any) -> None:
            begun.append(run.index)

    def grow(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents = tensors["latents"]
        return {"latents": latents.repeat(1, 1, 1, 2) if step == 1 else latents}

    made, _ = made_by("sd3", Count(), callback_on_step_end=grow)
    assert made.shape[-1] == 2 * made.shape[-2]
    assert begun == [0, 2]


def test_rows_of_a_call() -> None:
    class Network(nn.Module):
        def forward(self, hidden_states: Any, timestep: Any = None, **kwargs: Any) -> Any:
            return hidden_states

    rows, text = 4, torch.arange(4.0)[:, None, None].expand(4, 5, 8)
    kwargs = {
        "timestep": torch.arange(4),
        "encoder_hidden_states": text,
        "stack": torch.arange(4.0)[None, :, None, None].expand(3, 4, 5, 8),
        "added": {"time_ids": torch.arange(4.0)[:, None]},
        "residuals": [torch.arange(4.0)[:, None] for _ in range(3)],
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.arange(4.0)[:, None, None].expand(4, 5, 4),
        "image_rotary_emb": (torch.zeros(4, 8), torch.zeros(4, 8)),
        "names": ["a", "b", "c", "d"],
        "flag": True,
    }
    call = Call(Network(), (torch.arange(4.0)[:, None],), kwargs)
    assert call.rows == rows
    kept = call.take(torch.tensor([1, 3]))
    wanted = torch.tensor([1.0, 3.0])
    assert torch.equal(kept.x[:, 0], wanted) and torch.equal(kept.timestep, wanted.long())
    given = kept.kwargs
    assert torch.equal(given["encoder_hidden_states"][:, 0, 0], wanted)
    assert torch.equal(given["stack"][0, :, 0, 0], wanted)
    assert torch.equal(given["added"]["time_ids"][:, 0], wanted)
    assert all(torch.equal(each[:, 0], wanted) for each in given["residuals"])
    assert given["img_ids"].shape == (4, 3) and given["image_rotary_emb"][0].shape == (4, 8)
    assert torch.equal(given["txt_ids"][:, 0, 0], wanted)
    assert given["names"] == ["b", "d"] and given["flag"] is True
    listed = Call(Network(), (list(torch.arange(8.0).view(4, 2)),), {"timestep": 0})
    assert listed.rows == 4 and listed.x.shape == (4, 2)
    listed.x = listed.x + 1
    assert isinstance(listed.kwargs["hidden_states"], list)
    assert len(listed.take(torch.tensor([0])).kwargs["hidden_states"]) == 1


def test_outputs_are_given_back_as_they_were() -> None:
    tensor = torch.randn(2, 3)
    for output in (tensor, (tensor, "more"), [tensor[0], tensor[1]], ([tensor[0], tensor[1]],)):
        found, pack = unpack(output)
        assert torch.equal(found, tensor)
        back = pack(found)
        assert type(back) is type(output)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    found, pack = unpack(Transformer2DModelOutput(sample=tensor))
    back = pack(found + 1)
    assert isinstance(back, Transformer2DModelOutput) and torch.equal(back.sample, tensor + 1)
    from diffusers.models.transformers.prior_transformer import PriorTransformerOutput

    found, pack = unpack(PriorTransformerOutput(predicted_image_embedding=tensor))
    assert torch.equal(found, tensor)
    assert torch.equal(pack(found + 1).predicted_image_embedding, tensor + 1)


def test_a_hook_leaves_a_module_as_it_was() -> None:
    module = nn.Linear(2, 2)
    before = dict(vars(module))
    seen: list[int] = []

    def forward(module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
        seen.append(1)
        return original(*args, **kwargs)

    with pytest.raises(ZeroDivisionError), hooked(module, "a", forward):
        module(torch.zeros(1, 2))
        with hooked(module, "b", forward):
            module(torch.zeros(1, 2))
        1 / 0  # noqa: B018
    assert vars(module) == before and len(seen) == 3


def test_grids() -> None:
    layout = Layout(((1, 8, 16),), (1, 2, 2))
    assert layout.grid(32) == (1, 4, 8) and layout.grid(31) is None
    assert Layout(((1, 8, 16),), levels=True).grid(32) == (1, 4, 8)
    assert Layout(((1, 8, 16),)).grid(32) is None
    clip = Layout(((4, 3, 8, 8)[1:], (4, 8, 8)), (1, 2, 2))
    assert clip.grid(64) == (4, 4, 4) and clip.grid(48) == (3, 4, 4) and clip.grid(16) == (1, 4, 4)
    assert clip.place(64) == (0, (4, 4, 4)) and clip.place(65) is None


# --------------------------------------------------------------------------- schedules and states
def test_a_schedule_is_asked_before_and_after_the_scheduler_made_its_timesteps() -> None:
    @toy(Slot.SCHEDULE)
    class Fewer(Schedule):
        def begin(self, run: Run, bound: Any) -> list[int]:
            return []

        def ask(self, state: list[int], run: Run, arguments: dict[str, Any]) -> None:
            state.append(arguments["num_inference_steps"])
            arguments["num_inference_steps"] = 3

        def plan(self, state: list[int], run: Run) -> None:
            state.append(len(run.scheduler.timesteps))

    made, run = made_by("sd3", Fewer())
    assert state_of(run) == [4, 3]
    assert torch.equal(made, plain("sd3", num_inference_steps=3))


def test_a_state_may_change_what_goes_in_and_what_goes_on() -> None:
    @toy(Slot.STATE)
    class Shift(State):
        def feed(self, state: Any, run: Run, call: Call) -> None:
            call.x = call.x + 1.0

        def receive(self, state: Any, run: Run, call: Call, output: Tensor) -> Tensor:
            return torch.zeros_like(output)

        def advance(self, state: Any, run: Run, step: Step, solve: Callable[[], Tensor]) -> Tensor:
            assert torch.equal(step.output, torch.zeros_like(step.output))
            return solve() if run.index else step.sample + 1.0

    _, run = made_by("sd3", Shift())
    first = run.trace[0]
    assert all(step.result is not None for step in run.trace)
    assert torch.equal(run.trace[-1].result, first.sample + 1.0)  # the rest did not move
