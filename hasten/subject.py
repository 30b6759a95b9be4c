"""Opens any model and says what it is: kind, engine, size, which slots it offers."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import hasten.zoo.catalogue as zoo
from hasten.denoise import pipelines
from hasten.denoise.network import networks
from hasten.errors import SubjectError
from hasten.masked import checkpoints
from hasten.parts import model_hash
from hasten.technique import Slot

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class MaskedForm:
    """What a masked-diffusion checkpoint expects of its reader.

    Attributes:
        mask_id: the id that stands for a token to be found.
        shifted: the output at position i is about position i + 1, as in models that were
            autoregressive before.
        block_length: attention sees whole blocks of so many tokens and those before, not those
            behind; None sees everything.
    """

    mask_id: int
    shifted: bool = False
    block_length: int | None = None


@dataclass
class Subject:
    """A model ready to be hastened.

    Attributes:
        model: the model itself, in eval mode.
        name: how it was named: zoo name, folder or hub id; the class name for a live object.
        tokenizer: its tokenizer where there is one.
        form: how to read a masked-diffusion model; None for any other.
        pipe: the Diffusers pipeline that the model is the network of; None for any other.
    """

    model: Any
    name: str
    tokenizer: PreTrainedTokenizerBase | None = None
    form: MaskedForm | None = None
    pipe: Any = None

    @property
    def engine(self) -> str:
        """The engine that runs it."""
        if self.pipe is not None:
            return "denoise"
        return "causal" if self.form is None else "masked"

    @cached_property
    def hash(self) -> str:
        """Hash of the weights (`parts.model_hash`)."""
        return model_hash(self.model)

    @property
    def kind(self) -> str:
        """The model family, as transformers names it; the class of a pipeline."""
        if self.pipe is not None:
            return type(self.pipe).__name__
        return str(self.model.config.model_type)

    @property
    def num_parameters(self) -> int:
        """Parameters, shared ones counted once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def num_bytes(self) -> int:
        """Bytes of the parameters as loaded."""
        return sum(p.nbytes for p in self.model.parameters())

    @property
    def slots(self) -> list[Slot]:
        """The slots that the engine offers for this model."""
        return [slot for slot in Slot if slot.engine == self.engine]

    @property
    def context(self) -> int | None:
        """The longest sequence that the model was made for, if it says."""
        if self.pipe is not None:
            return None
        config = self.model.config.get_text_config(decoder=True)
        value = getattr(config, "max_position_embeddings", None)
        return int(value) if value else None

    def describe(self) -> dict[str, Any]:
        """What this is, as data."""
        return {
            "name": self.name,
            "kind": self.kind,
            "engine": self.engine,
            "parameters": self.num_parameters,
            "bytes": self.num_bytes,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "context": self.context,
            "slots": [slot.label for slot in self.slots],
            "hash": self.hash,
        }


def open_subject(
    what: str | os.PathLike[str] | nn.Module | Subject,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> Subject:
    """Open a zoo name, a checkpoint folder, a hub id or a live model.

    Args:
        dtype: of the weights once loaded, as torch's or by name. "auto" takes float32 on a CPU, where every processor is
            quick in it, and the checkpoint's own elsewhere; "stored" takes the checkpoint's own. A
            live model keeps its own.
        trust_remote_code: run code that comes with a hub model; off unless asked for. The masked
            models of `hasten.masked.checkpoints` need none.

    Raises:
        SubjectError: where there is no such model, a file is damaged, or no engine runs it.
    """
    dtype = _named_dtype(dtype)
    if isinstance(what, Subject):
        return _in_dtype(what, dtype)
    if pipelines.is_pipeline(what):
        return _in_dtype(pipeline_subject(what, type(what).__name__), dtype)
    if isinstance(what, nn.Module):
        name, form = type(what).__name__, masked_form(what)
        return _in_dtype(Subject(_checked(what, form), name, tokenizer, form), dtype)
    name = os.fspath(what)
    if not name.strip():
        raise SubjectError(
            "The model's name is empty; give a zoo name, a checkpoint folder or a hub id."
        )
    if zoo.is_zoo_name(name):
        source, shown = str(zoo.path(name)), name
    else:
        source = shown = name
        _check_folder(name)
    if dtype == "auto" and not torch.cuda.is_available():
        dtype = torch.float32
    if dtype == "stored":
        dtype = "auto"  # what transformers calls it
    options: dict[str, Any] = {
        "trust_remote_code": trust_remote_code,
        "local_files_only": _is_folder(source),
    }
    if pipelines.is_pipeline_folder(source):
        return pipeline_subject(pipelines.load(source, shown, dtype=dtype, device=device), shown)
    try:
        foreign = checkpoints.config_of(source, local=_is_folder(source))
        if foreign is not None:
            source = source if _is_folder(source) else checkpoints.fetch(source)
            options["local_files_only"] = True
            model: Any = checkpoints.load(source, foreign, dtype=dtype, shown=shown)
        else:
            model = _loaded(source, dtype, options, shown)
    except SubjectError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise SubjectError(_unopened(shown, error)) from error
    if device is not None or torch.cuda.is_available():
        model = model.to(device or "cuda")
    if tokenizer is None:
        tokenizer = _tokenizer(source, options, None if foreign is None else model.config)
    form = masked_form(model)
    return Subject(_checked(model, form), shown, tokenizer, form)


def pipeline_subject(pipe: Any, name: str) -> Subject:
    """A Diffusers pipeline as a subject; its network is the model.

    Raises:
        SubjectError: where it has no network that removes noise step by step.
    """
    network = networks(pipe)[0]
    scheduler = getattr(pipe, "scheduler", None)
    if not (hasattr(scheduler, "set_timesteps") and hasattr(scheduler, "step")):
        raise SubjectError(
            f"{type(pipe).__name__} has no scheduler that makes steps, and the denoise engine works on "
            "those; it runs pipelines that denoise step by step."
        )
    for module in networks(pipe):
        module.eval()
    return Subject(network, name, pipe=pipe)


def _loaded(
    source: str, dtype: torch.dtype | str, options: dict[str, Any], shown: str
) -> PreTrainedModel:
    """A causal language model of transformers, with every weight that its config asks for."""
    config = AutoConfig.from_pretrained(source, **options)
    _check_config(config, shown)
    # What does not fit the config would be filled with random numbers, so ask for the list.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    model, loading = loaded
    _check_weights(loading, shown)
    return model  # type: ignore[no-any-return]


def masked_form(model: nn.Module) -> MaskedForm | None:
    """How to read a model that fills masks, from its config; None for one that reads left to right.

    A config says `is_causal: false` and `mask_token_id`; further `shifted_logits` and `block_length`
    where they are not false and none.

    Raises:
        SubjectError: where it sees both ways and names no mask.
    """
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_causal", True):
        return None
    mask_id = getattr(config, "mask_token_id", None)
    if mask_id is None:
        raise SubjectError(
            f"{type(model).__name__} reads both ways (is_causal is false), but its config names no "
            "mask_token_id; add the id of its mask to config.json."
        )
    vocabulary = config.get_text_config(decoder=True).vocab_size
    if not _is_count(mask_id) or mask_id >= vocabulary:
        raise SubjectError(
            f"The config of {type(model).__name__} says mask_token_id={mask_id!r}; allowed is 0 to "
            f"{vocabulary - 1}."
        )
    block_length = getattr(config, "block_length", None)
    if block_length is not None and (not _is_count(block_length) or block_length == 0):
        raise SubjectError(
            f"The config of {type(model).__name__} says block_length={block_length!r}; it must be a "
            "whole number of 1 or more, or none."
        )
    return MaskedForm(mask_id, bool(getattr(config, "shifted_logits", False)), block_length)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _named_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """The dtype of a name; "auto" and "stored" stay."""
    if isinstance(dtype, torch.dtype) or dtype in ("auto", "stored"):
        return dtype
    if dtype not in DTYPES:
        raise SubjectError(f"dtype={dtype!r} is not one of auto, stored, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def _in_dtype(subject: Subject, dtype: torch.dtype | str) -> Subject:
    """A live model as it is; it is not ours to convert."""
    if isinstance(dtype, torch.dtype) and subject.model.dtype != dtype:
        raise SubjectError(
            f"{subject.name} is loaded in {subject.model.dtype}, and a live model is not converted; "
            f"load it in {dtype}, or give its folder or hub id."
        )
    return subject


def _is_folder(source: str) -> bool:
    return Path(source).is_dir()


def _check_folder(name: str) -> None:
    """Say at once what is wrong with a folder that cannot be a checkpoint."""
    path = Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or path.exists()
    if not looks_local:
        if name.count("/") > 1 or any(c.isspace() for c in name):
            raise SubjectError(
                f"{name!r} is no zoo model, no folder and no hub id (owner/name). {_known()}"
            )
        return
    if not path.exists():
        raise SubjectError(f"There is no folder {name}. {_known()}")
    if not path.is_dir():
        raise SubjectError(
            f"{name} is a file; give the checkpoint's folder (with its config.json)."
        )
    if pipelines.is_pipeline_folder(name):
        return  # a pipeline says itself what is wrong with it
    config = path / "config.json"
    if not config.is_file():
        raise SubjectError(
            f"{name} holds no config.json (or a pipeline's model_index.json), so it is no checkpoint folder. {_known()}"
        )
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SubjectError(f"{config} is not valid JSON: {error}.") from error
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise SubjectError(
            f"{name} holds no .safetensors file; hasten loads no other kind of weights."
        )
    for file in weights:
        try:
            with safe_open(str(file), framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise SubjectError(
                f"{file} is damaged or cut short ({error}); copy it again."
            ) from error


def _trainable(name: str) -> str:
    """What to do where a zoo model is only a recipe yet; empty for any other name."""
    if "/" in name:
        return ""
    from hasten.zoo import recipes  # only needed for the message

    known = {*recipes.RECIPES, *recipes.pictures.RECIPES}
    return f"It is a recipe: make it first with `hasten train {name}`. " if name in known else ""


def _known() -> str:
    return f"Zoo models here: {', '.join(zoo.names()) or 'none'}."


def _check_config(config: Any, name: str) -> None:
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise SubjectError(
            f"{name} is a {config.model_type!r} model, which no engine of hasten runs; the causal engine "
            "runs transformers' causal language models."
        )


def _check_weights(loading: dict[str, Any], name: str) -> None:
    missing = sorted(loading["missing_keys"])
    if missing:
        raise SubjectError(
            f"{name} lacks {len(missing)} of the weights that its config.json asks for, {missing[0]} among "
            "them; get the whole checkpoint."
        )
    for key, found, wanted in sorted(loading["mismatched_keys"], key=str):
        raise SubjectError(
            f"{name}: {key} has shape {tuple(found)}, but config.json asks for {tuple(wanted)}; "
            "use the config that came with the weights."
        )


def _unopened(name: str, error: Exception) -> str:
    reason = (
        str(error).strip().splitlines()[0].rstrip(".")
        if str(error).strip()
        else type(error).__name__
    )
    if not _is_folder(name):
        return (
            f"Cannot open {name!r}: it is no zoo model or folder, and as a hub id: {reason}. "
            f"{_trainable(name)}{_known()}"
        )
    return f"Cannot open {name}: {reason}"


def _tokenizer(
    source: str, options: dict[str, Any], config: Any = None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that comes with a model, or None: ids in, ids out; what needs text says so.

    `config` stands in for the folder's own where transformers does not know that one.
    """
    reader: Any = AutoTokenizer
    if config is not None:
        # The class that it names comes as code. A tokenizer.json needs none; other vocabulary
        # files are read by the class of the family that the model belongs to.
        if (Path(source) / "tokenizer.json").is_file():
            reader = PreTrainedTokenizerFast
        else:
            options = {**options, "tokenizer_type": config.model_type}
    try:
        tokenizer = reader.from_pretrained(source, **options)
    except Exception as error:  # a damaged file raises whatever its parser does
        if (Path(source) / "tokenizer.json").is_file():
            raise SubjectError(
                f"{source}/tokenizer.json cannot be read ({error}); copy it again."
            ) from error
        return None
    # Some families make a tokenizer of nothing, or of the end of text, where there are no files.
    return tokenizer if tokenizer.vocab_size > 1 else None


def _checked(model: nn.Module, form: MaskedForm | None) -> PreTrainedModel:
    """The model, if its engine can run it."""
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise SubjectError(
            f"{type(model).__name__} is no model that an engine of hasten runs; the causal engine takes "
            "transformers models that have `generate` (…ForCausalLM)."
        )
    config = model.config.get_text_config(decoder=True)
    stateful = getattr(model, "_is_stateful", False)
    encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    uses_registry = getattr(model, "_supports_attention_backend", False) or _looks_up_attention(
        model
    )
    if encoder_decoder or stateful or not uses_registry or _has_other_layers(config):
        raise SubjectError(
            f"{type(model).__name__} ({config.model_type}) is a model family that the causal engine cannot run: it "
            "needs a decoder whose every layer looks its attention up in transformers' registry."
        )
    if form is None and any(
        getattr(module, "is_causal", None) is False for module in model.modules()
    ):
        raise SubjectError(
            f"{type(model).__name__} ({config.model_type}) attends to what follows a token too, so no engine of "
            "hasten runs it; the causal engine takes models that read from left to right."
        )
    return model.eval()


def _looks_up_attention(model: nn.Module) -> bool:
    """Whether the modeling code asks the attention registry (some families do without saying so)."""
    module = __import__(type(model).__module__, fromlist=["_"])
    return hasattr(module, "ALL_ATTENTION_FUNCTIONS")


def _has_other_layers(config: Any) -> bool:
    """Linear attention, convolution or state-space layers keep a state that is no KV cache."""
    kinds = set(getattr(config, "layer_types", None) or [])
    return bool(kinds - {"full_attention", "sliding_attention", "chunked_attention"})
