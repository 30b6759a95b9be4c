"""Pipelines whose networks are given something else than others: chunks, packs, a second picture."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten import technique as registry
from hasten.denoise.engine import DenoiseModel
from hasten.denoise.network import Call, networks
from hasten.denoise.run import Run
from hasten.denoise.slots import Attention, Gate
from hasten.denoise.suits import check_call
from hasten.errors import SubjectError
from hasten.technique import Card, Contract, Loss, Slot, Technique
from tests.pipelines import (
    WIDTH,
    _chat_tokenizer,
    _t5,
    _t5_tokenizer,
    call,
    picture,
    tiny,
)

STEPS = 6
CHUNKS = (1, 2, 2)


def _clip_autoencoder() -> nn.Module:
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_spatial=4,
    )


def _chunks() -> Any:
    """Makes a clip chunk by chunk, each in a loop of its own, from a cache of those before."""
    transformer = diffusers.AnyFlowFARTransformer3DModel(
        patch_size=(1, 2, 2),
        compressed_patch_size=(1, 4, 4),
        full_chunk_limit=2,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        chunk_partition=CHUNKS,
    )
    return diffusers.AnyFlowFARPipeline(
        _t5_tokenizer(),
        _t5(kind="UMT5"),
        transformer,
        _clip_autoencoder(),
        diffusers.FlowMapEulerDiscreteScheduler(),
    )


def _packed() -> Any:
    """Packs text and picture, and sound where there is some, into one sequence."""
    transformer = diffusers.Cosmos3OmniTransformer(
        head_dim=16,
        hidden_size=32,
        intermediate_size=32,
        latent_channel=4,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=1,
        patch_latent_dim=16,
        vocab_size=128,
        rope_axes_dim=(4, 2, 2),
        unified_3d_mrope_temporal_modality_margin=16,
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.Cosmos3OmniPipeline(
        transformer, _chat_tokenizer(), _clip_autoencoder(), scheduler, enable_safety_checker=False
    )


def _edits() -> Any:
    """Edits a picture, whose tokens stand behind the sample's."""
    return tiny("flux", kind="FluxKontextPipeline")


MAKERS: dict[str, Callable[[], Any]] = {"chunks": _chunks, "packed": _packed, "edits": _edits}
CLIP: dict[str, Any] = {"height": 16, "width": 16, "guidance_scale": 3.0, "prompt": "a red circle"}
CALLS: dict[str, dict[str, Any]] = {
    "chunks": {**CLIP, "num_frames": 4 * sum(CHUNKS) - 3, "max_sequence_length": 16},
    "packed": {
        **CLIP,
        "num_frames": 5,
        "use_system_prompt": False,
        "enable_safety_check": False,
    },
    "edits": {
        **{key: value for key, value in call("flux").items() if key != "generator"},
        "max_area": 256,
        "_auto_resize": False,
    },
}


@cache
def pipe(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = MAKERS[name]()
    for part in made.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    made.set_progress_bar_config(disable=True)
    return made


def given(name: str, *, side: int = 16, **more: Any) -> dict[str, Any]:
    """Arguments of a call; `side` is that of the picture that is edited."""
    arguments = {**CALLS[name], "num_inference_steps": STEPS, "output_type": "pt", **more}
    if name == "edits":
        generator = torch.Generator().manual_seed(1)
        arguments["image"] = torch.rand(1, 3, side, side, generator=generator)
    return {**arguments, "generator": torch.Generator().manual_seed(0)}


@cache
def plain(name: str, side: int = 16) -> Tensor:
    return picture(pipe(name)(**given(name, side=side)))


def drawn(name: str, plan: Any, **more: Any) -> tuple[Tensor, Run]:
    """What a pipeline makes with a plan, and the run."""
    with hasten.apply(pipe(name), plan) as fast:
        assert isinstance(fast, DenoiseModel)
        run = fast.start()
        return picture(fast._execute(run, **given(name, **more))), run


def toy(slot: Slot) -> Callable[[Any], Any]:
    """A technique that no registry knows."""

    def declare(cls: Any) -> Any:
        cls.name, cls.contract = cls.__name__.lower(), Contract(slots=(slot,))
        cls.card = Card(title=cls.__name__, family="toy", loss=Loss.LOSSY)
        return cls

    return declare


@toy(Slot.GATE)
class Watching(Gate):
    """Lets everything run, and writes down what it is asked."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.asked: list[tuple[int, tuple[int, ...]]] = []

    def begin(self, run: Run, bound: Any) -> None:
        self.begun.append(run.activity["steps"])

    def observe(self, state: Any, run: Run, call: Call, output: Tensor) -> None:
        assert output.shape == call.x.shape
        self.asked.append((run.index, tuple(output.shape)))


@pytest.mark.parametrize("name", MAKERS)
def test_an_empty_plan_changes_nothing(name: str) -> None:
    made, run = drawn(name, "")
    assert torch.equal(made, plain(name))
    loops, fills = (len(CHUNKS), len(CHUNKS) - 1) if name == "chunks" else (1, 0)
    branches = 2 if name == "packed" else 1
    assert run.activity["steps"] == loops * STEPS
    assert run.activity["calls"] == loops * STEPS * branches + fills


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("plan", ["reuse_always(interval=2)", "zeus", "easy_cache(threshold=1.0)"])
def test_gates(name: str, plan: str) -> None:
    made, run = drawn(name, plan, num_inference_steps=12)
    whole = picture(pipe(name)(**given(name, num_inference_steps=12)))
    assert made.shape == whole.shape and bool(made.isfinite().all())
    if run.activity["skipped"]:  # random networks give some gates nothing to do
        assert not torch.equal(made, whole)
    else:
        assert torch.equal(made, whole) and not plan.startswith("reuse_always")


@pytest.mark.parametrize("name", MAKERS)
def test_a_schedule(name: str) -> None:
    made, run = drawn(name, "fewer_steps(share=0.5)")
    assert torch.equal(made, picture(pipe(name)(**given(name, num_inference_steps=STEPS // 2))))
    assert run.activity["steps"] == STEPS // 2 * (len(CHUNKS) if name == "chunks" else 1)


# ---------------------------------------------------------------------------------- chunk by chunk
def _watched(name: str) -> Watching:
    watching = Watching()
    with hasten.apply(pipe(name), "") as fast:
        assert isinstance(fast, DenoiseModel)
        run = fast.start()
        run.slots.gate = (watching, None)
        assert torch.equal(picture(fast._execute(run, **given(name))), plain(name))
    return watching


def test_each_chunk_is_a_loop_of_its_own() -> None:
    watching = _watched("chunks")
    # The first chunk, of another length, is followed by two of one shape.
    assert watching.begun == [0, STEPS, 2 * STEPS]
    assert [index for index, _ in watching.asked] == [*range(STEPS)] * len(CHUNKS)
    assert [shape[1] for _, shape in watching.asked] == [n for n in CHUNKS for _ in range(STEPS)]


def test_calls_that_fill_the_cache_are_nobodys() -> None:
    """They always run, whatever a gate would do, and are not predicted from."""
    _, run = drawn("chunks", "reuse_always(interval=3)")
    fills = len(CHUNKS) - 1
    assert run.activity["calls"] == len(CHUNKS) * STEPS // 3 + fills
    assert run.activity["skipped"] == len(CHUNKS) * (STEPS - STEPS // 3)


# ------------------------------------------------------------------------------------------ packed
def test_the_sample_is_found_in_a_pack() -> None:
    watching = _watched("packed")
    assert [index for index, _ in watching.asked] == [i for i in range(STEPS) for _ in range(2)]


def test_a_guider_leaves_the_other_branch_of_a_pack_out() -> None:
    made, run = drawn("packed", "adaptive_guidance(threshold=-1.0)")
    assert run.activity["left_out"] == STEPS - 1
    assert run.activity["calls"] == STEPS + 1
    assert run.guidance is not None and run.guidance.scale == pytest.approx(3.0, rel=1e-3)
    assert bool(made.isfinite().all()) and not torch.equal(made, plain("packed"))


@pytest.mark.parametrize("argument", ["sound_tokens", "action_tokens"])
def test_what_makes_more_than_a_picture_is_refused(argument: str) -> None:
    network = networks(pipe("packed"))[0]
    one = Call(network, (), {"vision_tokens": [torch.zeros(1, 4, 2, 4, 4)], argument: [1]})
    for slug, refused in (("zeus", True), ("adaptive_guidance", True), ("fewer_steps", False)):
        entries = [(registry.get(slug)(), None)]
        if not refused:
            check_call(one, entries)
            continue
        with pytest.raises(SubjectError, match=f"{slug} leaves .* makes {argument[:5]}") as caught:
            check_call(one, entries)
        assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------- refused
REFUSED = {
    "chunks": ("guider", "block", "attention", "state"),
    "packed": ("block", "attention", "state"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_slots_that_a_network_does_not_take_are_refused_in_one_line(name: str) -> None:
    subject, closed = pipe(name), REFUSED[name]
    tried = 0
    for slug in registry.names(engine="denoise"):
        technique = registry.get(slug)()
        slots = [slot.label for slot in technique.terms().slots if slot.label in closed]
        if not slots:
            continue
        tried += 1
        for refuse in (hasten.apply, hasten.prepare, _bench):
            with pytest.raises(SubjectError) as caught:
                refuse(subject, technique)
            words = str(caught.value)
            assert (
                f"{slug} is of the slot {slots[0]}, and {type(networks(subject)[0]).__name__}"
                in words
            )
            assert "Use techniques of the slots schedule, gate" in words and "\n" not in words
    assert tried > 8


def _bench(subject: Any, technique: Technique) -> None:
    hasten.bench(subject, technique, steps=2, record=False, quality=False)


# ------------------------------------------------------------------------------ a picture to edit
@toy(Slot.ATTENTION)
class Places(Attention):
    """The network's own attention, noting where the sample's tokens are."""

    def begin(self, run: Run, bound: Any) -> set[Any]:
        return set()

    def attend(self, state: set[Any], run: Run, call: Any) -> Tensor:
        length = call.query.shape[-2]
        state.add((length, run.layout.place(length), run.layout.grid(length)))
        return call.dense()


@pytest.mark.parametrize("side", [16, 8, 24])
def test_tokens_of_the_picture_are_told_from_the_samples(side: int) -> None:
    """Text first, then the sample, then the picture, whatever its size."""
    technique = Places()
    with hasten.apply(pipe("edits"), "") as fast:
        assert isinstance(fast, DenoiseModel)
        run = fast.start()
        run.slots.attention = (technique, None)
        made = picture(fast._execute(run, **given("edits", side=side)))
    assert torch.equal(made, plain("edits", side))
    text, own, other = 16, 64, (side // 2) ** 2
    assert run.state((technique, None)) == {(text + own + other, (text, (1, 8, 8)), None)}


@pytest.mark.parametrize("plan", ["random_key_blocks(cell=2)", "adaspa(block=4, sparsity=0.5)"])
def test_attention_over_some_of_the_samples_keys(plan: str) -> None:
    """The picture is read as a whole, as text is; only pairs within the sample are saved."""
    made, run = drawn("edits", plan, num_inference_steps=12)
    assert bool(made.isfinite().all())
    assert not torch.equal(made, picture(pipe("edits")(**given("edits", num_inference_steps=12))))
    slug = plan.partition("(")[0]
    saved, left = (run.activity[f"{slug}.{key}"] for key in ("pairs_saved", "pairs"))
    assert 0 < saved < (saved + left) * (64 / 144) ** 2


@pytest.mark.parametrize("plan", ["delta_dit", "random_block_reuse", "grat(cell=2, dense_steps=0)"])
def test_other_techniques_on_an_edit(plan: str) -> None:
    made, run = drawn("edits", plan, num_inference_steps=12)
    slug = plan.partition("(")[0]
    assert any(key.startswith(slug) for key in run.activity)
    assert bool(made.isfinite().all()) and not torch.equal(made, plain("edits"))


@pytest.mark.parametrize("plan", ["just_in_time", "bottleneck_sampling", "rollover_budget_forcing"])
def test_what_resizes_the_sample_refuses_an_edit_in_one_line(plan: str) -> None:
    with pytest.raises(SubjectError) as caught:
        drawn("edits", plan, num_inference_steps=12)
    words = str(caught.value)
    assert plan in words and "128 tokens" in words and "\n" not in words
