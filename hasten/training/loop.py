"""The training loop, readable on one screen.

It trains language models unless told otherwise; the words are theirs. For a model of pictures a
row is a picture, and its length is the number of tokens that the picture is cut into.

Muon updates the hidden matrices and AdamW the rest (embeddings, norms, biases). The learning rate
warms up, holds, and falls linearly to zero. Sequences grow in stages, since short ones are cheaper
and teach most of what a young model can learn. What is learnt is up to the `loss_fn`.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hasten.errors import HastenError
from hasten.training.memory import give_back

STEPS_BETWEEN_TRIMS = 25

LossFunction = Callable[[nn.Module, Any], tuple[Tensor, dict[str, float]]]
"""`loss_fn(model, batch) -> (loss, metrics)`; `batch` is what `Data.batch` gave, on the model's
device. For language models: ids, `(rows, length + 1)`, int64."""

Builder = Callable[[nn.Module, "Settings"], list[torch.optim.Optimizer]]

Evaluation = Callable[[nn.Module], dict[str, float]]


class Data(Protocol):
    """Where batches come from."""

    def batch(self, index: int, rows: int, length: int) -> Any:
        """A tensor, or what else has `to(device)`: of text, ids `(rows, length + 1)`.

        A pure function of its arguments, so that runs resume.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the run at one sequence length."""

    length: int
    share: float  # of all tokens


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The knobs of a run; rates are per step, shares are parts of the run."""

    tokens: int  # of the whole run
    batch_tokens: int = 8192
    stages: tuple[Stage, ...] = (Stage(length=2048, share=1.0),)
    matrix_lr: float = 0.01  # Muon
    matrix_decay: float = 0.1
    other_lr: float = 3e-3  # AdamW
    warmup_share: float = 0.02
    decay_share: float = 0.6  # the last part, in which the rate falls linearly to zero
    grad_clip: float = 1.0  # norm of all gradients together
    autocast: bool = True  # matrices multiply in bf16, weights stay in fp32
    compile: bool = True  # each decoder layer on its own, where a C++ compiler is found
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < self.batch_tokens:
            raise HastenError(
                f"tokens={self.tokens} is less than one batch of {self.batch_tokens}; "
                "give more tokens or a smaller batch_tokens"
            )
        total = sum(stage.share for stage in self.stages)
        if not self.stages or any(s.share <= 0 for s in self.stages) or abs(total - 1) > 1e-6:
            raise HastenError(
                f"the shares of the stages are {[s.share for s in self.stages]}; "
                "each must be above 0 and together they must make 1"
            )
        for stage in self.stages:
            if stage.length < 1 or self.batch_tokens % stage.length:
                raise HastenError(
                    f"a stage of length {stage.length} does not divide batch_tokens="
                    f"{self.batch_tokens}; give a length that does"
                )
        if self.warmup_share < 0 or self.decay_share < 0:
            raise HastenError("warmup_share and decay_share must not be negative; give 0 for none")
        if self.warmup_share + self.decay_share > 1:
            raise HastenError(
                f"warmup_share + decay_share is {self.warmup_share + self.decay_share}; "
                "together they must not pass 1"
            )

    @property
    def num_steps(self) -> int:
        return self.tokens // self.batch_tokens

    def place(self, step: int) -> tuple[int, int]:
        """The sequence length at `step` and how many steps that stage has done before it."""
        end, start, stage = 0.0, 0, self.stages[0]
        for stage in self.stages:
            end += stage.share
            stop = self.num_steps if stage is self.stages[-1] else round(end * self.num_steps)
            if step < stop:
                break
            start = stop
        return stage.length, step - start

    def rate(self, step: int) -> float:
        """The factor on both learning rates at `step`."""
        warmup = self.warmup_share * self.num_steps
        decay = self.decay_share * self.num_steps
        rising = (step + 1) / warmup if warmup else 1.0
        falling = (self.num_steps - step) / decay if decay else 1.0
        return min(1.0, rising, falling)

    def fingerprint(self) -> str:
        """Tells runs apart; a checkpoint resumes only the run that wrote it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Outcome:
    """What a run did; `seconds` is wall time over all its sittings."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # one per step
    evaluations: list[dict[str, float]] = field(default_factory=list)

    @property
    def final_loss(self) -> float:
        """Mean training loss over the last 20 steps, nats per token."""
        last = self.losses[-20:]
        return sum(last) / len(last)


def next_token_loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Mean cross-entropy of each next token, in nats."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten()), {}


def fit(
    model: nn.Module,
    data: Data,
    settings: Settings,
    loss_fn: LossFunction = next_token_loss,
    *,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 180.0,
    resume: bool = False,
    of: str = "",
    evaluate: Evaluation | None = None,
    num_evaluations: int = 10,
    quiet: bool = False,
    label: str = "training",
    optimizers_of: Builder | None = None,
    average: float | None = None,
) -> Outcome:
    """Train `model` in place.

    Args:
        checkpoint: a file that holds the newest state; None keeps none. It stays when the run ends.
        resume: go on from `checkpoint` where there is one.
        of: what is trained, and by which loss; a checkpoint of something else is refused.
        evaluate: called `num_evaluations` times, evenly spread, the last after the last step.
        optimizers_of: makes the optimisers; by default `build_optimizers`.
        average: keep a running mean of the weights that forgets this little each step (0.999,
            say), evaluate it, and leave it in the model. Diffusion models need one: their
            gradients are noisy.

    Raises:
        HastenError: where the checkpoint belongs to another run or the loss is not finite.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after the step is done and the state is saved.
    """
    optimizers = (optimizers_of or build_optimizers)(model, settings)
    outcome = Outcome()
    mean = None if average is None else Average(model, average)
    if resume and checkpoint is not None and checkpoint.exists():
        outcome = load_checkpoint(checkpoint, model, optimizers, settings, mean, of=of)
    marks = {round(settings.num_steps * (i + 1) / num_evaluations) for i in range(num_evaluations)}
    model.train()
    last_save = last_clock = time.monotonic()
    with (
        _compiled(model, settings.compile and outcome.steps < settings.num_steps),
        _stop_between_steps() as stopped,
        _Report(settings, label, quiet) as report,
    ):
        for step in range(outcome.steps, settings.num_steps):
            loss, metrics = _step(model, data, settings, loss_fn, optimizers, step)
            if mean is not None:
                mean.update(step)
            if step % STEPS_BETWEEN_TRIMS == 0:
                give_back()
            outcome.losses.append(loss)
            outcome.steps, outcome.tokens = step + 1, (step + 1) * settings.batch_tokens
            if evaluate is not None and outcome.steps in marks:
                with mean.in_use() if mean is not None else nullcontext():
                    evaluation = {"step": float(outcome.steps), **run_evaluation(model, evaluate)}
                outcome.evaluations.append(evaluation)
                metrics = {**metrics, **evaluation}
            now = time.monotonic()
            outcome.seconds, last_clock = outcome.seconds + now - last_clock, now
            report.show(outcome, metrics)
            due = stopped() or outcome.steps == settings.num_steps
            if checkpoint is not None and (due or now - last_save > checkpoint_seconds):
                save_checkpoint(checkpoint, model, optimizers, settings, outcome, mean, of=of)
                last_save = now
            if stopped() and outcome.steps < settings.num_steps:
                raise KeyboardInterrupt
    if mean is not None:
        mean.swap()
    return outcome


class Average:
    """A running mean of a model's weights."""

    def __init__(self, model: nn.Module, keep: float) -> None:
        if not 0 <= keep < 1:
            raise HastenError(f"average is {keep}; give 0 or more and less than 1")
        self.keep = keep
        self.live = dict(model.named_parameters())
        self.mean = {name: p.detach().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step number `step`, counted from 0."""
        keep = min(self.keep, (1 + step) / (10 + step))  # so that the first weights are forgotten
        torch._foreach_lerp_(list(self.mean.values()), list(self.live.values()), 1 - keep)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the mean with the weights in the model; twice is as before."""
        for name, parameter in self.live.items():
            kept = parameter.clone()
            parameter.copy_(self.mean[name])
            self.mean[name].copy_(kept)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Have the model hold the mean for the time being."""
        self.swap()
        try:
            yield
        finally:
            self.swap()


def _step(
    model: nn.Module,
    data: Data,
    settings: Settings,
    loss_fn: LossFunction,
    optimizers: list[torch.optim.Optimizer],
    step: int,
) -> tuple[float, dict[str, float]]:
    """One update; returns the loss before it."""
    length, index = settings.place(step)
    device = next(model.parameters()).device
    batch = data.batch(index, settings.batch_tokens // length, length).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast):
        loss, metrics = loss_fn(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
    value = loss.item()
    if not math.isfinite(value):
        raise HastenError(f"the loss at step {step} is {value}; lower the learning rates")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * settings.rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return value, metrics


def build_optimizers(model: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the network, AdamW for everything else that learns."""
    outer = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        outer.add(id(head.weight))
    learning = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in learning if p.ndim == 2 and id(p) not in outer]
    others = [p for p in learning if p.ndim != 2 or id(p) in outer]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(
            torch.optim.Muon(matrices, lr=settings.matrix_lr, weight_decay=settings.matrix_decay)
        )
    if others:
        optimizers.append(
            torch.optim.AdamW(
                others, lr=settings.other_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return optimizers


@contextmanager
def _compiled(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Compile each decoder layer in place for the time being; one compilation serves them all.

    Does nothing where no C++ compiler is found: the run is then slower and otherwise the same.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    found = any(shutil.which(name) for name in ("g++", "clang++", "c++", "cl"))
    chosen = list(layers) if wanted and found and isinstance(layers, nn.ModuleList) else []
    for layer in chosen:
        layer.compile(dynamic=False)
    try:
        yield
    finally:
        for layer in chosen:
            layer._compiled_call_impl = None  # torch has no public way back


def run_evaluation(model: nn.Module, evaluate: Evaluation) -> dict[str, float]:
    """Call `evaluate` without gradients, in eval mode and without compiling for its shapes."""
    training = model.training
    model.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        result = evaluate(model)
    model.train(training)
    return result


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    settings: Settings,
    outcome: Outcome,
    average: Average | None = None,
    *,
    of: str = "",
) -> None:
    """Write weights, optimizer state and progress to one file, whole or not at all."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {f"model.{name}": p.detach().contiguous() for name, p in model.named_parameters()}
    tensors |= {f"buffer.{name}": b.detach().clone() for name, b in _kept_buffers(model).items()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                # AdamW counts its steps in one tensor per parameter; safetensors wants copies.
                tensors[f"optimizer.{key}.{names[id(parameter)]}"] = value.detach().clone()
    if average is not None:
        tensors |= {f"average.{name}": mean.clone() for name, mean in average.mean.items()}
    tensors["rng"] = torch.get_rng_state()
    metadata = {
        "settings": settings.fingerprint(),
        "of": of,
        "outcome": json.dumps(asdict(outcome)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata)
    partial.replace(path)


def _kept_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What a model remembers beside its weights, such as the means of a batch norm."""
    kept = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    settings: Settings,
    average: Average | None = None,
    *,
    of: str = "",
) -> Outcome:
    """Put a saved state back into `model` and `optimizers`; returns the progress so far.

    Raises:
        HastenError: where the file is damaged or belongs to other settings or another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise HastenError(
            f"the checkpoint {path} cannot be read ({error}); delete it and start afresh"
        ) from error
    if metadata.get("settings") != settings.fingerprint():
        raise HastenError(
            f"the checkpoint {path} was written with other settings; "
            "use those, or delete it and start afresh"
        )
    if metadata.get("of", "") != of:
        raise HastenError(
            f"the checkpoint {path} is of {metadata.get('of') or 'something else'}, and this run of "
            f"{of or 'something else'}; give another checkpoint, or delete it and start afresh"
        )
    named, buffers = dict(model.named_parameters()), _kept_buffers(model)
    saved = {name: t.shape for name, t in tensors.items() if name.startswith(("model.", "buffer."))}
    wanted = {f"model.{name}": parameter.shape for name, parameter in named.items()}
    wanted |= {f"buffer.{name}": buffer.shape for name, buffer in buffers.items()}
    if saved != wanted:
        raise HastenError(
            f"the checkpoint {path} is of a model of another shape; "
            "use that one, or delete the checkpoint and start afresh"
        )
    if average is not None and not all(f"average.{name}" in tensors for name in named):
        raise HastenError(
            f"the checkpoint {path} holds no mean of the weights; delete it and start afresh"
        )
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[f"model.{name}"])
            if average is not None:
                average.mean[name].copy_(tensors[f"average.{name}"])
        for name, buffer in buffers.items():
            buffer.copy_(tensors[f"buffer.{name}"])
    owner = {
        id(parameter): optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for full_name, tensor in tensors.items():
        if full_name.startswith("optimizer."):
            _, key, name = full_name.split(".", 2)
            parameter = named[name]
            if id(parameter) not in owner:
                raise HastenError(
                    f"the checkpoint {path} has trained {name}, which is frozen now; let it learn, or "
                    "delete the checkpoint and start afresh"
                )
            owner[id(parameter)].state[parameter][key] = tensor
    torch.set_rng_state(tensors["rng"])
    return Outcome(**json.loads(metadata["outcome"]))


@contextmanager
def _stop_between_steps() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C and SIGTERM into a flag, so that no update is cut in half."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # only the main thread may set handlers
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: asked.set()) for number in signals}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            # None stands for a handler that was not set from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class _Report:
    """A progress bar in a terminal, a line now and then elsewhere, nothing where quiet."""

    _SECONDS_BETWEEN_LINES = 20.0

    def __init__(self, settings: Settings, label: str, quiet: bool) -> None:
        self._settings = settings
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._bar = Progress(
            TextColumn(label),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task(label, total=settings.num_steps, text="")
        self._last_line = 0.0
        self._recent: list[tuple[float, int]] = []

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, outcome: Outcome, metrics: dict[str, float]) -> None:
        loss = sum(outcome.losses[-10:]) / len(outcome.losses[-10:])
        text = f"loss {loss:.3f}" + "".join(f" {k} {v:.4g}" for k, v in metrics.items())
        self._bar.update(self._task, completed=outcome.steps, text=text)
        now = time.monotonic()
        self._recent = [*self._recent[-20:], (now, outcome.tokens)]
        rested = now - self._last_line > self._SECONDS_BETWEEN_LINES
        if not self._console.is_terminal and (rested or metrics):
            (start, first), (end, last) = self._recent[0], self._recent[-1]
            speed = (last - first) / (end - start) if end > start else 0.0
            length, _ = self._settings.place(outcome.steps - 1)
            self._console.print(
                f"step {outcome.steps}/{self._settings.num_steps} length {length} {text} "
                f"{speed:.0f} tokens/s {outcome.seconds:.0f} s",
                soft_wrap=True,
            )
            self._last_line = now
