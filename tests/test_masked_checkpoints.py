"""LLaDA, Dream and SDAR checkpoints: opened without their code, and refused where they do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import PreTrainedModel

import hasten
from hasten.errors import SubjectError
from hasten.masked import checkpoints
from hasten.masked.denoiser import Denoiser
from hasten.subject import MaskedForm, open_subject
from tests import models

MASK = 95
LAYERS = 2

# Keys as the published config.json files have them, at a tiny size.
LLADA: dict[str, Any] = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig"},
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 32,
    "embedding_size": 96,
    "eos_token_id": 0,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": MASK,
    "max_sequence_length": 128,
    "mlp_hidden_size": 48,
    "mlp_ratio": 4,
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": LAYERS,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "use_cache": False,
    "vocab_size": 96,
    "weight_tying": False,
}
QWEN: dict[str, Any] = {
    "attention_dropout": 0.0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "max_window_layers": LAYERS,
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": False,
    "use_sliding_window": False,
    "vocab_size": 96,
}
DREAM: dict[str, Any] = {
    **QWEN,
    "model_type": "Dream",
    "architectures": ["DreamModel"],
    "auto_map": {"AutoModel": "modeling_dream.DreamModel"},
    "mask_token_id": MASK,
    "use_mrope": False,
}
SDAR: dict[str, Any] = {
    **QWEN,
    "model_type": "sdar",
    "architectures": ["SDARForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"},
    "attention_bias": False,
    "attn_implementation": "flex_attention",
    "block_size": 8,
    "fuse_cross_entropy": True,
    "head_dim": 16,
    "mask_token_id": MASK,
}
CONFIGS = {"llada": LLADA, "dream": DREAM, "sdar": SDAR}
SHAPES = {"rope_theta": 500000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 128}
TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "llada": ("llama", SHAPES),
    "dream": ("qwen2", {**SHAPES, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6}),
    "sdar": ("qwen3", {**SHAPES, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "head_dim": 16}),
}


def twin(kind: str, **overrides: Any) -> PreTrainedModel:
    """The transformers model with the weights that the checkpoint of this kind gets."""
    family, shapes = TWINS[kind]
    return models.tiny_model(family, seed=3, **{**shapes, **overrides})


def foreign_weights(kind: str, model: PreTrainedModel) -> dict[str, Tensor]:
    """Its weights under the names that this kind of checkpoint has."""
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del own["lm_head.weight"]
    if kind != "llada":
        return own
    renamed = {
        "model.transformer.wte.weight": own["model.embed_tokens.weight"],
        "model.transformer.ln_f.weight": own["model.norm.weight"],
    }
    if "lm_head.weight" in own:
        renamed["model.transformer.ff_out.weight"] = own["lm_head.weight"]
    for i in range(LAYERS):
        ours, theirs = f"model.layers.{i}", f"model.transformer.blocks.{i}"
        renamed[f"{theirs}.attn_norm.weight"] = own[f"{ours}.input_layernorm.weight"]
        renamed[f"{theirs}.q_proj.weight"] = own[f"{ours}.self_attn.q_proj.weight"]
        renamed[f"{theirs}.k_proj.weight"] = own[f"{ours}.self_attn.k_proj.weight"]
        renamed[f"{theirs}.v_proj.weight"] = own[f"{ours}.self_attn.v_proj.weight"]
        renamed[f"{theirs}.attn_out.weight"] = own[f"{ours}.self_attn.o_proj.weight"]
        renamed[f"{theirs}.ff_norm.weight"] = own[f"{ours}.post_attention_layernorm.weight"]
        renamed[f"{theirs}.ff_proj.weight"] = own[f"{ours}.mlp.gate_proj.weight"]
        renamed[f"{theirs}.up_proj.weight"] = own[f"{ours}.mlp.up_proj.weight"]
        renamed[f"{theirs}.ff_out.weight"] = own[f"{ours}.mlp.down_proj.weight"]
    return renamed


def write(
    folder: Path,
    kind: str,
    *,
    change: Callable[[dict[str, Tensor]], None] | None = None,
    without: tuple[str, ...] = (),
    shards: int = 1,
    tied: bool = False,
    **config: Any,
) -> Path:
    """A checkpoint folder; `config` overrides keys, `without` leaves keys out."""
    weights = foreign_weights(kind, twin(kind, tie_word_embeddings=tied))
    if change is not None:
        change(weights)
    values = {k: v for k, v in {**CONFIGS[kind], **config}.items() if k not in without}
    (folder / "config.json").write_text(json.dumps(values))
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        places = {}
        for n in range(shards):
            name = f"model-{n + 1:05}-of-{shards:05}.safetensors"
            part = {key: weights[key] for key in sorted(weights)[n::shards]}
            save_file(part, folder / name, metadata={"format": "pt"})
            places.update(dict.fromkeys(part, name))
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (folder / checkpoints.INDEX).write_text(json.dumps(index))
    models.tiny_tokenizer().save_pretrained(folder)
    return folder


def seen_both_ways(model: PreTrainedModel, ids: Tensor, visible: Tensor | None = None) -> Tensor:
    """Logits by transformers' own attention with a mask that hides what is not visible."""
    length = ids.shape[1]
    visible = torch.ones(length, length, dtype=torch.bool) if visible is None else visible
    hidden = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        return model(ids, attention_mask=hidden[None, None], use_cache=False).logits


def everywhere(subject: Any, ids: Tensor) -> Tensor:
    """The engine's logits of all positions as the model says them, not moved to their places."""
    form = MaskedForm(subject.form.mask_id, False, subject.form.block_length)
    return Denoiser(subject.model, form).read(ids, torch.arange(ids.shape[1])).logits


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_of_the_transformers_class(tmp_path: Path, kind: str, shards: int) -> None:
    subject = open_subject(write(tmp_path, kind, shards=shards))
    assert subject.engine == "masked"
    assert subject.context == 128
    assert subject.tokenizer is not None
    assert type(subject.model) is type(twin(kind))
    block = 8 if kind == "sdar" else None
    assert subject.form == MaskedForm(MASK, kind == "dream", block)
    ids = models.prompt(2, 21)
    ids[:, 12:] = MASK
    visible = None
    if block is not None:
        blocks = torch.arange(21) // block
        visible = blocks[:, None] >= blocks
    wanted = seen_both_ways(twin(kind), ids, visible)
    wanted[..., MASK] = -torch.inf
    torch.testing.assert_close(everywhere(subject, ids), wanted, atol=1e-5, rtol=1e-5)
    for name, tensor in twin(kind).state_dict().items():
        assert torch.equal(subject.model.state_dict()[name], tensor), name


def llada_forward(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """LLaDA's computation from its own names: no transformers, no hasten."""

    def norm(x: Tensor, name: str) -> Tensor:
        return weights[name] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 8)).transpose(1, 2)

    angles = torch.outer(
        torch.arange(ids.shape[1]).float(), 500000.0 ** (-torch.arange(0, 8, 2).float() / 8)
    )
    cos, sin = (f(torch.cat((angles, angles), -1)) for f in (torch.cos, torch.sin))

    def turn(x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-right, left), -1) * sin

    x = weights["model.transformer.wte.weight"][ids]
    for i in range(LAYERS):
        block = f"model.transformer.blocks.{i}."
        part = {n: weights[f"{block}{n}.weight"].T for n in ("q_proj", "k_proj", "v_proj")}
        h = norm(x, f"{block}attn_norm.weight")
        q, k = turn(heads(h @ part["q_proj"])), turn(heads(h @ part["k_proj"]))
        v = heads(h @ part["v_proj"]).repeat_interleave(2, 1)
        scores = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)) * 8**-0.5
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + mixed @ weights[f"{block}attn_out.weight"].T
        h = norm(x, f"{block}ff_norm.weight")
        gate = nn.functional.silu(h @ weights[f"{block}ff_proj.weight"].T)
        up = h @ weights[f"{block}up_proj.weight"].T
        x = x + (gate * up) @ weights[f"{block}ff_out.weight"].T
    x = norm(x, "model.transformer.ln_f.weight")
    return x @ weights["model.transformer.ff_out.weight"].T


def test_llada_computes_what_its_own_code_does(tmp_path: Path) -> None:
    subject = open_subject(write(tmp_path, "llada"))
    ids = models.prompt(2, 17)
    wanted = llada_forward(load_file(tmp_path / "model.safetensors"), ids)
    wanted[..., MASK] = -torch.inf
    torch.testing.assert_close(everywhere(subject, ids), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_tied_embeddings_with_the_head_written_out_or_not(tmp_path: Path, kind: str) -> None:
    key = "weight_tying" if kind == "llada" else "tie_word_embeddings"
    model = open_subject(write(tmp_path, kind, tied=True, **{key: True})).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, twin(kind, tie_word_embeddings=True).lm_head.weight)
    head = "model.transformer.ff_out.weight" if kind == "llada" else "lm_head.weight"
    embedding = foreign_weights(kind, model)[
        "model.transformer.wte.weight" if kind == "llada" else "model.embed_tokens.weight"
    ]
    write(tmp_path, kind, tied=True, change=lambda w: w.update({head: embedding}), **{key: True})
    assert open_subject(tmp_path).model.lm_head.weight.shape == (96, 32)


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_generates_is_saved_again_and_undone(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path, kind)
    prompt = models.prompt(2, 11, vocabulary=MASK)
    with hasten.apply(folder) as fast:
        before = {name: tensor.clone() for name, tensor in fast.subject.model.state_dict().items()}
        ids = fast.generate(prompt, max_new_tokens=8)
        model = fast.subject.model
    assert not bool((ids == MASK).any())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "again")
    with hasten.apply(tmp_path / "again") as fast:
        assert fast.form == open_subject(folder).form
        assert torch.equal(fast.generate(prompt, max_new_tokens=8), ids)


def test_dtypes(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        "llada",
        change=lambda w: w.update({k: t.bfloat16() for k, t in w.items()}),
    )
    assert open_subject(folder).model.dtype == torch.float32
    assert open_subject(folder, dtype="stored").model.dtype == torch.bfloat16
    assert open_subject(folder, dtype="float16").model.dtype == torch.float16


def test_defaults_where_the_config_is_silent(tmp_path: Path) -> None:
    silent = ("mlp_hidden_size", "n_kv_heads", "embedding_size", "rope", "block_type")
    with pytest.raises(SubjectError, match=r"ff_out\.weight has shape \(32, 48\).*\(32, 128\)"):
        open_subject(write(tmp_path, "llada", without=silent))
    config = checkpoints.KINDS["llada"].config(
        {k: v for k, v in LLADA.items() if k not in silent}, "it"
    )
    assert (config.intermediate_size, config.num_key_value_heads) == (128, 4)
    config = checkpoints.KINDS["llada"].config(
        {**LLADA, "n_kv_heads": None, "multi_query_attention": True}, "it"
    )
    assert config.num_key_value_heads == 1
    assert open_subject(write(tmp_path, "sdar", without=("block_size",))).form == MaskedForm(
        MASK, False, checkpoints.SDAR_BLOCK
    )


def test_the_mask_of_the_tokenizer_is_taken_where_the_config_names_none(tmp_path: Path) -> None:
    folder = write(tmp_path, "sdar", without=("mask_token_id",))
    settings = folder / "tokenizer_config.json"
    values = json.loads(settings.read_text()) | {
        "mask_token": "<|MASK|>",
        "added_tokens_decoder": {"0": {"content": "<eos>"}, "94": {"content": "<|MASK|>"}},
    }
    settings.write_text(json.dumps(values))
    assert checkpoints._tokenizer_mask(settings) == 94
    model = checkpoints.load(str(folder), json.loads((folder / "config.json").read_text()))
    assert model.config.mask_token_id == 94


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(weights: dict[str, Tensor]) -> None:
        del weights[name]

    return change


def add(name: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda weights: weights.update({name: torch.zeros(shape)})


BLOCK = "model.transformer.blocks.1."
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llada", {"change": drop(f"{BLOCK}up_proj.weight")}, f"lacks 1 .*{BLOCK}up_proj.weight"),
    ("llada", {"change": drop("model.transformer.ff_out.weight")}, "lacks 1 .*ff_out.weight"),
    ("llada", {"n_layers": 1}, r"holds 9 weights .*blocks\.1\.attn_norm"),
    ("llada", {"change": add(f"{BLOCK}q_norm.weight", 32)}, "holds 1 weights .*q_norm"),
    ("llada", {"mlp_hidden_size": 64}, r"ff_out\.weight has shape \(32, 48\).*\(32, 64\)"),
    ("llada", {"without": ("n_heads",)}, "lacks 'n_heads'"),
    ("llada", {"d_model": "32"}, "says d_model='32'"),
    ("llada", {"activation_type": "swiglu"}, "activation_type='swiglu'.* only with .*'silu'"),
    ("llada", {"alibi": True}, "alibi=True"),
    ("llada", {"without": ("mask_token_id",)}, "mask_token_id=126336; allowed is 0 to 95"),
    ("llada", {"quantization_config": {"bits": 4}}, "quantized"),
    ("dream", {"without": ("mask_token_id",)}, "names a mask"),
    ("dream", {"mask_token_id": 96}, "mask_token_id=96; allowed is 0 to 95"),
    ("dream", {"pad_token_id": 151643}, "pad_token_id=151643"),
    ("dream", {"use_sliding_window": True}, "use_sliding_window=True"),
    ("dream", {"block_size": 32}, "block_size=32"),
    (
        "dream",
        {"change": drop("model.layers.0.self_attn.q_proj.bias")},
        r"layers\.0\.self_attn\.q_proj\.bias",
    ),
    ("sdar", {"change": add("model.layers.0.mlp.gate.weight", 4)}, r"mlp\.gate\.weight"),
    ("sdar", {"block_size": 0}, "block_size=0"),
    ("sdar", {"without": ("hidden_size",)}, "lacks 'hidden_size'"),
]


@pytest.mark.parametrize(("kind", "wrong", "words"), REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, kind: str, wrong: dict[str, Any], words: str
) -> None:
    folder = write(tmp_path, kind, **wrong)
    with pytest.raises(SubjectError, match=words) as caught:
        open_subject(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_broken_shards_are_refused_in_one_line(tmp_path: Path) -> None:
    def refused(words: str) -> None:
        with pytest.raises(SubjectError, match=words) as caught:
            open_subject(tmp_path)
        assert "\n" not in str(caught.value)

    write(tmp_path, "llada", shards=3)
    second = tmp_path / "model-00002-of-00003.safetensors"
    whole = second.read_bytes()
    second.unlink()
    refused("lacks model-00002-of-00003.safetensors")
    second.write_bytes(whole[: len(whole) // 2])
    refused("damaged or cut short")
    second.write_bytes(whole)
    (tmp_path / checkpoints.INDEX).write_text("[]")
    refused("is no index of weights")


def test_a_hub_id_is_fetched_as_data_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, "llada")
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(hub_id: str, *, allow_patterns: list[str]) -> str:
        asked.append((hub_id, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(
        checkpoints, "config_of", lambda source, *, local: None if local else dict(LLADA)
    )
    subject = open_subject("someone/llada")
    assert subject.name == "someone/llada"
    assert subject.form == MaskedForm(MASK)
    assert [hub_id for hub_id, _ in asked] == ["someone/llada"]
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in asked[0][1])


def remote_tokenizer(folder: Path, **settings: Any) -> None:
    """Say in a tokenizer's config that its class comes as code, as Dream and SDAR do."""
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text()) if path.is_file() else {}
    code = {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    path.write_text(json.dumps({**values, **code, **settings}))


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_tokenizer_comes_without_code_too(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path, kind)
    wanted = models.tiny_tokenizer()("def f(x):\n  y").input_ids
    for _ in range(2):
        tokenizer = open_subject(folder).tokenizer
        assert tokenizer is not None
        assert tokenizer("def f(x):\n  y").input_ids == wanted
        assert tokenizer.eos_token_id == models.EOS
        remote_tokenizer(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert open_subject(folder).tokenizer is None


def test_a_dream_tokenizer_is_read_from_its_vocabulary_files(tmp_path: Path) -> None:
    folder = write(tmp_path, "dream")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    letters = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    (folder / "vocab.json").write_text(json.dumps({**letters, "he": 256}))
    (folder / "merges.txt").write_text("#version: 0.2\nh e\n")
    added = {"content": "<|mask|>", "special": True}
    remote_tokenizer(
        folder,
        tokenizer_class="DreamTokenizer",
        mask_token="<|mask|>",
        added_tokens_decoder={"257": added},
    )
    tokenizer = open_subject(folder).tokenizer
    assert tokenizer is not None
    assert tokenizer.mask_token_id == 257
    ids = tokenizer("hello <|mask|>").input_ids
    assert ids[0] == 256
    assert ids[-1] == 257
    assert tokenizer.decode(ids) == "hello <|mask|>"
