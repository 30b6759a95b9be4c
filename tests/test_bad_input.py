"""Bad input: one clear line on stderr, exit code 2, nothing half-written, no traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import hasten
from hasten import technique as registry
from hasten.errors import HastenError, PlanError, SubjectError
from hasten.parts import default_path
from hasten.plan import Plan
from hasten.subject import open_subject
from tests import models
from tests.refusals import refused, refused_by_the_program

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints: `good`, and others each wrong in one way."""
    root = tmp_path_factory.mktemp("checkpoints")
    good = models.save_checkpoint(root / "good")
    bert = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    t5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    mamba = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    others = {
        "bert": transformers.BertForMaskedLM(transformers.BertConfig(**bert, intermediate_size=32)),
        "t5": transformers.T5ForConditionalGeneration(transformers.T5Config(**t5)),
        "mamba": transformers.MambaForCausalLM(transformers.MambaConfig(**mamba)),
        "bloom": transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)
        ),
    }
    for name, model in others.items():
        model.save_pretrained(root / name)
        models.tiny_tokenizer().save_pretrained(root / name)
    names = (
        "cut",
        "header",
        "config",
        "list",
        "shape",
        "missing",
        "tokenizer",
        "no_tokenizer",
        "pickled",
    )
    folders = {name: Path(shutil.copytree(good, root / name)) for name in names}
    weights = (good / "model.safetensors").read_bytes()
    (folders["cut"] / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (folders["header"] / "model.safetensors").write_bytes(weights[:5])
    (folders["config"] / "config.json").write_text("{")
    (folders["list"] / "config.json").write_text("[]")
    (folders["tokenizer"] / "tokenizer.json").write_text("{")
    for file in folders["no_tokenizer"].glob("tokenizer*"):
        file.unlink()
    config = json.loads((good / "config.json").read_text())
    (folders["shape"] / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    tensors = load_file(good / "model.safetensors")
    torch.save(tensors, folders["pickled"] / "pytorch_model.bin")
    (folders["pickled"] / "model.safetensors").unlink()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folders["missing"] / "model.safetensors", {"format": "pt"})
    (root / "empty").mkdir()
    (root / "file.bin").write_bytes(b"no checkpoint")
    return root


def generate(model: Path | str, *arguments: str) -> tuple[str, ...]:
    return ("generate", str(model), "--prompt", "def f(x):", "--max-new-tokens", "4", *arguments)


# Plans. Each row: the plan, and words that the message must hold.

PLANS = [
    ("medus", ["Unknown technique 'medus'", "medusa"]),
    ("prefix_vk", ["Unknown technique", "prefix_kv"]),
    ("xyzzy_qqq", ["Unknown technique", "hasten list"]),
    ("prompt_lookup(num_drafts=3)", ["no knob 'num_drafts'", "num_draft"]),
    (
        "prompt_lookup(num_draft='three')",
        ["num_draft='three'", "must be int", "hasten show prompt_lookup"],
    ),
    ("prompt_lookup(num_draft=2.5)", ["num_draft=2.5", "must be int"]),
    ("prompt_lookup(num_draft=True)", ["num_draft=True", "must be int"]),
    ("prompt_lookup(num_draft=0)", ["num_draft=0", "out of range", "1 to 64"]),
    ("random_eviction(budget=1.5)", ["budget=1.5", "out of range"]),
    ("random_eviction(budget=nan)", ["budget"]),
    ("medusa(tree=oak)", ["tree='oak'", "'tuned'", "'chain'"]),
    (
        "prompt_lookup, medusa",
        ["prompt_lookup", "medusa", "slot 'drafter'", "leave one of them out"],
    ),
    ("sinks_recent, random_eviction", ["sinks_recent", "random_eviction", "slot 'kv'"]),
    ("prompt_lookup, prompt_lookup", ["twice"]),
    ("prompt_lookup(", ["Cannot read the plan", "name(knob=value"]),
    ("prompt_lookup(3)", ["Cannot read the plan"]),
    ("prompt_lookup(num_draft=__import__('os').getpid())", ["num_draft", "not a number"]),
    ("import os", ["Cannot read the plan"]),
    ("no_such_plan.toml", ["no_such_plan.toml", "Cannot read"]),
    ("medusa", ["no trained part", "hasten prepare"]),
]


@pytest.mark.parametrize(("plan", "words"), PLANS)
def test_bad_plan(home: Path, checkpoints: Path, plan: str, words: list[str]) -> None:
    line = refused(home, *generate(checkpoints / "good", "--with", plan))
    for word in words:
        assert word in line


def test_plans_that_need_what_another_changes_are_refused(home: Path, checkpoints: Path) -> None:
    """Every pair that the contracts forbid says both names and what to do."""
    kinds = [registry.get(name) for name in sorted(registry.BUILT_IN)]
    forbidden = [
        (a.name, b.name)
        for i, a in enumerate(kinds)
        for b in kinds[i + 1 :]
        if a.contract.needs & b.contract.changes or b.contract.needs & a.contract.changes
    ]
    assert forbidden
    for first, second in forbidden:
        with pytest.raises(PlanError) as caught:
            Plan.parse(first, second)
        assert first in str(caught.value) and second in str(caught.value)
        assert "leave one of them out" in str(caught.value)
    refused(home, "bench", str(checkpoints / "good"), "--with", ", ".join(forbidden[0]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[technique]\n", "TOML"),
        ("name = 'medusa'\n", "[[technique]]"),
        ("[[technique]]\nnum_draft = 2\n", "needs a name"),
        ("[[technique]]\nname = 'prompt_lookup'\nnum_draft = 'x'\n", "must be int"),
    ],
)
def test_bad_plan_file(home: Path, checkpoints: Path, text: str, words: str) -> None:
    Path("plan.toml").write_text(text)
    assert words in refused(home, *generate(checkpoints / "good", "--with", "plan.toml"))


def test_plan_that_its_runner_cannot_carry(home: Path, checkpoints: Path) -> None:
    arguments = ("--with", "random_eviction", "--runner", "compiled")
    assert "runs on: eager" in refused(home, *generate(checkpoints / "good", *arguments))


def test_parts_of_another_model_are_refused(home: Path, checkpoints: Path) -> None:
    """A saved plan loads onto the model that it was trained for and onto no other."""
    text = "\n".join(models.texts(40))
    parts = hasten.prepare(
        open_subject(checkpoints / "good"), "medusa", texts=[text], steps=1, write=False
    )
    with hasten.apply(checkpoints / "good", "medusa", parts=parts) as fast:
        hasten.save(fast, home / "saved")
    hasten.load(home / "saved", checkpoints / "good").undo()
    other = models.save_checkpoint(home / "other", seed=1)
    with pytest.raises(PlanError, match="another model"):
        hasten.load(home / "saved", other)
    # A part that was put into another model's folder by hand is no part of that model.
    (technique,) = Plan.parse("medusa")
    place = default_path(technique, open_subject(other).hash)
    place.parent.mkdir(parents=True)
    shutil.copy(home / "saved" / "medusa.safetensors", place)
    assert "no trained part" in refused(home, *generate(other, "--with", "medusa"))


def test_truncated_part_is_refused(home: Path, checkpoints: Path) -> None:
    (technique,) = Plan.parse("medusa")
    place = default_path(technique, open_subject(checkpoints / "good").hash)
    place.parent.mkdir(parents=True)
    place.write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{}")
    line = refused(home, *generate(checkpoints / "good", "--with", "medusa"))
    assert str(place) in line and "safetensors" in line


# Models.

MODELS = [
    ("bert", ["attends to what follows"]),
    ("t5", ["'t5'", "no engine"]),
    ("mamba", ["mamba", "cannot run"]),
    ("bloom", ["bloom", "cannot run"]),
    ("empty", ["no config.json"]),
    ("file.bin", ["is a file"]),
    ("cut", ["model.safetensors", "damaged or cut short"]),
    ("header", ["model.safetensors", "damaged or cut short"]),
    ("config", ["config.json", "not valid JSON"]),
    ("list", ["Cannot open"]),
    ("shape", ["shape", "config.json asks for"]),
    ("missing", ["lacks 1 of the weights", "model.layers.1.mlp.up_proj.weight"]),
    ("pickled", ["no .safetensors"]),
    ("tokenizer", ["tokenizer.json", "cannot be read"]),
    ("no_tokenizer", ["has no tokenizer"]),
    ("nowhere", ["There is no folder"]),
]


@pytest.mark.parametrize(("name", "words"), MODELS)
def test_bad_model(home: Path, checkpoints: Path, name: str, words: list[str]) -> None:
    line = refused(home, *generate(checkpoints / name))
    for word in words:
        assert word in line


@pytest.mark.parametrize("name", ["", "a/b/c", "code-lm-huge", "some one/model"])
def test_model_that_is_nowhere(home: Path, name: str) -> None:
    line = refused(home, "show", name) if name else refused(home, *generate(name))
    assert "zoo" in line.lower() or "hasten list" in line


def test_live_models_that_no_engine_runs() -> None:
    bert = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    for model in (
        torch.nn.Linear(2, 2),
        transformers.BertModel(bert),
        transformers.BertLMHeadModel(bert),
    ):
        with pytest.raises(SubjectError, match=r"no engine|no model"):
            hasten.apply(model)


# Numbers, prompts and files.

SETTINGS = [
    (["--max-new-tokens", "0"], "max_new_tokens=0"),
    (["--max-new-tokens", "-3"], "max_new_tokens=-3"),
    (["--max-new-tokens", "100000000000"], "out of range"),
    (["--max-new-tokens", "504"], "together 513"),
    (["--prompt", ""], "prompt is empty"),
    (["--prompt", "x" * 600], "The prompt has 600 tokens"),
    (["--temperature", "-1"], "temperature=-1"),
    (["--temperature", "nan"], "temperature=nan"),
    (["--temperature", "1", "--top-p", "1.5"], "top_p=1.5"),
    (["--temperature", "1", "--top-k", "-2"], "top_k=-2"),
    (["--top-k", "5"], "--temperature"),
    (["--repetition-penalty", "0"], "repetition_penalty=0"),
    (["--seed", "-1"], "--seed"),
    (["--seed", str(2**64)], "--seed"),
    (["--threads", "0"], "--threads"),
    (["--stop", ""], "--stop"),
]


@pytest.mark.parametrize(("arguments", "words"), SETTINGS)
def test_bad_setting(home: Path, checkpoints: Path, arguments: list[str], words: str) -> None:
    assert words in refused(home, *generate(checkpoints / "good", *arguments))


BENCHES = [
    (["--rounds", "2"], "--rounds"),
    (["--max-new-tokens", "0"], "--max-new-tokens"),
    (["--max-new-tokens", "512"], "no room for a prompt"),
    (["--prompt", ""], "prompt is empty"),
    (["--prompt", "x" * 600], "600 tokens"),
    (["--prompts", "none.txt"], "none.txt"),
    (["--prompts", "bad.jsonl"], "not valid JSON"),
    (["--prompts", "empty.txt"], "holds no prompts"),
    (["--prompts", "numbers.json"], "holds no prompts"),
    (["--report", "."], "not a regular file"),
    (["--report", "bad.jsonl/report.html"], "cannot write"),
    (["--threads", "100000"], "threads"),
    (["--seed", "-1"], "--seed"),
    (["--with", "medusa"], "slot 'drafter'"),
]


@pytest.mark.parametrize(("arguments", "words"), BENCHES)
def test_bad_bench(home: Path, checkpoints: Path, arguments: list[str], words: str) -> None:
    Path("bad.jsonl").write_text('"fine"\n{\n')
    Path("empty.txt").write_text("\n\n")
    Path("numbers.json").write_text("[1, 2]")
    assert words in refused(
        home, "bench", str(checkpoints / "good"), "--with", "prompt_lookup", *arguments
    )


OTHERS = [
    (["list", "--family", "nope"], ["family 'nope'", "kv_cache"]),
    (["list", "--engine", "nope"], ["engine 'nope'", "causal"]),
    (["show", "medus"], ["medusa"]),
    (["ledger", "--technique", "medus"], ["medusa"]),
    (["train", "nope"], ["no recipe", "code-lm-tiny"]),
    (["train", "code-lm-tiny", "--max-tokens", "0"], ["--max-tokens"]),
    (["train", "code-lm-tiny", "--max-tokens", "10"], ["tokens=10"]),
    (["train", "code-lm-tiny", "--threads", "0"], ["--threads"]),
    (["train", "code-lm-tiny", "--output", "GOOD"], ["is no zoo model"]),
    (["prepare", "GOOD", "--with", "prompt_lookup"], ["nothing to prepare"]),
    (["prepare", "GOOD", "--with", "medusa", "--text", "none.txt"], ["none.txt"]),
    (["prepare", "GOOD", "--with", "medusa", "--text", "*.none"], ["matches no file"]),
    (["prepare", "GOOD", "--with", "medusa", "--text", "GOOD/model.safetensors"], ["not UTF-8"]),
    (["prepare", "GOOD", "--with", "medusa", "--text", "short.txt"], ["tokens of text"]),
    (["prepare", "GOOD", "--with", "medusa", "--steps", "0"], ["--steps"]),
]


@pytest.mark.parametrize(("arguments", "words"), OTHERS)
def test_bad_verb(home: Path, checkpoints: Path, arguments: list[str], words: list[str]) -> None:
    Path("short.txt").write_text("x = 1\n")
    good = str(checkpoints / "good")
    line = refused(home, *(argument.replace("GOOD", good) for argument in arguments))
    for word in words:
        assert word in line


def test_unwritable_ledger(home: Path, checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is measured, also to the user who may do everything."""
    (home / "file").write_text("")
    monkeypatch.setenv("HASTEN_HOME", str(home / "file" / "inside"))
    arguments = ("bench", str(checkpoints / "good"), "--with", "prompt_lookup", "--runner", "eager")
    assert "HASTEN_HOME" in refused(home, *arguments)
    for verb in (("limits",), ("ledger",)):
        assert "HASTEN_HOME" in refused(home, *verb)


def test_ledger_that_is_no_ledger(home: Path) -> None:
    (home / "home").mkdir()
    (home / "home" / "ledger.sqlite3").write_bytes(b"not a database, not at all" * 100)
    assert "not an SQLite database" in refused(home, "ledger")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "whole number"),
        ({"max_new_tokens": True}, "whole number"),
        ({"num_beams": 4}, "num_beams"),
        ({"max_new_token": 4}, "max_new_token"),
        ({"stop_strings": ["x"]}, "tokenizer"),
        ({"seed": -1, "do_sample": True}, "seed"),
    ],
)
def test_python_calls_say_the_same(
    checkpoints: Path, arguments: dict[str, object], problem: str
) -> None:
    with (
        hasten.apply(checkpoints / "good") as fast,
        pytest.raises(HastenError, match=problem),
    ):
        fast.generate(models.prompt(), **arguments)


# The real program: an own process each, so these are few.


@pytest.mark.parametrize(
    ("arguments", "home_is", "words"),
    [
        (["bench", "GOOD", "--with", "medus"], "home", "medusa"),
        (["generate", "CUT", "--prompt", "x", "--json"], "home", "damaged or cut short"),
        (["bench", "GOOD", "--with", "prompt_lookup", "--json"], "file/inside", "HASTEN_HOME"),
    ],
)
def test_the_program_itself(
    tmp_path: Path, checkpoints: Path, arguments: list[str], home_is: str, words: str
) -> None:
    (tmp_path / "file").write_text("")
    names = {"GOOD": str(checkpoints / "good"), "CUT": str(checkpoints / "cut")}
    arguments = [names.get(word, word) for word in arguments]
    assert words in refused_by_the_program(tmp_path, *arguments, home=home_is)
