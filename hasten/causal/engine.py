"""A causal model with a plan on it: generate, stream, score, undo."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from hasten.applied import AppliedPlan, Runners, check_engine
from hasten.causal.generation import Settings, result
from hasten.causal.run import Run, Slots
from hasten.causal.runners import CompiledRunner, EagerRunner, Runner
from hasten.causal.slots import CausalTechnique
from hasten.errors import HastenError
from hasten.plan import Plan
from hasten.streaming import streamed
from hasten.subject import Subject
from hasten.technique import Parts

RUNNERS: Runners[Runner] = Runners({"eager": EagerRunner, "compiled": CompiledRunner})
WHOLE_NUMBERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)  # that ids may be


@dataclass
class Score:
    """Teacher-forced likelihood of a continuation.

    Attributes:
        nll: (batch, length) negative log-likelihood of each continuation token, in nats.
        logits: (batch, length, vocabulary) that decided each token, or None if not asked for.
        activity: the counters of the call.
    """

    nll: Tensor
    logits: Tensor | None
    activity: dict[str, int]


class CausalModel(AppliedPlan):
    """What `hasten.apply` returns for a causal language model.

    The model itself is never changed: its attention is exchanged for the time of a pass only.

    Attributes:
        plan: the techniques, in the order in which they were written.
        activity: counters of the last call.
        peak_cache_bytes: largest size of the KV caches in the last call.
        cache_bytes: their size at its end.
        prefill_seconds: time from the start of the last call to its first token.
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
        check_engine(subject, "causal")
        super().__init__(subject, plan, subject.model, parts, exclusive=exclusive)
        brought = [
            own
            for technique, bound in self.bound
            if isinstance(technique, CausalTechnique)
            and (own := technique.model(bound)) is not None
        ]
        self.runner: Runner = RUNNERS.get(runner, brought[0] if brought else subject.model, plan)
        self.peak_cache_bytes = 0
        self.prefill_seconds = 0.0
        self.cache_bytes = 0
        self._claim()

    # -- calls -----------------------------------------------------------------------------------
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **arguments: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """What `model.generate` takes and returns, with the plan at work."""
        run = self._run(input_ids, attention_mask, arguments)
        streamer = run.settings.streamer
        if streamer is not None:
            if run.batch > 1:
                raise HastenError("A streamer takes one row; give a batch of one.")
            streamer.put(run.tokens[:, : run.prompt_length].cpu())
            run.on_tokens = lambda run, first: _put(streamer, run, first)
        self._execute(run)
        if streamer is not None:
            streamer.end()
        return result(run.settings, run.sequences())

    def stream(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **arguments: Any,
    ) -> Iterator[Tensor]:
        """Yield the new ids of a batch of one as they are decided, (tokens,) each time."""
        run = self._run(input_ids, attention_mask, arguments)
        if run.batch > 1:
            raise HastenError("A stream takes one row; give a batch of one.")

        def execute(put: Callable[[Tensor], None]) -> None:
            run.on_tokens = lambda run, first: put(
                run.tokens[0, int(first[0]) : int(run.lengths[0])].clone()
            )
            self._execute(run)

        return streamed(execute, run.cancel)

    def score(
        self,
        input_ids: Tensor,
        continuation: Tensor,
        attention_mask: Tensor | None = None,
        *,
        logits: bool = False,
    ) -> Score:
        """Likelihood of a given continuation, token by token as the plan would decode it.

        Args:
            input_ids: (batch, prompt) ids.
            continuation: (batch, length) ids that are forced instead of chosen.
            logits: keep the logits too.
        """
        arguments = {
            "max_new_tokens": continuation.shape[1],
            "do_sample": False,
            "repetition_penalty": 1.0,
        }
        run = self._run(input_ids, attention_mask, arguments)
        run.forced = continuation.to(run.device)
        run.trace = []
        self._execute(run)
        trace = torch.stack(run.trace, dim=1).float()
        nll = -trace.log_softmax(dim=-1).gather(2, run.forced[..., None])[..., 0]
        return Score(nll, trace if logits else None, self.activity)

    def infill(self, *args: Any, **arguments: Any) -> NoReturn:
        """Refuse: only the masked engine fills masks.

        Raises:
            HastenError: always.
        """
        raise HastenError(
            f"infill is for models that fill masks, and {self.subject.name} reads from left to right; "
            "use generate, or a model of the masked engine (code-dlm, LLaDA, Dream, SDAR)."
        )

    # -- the rest --------------------------------------------------------------------------------
    def _run(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, arguments: dict[str, Any]
    ) -> Run:
        self._check_open()
        if "block_length" in arguments:
            raise HastenError(
                f"block_length is for models that fill masks, and {self.subject.name} reads from left to "
                "right; leave it out."
            )
        prompt, mask = check_prompt(self.subject, input_ids, attention_mask)
        settings = Settings.resolve(self.subject.model, prompt.shape[1], arguments)
        check_length(self.subject, prompt.shape[1], settings.max_new_tokens)
        slots = Slots.fill(self.bound)  # type: ignore[arg-type]
        run = Run(self.runner, settings, prompt, mask, slots)
        run.tokenizer = self.subject.tokenizer
        return run

    def _execute(self, run: Run) -> None:
        self.peak_cache_bytes = 0
        start = time.perf_counter()
        try:
            run.execute()
        finally:
            self.prefill_seconds = run.first_token_at - start if run.first_token_at else 0.0
            self.activity = dict(run.activity)
            self.peak_cache_bytes = run.peak_cache_bytes
            self.cache_bytes = sum(lane.cache.num_bytes() for lane in run.lanes.values())


def _put(streamer: Any, run: Run, first: Tensor) -> None:
    for token in run.tokens[0, int(first[0]) : int(run.lengths[0])].cpu():
        streamer.put(token[None])


def check_prompt(
    subject: Subject, input_ids: Tensor | None, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Ids and padding mask on the model's device, or one clear error."""
    if not isinstance(input_ids, Tensor):
        raise HastenError("input_ids is missing or no tensor; give token ids (batch, length).")
    if input_ids.dim() != 2 or input_ids.dtype not in WHOLE_NUMBERS:
        raise HastenError(
            f"input_ids has shape {tuple(input_ids.shape)} and dtype {input_ids.dtype}; it must be whole "
            "numbers of shape (batch, length)."
        )
    if input_ids.shape[0] == 0 or input_ids.shape[1] == 0:
        raise HastenError("The prompt is empty; give at least one token.")
    vocabulary = subject.model.config.get_text_config(decoder=True).vocab_size
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocabulary:
        raise HastenError(
            f"The prompt holds token id {low if low < 0 else high}; allowed is 0 to {vocabulary - 1}."
        )
    device = subject.model.device
    ids = input_ids.to(device).long()
    if attention_mask is None:
        return ids, None
    if not isinstance(attention_mask, Tensor):
        raise HastenError(
            f"attention_mask is a {type(attention_mask).__name__}; it must be a tensor like input_ids."
        )
    if attention_mask.shape != input_ids.shape:
        raise HastenError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}; "
            "they must be equal."
        )
    if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise HastenError(
            "attention_mask holds other values than 0 and 1; 1 is a token and 0 is padding."
        )
    mask = attention_mask.to(device).long()
    if not bool((mask.sum(dim=1) > 0).all()):
        raise HastenError("A row of the attention mask is all zero: that prompt is empty.")
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise HastenError(
            "The batch is padded on the right; pad on the left (tokenizer.padding_side='left')."
        )
    return ids, mask


def check_length(subject: Subject, prompt: int, new: int) -> None:
    """Refuse what goes beyond the length that the model was made for."""
    context = subject.context
    if context is not None and prompt + new > context:
        raise HastenError(
            f"The prompt has {prompt} tokens and max_new_tokens is {new}, together {prompt + new}; "
            f"{subject.name} was made for {context}. Shorten one of them."
        )
