"""Generation settings: checked once, then the same logits processors that transformers uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from hasten.errors import HastenError

MAX_NEW_TOKENS_LIMIT = 1_000_000
# transformers generates up to 20 tokens in all where nothing is said
DEFAULT_MAX_LENGTH = 20
DEFAULT_TOP_K = 50  # likewise
UNSUPPORTED = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0.0),
    "num_beam_groups": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
    "no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "guidance_scale": (None, 1.0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "min_p": (None, 0.0),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
}


@dataclass
class Settings:
    """What a call asks for, after the model's own generation config and the call's arguments."""

    max_new_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stopping: StoppingCriteriaList | None = None
    streamer: BaseStreamer | None = None
    return_dict: bool = False

    @classmethod
    def resolve(
        cls, model: PreTrainedModel, prompt_length: int, arguments: dict[str, Any]
    ) -> Settings:
        """Settings from the arguments of a `generate` call; what is unknown or unsupported raises.

        Precedence as in transformers: call arguments, then a `generation_config` argument, then
        the model's own config.
        """
        given = dict(arguments)
        config = given.pop("generation_config", None)
        if not isinstance(config, GenerationConfig | None):
            raise HastenError(
                f"generation_config is a {type(config).__name__}; it must be transformers' "
                "GenerationConfig."
            )
        defaults = model.generation_config

        def take(name: str, default: Any) -> Any:
            for source in (
                given.pop(name, None),
                getattr(config, name, None),
                getattr(defaults, name, None),
            ):
                if source is not None:
                    return source
            return default

        for name, neutral in UNSUPPORTED.items():
            value = take(name, None)
            if value not in neutral:
                raise HastenError(
                    f"{name}={value!r} is not supported; leave it out. "
                    f"Supported: {', '.join(sorted(_accepted()))}."
                )
        max_new = take("max_new_tokens", None)
        max_length = take("max_length", None)
        if max_new is None:
            max_new = _room(max_length, prompt_length)
        eos_ids = tuple(_ids("eos_token_id", take("eos_token_id", None)))
        pad = _padding(model, arguments, take("pad_token_id", eos_ids[0] if eos_ids else 0))
        stopping = _stopping(given, take)
        do_sample = take("do_sample", False)
        if do_sample not in (True, False):
            raise HastenError(f"do_sample={do_sample!r} must be True or False.")
        settings = cls(
            max_new_tokens=max_new,
            eos_token_ids=eos_ids,
            pad_token_id=pad,
            do_sample=bool(do_sample),
            temperature=take("temperature", 1.0),
            top_k=take("top_k", DEFAULT_TOP_K if do_sample else 0),
            top_p=take("top_p", 1.0),
            repetition_penalty=take("repetition_penalty", 1.0),
            seed=given.pop("seed", None),
            stopping=stopping,
            streamer=given.pop("streamer", None),
            return_dict=bool(take("return_dict_in_generate", False)),
        )
        for ignored in ("use_cache", "output_scores", "output_attentions", "output_hidden_states"):
            if given.pop(ignored, None) and ignored != "use_cache":
                raise HastenError(f"{ignored}=True is not supported; leave it out.")
        if given:
            raise HastenError(
                f"Unknown argument {next(iter(given))!r} for generate; "
                f"allowed: {', '.join(sorted(_accepted()))}."
            )
        settings.check()
        return settings

    def check(self) -> None:
        """Raise one clear error for a value that no generation can run with."""
        if not _is_whole(self.max_new_tokens):
            raise HastenError(f"max_new_tokens={self.max_new_tokens!r} must be a whole number.")
        if not 1 <= self.max_new_tokens <= MAX_NEW_TOKENS_LIMIT:
            raise HastenError(
                f"max_new_tokens={self.max_new_tokens} is out of range; allowed is 1 to "
                f"{MAX_NEW_TOKENS_LIMIT}."
            )
        for name, whole in (("seed", self.seed), ("top_k", self.top_k)):
            if whole is not None and not _is_whole(whole):
                raise HastenError(f"{name}={whole!r} must be a whole number.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise HastenError(f"seed={self.seed!r} is out of range; allowed is 0 to {2**63 - 1}.")
        if self.streamer is not None and not (
            hasattr(self.streamer, "put") and hasattr(self.streamer, "end")
        ):
            raise HastenError(
                f"streamer is a {type(self.streamer).__name__}; it must have put and end, as "
                "transformers' TextStreamer has."
            )
        ranges = (
            ("temperature", self.temperature, 1e-6 if self.do_sample else 0.0, 100.0),
            ("top_k", self.top_k, 0, 10**9),
            ("top_p", self.top_p, 0.0, 1.0),
            ("repetition_penalty", self.repetition_penalty, 1e-6, 100.0),
        )
        for name, value, low, high in ranges:
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not low <= value <= high
            ):
                hint = " For greedy decoding use do_sample=False." if name == "temperature" else ""
                raise HastenError(
                    f"{name}={value!r} is out of range; allowed is {low:g} to {high:g}.{hint}"
                )

    def generator(self, device: torch.device) -> torch.Generator | None:
        """A generator of its own if a seed is given; otherwise torch's global one is used."""
        if self.seed is None:
            return None
        return torch.Generator(device=device).manual_seed(self.seed)


def _accepted() -> set[str]:
    own = {field.name for field in fields(Settings)}
    own -= {"eos_token_ids", "stopping", "return_dict"}
    return own | {
        "eos_token_id", "stop_strings", "tokenizer", "stopping_criteria", "generation_config",
        "max_length", "return_dict_in_generate", "attention_mask", "input_ids",
    }  # fmt: skip


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _ids(name: str, value: Any) -> list[int]:
    """Token ids of one, a list or a tensor of them."""
    if isinstance(value, Tensor):
        value = value.tolist()
    found = list(value) if isinstance(value, list | tuple) else [value] * (value is not None)
    if not all(map(_is_whole, found)):
        raise HastenError(
            f"{name}={value!r} must be a token id, a whole number, or a list of them."
        )
    return [int(one) for one in found]


def _padding(model: PreTrainedModel, arguments: Mapping[str, Any], value: Any) -> int:
    """The id behind the end of a row; what a call asks for must be in the vocabulary."""
    found = _ids("pad_token_id", value)
    if len(found) != 1:
        raise HastenError(f"pad_token_id={value!r} must be one token id, a whole number.")
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    if arguments.get("pad_token_id") is not None and not 0 <= found[0] < vocabulary:
        raise HastenError(f"pad_token_id={found[0]}; allowed is 0 to {vocabulary - 1}.")
    return found[0]


def _room(max_length: Any, prompt: int) -> int:
    """What is left for new tokens where a call limits all tokens, or says nothing."""
    if max_length is not None and not _is_whole(max_length):
        raise HastenError(f"max_length={max_length!r} must be a whole number.")
    total = max_length or DEFAULT_MAX_LENGTH
    if total <= prompt:
        said = "" if max_length else ", which is what transformers takes where nothing is said,"
        raise HastenError(
            f"max_length={total}{said} leaves no room behind a prompt of {prompt} tokens; give "
            "max_new_tokens."
        )
    return total - prompt


def _stopping(given: dict[str, Any], take: Any) -> StoppingCriteriaList | None:
    criteria = StoppingCriteriaList(given.pop("stopping_criteria", None) or [])
    tokenizer = given.pop("tokenizer", None)
    strings = take("stop_strings", None)
    if strings:
        if tokenizer is None:
            raise HastenError(
                "stop_strings needs the tokenizer too: generate(..., tokenizer=tokenizer)."
            )
        criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=strings))
    return criteria or None


class Sampler:
    """Turns logits into tokens, with transformers' own processors in transformers' order."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings = settings
        self.greedy = not settings.do_sample
        self.generator = settings.generator(device)
        self._penalty: RepetitionPenaltyLogitsProcessor | None = None
        if settings.repetition_penalty != 1.0:
            self._penalty = RepetitionPenaltyLogitsProcessor(float(settings.repetition_penalty))
        self._warpers = LogitsProcessorList()
        if settings.do_sample:
            if settings.temperature != 1.0:
                self._warpers.append(TemperatureLogitsWarper(float(settings.temperature)))
            if settings.top_k:
                self._warpers.append(TopKLogitsWarper(int(settings.top_k)))
            if settings.top_p < 1.0:
                self._warpers.append(TopPLogitsWarper(float(settings.top_p)))

    @property
    def needs_prefix(self) -> bool:
        """True when scores depend on the tokens before them."""
        return self._penalty is not None

    def scores(self, logits: Tensor, prefix: Tensor | None, pads: Tensor | None = None) -> Tensor:
        """Processed scores (rows, vocabulary), float32.

        `prefix` is (rows, length) token ids so far and `pads` (rows,) how many of them are left
        padding; both matter for a repetition penalty only.
        """
        scores = logits.float()
        if self._penalty is not None:
            assert prefix is not None, "a repetition penalty needs the tokens so far"
            self._penalty.prompt_ignore_length = pads
            scores = self._penalty(prefix, scores)
        return self._warpers(prefix, scores) if self._warpers else scores  # type: ignore[arg-type]

    def pick(self, scores: Tensor) -> Tensor:
        """One token a row from processed scores (rows, vocabulary): (rows,)."""
        if self.greedy:
            return scores.argmax(dim=-1)
        probs = scores.softmax(dim=-1)
        return torch.multinomial(probs, 1, generator=self.generator).squeeze(1)

    def uniform(self, *shape: int, device: torch.device) -> Tensor:
        """Uniform random numbers from this call's generator."""
        return torch.rand(shape, generator=self.generator, device=device)


def result(settings: Settings, sequences: Tensor) -> Tensor | GenerateDecoderOnlyOutput:
    """What `model.generate` would return."""
    if settings.return_dict:
        return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
    return sequences
