"""StreamDiffusion: frames of a stream share network calls, each at another stage of its way.

"StreamDiffusion: A Pipeline-level Solution for Real-time Interactive Generation" (arXiv 2312.12491),
after the reference code. A frame's way has few stages. Each network call takes the newest frame at
the first stage and the ones before it at the later stages, with a timestep for each row, so that
every call finishes a frame (`fast.stream(frames, prompt=...)`). Stages have fixed noises. Guidance
takes the noise that would lead back to the frame itself for the unconditional prediction ("self"), or
the one that was predicted at the first stage ("initialize"). Frames like the one before may be left
out, by a chance that rises with their likeness.

Frames and outputs are taken and handed out in turns with the reader of the stream, so a frame that is
left out costs no time, where the code sleeps for as long as a call takes. One prompt holds for a stream.

Inferred: stages are spread evenly over the part of the way that `strength` leaves; the residual noise
is the closed form (x - alpha * frame) / sigma of the paper, of which the code has an approximation.

In an ordinary call there is no frame to lead back to. There both kinds of residual guidance take the
unconditional prediction of the first step for the later ones, at the pipeline's guidance scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.denoise.guidance import like, own_part
from hasten.denoise.levels import check_levels, level
from hasten.denoise.network import Call
from hasten.denoise.run import Run, Step
from hasten.denoise.slots import Guider, State
from hasten.denoise.state.moves import estimate, noised_again
from hasten.denoise.state.stages import Progress, Rows, stage_places
from hasten.denoise.state.times import EndlessLoop
from hasten.errors import HastenError
from hasten.technique import (
    Card,
    Claim,
    Contract,
    Loss,
    Resource,
    Rival,
    Slot,
    knob,
    technique,
)

LIMIT = 4096  # network calls of one call of the pipeline; a longer stream takes several
OWN = "stream_session"


@technique("stream_diffusion")
@dataclass(frozen=True, kw_only=True)
class StreamDiffusion(State, Guider):
    """Runs all stages of a stream's frames in one call, with guidance that needs no second branch."""

    card: ClassVar[Card] = Card(
        title="StreamDiffusion: A Pipeline-level Solution for Real-time Interactive Generation",
        paper="stream_diffusion",
        family="diffusion",
        loss=Loss.LOSSY,
        link="https://arxiv.org/abs/2312.12491",
        year=2023,
        claims=(
            Claim(
                "speed-up by the batch of stages", 1.5, "over one stage after the other, on a GPU"
            ),
            Claim("speed-up by residual guidance", 2.05, "over ordinary guidance"),
            Claim("frames a second", 91.07, "one RTX 4090, TensorRT, tiny autoencoder"),
        ),
        neutral={"residual": "full"},
        rival=Rival(
            "fixed_guidance_cut(last=0.02)",
            "attributes",
            "guides the first step only, which is as cheap in an ordinary call",
        ),
        saves="guidance",
        notes=(
            "The batch of stages is lossless and comes with a delay of as many frames as there are "
            "later stages. It pays where a batch costs less than its rows one by one, which a busy CPU "
            "does not offer. A network that was not distilled to few steps draws blurred frames in few "
            "stages."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.STATE, Slot.GUIDER),
        changes=frozenset({Resource.TRAJECTORY}),
        needs=frozenset({Resource.TIMESTEPS}),
        runners=frozenset({"eager", "compiled"}),
    )

    stages: int = knob(
        2, "network rows that a frame takes; more is finer and later", low=1, high=50
    )
    strength: float = knob(
        0.5, "share of the way that a frame is noised; 1 ignores the frame", low=0.02, high=1.0
    )
    steps: int = knob(50, "timesteps among which the stages are chosen", low=1)
    guidance: float = knob(1.2, "guidance scale of a stream; 1 and below is off", low=0.0)
    delta: float = knob(1.0, "weight of the residual noise; lower is milder", low=0.0)
    residual: str = knob(
        "self",
        "what stands for the unconditional prediction: noise that leads back to the frame; the first "
        "stage's prediction; or it runs in full; none is no guidance of a stream",
        choices=("self", "initialize", "full", "none"),
    )
    renoise: str = knob(
        "stage",
        "noise of a row's next stage: the stage's own; the predicted one; none",
        choices=("stage", "predicted", "none"),
    )
    frame_buffer: int = knob(1, "frames that are taken together", low=1)
    skip_similar: bool = knob(False, "leave frames out that are like the one before")
    similarity: float = knob(
        0.98, "cosine between frames from which they may be left out", low=-1.0, high=0.999999
    )
    max_skips: int = knob(10, "frames that may be left out in a row", low=0)
    seed: int = knob(0, "seed of the stages' noises and of what is left out", low=0)

    def terms(self) -> Contract:
        """Without residual guidance the guider's slot is free."""
        if self.residual in ("self", "initialize"):
            return self.contract
        return replace(self.contract, slots=(Slot.STATE,))

    def check(self, pipe: Any) -> None:
        """See `DenoiseTechnique.check`."""
        check_levels(pipe.scheduler, self.name)

    # -- a call begins -----------------------------------------------------------------------------
    def begin(self, run: Run, bound: Any) -> Progress:
        """See `DenoiseTechnique.begin`."""
        return Progress()

    def ask(self, state: Progress, run: Run, arguments: dict[str, Any]) -> None:
        """Make the call that of a stream, if it is one."""
        state.session = arguments.pop(OWN, None)
        if state.session is None:
            return
        rows = self.stages * self.frame_buffer
        for name in ("prompt", "prompt_2", "prompt_3", "negative_prompt", "class_labels"):
            value = arguments.get(name)
            if value is not None:
                arguments[name] = [value[0] if isinstance(value, list) else value] * rows
        arguments["num_inference_steps"] = self.steps
        scale = state.session.guidance_argument
        if scale is not None:
            arguments[scale] = self._pipeline_scale()

    def _pipeline_scale(self) -> float:
        """The pipeline's own guidance scale in a stream."""
        if self.guidance <= 1.0 or self.residual in ("self", "none"):
            return 0.0  # off in every pipeline, also in those that count from 0
        return self.guidance if self.residual == "full" else max(self.guidance, 2.0)

    @property
    def _needs_both(self) -> bool:
        return self.residual in ("initialize", "full") and self.guidance > 1.0

    def plan(self, state: Progress, run: Run) -> None:
        """Choose the stages among the scheduler's timesteps, and let the loop go on as long as frames come."""
        if state.session is None:
            return
        scheduler = run.scheduler
        times = [float(t) for t in scheduler.timesteps]
        chosen = stage_places(len(times), self.stages, self.strength)
        state.times = [times[i] for i in chosen]
        at = [level(scheduler, i, scheduler.timesteps[i]) for i in chosen]
        state.levels = [replace(found, scale=1.0) for found in at]  # rows are what the network sees
        scaling = getattr(scheduler, "get_scalings_for_boundary_condition_discrete", None)
        state.scalings = [scaling(int(t)) if scaling else (0.0, 1.0) for t in state.times]
        state.loop = EndlessLoop(scheduler, LIMIT, self.name)

    def finish(self, state: Progress, run: Run) -> None:
        """Put the scheduler's list back."""
        if state.loop is not None:
            state.loop.restore()

    # -- a network call ----------------------------------------------------------------------------
    def feed(self, state: Progress, run: Run, call: Call) -> None:
        """Give the network the newest frames and those that wait, each at its own time."""
        if state.session is None:
            return
        assert state.loop is not None
        if run.calls == 0:
            frames = state.session.pull(call, run)
            state.rows = self._rows(state, frames)
            run.activity[f"{self.name}.calls"] += 1
        assert state.rows is not None
        count = call.rows // len(state.rows.x)
        shape = call.x.shape[1:]
        if state.rows.x[0].numel() != shape.numel():
            raise HastenError(
                f"The stream's frames give latents of {tuple(state.rows.x.shape[1:])} and the pipeline makes "
                f"{tuple(shape)}; give height and width of the frames."
            )
        x = state.rows.x.reshape(-1, *shape).to(call.x.dtype)
        call.x = x.repeat(count, *(1,) * len(shape))
        times = torch.tensor(state.times).repeat_interleave(self.frame_buffer)
        call.timestep = state.loop.told(call.timestep, times).repeat(count)

    def _rows(self, state: Progress, frames: Tensor) -> Rows:
        """The rows of a call: new frames, noised for the first stage, and those that wait."""
        if state.noises is None:
            drawn = torch.Generator().manual_seed(self.seed)
            shape = (self.stages, 1, *frames.shape[1:])
            state.noises = torch.randn(shape, generator=drawn).to(frames.device)
            later = (self.stages - 1) * self.frame_buffer
            empty = frames.new_zeros(later, *frames.shape[1:])
            assert state.session is not None
            state.waiting = state.session.waiting or Rows(empty, empty, empty)
        assert state.waiting is not None
        first, noise = state.levels[0], state.noises[0].expand_as(frames)
        new = Rows(first.alpha * frames + first.sigma * noise, frames, noise)
        return Rows.join([new, state.waiting])

    # -- guidance ----------------------------------------------------------------------------------
    def wanted(self, state: Progress, run: Run, call: Call) -> Tensor:
        """The newest frames of a stream; nothing after the first step of an ordinary call."""
        count = call.rows // (2 if run.guidance is not None and run.guidance.batched else 1)
        wanted = torch.zeros(count, dtype=torch.bool)
        if state.session is not None:
            wanted[: self.frame_buffer] = True
        return wanted

    def compare(
        self, state: Progress, run: Run, conditional: Tensor, unconditional: Tensor, step: Step
    ) -> None:
        """Keep both outputs of a stream's call, and the first unconditional one of another."""
        assert run.guidance is not None
        if state.session is not None:
            state.pair = conditional * run.guidance.sign, unconditional * run.guidance.sign
        elif state.first is None:
            output = like(unconditional, step.sample) * run.guidance.sign
            state.first = run.level(step).noise(output, step.sample)

    def missing(self, state: Progress, run: Run, conditional: Tensor) -> Tensor:
        """The output that says the residual noise, in an ordinary call."""
        if state.session is not None or state.first is None:
            return conditional
        assert run.guidance is not None
        place = run.first + run.index
        at = level(run.scheduler, place, run.scheduler.timesteps[place])
        noise = self.delta * state.first
        x = own_part(run.call.x[: len(noise)], noise)
        said = replace(at, scale=1.0).output_of_noise(noise, x) * run.guidance.sign
        run.activity[f"{self.name}.residual_steps"] += 1
        known = said.reshape(conditional[:, : said.shape[1]].shape).to(conditional.dtype)
        return torch.cat([known, conditional[:, known.shape[1] :]], dim=1)

    # -- a step ------------------------------------------------------------------------------------
    def advance(self, state: Progress, run: Run, step: Step, solve: Any) -> Tensor:
        """Move each row on by a stage, and hand out the frames that are done."""
        if state.session is None:
            return solve()  # type: ignore[no-any-return]
        assert state.rows is not None and state.noises is not None
        rows, f = state.rows, self.frame_buffer
        if self._needs_both and run.calls == 1 and len(run.computed[0]) == len(rows.x):
            raise HastenError(
                f"{self.name}(residual={self.residual}) needs the unconditional branch, and {type(run.pipe).__name__} "
                "ran none; give negative_prompt, or use residual=self."
            )
        output = step.output[: len(rows.x)] if state.pair is None else state.pair[0]
        output = like(output, rows.x).to(rows.x.dtype)
        moved: list[Rows] = []
        for stage in range(self.stages):
            part = slice(stage * f, (stage + 1) * f)
            done = estimate(self, state, rows[part], output[part], stage)
            if stage + 1 == self.stages:
                state.session.push(done.clean, run)
            else:
                moved.append(noised_again(self, state, rows.frames[part], done, stage + 1))
        if moved:
            state.waiting = state.session.waiting = Rows.join(moved)
        return step.sample
