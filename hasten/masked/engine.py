"""A masked-diffusion model with a plan on it: generate, infill, stream, undo."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from hasten.applied import AppliedPlan, Runners, check_engine
from hasten.causal.engine import check_length, check_prompt
from hasten.causal.generation import Settings, result
from hasten.errors import HastenError
from hasten.masked.denoiser import Denoiser
from hasten.masked.run import Run, Slots
from hasten.masked.runners import CompiledRunner, EagerRunner, Runner
from hasten.masked.sampling import Sampler
from hasten.plan import Plan
from hasten.streaming import streamed
from hasten.subject import MaskedForm, Subject
from hasten.technique import Parts

RUNNERS: Runners[Runner] = Runners({"eager": EagerRunner, "compiled": CompiledRunner})
DEFAULT_BLOCK = 32
FROM_LEFT_TO_RIGHT = "The masked engine does not write from left to right; cut the text afterwards."


class MaskedModel(AppliedPlan):
    """What `hasten.apply` returns for a masked-diffusion model.

    With an empty plan it decodes statically: one place a pass, the most confident first, block by
    block. That is the reference of every proof.

    Attributes:
        plan: the techniques, in the order in which they were written.
        activity: counters of the last call; "passes" are forward passes, "positions" what they
            computed, "emitted" the places that were filled.
        peak_cache_bytes: largest size of the kept keys and values in the last call.
    """

    def __init__(
        self,
        subject: Subject,
        plan: Plan,
        *,
        runner: str = "eager",
        parts: dict[str, Parts] | None = None,
        exclusive: bool = True,
    ) -> None:
        check_engine(subject, "masked")
        super().__init__(subject, plan, subject.model, parts, exclusive=exclusive)
        assert subject.form is not None  # as every subject of this engine has one
        self.form: MaskedForm = subject.form
        self.runner = RUNNERS.get(runner, subject.model, plan)
        self._slots()  # a technique of another engine is refused now
        self.peak_cache_bytes = 0
        self.seconds = 0.0
        self._claim()

    def _slots(self) -> Slots:
        return Slots.fill(self.bound)

    # -- calls -----------------------------------------------------------------------------------
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        block_length: int | None = None,
        **arguments: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Continue prompts, as `generate` of transformers does: ids (batch, prompt + new).

        Args:
            block_length: places are filled in blocks of so many from left to right, in any order
                within one, counted from the prompt's end. It must divide `max_new_tokens`. By
                default 32, or the model's own, or as much as divides.
            arguments: the settings of `model.generate`, as for the causal engine.
        """
        run, settings = self._generation(input_ids, attention_mask, block_length, arguments)
        streamer = settings.streamer
        if streamer is not None:
            if run.batch > 1:
                raise HastenError("A streamer takes one row; give a batch of one.")
            streamer.put(run.tokens[:, : run.start].cpu())
            run.on_tokens = _Tail(lambda new: [streamer.put(token[None]) for token in new.cpu()])
        self._execute(run)
        if streamer is not None:
            streamer.end()
        return result(settings, run.sequences())

    def infill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        block_length: int | None = None,
        **arguments: Any,
    ) -> Tensor:
        """Fill the masks of texts; everything else stays. Ids (batch, length), as many as given.

        Args:
            input_ids: ids with the mask id wherever a token is wanted, anywhere.
            block_length: as `generate`; by default all masks are one block.
        """
        _refuse(arguments, ("stop_strings", "stopping_criteria"), FROM_LEFT_TO_RIGHT)
        only = "infill fills the masks that are there, and returns ids."
        _refuse(arguments, ("max_new_tokens", "max_length", "streamer"), only)
        _refuse(arguments, ("return_dict_in_generate",), only)
        ids, mask = check_prompt(self.subject, input_ids, attention_mask)
        masks = _masks(ids, mask, self.form)
        if not bool(masks.any(dim=1).all()):
            raise HastenError(
                f"A row of input_ids holds no mask (id {self.form.mask_id}), so there is nothing to fill; "
                "put it where tokens are wanted, or use generate."
            )
        settings = Settings.resolve(
            self.subject.model, 0, {**arguments, "max_new_tokens": ids.shape[1]}
        )
        check_length(self.subject, ids.shape[1], 0)
        length = ids.shape[1] if block_length is None else _checked_block(block_length)
        run = self._run(ids, ~masks, mask, settings, length, eos=())
        self._execute(run)
        return run.sequences()

    def stream(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        block_length: int | None = None,
        **arguments: Any,
    ) -> Iterator[Tensor]:
        """Yield the new ids of a batch of one, (tokens,) each time, once no place before is open."""
        run, _ = self._generation(input_ids, attention_mask, block_length, arguments)
        if run.batch > 1:
            raise HastenError("A stream takes one row; give a batch of one.")

        def execute(put: Callable[[Tensor], None]) -> None:
            run.on_tokens = _Tail(put)
            self._execute(run)

        return streamed(execute, run.cancel)

    # -- the rest --------------------------------------------------------------------------------
    def _generation(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        block_length: int | None,
        arguments: dict[str, Any],
    ) -> tuple[Run, Settings]:
        _refuse(arguments, ("stop_strings", "stopping_criteria"), FROM_LEFT_TO_RIGHT)
        prompt, mask = check_prompt(self.subject, input_ids, attention_mask)
        if bool(_masks(prompt, mask, self.form).any()):
            raise HastenError(
                f"The prompt holds the mask (id {self.form.mask_id}); use infill to fill masks in a text."
            )
        settings = Settings.resolve(self.subject.model, prompt.shape[1], arguments)
        if settings.stopping is not None:  # from a generation config
            raise HastenError(f"stop_strings is not supported here. {FROM_LEFT_TO_RIGHT}")
        new = settings.max_new_tokens
        check_length(self.subject, prompt.shape[1], new)
        length = block_for(self.subject, new, block_length)
        masks = prompt.new_full((prompt.shape[0], new), self.form.mask_id)
        tokens = torch.cat((prompt, masks), dim=1)
        given = torch.cat((torch.ones_like(prompt), torch.zeros_like(masks)), dim=1).bool()
        if mask is not None:
            mask = torch.cat((mask, torch.ones_like(masks)), dim=1)
        return self._run(
            tokens, given, mask, settings, length, eos=settings.eos_token_ids
        ), settings

    def _run(
        self,
        tokens: Tensor,
        given: Tensor,
        mask: Tensor | None,
        settings: Settings,
        block_length: int,
        *,
        eos: tuple[int, ...],
    ) -> Run:
        self._check_open()
        pads = torch.zeros_like(tokens[:, 0]) if mask is None else (mask == 0).sum(dim=1)
        pad = settings.pad_token_id
        if pad == self.form.mask_id and eos:
            pad = eos[0]  # what stands behind an end must not look open
        return Run(
            Denoiser(self.subject.model, self.form, self.runner),
            Sampler(settings, tokens.shape[0]),
            tokens,
            given,
            self._slots(),
            pads=pads,
            block_length=block_length,
            eos=eos,
            pad=pad,
        )

    def _execute(self, run: Run) -> None:
        self.runner.begin()
        start = time.perf_counter()
        try:
            run.execute()
        finally:
            self.seconds = time.perf_counter() - start
            self.activity = dict(run.activity)
            self.peak_cache_bytes = run.peak_cache_bytes


class _Tail:
    """Hands on new ids of a single row as soon as no place before them is open."""

    def __init__(self, put: Any) -> None:
        self.put = put
        self.done: int | None = None

    def __call__(self, run: Run) -> None:
        first = run.start if self.done is None else self.done
        settled = (~run.masked[0, first:]).long().cumprod(dim=0)
        if run.slots.remasker is not None and bool(run.masked.any()):
            return  # what is fixed now may be opened again
        stop = first + int(settled.sum())
        if stop > first:
            self.put(run.tokens[0, first:stop].clone())
        self.done = stop


def _checked_block(length: int) -> int:
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise HastenError(f"block_length={length!r}; it must be a whole number of 1 or more.")
    return length


def _refuse(arguments: dict[str, Any], names: tuple[str, ...], why: str) -> None:
    for name in names:
        if arguments.get(name):
            raise HastenError(f"{name} is not supported here. {why} Leave it out.")


def _masks(ids: Tensor, mask: Tensor | None, form: MaskedForm) -> Tensor:
    """(batch, length) bool, masks of the text; padding may well be of the same id."""
    return (ids == form.mask_id) & (torch.ones_like(ids) if mask is None else mask).bool()


def block_for(subject: Subject, new: int, wanted: int | None) -> int:
    """The block length for so many new tokens; where none is wanted, the usual or what divides.

    Raises:
        HastenError: where it does not divide them.
    """
    if wanted is None:
        usual = (subject.form and subject.form.block_length) or DEFAULT_BLOCK
        return max(length for length in range(1, min(usual, new) + 1) if new % length == 0)
    if new % _checked_block(wanted):
        near = [length for length in range(1, new + 1) if new % length == 0]
        raise HastenError(
            f"block_length={wanted} does not divide max_new_tokens={new}; "
            f"give {min(near, key=lambda length: abs(length - wanted))}, or another divisor."
        )
    return wanted
