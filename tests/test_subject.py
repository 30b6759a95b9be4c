"""Opening models: what is accepted, what is said of it, what is refused and how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

import hasten
from hasten.errors import PlanError, SubjectError
from hasten.parts import model_hash
from hasten.subject import open_subject
from tests import models


def test_a_folder_a_live_model_and_a_zoo_name_say_what_they_are(
    tiny_checkpoint: Path, zoo: Any
) -> None:
    folder = open_subject(tiny_checkpoint)
    assert folder.engine == "causal"
    assert folder.describe()["kind"] == "llama"
    assert folder.tokenizer is not None
    assert "kv" in folder.describe()["slots"]
    live = open_subject(models.tiny_model("gpt2"))
    assert live.name == "GPT2LMHeadModel"
    zoo("code-lm-tiny")
    named = open_subject("code-lm-tiny")
    assert named.name == "code-lm-tiny"
    assert named.context and named.context >= 2048


def test_the_hash_belongs_to_the_weights_not_to_the_dtype(tiny_checkpoint: Path) -> None:
    one = models.tiny_model()
    assert model_hash(one) == model_hash(models.tiny_model())
    assert model_hash(one) != model_hash(models.tiny_model(seed=1))
    rounded = models.tiny_model(dtype=torch.bfloat16)
    assert model_hash(rounded) == model_hash(models.tiny_model(dtype=torch.bfloat16).float())


def foreign(tmp_path: Path, family: str, **config: Any) -> Path:
    model = AutoModel.from_config(AutoConfig.for_model(family, **config))
    model.save_pretrained(tmp_path)
    return tmp_path


FOREIGN: list[tuple[str, dict[str, Any]]] = [
    (
        "t5",
        {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32},
    ),
    (
        "vit",
        {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
        },
    ),
    ("mamba", {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 32, "state_size": 4}),
    ("bloom", {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32}),
]


@pytest.mark.parametrize(("family", "config"), FOREIGN)
def test_a_family_that_no_engine_runs_is_refused(
    tmp_path: Path, family: str, config: dict[str, Any]
) -> None:
    with pytest.raises(SubjectError) as caught:
        open_subject(foreign(tmp_path, family, **config))
    assert "engine" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, tiny_checkpoint: Path) -> None:
    def refused(what: Any, words: str) -> None:
        with pytest.raises(SubjectError) as caught:
            open_subject(what)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)

    refused("", "empty")
    refused(tmp_path / "nowhere", "no folder")
    refused(tmp_path, "no config.json")
    refused(tiny_checkpoint / "config.json", "is a file")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "not valid JSON")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    refused(tmp_path, "no .safetensors")
    whole = (tiny_checkpoint / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, "cut short")
    refused("a hub/id/that is none", "no hub id")
    refused("nobody/no-such-model", "Cannot open")
    refused(torch.nn.Linear(2, 2), "no model that an engine of hasten runs")


def test_a_saved_plan_comes_back_and_only_onto_its_own_model(tmp_path: Path) -> None:
    model = models.tiny_model()
    texts = models.texts()
    tokenizer = models.tiny_tokenizer()
    parts = hasten.prepare(
        model, "double_sparsity", texts=texts, steps=1, tokenizer=tokenizer, write=False
    )
    prompt = models.prompt(length=60)
    with hasten.apply(model, "double_sparsity(budget=0.3)", parts=parts) as fast:
        wanted = fast.generate(prompt, max_new_tokens=12)
        hasten.save(fast, tmp_path / "plan")
    with hasten.load(tmp_path / "plan", model) as again:
        assert str(again.plan) == "double_sparsity(budget=0.3)"
        assert torch.equal(again.generate(prompt, max_new_tokens=12), wanted)
    with pytest.raises(PlanError, match="another model"):
        hasten.load(tmp_path / "plan", models.tiny_model(seed=1))
    with pytest.raises(PlanError, match=r"holds no plan\.toml"):
        hasten.load(tmp_path, model)
