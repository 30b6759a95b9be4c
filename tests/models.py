"""Tiny random models, prompts and a tokenizer for tests. Nothing here is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hasten.causal.attention import AttentionView, Pass
from hasten.causal.cache import KVCache

VOCABULARY = 96
EOS = 0
# Newline and printable ASCII without the tilde: with the end-of-text token 96 ids.
CHARACTERS = "\n" + "".join(map(chr, range(32, 126)))

# With the usual standard deviation of 0.02 a model this small says nearly the same everywhere;
# this one makes attention and logits depend clearly on the tokens.
INITIALIZER_RANGE = 0.25

_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": INITIALIZER_RANGE,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": None,  # a padding id in the config would get an embedding of zeros
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}

# What each family needs beyond `_SMALL`; a value of None takes a key away.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 12},  # short, so that prompts of tests reach beyond it
    "gemma3_text": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "tie_word_embeddings": False,  # tied, a random model repeats its input
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {},
    "gpt2": {},
    "gpt_neox": {"rotary_pct": 0.5},
    "mixtral": {"num_local_experts": 4, **_EXPERTS},
    "qwen3_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 1,
        "head_dim": 8,
        **_EXPERTS,
    },
}


def tiny_model(
    family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A random model of a family, in eval mode; the same for a given seed and config.

    Two layers, hidden size 32, four heads on two KV heads, 96 ids; `overrides` are config keys.
    """
    settings = {**_SMALL, **FAMILIES.get(family, {}), **overrides}
    config = AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    model.generation_config.pad_token_id = EOS
    return model.to(dtype).eval()


def tiny_tokenizer(characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """One id per character of an alphabet; id 0 is end of text, padding and unknown."""
    vocabulary = {"<eos>": EOS, **{char: i + 1 for i, char in enumerate(characters)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<eos>",
        unk_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def save_checkpoint(folder: Path, family: str = "llama", **arguments: Any) -> Path:
    """Write a tiny model (`tiny_model`) and its tokenizer as a checkpoint folder."""
    tiny_model(family, **arguments).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def prompt(
    batch: int = 1, length: int = 16, *, seed: int = 0, vocabulary: int = VOCABULARY
) -> Tensor:
    """Random ids (batch, length) without the end-of-text id."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocabulary, (batch, length), generator=generator)


def padded(rows: list[Tensor], pad: int = EOS) -> dict[str, Tensor]:
    """Rows of ids (length,) of several lengths as a left-padded batch with its attention mask."""
    longest = max(row.numel() for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - row.numel() :] = row
        mask[i, longest - row.numel() :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def texts(count: int = 8, *, seed: int = 0) -> list[str]:
    """Short made-up programs in the tiny tokenizer's alphabet, about 400 characters each."""
    generator = torch.Generator().manual_seed(seed)
    names = ["alpha", "beta", "count", "delta", "index", "total", "value", "width"]
    documents = []
    for _ in range(count):
        picks = torch.randint(0, len(names), (24,), generator=generator).tolist()
        lines = [
            f"def {names[a]}_{names[b]}(x):\n    return x + {names[c]}({a} * {b} - {c})\n"
            for a, b, c in zip(picks[::3], picks[1::3], picks[2::3], strict=True)
        ]
        documents.append("\n".join(lines))
    return documents


def attention_view(
    query: Tensor, keys: Tensor, values: Tensor | None = None, *, pads: Tensor | None = None
) -> AttentionView:
    """One layer in the middle of a decoding pass, as a kv technique sees it.

    Args:
        query: (batch, heads, block, head_dim).
        keys: (batch, kv_heads, length, head_dim), the block's own included; values likewise.
        pads: (batch,) left padding of each row.
    """
    batch, _, length, _ = keys.shape
    block = query.shape[2]
    pads = torch.zeros(batch, dtype=torch.long) if pads is None else pads
    positions = (torch.arange(length) - pads[:, None]).clamp(min=-1)
    has_pads = bool(pads.any())
    cache = KVCache(1, batch, length + 8, keys.device)
    layer = cache.layers[0]
    if length > block:
        cache.open_block(positions[:, :-block], has_holes=has_pads)
        layer.update(keys[:, :, :-block], (keys if values is None else values)[:, :, :-block])
        cache.commit()
    cache.open_block(positions[:, -block:], has_holes=has_pads and length == block)
    layer.update(keys[:, :, -block:], (keys if values is None else values)[:, :, -block:])
    current = Pass(cache, positions[:, -block:], is_prompt=length == block)
    scaling = query.shape[3] ** -0.5
    mask = current.mask(layer, None)
    return AttentionView(0, query, layer, mask, scaling, current.positions, current.is_prompt)
