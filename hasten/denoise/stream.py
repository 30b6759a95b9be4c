"""A stream of frames through a pipeline: frames go in, frames come out, one network call each.

The pipeline is called once, and its own loop goes on as long as frames come. It runs in a thread of
its own, in turns with whoever reads the stream: it takes a frame when an output is asked for.
"""

from __future__ import annotations

import inspect
import queue
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hasten.denoise.coding import Coder
from hasten.denoise.network import Call, networks
from hasten.denoise.pipelines import quiet
from hasten.denoise.state.sizes import size_of
from hasten.denoise.state.stages import Rows
from hasten.denoise.state.stream_diffusion import OWN, StreamDiffusion
from hasten.errors import PlanError

if TYPE_CHECKING:
    from hasten.denoise.engine import DenoiseModel
    from hasten.denoise.run import Run

TYPES = ("pt", "np", "pil", "latent")


class _EndedError(Exception):
    """Leaves the pipeline's loop when there are no frames any more."""


class Session:
    """One stream in progress.

    Attributes:
        skipped: frames left out in a row.
        waiting: rows at the stages after the first, from one call of the pipeline to the next.
    """

    def __init__(
        self, model: DenoiseModel, technique: StreamDiffusion, frames: Iterable[Any], form: str
    ) -> None:
        self.technique = technique
        self.pipe = model.pipe
        self.frames = iter(frames)
        self.form = form
        self.coder = Coder(self.pipe)
        self.coder.check(technique.name)
        self.asked = threading.Semaphore(0)
        self.outputs: queue.Queue[Any] = queue.Queue()
        self.stopping = False
        self.skipped = 0
        self.waiting: Rows | None = None
        self.flight: deque[int] = deque()  # real frames in each batch that is not done
        self._head: list[Tensor] = []  # pixels that were read before the loop began
        self._reference: Tensor | None = None  # the last frame that was processed
        self._latent: Tensor | None = None  # of the last frame that was processed
        self._last: Any = None  # the last output
        self._owed = False  # whether somebody waits for an output
        self._ended = False
        self._luck = torch.Generator().manual_seed(technique.seed)

    @property
    def guidance_argument(self) -> str | None:
        """The argument of the pipeline's call by which it guides with a second branch."""
        network: Any = networks(self.pipe)[0]
        if network.config.get("time_cond_proj_dim"):
            return None  # the network itself is told the scale
        known = inspect.signature(type(self.pipe).__call__).parameters
        return next((n for n in ("true_cfg_scale", "guidance_scale") if n in known), None)

    def look(self) -> Tensor | None:
        """(1, 3, height, width) the first frame, before the loop begins; None where there is none."""
        frame = next(self.frames, None)
        if frame is not None:
            self._head = [self.coder.pixels(frame)]
        return self._head[0] if self._head else None

    # -- called inside the loop ----------------------------------------------------------------------
    def pull(self, call: Call, run: Run) -> Tensor:
        """(frames, ...) latents of the next frames; zeros once there are none and others wait."""
        if self.coder.size is None and call.x.ndim == 3:
            self.coder.size = size_of(call, self.pipe, self.technique.name)
        taken: list[Tensor] = []
        while len(taken) < self.technique.frame_buffer and not self._ended:
            pixels = self._next(run)
            if pixels is not None:
                self._latent = self.coder.encode(pixels).float()
                taken.append(self._latent)
        if not taken and not any(self.flight):
            raise _EndedError
        if not taken:  # lets the last frames out
            self._wait()
            assert self._latent is not None
            taken = [torch.zeros_like(self._latent)]
            self.flight.append(0)
        else:
            self.flight.append(len(taken))
            run.activity[f"{self.technique.name}.frames"] += len(taken)
        while len(taken) < self.technique.frame_buffer:
            taken.append(taken[-1])
        return torch.cat(taken)

    def push(self, clean: Tensor, run: Run) -> None:
        """Hand out the frames that are done."""
        if len(self.flight) < self.technique.stages:
            return  # rows that no frame has come to yet
        real = self.flight.popleft()
        if real:
            self._emit([self._formed(row) for row in clean[:real].split(1)])

    def _next(self, run: Run) -> Tensor | None:
        """Pixels of the next frame that is processed; None at the end."""
        while True:
            self._wait()
            frame = self._head.pop() if self._head else next(self.frames, None)
            if frame is None:
                self._ended = True
                return None
            pixels = (
                frame if torch.is_tensor(frame) and frame.ndim == 4 else self.coder.pixels(frame)
            )
            if not self._leaves_out(pixels):
                self._reference, self.skipped = pixels, 0
                return pixels
            self.skipped += 1
            run.activity[f"{self.technique.name}.frames_left_out"] += 1
            self._emit([self._last])

    def _leaves_out(self, pixels: Tensor) -> bool:
        technique = self.technique
        if not technique.skip_similar or self._reference is None or self._last is None:
            return False
        if self.skipped >= technique.max_skips:
            return False
        chance = skip_chance(self._reference, pixels, technique.similarity)
        return bool(torch.rand((), generator=self._luck) < chance)

    def _formed(self, latent: Tensor) -> Any:
        """A latent as what the reader asked for."""
        if self.form == "latent":
            return latent
        picture = self.coder.decode(latent.to(self.pipe.dtype))[0]
        if self.form == "pt":
            return picture
        array = picture.permute(1, 2, 0).cpu().numpy()
        if self.form == "np":
            return array
        from diffusers.image_processor import VaeImageProcessor

        return VaeImageProcessor.numpy_to_pil(array)[0]

    # -- in turns with the reader --------------------------------------------------------------------
    def _wait(self) -> None:
        """Go on only when an output is asked for."""
        if not self._owed:
            self.asked.acquire()
            self._owed = True
        if self.stopping:
            raise _EndedError

    def _emit(self, made: list[Any]) -> None:
        self._last, self._owed = made[-1], False
        self.outputs.put(made)


def skip_chance(before: Tensor, frame: Tensor, threshold: float) -> float:
    """The chance by which a frame is left out: 0 up to a cosine of `threshold`, 1 for the same frame."""
    flat = (before.flatten().double(), frame.flatten().double())
    cosine = float(torch.cosine_similarity(*flat, dim=0))
    return max(0.0, 1.0 - (1.0 - cosine) / (1.0 - threshold))


def stream(
    model: DenoiseModel, frames: Iterable[Any], *, output_type: str = "pt", **arguments: Any
) -> Iterator[Any]:
    """Run a stream of frames through a pipeline whose plan holds `stream_diffusion`.

    Args:
        frames: pictures as PIL, arrays or tensors from 0 to 1; read one by one, as outputs are asked for.
        output_type: "pt" for (3, height, width) tensors from 0 to 1, "np", "pil" or "latent".
        arguments: of the pipeline's call, such as the prompt.

    Yields:
        An output for each frame, in order. It comes as many frames later as there are stages after
        the first; the last ones come when the frames have ended.

    Raises:
        PlanError: where the plan holds no `stream_diffusion`, or the form of the output is unknown.
        SubjectError: where the pipeline makes no single pictures.
    """
    found = [t for t in model.plan if isinstance(t, StreamDiffusion)]
    if not found:
        raise PlanError(
            "A stream needs stream_diffusion in the plan: hasten.apply(pipe, 'stream_diffusion').stream(frames)."
        )
    if output_type not in TYPES:
        raise PlanError(f"output_type={output_type!r} is not one of {', '.join(TYPES)}.")
    return _outputs(model, Session(model, found[0], frames, output_type), arguments)


def _outputs(model: DenoiseModel, session: Session, arguments: dict[str, Any]) -> Iterator[Any]:
    first = session.look()
    if first is None:
        return
    known = inspect.signature(type(model.pipe).__call__).parameters
    for name, size in zip(("height", "width"), first.shape[-2:], strict=True):
        if name in known:
            arguments.setdefault(name, int(size))

    def work() -> None:
        total: Counter[str] = Counter()
        ended: BaseException | None = None
        while ended is None:  # a call of the pipeline ends by itself after very many frames
            try:
                model(**arguments, **{OWN: session})
            except BaseException as error:
                ended = error
            total.update(model.activity)
            model.activity = dict(total)
        if isinstance(ended, _EndedError):
            model.pipe.maybe_free_model_hooks()
        session.outputs.put(None if isinstance(ended, _EndedError) else ended)

    thread = threading.Thread(target=work, name="hasten-stream", daemon=True)
    with quiet(model.pipe):
        thread.start()
        try:
            while True:
                session.asked.release()
                made = session.outputs.get()
                if made is None:
                    return
                if isinstance(made, BaseException):
                    raise made
                yield from made
        finally:
            session.stopping = True
            session.asked.release()
            thread.join()
