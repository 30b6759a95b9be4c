"""Bad input to models that fill masks: one clear line, in Python and on the command line.

It says what was given, what is allowed, and what to do. `test_masked_engine` holds further calls.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import hasten
from hasten import technique as registry
from hasten.benchmark.workload import make_workload
from hasten.causal.engine import CausalModel
from hasten.errors import HastenError, PlanError, SubjectError
from hasten.masked.engine import MaskedModel
from hasten.plan import Plan
from hasten.subject import open_subject
from tests import models
from tests.refusals import refused, refused_by_the_program
from tests.techniques.fillers import MASK, NEVER, filler, prompt

WORD = "<mask>"  # how the mask is written


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints: `masked` and `causal` with the same tokens, others wrong in one way."""
    root = tmp_path_factory.mktemp("checkpoints")
    tokenizer = models.tiny_tokenizer(models.CHARACTERS[:-1])
    tokenizer.add_special_tokens({"mask_token": WORD})
    assert tokenizer.mask_token_id == MASK
    odd: dict[str, dict[str, Any]] = {
        "masked": {},
        "no_mask": {"mask_token_id": None},
        "far_mask": {"mask_token_id": 96},
        "no_blocks": {"block_length": 0},
        "says_nothing": {"is_causal": True},  # names a mask, but not that it sees both ways
    }
    for name, config in odd.items():
        model = filler()
        for key, value in config.items():
            setattr(model.config, key, value)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    models.tiny_model().save_pretrained(root / "causal")
    models.tiny_tokenizer(models.CHARACTERS[:-1]).save_pretrained(root / "causal")
    turned = models.tiny_tokenizer(models.CHARACTERS[-2::-1])
    shutil.copytree(root / "causal", root / "turned")
    turned.save_pretrained(root / "turned")
    models.tiny_model(max_position_embeddings=12).save_pretrained(root / "short")
    models.tiny_tokenizer(models.CHARACTERS[:-1]).save_pretrained(root / "short")
    return root


def generate(model: Path | str, *arguments: str) -> tuple[str, ...]:
    return ("generate", str(model), "--prompt", "def f(x):", "--max-new-tokens", "4", *arguments)


def bench(model: Path | str, *arguments: str) -> tuple[str, ...]:
    return ("bench", str(model), "--max-new-tokens", "4", "--rounds", "5", *arguments)


# -- plans -----------------------------------------------------------------------------------------

PLANS = [
    ("sabre", ["Unknown technique 'sabre'", "saber"]),
    ("saber(n=2)", ["saber has no knob 'n'", "min_tokens"]),
    ("saber(min_tokens=0)", ["min_tokens=0", "allowed is 1 to inf"]),
    ("saber(min_tokens=1.5)", ["min_tokens=1.5 is a float", "must be int", "hasten show saber"]),
    ("saber(backtrack=most)", ["backtrack='most'", "'drop', 'confidence', 'random', 'none'"]),
    ("saber(accelerate=2)", ["accelerate=2", "must be bool"]),
    ("dinfer(decoder=hierarchy)", ["decoder='hierarchy'", "'hierarchical'"]),
    ("dinfer(threshold=3)", ["threshold=3.0", "allowed is 0 to 2"]),
    ("dinfer(threshold='high')", ["threshold='high'", "must be float"]),
    ("dinfer(cache=full)", ["cache='full'", "'none', 'prefix', 'dual'"]),
    ("dinfer(credit_decay=1.5)", ["credit_decay=1.5", "allowed is 0 to 1"]),
    ("dinfer(warmup_steps=-1)", ["warmup_steps=-1", "allowed is 0 to inf"]),
    ("freecache(rule=maybe)", ["rule='maybe'", "'relative'", "'never'"]),
    ("freecache(window=-1)", ["window=-1", "allowed is 0 to inf"]),
    ("freecache(ratio=2)", ["ratio=2.0", "allowed is 0 to 1"]),
    ("freecache(top_k=0)", ["top_k=0", "allowed is 1 to inf"]),
    ("freedave(num_draft=0)", ["num_draft=0", "allowed is 1 to 256"]),
    ("freedave(threshold=1.5)", ["threshold=1.5", "allowed is 0 to 1"]),
    ("fixed_steps(tokens_per_pass=0)", ["tokens_per_pass=0", "allowed is 1"]),
    ("confidence_threshold(threshold=nan)", ["threshold"]),
]

CLASHES = [
    ("saber, freecache", ["saber", "freecache", "slot 'committer'"]),
    ("saber, freecache(guided=False)", ["freecache needs places that stay fixed", "saber changes"]),
    ("saber, dinfer", ["saber", "dinfer", "slot 'committer'"]),
    ("saber, dinfer(decoder=none)", ["saber needs inputs that are nothing but tokens", "dinfer"]),
    (
        "saber, dinfer(decoder=none, smoothing=false, cache=prefix)",
        ["dinfer needs places that stay fixed", "saber changes"],
    ),
    ("freedave, saber", ["freedave", "saber", "slot 'committer'"]),
    ("freedave, dinfer", ["freedave", "dinfer", "slot 'committer'"]),
    (
        "freedave, dinfer(decoder=none, cache=none)",
        ["freedave needs inputs that are nothing but tokens", "dinfer changes"],
    ),
    (
        "freedave, dinfer(decoder=credit, cache=none, smoothing=false)",
        ["freedave", "dinfer", "slot 'committer'"],
    ),
    ("freedave, freecache", ["freedave", "freecache", "slot 'committer'"]),
    ("freedave, confidence_threshold", ["slot 'committer'"]),
    ("dinfer(decoder=none), freecache(guided=False)", ["slot 'window'"]),
    ("dinfer, fixed_steps", ["slot 'committer'"]),
    ("saber, saber(min_tokens=1)", ["saber stands in the plan twice"]),
]


@pytest.mark.parametrize(("plan", "words"), [*PLANS, *CLASHES])
def test_a_bad_plan(home: Path, checkpoints: Path, plan: str, words: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        hasten.apply(checkpoints / "masked", plan)
    line = refused(home, *generate(checkpoints / "masked", "--with", plan))
    assert line == f"error: {caught.value}"
    assert refused(home, *bench(checkpoints / "masked", "--with", plan)) == line
    for word in words:
        assert word in line
    if (plan, words) in CLASHES:
        assert "leave one of them out" in line or "name it once" in line


# -- the other engine ------------------------------------------------------------------------------

MASKED = [name for name in registry.names(engine="masked") if name != "freecache"]

STRANGERS = [
    ("masked", "medusa", "medusa is of the causal engine", "hasten list --engine masked"),
    ("masked", "prefix_kv(budget=0.5)", "prefix_kv is of the causal engine", "--engine masked"),
    ("masked", "zeus", "zeus is of the denoise engine", "--engine masked"),
    ("masked", "repr_align", "repr_align is of the training engine", "hasten train RECIPE --with"),
    *(
        ("causal", name, f"{name} is of the masked engine", "hasten list --engine causal")
        for name in (*MASKED, "freecache(guided=False)")
    ),
    ("says_nothing", "saber", "runs on the causal one", "is_causal false, and mask_token_id"),
    ("masked", "saber, medusa", "runs on one engine", "causal, masked"),
]


@pytest.mark.parametrize(("model", "plan", "words", "hint"), STRANGERS)
def test_a_technique_of_another_engine(
    home: Path, checkpoints: Path, model: str, plan: str, words: str, hint: str
) -> None:
    words = words.replace("freecache(guided=False)", "freecache")
    with pytest.raises(PlanError) as caught:
        hasten.apply(checkpoints / model, plan)
    assert words in str(caught.value) and hint in str(caught.value)
    for verb in (generate, bench):
        line = refused(home, *verb(checkpoints / model, "--with", plan))
        assert line == f"error: {caught.value}"


def test_a_model_in_the_wrong_engine(checkpoints: Path) -> None:
    """`apply` picks the engine; whoever names one is told which it should have been."""
    masked = open_subject(checkpoints / "masked")
    with pytest.raises(SubjectError, match="runs on the masked engine, not on the causal one"):
        CausalModel(masked, Plan(()))
    with hasten.apply(checkpoints / "causal") as reader:
        with pytest.raises(HastenError, match="reads from left to right; use generate, or a model"):
            reader.infill(prompt())  # type: ignore[union-attr]
        with pytest.raises(HastenError, match="block_length is for models that fill masks"):
            reader.generate(prompt(), max_new_tokens=4, block_length=2)


@pytest.mark.parametrize(
    "plan", ["draft_model(draft='{}')", "entropy_adaptive_decoding(small='{}')"]
)
def test_a_masked_model_is_no_second_model_of_a_causal_one(
    home: Path, checkpoints: Path, plan: str
) -> None:
    plan = plan.format(checkpoints / "masked")
    line = refused(home, *generate(checkpoints / "causal", "--with", plan))
    assert "runs on the masked engine" in line and "Name an autoregressive model" in line


# -- models ----------------------------------------------------------------------------------------

CONFIGS = [
    ("no_mask", ["reads both ways", "names no mask_token_id", "add the id of its mask"]),
    ("far_mask", ["mask_token_id=96", "allowed is 0 to 95"]),
    ("no_blocks", ["block_length=0", "whole number of 1 or more"]),
]


@pytest.mark.parametrize(("name", "words"), CONFIGS)
def test_a_config_that_cannot_be_followed(
    home: Path, checkpoints: Path, name: str, words: list[str]
) -> None:
    with pytest.raises(SubjectError) as caught:
        hasten.apply(checkpoints / name, "saber")
    for verb in (generate, bench):
        line = refused(home, *verb(checkpoints / name, "--with", "saber"))
        assert line == f"error: {caught.value}"
    for word in words:
        assert word in line


GUIDES = [
    ("turned", ["another tokenizer", "guided=False"]),
    ("masked", ["fills masks too", "from left to right"]),
    ("nowhere", ["There is no folder"]),
    ("short", ["text is 13 tokens long", "was made for 12", "Shorten"]),
]


@pytest.mark.parametrize(("guide", "words"), GUIDES)
def test_a_guide_that_cannot_guide(
    home: Path, checkpoints: Path, guide: str, words: list[str]
) -> None:
    plan = f"freecache(guide='{checkpoints / guide}')"
    line = refused(home, *generate(checkpoints / "masked", "--with", plan))
    for word in words:
        assert word in line


# -- the command line ------------------------------------------------------------------------------

SETTINGS = [
    (["--block-length", "3"], ["block_length=3 does not divide max_new_tokens=4", "give 2, or"]),
    (["--block-length", "0"], ["--block-length"]),
    (["--prompt", f"def {WORD}"], [f"holds the mask (id {MASK})"]),
    (["--prompt", ""], ["prompt is empty"]),
    (["--prompt", "x" * 510], ["together 514", "was made for 512"]),
    (["--max-new-tokens", "0"], ["max_new_tokens=0"]),
    (["--temperature", "-1"], ["temperature=-1"]),
    (["--stop", "x"], ["stop_strings is not supported", "cut the text afterwards"]),
    (["--guidance", "3"], ["--guidance", "masked"]),
    (["--output", "a.png"], ["--output is for pictures"]),
]


@pytest.mark.parametrize(("arguments", "words"), SETTINGS)
def test_a_bad_setting(
    home: Path, checkpoints: Path, arguments: list[str], words: list[str]
) -> None:
    line = refused(home, *generate(checkpoints / "masked", "--with", "saber", *arguments))
    for word in words:
        assert word in line


BENCHES = [
    (["--block-length", "3"], ["block_length=3 does not divide max_new_tokens=4"]),
    (["--block-length", "0"], ["--block-length"]),
    (["--prompt", f"def {WORD}"], [f"A prompt holds the mask (id {MASK})", "without it"]),
    (["--prompt", ""], ["prompt is empty"]),
    (["--max-new-tokens", "512"], ["no room for a prompt"]),
    (["--beside", "medusa"], ["medusa is of the causal engine"]),
]


@pytest.mark.parametrize(("arguments", "words"), BENCHES)
def test_a_bad_benchmark_measures_nothing(
    home: Path,
    checkpoints: Path,
    arguments: list[str],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("something was measured before the input was checked")

    monkeypatch.setattr("hasten.benchmark.masked.limits", never)
    line = refused(home, *bench(checkpoints / "masked", "--with", "saber", *arguments))
    for word in words:
        assert word in line


OTHERS = [
    (["generate", "CAUSAL", "--prompt", "x", "--block-length", "2"], ["--block-length is for mod"]),
    (["bench", "CAUSAL", "--with", "prompt_lookup", "--block-length", "2"], ["models that fill"]),
    (["prepare", "MASKED", "--with", "saber"], ["saber has nothing to prepare"]),
    (["prepare", "MASKED", "--with", "medusa"], ["medusa is of the causal engine", "masked one"]),
    (["train", "code-dlm", "--with", "saber", "--output", "new"], ["saber", "no loss term"]),
    (["train", "code-dlm", "--with", "repr_align(weight=-1)"], ["weight=-1.0", "allowed is 0"]),
    (["train", "code-dlm", "--with", "repr_align(teacher=me)"], ["teacher='me'", "'model'"]),
    (["train", "code-lm-tiny", "--with", "repr_align"], ["takes no techniques"]),
]


@pytest.mark.parametrize(("arguments", "words"), OTHERS)
def test_a_bad_verb(home: Path, checkpoints: Path, arguments: list[str], words: list[str]) -> None:
    names = {"CAUSAL": str(checkpoints / "causal"), "MASKED": str(checkpoints / "masked")}
    line = refused(home, *(names.get(word, word) for word in arguments))
    for word in words:
        assert word in line


def test_the_program_itself(tmp_path: Path, checkpoints: Path) -> None:
    arguments = generate(checkpoints / "masked", "--with", "saber, freecache", "--json")
    assert "slot 'committer'" in refused_by_the_program(tmp_path, *arguments)


# -- calls in Python -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fast() -> Iterator[MaskedModel]:
    with hasten.apply(filler(), "saber") as applied:
        assert isinstance(applied, MaskedModel)
        yield applied


def masks(rows: int = 1, length: int = 12) -> torch.Tensor:
    return torch.full((rows, length), MASK)


Call = Callable[[MaskedModel], Any]

CALLS: list[tuple[Call, str]] = [
    (lambda f: f.generate("def f(x):"), "input_ids is missing or no tensor"),
    (lambda f: f.generate([[1, 2]]), "input_ids is missing or no tensor"),
    (lambda f: f.generate(prompt()[None]), r"shape \(1, 1, 12\).* of shape \(batch, length\)"),
    (lambda f: f.generate(prompt().float()), r"dtype torch\.float32; it must be whole numbers"),
    (lambda f: f.generate(prompt().bool()), r"dtype torch\.bool; it must be whole numbers"),
    (lambda f: f.generate(prompt().cfloat()), r"dtype torch\.complex64; it must be whole numbers"),
    (lambda f: f.generate(prompt()[:0]), "prompt is empty"),
    (lambda f: f.generate(prompt() + 96), r"holds token id \d+; allowed is 0 to 95"),
    (lambda f: f.generate(-prompt()), r"holds token id -\d+; allowed is 0 to 95"),
    (lambda f: f.generate(prompt(), [[1] * 12]), "attention_mask is a list; it must be a tensor"),
    (
        lambda f: f.generate(prompt(), torch.ones(1, 11)),
        r"has shape \(1, 11\), input_ids \(1, 12\)",
    ),
    (lambda f: f.generate(prompt(2), torch.ones(1, 12)), r"\(1, 12\), input_ids \(2, 12\)"),
    (lambda f: f.generate(prompt(), torch.full((1, 12), 0.5)), "other values than 0 and 1"),
    (lambda f: f.generate(prompt(), torch.full((1, 12), -1)), "other values than 0 and 1"),
    (lambda f: f.generate(prompt(1, 30)), "max_length=20, which .* prompt of 30 .* max_new_tokens"),
    (lambda f: f.generate(prompt(), max_length=12), "max_length=12 leaves no room"),
    (lambda f: f.generate(prompt(), max_length="12"), "max_length='12' must be a whole number"),
    (lambda f: f.generate(prompt(), max_new_tokens="4"), "max_new_tokens='4' must be a whole"),
    (
        lambda f: f.generate(prompt(), max_new_tokens=4, block_length="2"),
        "block_length='2'; it must",
    ),
    (lambda f: f.generate(prompt(), max_new_tokens=4, block_length=-1), "block_length=-1; it must"),
    (lambda f: f.generate(prompt(), max_new_tokens=4, seed="a"), "seed='a' must be a whole"),
    (lambda f: f.generate(prompt(), max_new_tokens=4, seed=1.5), "seed=1.5 must be a whole"),
    (lambda f: f.generate(prompt(), max_new_tokens=4, seed=-1), "seed=-1 is out of range"),
    (lambda f: f.generate(prompt(), max_new_tokens=4, top_k=2.5), "top_k=2.5 must be a whole"),
    (lambda f: f.generate(prompt(), max_new_tokens=4, do_sample="no"), "do_sample='no' must be"),
    (
        lambda f: f.generate(prompt(), max_new_tokens=4, eos_token_id="x"),
        "eos_token_id='x' must be",
    ),
    (
        lambda f: f.generate(prompt(), max_new_tokens=4, pad_token_id="x"),
        "pad_token_id='x' must be",
    ),
    (lambda f: f.generate(prompt(), max_new_tokens=4, pad_token_id=96), "=96; allowed is 0 to 95"),
    (lambda f: f.generate(prompt(), max_new_tokens=4, pad_token_id=[1, 2]), "must be one token id"),
    (lambda f: f.generate(prompt(), generation_config={}), "generation_config is a dict; it must"),
    (lambda f: f.generate(prompt(), max_new_tokens=4, streamer=print), "must have put and end"),
    (
        lambda f: f.generate(
            prompt(), generation_config=GenerationConfig(max_new_tokens=4, num_beams=3)
        ),
        "num_beams=3 is not supported",
    ),
    (lambda f: f.infill("a"), "input_ids is missing"),
    (lambda f: f.infill(masks()[0]), r"of shape \(batch, length\)"),
    (lambda f: f.infill(prompt(2)), r"holds no mask \(id 95\), so there is nothing to fill"),
    (lambda f: f.infill(torch.cat((masks(), prompt()))), "A row of input_ids holds no mask"),
    (lambda f: f.infill(masks(), torch.ones(1, 3)), r"\(1, 3\), input_ids \(1, 12\)"),
    (lambda f: f.infill(masks(), torch.zeros(1, 12)), "all zero: that prompt is empty"),
    (lambda f: f.infill(masks(), torch.tensor([[1] * 11 + [0]])), "padded on the right"),
    (lambda f: f.infill(masks(), block_length=0), "block_length=0; it must be"),
    (lambda f: f.infill(masks(), return_dict_in_generate=True), "infill fills the masks that are"),
    (lambda f: f.infill(masks(), num_beams=2), "num_beams=2 is not supported"),
    (lambda f: f.infill(masks(1, 513)), "was made for 512"),
]


@pytest.mark.parametrize(("call", "words"), CALLS)
def test_a_bad_call(fast: MaskedModel, call: Call, words: str) -> None:
    with pytest.raises(HastenError, match=words) as caught:
        call(fast)
    assert "\n" not in str(caught.value)
    assert re.search(r"[.]$", str(caught.value))
    assert fast.generate(prompt(), max_new_tokens=2).shape == (1, 14)  # it goes on working


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_ids_may_be_of_any_whole_numbers(fast: MaskedModel, dtype: torch.dtype) -> None:
    settings = {"max_new_tokens": 8, "repetition_penalty": 1.2, **NEVER}
    wanted = fast.generate(prompt(2), **settings)
    found = fast.generate(prompt(2).to(dtype), torch.ones(2, 12, dtype=torch.bool), **settings)
    assert torch.equal(found, wanted) and found.dtype == torch.int64
    holes = prompt(2)
    holes[:, 3:7] = MASK
    assert torch.equal(fast.infill(holes.to(dtype)), fast.infill(holes))


def test_random_prompts_of_a_benchmark_hold_no_mask() -> None:
    """A model without a tokenizer is timed on random ids."""
    subject = open_subject(filler())
    work = make_workload(subject, prompts=None, max_new_tokens=8, seed=0, quality=False)
    ids = torch.cat(work.prompts)
    assert ids.numel() > 1000 and not bool((ids == MASK).any())
