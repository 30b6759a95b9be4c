"""What a technique is: knobs, a card, a contract; and the registry that finds it by name."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import importlib
import importlib.metadata
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from functools import cache
from typing import Any, ClassVar, TypeVar

import torch

from hasten.errors import HastenError, PlanError

if typing.TYPE_CHECKING:
    from hasten.preparation import Preparation

Parts = dict[str, torch.Tensor]
"""Trained or calibrated tensors of a technique, by name; saved as safetensors."""


class Loss(StrEnum):
    """What a technique may change in the output; proved at every benchmark."""

    EXACT = "exact"  # the same ids, the same bits
    DISTRIBUTION = "distribution"  # the same sampling distribution
    LOSSY = "lossy"  # other output; recovery of the quality metrics is reported


class Phase(StrEnum):
    """When a technique acts. Plans apply their techniques in this order."""

    LOAD = "load"
    PREFILL = "prefill"
    PASS = "pass"  # inside a forward pass
    STEP = "step"  # around a forward pass
    SEARCH = "search"  # above the loop


class Resource(Enum):
    """What techniques read, change and need. Conflicts follow from these, never from names."""

    PROMPT_ATTENTION = "the base model's attention over the prompt"
    STEP_ATTENTION = "the attention of each decoding step"
    KV_ENTRIES = "a KV cache that holds every past token"
    KV_READS = "which cache entries a query reads"
    CACHE_FORK = "a KV cache that can be forked in the middle of a sequence"
    HIDDEN = "the last hidden state"
    LOGITS = "the logits"
    ONE_TOKEN_PASSES = "passes that each decide one token"
    MODEL_CHOICE = "which model runs the next pass"
    FIXED_PLACES = "places that stay fixed once they are"
    TOKEN_INPUTS = "inputs that are nothing but tokens"
    TRAJECTORY = "one sample that moves on from step to step"
    EVERY_CALL = "a network call at every step"
    TIMESTEPS = "the timesteps that the scheduler makes"
    TOKEN_SET = "all tokens of the sample in every call"


class Slot(Enum):
    """A place in an engine where techniques plug in: (engine, name, exclusive)."""

    PREFILL = ("causal", "prefill", True)
    DRAFTER = ("causal", "drafter", True)
    ACCEPTOR = ("causal", "acceptor", True)
    KV = ("causal", "kv", True)
    CONTROLLER = ("causal", "controller", True)
    EMISSION = ("causal", "emission", True)
    COMMITTER = ("masked", "committer", True)
    REMASKER = ("masked", "remasker", True)
    CANDIDATES = ("masked", "candidates", True)
    WINDOW = ("masked", "window", True)
    EMBEDDING = ("masked", "embedding", True)
    SCHEDULE = ("denoise", "schedule", True)
    GATE = ("denoise", "gate", True)
    GUIDER = ("denoise", "guider", True)
    BLOCK = ("denoise", "block", True)
    ATTENTION = ("denoise", "attention", True)
    STATE = ("denoise", "state", True)
    LOSS = ("training", "loss", False)

    def __init__(self, engine: str, label: str, exclusive: bool) -> None:
        self.engine = engine
        self.label = label
        self.exclusive = exclusive


@dataclass(frozen=True)
class Claim:
    """A number that the paper prints; cited, never measured here."""

    what: str  # "speed-up", "accuracy kept", ...
    value: float
    where: str  # model, task and machine of the claim


@dataclass(frozen=True)
class Rival:
    """The ablation that must lose against the technique, on the zoo, by more than the noise."""

    plan: str  # a plan text; {knob} is filled with the technique's own knob
    metric: str  # key of the quality block, or "ratio"
    why: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a technique says of itself."""

    title: str
    family: str  # "decoding", "kv_cache", ...
    loss: Loss
    paper: str | None = None  # slug in the reference list; None for a baseline
    link: str = ""  # where the method is described
    year: int = 0
    claims: tuple[Claim, ...] = ()
    neutral: Mapping[str, Any] | None = None  # knobs at which the output is the original's
    rival: Rival | None = None
    saves: str = ""  # term of the ceiling: passes, cache_bytes, prefill, weight_bytes, none
    trained: bool = False  # needs `prepare` before it can run
    notes: str = ""  # what a reader must know before believing a figure

    @property
    def is_baseline(self) -> bool:
        """True for a plain rival that no paper of the reference list is about."""
        return self.paper is None


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What a technique touches, in the engine's words."""

    slots: tuple[Slot, ...]
    reads: frozenset[Resource] = frozenset()
    changes: frozenset[Resource] = frozenset()
    needs: frozenset[Resource] = frozenset()
    phase: Phase = Phase.STEP
    runners: frozenset[str] = frozenset({"eager"})  # runners that can carry it


@dataclass(frozen=True)
class Knob:
    """Limits of one knob, checked when the technique is made."""

    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] = ()


def knob(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] = (),
) -> Any:
    """A dataclass field with its consequence and its limits (both inclusive)."""
    return dataclasses.field(default=default, metadata={"knob": Knob(help, low, high, choices)})


class Technique:
    """Base of all techniques: a frozen dataclass of knobs with a card and a contract.

    A technique object holds knobs only. What it learns of a model is a `Parts` dictionary, made
    by `prepare`; what it builds from them once per model is made by `bind`; what it remembers
    during one call is made by the `begin` of its slot.
    """

    name: ClassVar[str]
    card: ClassVar[Card]
    contract: ClassVar[Contract]
    part_knobs: ClassVar[tuple[str, ...]] = ()  # knobs on which the trained parts depend
    part_settings: ClassVar[tuple[str, ...]] = ()  # settings of a pipeline's call on which they do

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = _checked(self.name, field.name, getattr(self, field.name), hints[field.name])
            limits = field.metadata.get("knob")
            if limits is not None:
                _check_limits(self.name, field.name, value, limits)
            object.__setattr__(self, field.name, value)

    def prepare(self, preparation: Preparation) -> Parts:
        """Train or calibrate on a model; only for cards with `trained=True`."""
        raise NotImplementedError(f"{self.name} has nothing to prepare")

    def bind(self, model: torch.nn.Module, parts: Parts) -> Any:
        """What the technique builds once per model (modules, lists); handed to `begin`."""
        return parts

    def loss_class(self) -> Loss:
        """What the technique may change at these knobs; the card says it for the defaults."""
        return self.card.loss

    @property
    def trained(self) -> bool:
        """Whether it needs parts at these knobs; the card says it for the defaults."""
        return self.card.trained

    def terms(self) -> Contract:
        """The contract at these knobs: some turn a part of the technique off, and free its slot."""
        return self.contract

    @property
    def knobs(self) -> dict[str, Any]:
        """All knobs with their values, in the order of their declaration."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]


def _checked(name: str, knob_name: str, value: Any, hint: Any) -> Any:
    """The value as the knob's type; a whole number is taken for a float."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in options and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if value is None and str in options and types.NoneType not in options:
        return "none"  # a plan's bare word is read as a constant where it could be one
    for option in options:
        if option is int and isinstance(value, bool):
            continue
        if isinstance(option, type) and isinstance(value, option):
            return value
    wanted = " or ".join(
        "none" if o is types.NoneType else getattr(o, "__name__", str(o)) for o in options
    )
    raise PlanError(
        f"{name}: {knob_name}={value!r} is a {type(value).__name__}; it must be {wanted}. "
        f"See `hasten show {name}`."
    )


def _check_limits(name: str, knob_name: str, value: Any, limits: Knob) -> None:
    if limits.choices and value not in limits.choices:
        allowed = ", ".join(repr(choice) for choice in limits.choices)
        raise PlanError(f"{name}: {knob_name}={value!r} is not one of {allowed}.")
    if value is None or isinstance(value, (str, bool)):
        return
    below = limits.low is not None and value < limits.low
    above = limits.high is not None and value > limits.high
    if below or above or (isinstance(value, float) and math.isnan(value)):
        low = "-inf" if limits.low is None else f"{limits.low:g}"
        high = "inf" if limits.high is None else f"{limits.high:g}"
        raise PlanError(
            f"{name}: {knob_name}={value!r} is out of range; allowed is {low} to {high}."
        )


# ---------------------------------------------------------------------------------------- registry

# Every technique that ships with hasten, by slug: the file that holds it. A name here costs
# nothing until it is looked up, so `import hasten` stays light.
BUILT_IN: dict[str, str] = {
    "a_star_decoding": "hasten.causal.controller.a_star_decoding",
    "adaptive_guidance": "hasten.denoise.guider.adaptive_guidance",
    "adaspa": "hasten.denoise.attention.adaspa",
    "auto_diffusion": "hasten.denoise.schedule.auto_diffusion",
    "bottleneck_sampling": "hasten.denoise.state.bottleneck_sampling",
    "confidence_threshold": "hasten.masked.committer.confidence_threshold",
    "d2o": "hasten.causal.kv.d2o",
    "delta_dit": "hasten.denoise.block.delta_dit",
    "dinfer": "hasten.masked.committer.dinfer",
    "double_sparsity": "hasten.causal.kv.double_sparsity",
    "draft_model": "hasten.causal.drafter.draft_model",
    "dual_fast": "hasten.denoise.gate.dual_fast",
    "easy_cache": "hasten.denoise.gate.easy_cache",
    "elastic_cache": "hasten.causal.kv.elastic_cache",
    "entropy_adaptive_decoding": "hasten.causal.controller.entropy_adaptive_decoding",
    "faster_cache": "hasten.denoise.gate.faster_cache",
    "fewer_steps": "hasten.denoise.schedule.fewer_steps",
    "first_block_cache": "hasten.denoise.gate.first_block_cache",
    "fixed_guidance_cut": "hasten.denoise.guider.fixed_guidance_cut",
    "fixed_steps": "hasten.masked.committer.fixed_steps",
    "freecache": "hasten.masked.window.freecache",
    "freedave": "hasten.masked.candidates.freedave",
    "grat": "hasten.denoise.attention.grat",
    "harmonica": "hasten.denoise.block.harmonica",
    "heavy_hitter": "hasten.causal.kv.heavy_hitter",
    "just_in_time": "hasten.denoise.state.just_in_time",
    "kv_prediction": "hasten.causal.prefill.kv_prediction",
    "lexical_unit_decoding": "hasten.causal.emission.lexical_unit_decoding",
    "mag_cache": "hasten.denoise.gate.mag_cache",
    "medusa": "hasten.causal.drafter.medusa",
    "prefix_kv": "hasten.causal.kv.prefix_kv",
    "prompt_lookup": "hasten.causal.drafter.prompt_lookup",
    "pyramid_attention_broadcast": "hasten.denoise.gate.pyramid_attention_broadcast",
    "random_block_reuse": "hasten.denoise.block.random_block_reuse",
    "random_eviction": "hasten.causal.kv.random_eviction",
    "random_key_blocks": "hasten.denoise.attention.random_key_blocks",
    "recycled_attention": "hasten.causal.kv.recycled_attention",
    "repr_align": "hasten.training.loss.repr_align",
    "reuse_always": "hasten.denoise.gate.reuse_always",
    "rollover_budget_forcing": "hasten.denoise.state.rollover_budget_forcing",
    "saber": "hasten.masked.remasker.saber",
    "sada": "hasten.denoise.gate.sada",
    "sea_cache": "hasten.denoise.gate.sea_cache",
    "sinks_recent": "hasten.causal.kv.sinks_recent",
    "stream_diffusion": "hasten.denoise.state.stream_diffusion",
    "taylorseer_cache": "hasten.denoise.gate.taylorseer_cache",
    "zeus": "hasten.denoise.gate.zeus",
}
ENTRY_POINTS = "hasten.techniques"
"""Group in which another package names its techniques: `slug = "package.module"`."""

_REGISTERED: dict[str, type[Technique]] = {}
T = TypeVar("T", bound=type[Technique])


def technique(slug: str) -> Callable[[T], T]:
    """Class decorator that checks a technique's declaration and puts it into the registry."""

    def register(cls: T) -> T:
        params = getattr(cls, "__dataclass_params__", None)
        if params is None or not params.frozen:
            raise TypeError(f"{cls.__name__} must be a frozen dataclass of knobs")
        for attribute, kind in (("card", Card), ("contract", Contract)):
            if not isinstance(getattr(cls, attribute, None), kind):
                raise TypeError(f"{cls.__name__}.{attribute} must be a {kind.__name__}")
        known = _REGISTERED.get(slug)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise TypeError(f"two techniques are named {slug!r}: {known!r} and {cls!r}")
        cls.name = slug
        _REGISTERED[slug] = cls
        return cls

    return register


@cache
def _modules() -> dict[str, str]:
    found = dict(BUILT_IN)
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        found.setdefault(entry.name, entry.value)
    return found


def names(pattern: str = "*", *, family: str | None = None, engine: str | None = None) -> list[str]:
    """Slugs that match a shell wildcard, sorted; `family` and `engine` narrow the list."""
    every = set(_modules()) | set(_REGISTERED)
    found = sorted(fnmatch.filter(every, pattern))
    if family is not None:
        found = [name for name in found if get(name).card.family == family]
    if engine is not None:
        found = [n for n in found if any(s.engine == engine for s in get(n).contract.slots)]
    return found


def get(name: str) -> type[Technique]:
    """The technique class of a slug; an unknown name raises with the nearest ones."""
    if name not in _REGISTERED:
        module = _modules().get(name)
        if module is None:
            near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise PlanError(f"Unknown technique {name!r}.{hint} `hasten list` shows all of them.")
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise HastenError(f"Technique {name!r} could not be imported: {error}.") from error
        if name not in _REGISTERED:
            raise HastenError(f"Module {module} does not register a technique named {name!r}.")
    return _REGISTERED[name]


def families() -> list[str]:
    """All families that a registered technique belongs to."""
    return sorted({cls.card.family for cls in every()})


def every() -> Iterator[type[Technique]]:
    """All technique classes, by slug."""
    for name in names():
        yield get(name)
