"""Masked-diffusion checkpoints whose publishers ship model code, opened without running that code.

Three kinds are known by `model_type`; each is an architecture that transformers has, under other
names or with another way of attending, which the masked engine provides:

    llada   LLaDA: Llama under OLMo's names (github.com/ML-GSAI/LLaDA); sees everything
    Dream   Dream, DiffuCoder: Qwen2, output shifted by one (github.com/DreamLM/Dream)
    sdar    SDAR, TraDo: Qwen3, sees its own block and those before (github.com/JetAstra/SDAR)

Names and defaults are those of the published configurations. A config that asks for something the
transformers class does not compute is refused, as is a checkpoint with a weight too many or too few.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hasten.errors import SubjectError

Values = dict[str, Any]

LLADA_MASK = 126_336  # of every LLaDA tokenizer so far
SDAR_BLOCK = 4  # what SDAR and TraDo were trained with, where the config does not say

# What is fetched of a hub repository: data only.
FETCHED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]

INDEX = "model.safetensors.index.json"

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_QWEN = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings"),
    *("rms_norm_eps", "initializer_range", "tie_word_embeddings", "rope_theta", "rope_scaling"),
)
_QWEN_NEEDED = _QWEN[:5]

# What a LLaDA config may not ask for otherwise; a key that is left out is taken as these.
_LLADA_FIXED: Values = {
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "attention_layer_norm": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "rope": True,
    "alibi": False,
    "input_emb_norm": False,
    "scale_logits": False,
}
_LLADA_NAMES = {
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
}
_LLADA_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",  # the one that the activation is applied to
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}


def _same_name(name: str) -> str:
    return name


def _llada_name(name: str) -> str:
    """A Llama weight's name in a LLaDA checkpoint."""
    module, _, kind = name.rpartition(".")
    if module.startswith("model.layers."):
        number, _, part = module.removeprefix("model.layers.").partition(".")
        return f"model.transformer.blocks.{number}.{_LLADA_BLOCK[part]}.{kind}"
    return f"{_LLADA_NAMES[module]}.{kind}"


def _llada_config(values: Values, shown: str) -> PreTrainedConfig:
    _need(values, ("d_model", "n_heads", "n_layers", "vocab_size"), shown)
    _fixed(values, _LLADA_FIXED, shown)
    width, heads = values["d_model"], values["n_heads"]
    kv_heads = values.get("n_kv_heads")
    if kv_heads is None:
        kv_heads = 1 if values.get("multi_query_attention") else heads
    return LlamaConfig(
        vocab_size=values.get("embedding_size") or values["vocab_size"],
        hidden_size=width,
        intermediate_size=values.get("mlp_hidden_size") or values.get("mlp_ratio", 4) * width,
        num_hidden_layers=values["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=values.get("max_sequence_length", 1024),
        rms_norm_eps=values.get("rms_norm_eps", 1e-5),
        rope_parameters={"rope_type": "default", "rope_theta": values.get("rope_theta", 10_000.0)},
        tie_word_embeddings=bool(values.get("weight_tying", False)),
        **_token_ids(values),
    )


def _dream_config(values: Values, shown: str) -> PreTrainedConfig:
    _need(values, _QWEN_NEEDED, shown)
    # With a block size it is another model under the same name (DreamReasoner: not shifted).
    _fixed(values, {"use_sliding_window": False, "use_mrope": False, "block_size": None}, shown)
    return Qwen2Config(**_taken(values, _QWEN), **_token_ids(values))


def _sdar_config(values: Values, shown: str) -> PreTrainedConfig:
    _need(values, _QWEN_NEEDED, shown)
    _fixed(values, {"use_sliding_window": False}, shown)
    keys = (*_QWEN, "head_dim", "attention_bias")
    return Qwen3Config(**_taken(values, keys), **_token_ids(values))


@dataclass(frozen=True)
class Kind:
    """One kind of checkpoint.

    Attributes:
        model: transformers' class of the same architecture.
        config: its config, from what the checkpoint's config.json says.
        name: what the checkpoint calls a weight of that class.
        mask_id: the mask where nothing says otherwise.
        shifted: as in `hasten.subject.MaskedForm`.
        block_length: likewise, where the config names no block size; None for full attention.
    """

    model: type[PreTrainedModel]
    config: Callable[[Values, str], PreTrainedConfig]
    name: Callable[[str], str] = _same_name
    mask_id: int | None = None
    shifted: bool = False
    block_length: int | None = None


KINDS: Mapping[str, Kind] = {
    "llada": Kind(LlamaForCausalLM, _llada_config, _llada_name, mask_id=LLADA_MASK),
    "Dream": Kind(Qwen2ForCausalLM, _dream_config, shifted=True),
    "sdar": Kind(Qwen3ForCausalLM, _sdar_config, block_length=SDAR_BLOCK),
}


def config_of(source: str, *, local: bool) -> Values | None:
    """The config.json of a folder (`local`) or hub id if it is of one of the `KINDS`, else None."""
    try:
        if local:
            values = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
        else:
            values, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError):
        return None  # whoever opens it in the usual way says what is wrong
    return values if isinstance(values, dict) and values.get("model_type") in KINDS else None


def fetch(hub_id: str) -> str:
    """The folder of a hub repository's config, tokenizer and safetensors; nothing else is loaded."""
    from huggingface_hub import snapshot_download

    return str(snapshot_download(hub_id, allow_patterns=FETCHED))


def load(
    folder: str, values: Values, *, dtype: torch.dtype | str = "auto", shown: str | None = None
) -> PreTrainedModel:
    """The model of a checkpoint folder, as transformers' own class, in eval mode.

    Its config says what `hasten.subject.masked_form` asks: that it sees both ways, its mask,
    whether its output is shifted, and its block length.

    Args:
        values: what `config_of` returned.
        dtype: of the weights; "auto" keeps that of the embeddings.
        shown: how errors name the checkpoint.

    Raises:
        SubjectError: for a config that cannot be followed, and weights that do not fit it.
    """
    shown = shown or folder
    kind = KINDS[values["model_type"]]
    if values.get("quantization_config"):
        raise SubjectError(f"{shown} is quantized, which is not read here; get the plain weights.")
    config = kind.config(values, shown)
    config.is_causal = False
    config.shifted_logits = kind.shifted
    config.block_length = _block_length(kind, values, shown)
    config.mask_token_id = _mask_id(kind, values, Path(folder), shown)
    for name in ("mask_token_id", *_TOKENS):
        _check_ids(name, getattr(config, name), config.vocab_size, shown)
    state = _weights(kind, config, Path(folder), shown)
    if dtype == "auto":
        dtype = state["model.embed_tokens.weight"].dtype
    model: PreTrainedModel = kind.model.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype
    )
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


# -- config ----------------------------------------------------------------------------------------
def _need(values: Values, keys: tuple[str, ...], shown: str) -> None:
    for key in keys:
        value = values.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            said = f"says {key}={value!r}" if key in values else f"lacks {key!r}"
            raise SubjectError(
                f"The config.json of {shown} {said}; it must be a whole number of 1 or more."
            )


def _fixed(values: Values, allowed: Values, shown: str) -> None:
    for key, wanted in allowed.items():
        value = values.get(key, wanted)
        # None leaves such a switch off, as leaving it out does.
        if value != wanted and not (value is None and not wanted):
            raise SubjectError(
                f"The config.json of {shown} says {key}={value!r}; hasten runs a "
                f"{values['model_type']!r} model only with {key}={wanted!r}."
            )


def _taken(values: Values, keys: tuple[str, ...]) -> Values:
    return {key: values[key] for key in keys if values.get(key) is not None}


def _token_ids(values: Values) -> Values:
    return {name: values.get(name) for name in _TOKENS}


def _check_ids(name: str, ids: Any, vocabulary: int, shown: str) -> None:
    for token in ids if isinstance(ids, list) else [ids]:
        if token is None:
            continue
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
            raise SubjectError(
                f"The config of {shown} says {name}={token!r}; allowed is 0 to {vocabulary - 1}, one "
                "less than the size of its vocabulary."
            )


def _block_length(kind: Kind, values: Values, shown: str) -> int | None:
    if kind.block_length is None:
        return None
    if values.get("block_size") is None:
        return kind.block_length
    _need(values, ("block_size",), shown)
    return int(values["block_size"])


def _mask_id(kind: Kind, values: Values, folder: Path, shown: str) -> int:
    """The mask of the config, else the tokenizer's own, else the kind's."""
    if values.get("mask_token_id") is not None:
        return values["mask_token_id"]  # type: ignore[no-any-return]  # checked with the others
    found = _tokenizer_mask(folder / "tokenizer_config.json")
    found = kind.mask_id if found is None else found
    if found is None:
        raise SubjectError(
            f"Neither config.json nor tokenizer_config.json of {shown} names a mask; add the id of "
            "its mask to config.json as mask_token_id."
        )
    return found


def _tokenizer_mask(path: Path) -> int | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        mask = data.get("mask_token")
        text = mask.get("content") if isinstance(mask, dict) else mask
        added: Values = data.get("added_tokens_decoder") or {}
        return next((int(i) for i, token in added.items() if token["content"] == text), None)
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None  # opening the tokenizer says what is wrong with it


# -- weights ---------------------------------------------------------------------------------------
def _weights(kind: Kind, config: PreTrainedConfig, folder: Path, shown: str) -> dict[str, Tensor]:
    """All weights under the names of transformers' class; none is read before all are there."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in kind.model(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    wanted = {kind.name(name): name for name in shapes}
    found = dict(_listed(folder, shown))
    if config.tie_word_embeddings:  # a tied head may be written out; it is the embedding
        found.pop(kind.name("lm_head.weight"), None)
    found = {name: file for name, file in found.items() if not name.endswith(".inv_freq")}
    _check_names(wanted, found, shown)
    state = {}
    for file in sorted(set(found.values())):
        with safe_open(str(file), framework="pt") as opened:
            for theirs in opened.keys():  # noqa: SIM118
                if theirs not in wanted:
                    continue
                ours = wanted[theirs]
                shape = tuple(opened.get_slice(theirs).get_shape())
                if shape != tuple(shapes[ours]):
                    raise SubjectError(
                        f"{shown}: {theirs} has shape {shape}, but config.json asks for "
                        f"{tuple(shapes[ours])}; use the config that came with the weights."
                    )
                state[ours] = opened.get_tensor(theirs)
    return state


def _listed(folder: Path, shown: str) -> Iterator[tuple[str, Path]]:
    """Every weight of a checkpoint with its file: those of the index's files, or of the only ones."""
    files = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        try:
            places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = sorted({folder / Path(place).name for place in places.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SubjectError(
                f"{shown}: {INDEX} is no index of weights ({error}); copy it again."
            ) from error
    for file in files:
        if not file.is_file():
            raise SubjectError(
                f"{shown} lacks {file.name}, which its index names; get the whole checkpoint."
            )
        try:
            with safe_open(str(file), framework="pt") as opened:
                yield from ((name, file) for name in opened.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise SubjectError(
                f"{file} is damaged or cut short ({error}); copy it again."
            ) from error


def _check_names(wanted: Mapping[str, str], found: Mapping[str, Path], shown: str) -> None:
    missing, unexpected = sorted(wanted.keys() - found), sorted(found.keys() - wanted)
    if missing:
        raise SubjectError(
            f"{shown} lacks {len(missing)} of the weights that its config.json asks for, "
            f"{missing[0]} among them; get the whole checkpoint."
        )
    if unexpected:
        raise SubjectError(
            f"{shown} holds {len(unexpected)} weights that its config.json does not ask for, "
            f"{unexpected[0]} among them; use the config that came with the weights."
        )
