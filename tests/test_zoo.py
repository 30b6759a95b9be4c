"""The zoo: corpus, tokenizer, recipes, catalogue and the models that ship."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hasten.errors import HastenError
from hasten.training import Stage
from hasten.zoo import catalogue, corpus, recipes
from hasten.zoo.corpus import Corpus
from hasten.zoo.score import bits_per_byte, xz_bits_per_byte
from hasten.zoo.tokenizer import train_tokenizer

SHIPPED = ("code-lm", "code-lm-small", "code-lm-tiny")
CONVERTED = ("code-dlm", "code-dlm-block")
PICTURES = ("scenes-dit", "scenes-unet", "scenes-video")  # tested in test_scenes_models


@pytest.fixture(scope="module")
def library() -> Corpus:
    return corpus.default_corpus()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(catalogue.path("code-lm"))


@pytest.fixture(scope="module")
def little(library: Corpus) -> Corpus:
    """Enough text for a run of seconds."""
    short = [file for file in library.held_out if 1_000 < file.num_bytes < 3_000]
    return Corpus(library.train[:40], tuple(short[:3]))


@pytest.fixture(scope="module")
def tiny() -> recipes.Recipe:
    """code-lm-tiny with batches of one short sequence, for runs of seconds."""
    full = recipes.recipe("code-lm-tiny")
    stages = (Stage(length=128, share=0.5), Stage(length=256, share=0.5))
    settings = replace(full.training, batch_tokens=512, stages=stages, tokens=512 * 30)
    return replace(full, training=settings)


# The corpus.


def test_split_is_disjoint_in_paths_and_in_texts(library: Corpus) -> None:
    assert len(library.train) > 300 and len(library.held_out) >= 20
    for key in ("path", "sha256"):
        train = {getattr(file, key) for file in library.train}
        held_out = {getattr(file, key) for file in library.held_out}
        assert not train & held_out
        assert len(train) == len(library.train)
    assert all(corpus.is_held_out(file.path) for file in library.held_out)
    assert not any(corpus.is_held_out(file.path) for file in library.train)


def test_split_takes_about_its_share() -> None:
    held_out = sum(corpus.is_held_out(f"folder/file{i}.py") for i in range(10_000))
    assert held_out / 10_000 == pytest.approx(corpus.HOLD_OUT_SHARE, rel=0.2)


def test_collect_skips_what_it_should(tmp_path: Path) -> None:
    for name in ("b.py", "copy_of_b.py", "folder/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"x = {name.endswith('c.py')}\n")
    for folder in ("test", "site-packages", "__pycache__", "folder/tests", "config-3.11"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "skipped.py").write_text(f"skipped = {folder!r}\n")
    (tmp_path / "_sysconfigdata_x.py").write_text("path = 1\n")
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "latin.py").write_bytes(b"s = '\xe9'\n")
    (tmp_path / "windows.py").write_bytes(b"y = 1\r\n")
    found = corpus.collect(tmp_path)
    files = {file.path: file.text for file in (*found.train, *found.held_out)}
    assert files == {"b.py": "x = False\n", "folder/c.py": "x = True\n", "windows.py": "y = 1\r\n"}
    assert corpus.collect(tmp_path) == found


def test_collect_refuses_a_folder_without_sources(tmp_path: Path) -> None:
    with pytest.raises(HastenError, match="no Python sources"):
        corpus.collect(tmp_path)


def test_held_out_files_round_trip(tmp_path: Path) -> None:
    files = corpus.shipped_held_out()
    corpus.save_held_out(files, tmp_path / "files.json.gz")
    shipped = Path(corpus.__file__).parent / "data" / "held_out"
    assert (tmp_path / "files.json.gz").stat().st_size < 300_000
    assert (shipped / "LICENSE.txt").is_file()
    listed = catalogue.card("code-lm")["data"]["held_out"]
    assert [entry["sha256"] for entry in listed] == [file.sha256 for file in files]


# The tokenizer.


@pytest.mark.parametrize(
    "text",
    [
        "def f(self, x):\n        return x\n",
        "\ttabs\r\nand  spaces   \n\n\n",
        "naïve 日本語 \U0001f40d \x00",
        " leading",
        "",
        "<|endoftext",
    ],
)
def test_tokenizer_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_entries(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 4096
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert tokenizer.bos_token is None
    assert tokenizer.padding_side == "left"


def test_tokenizer_training_is_deterministic(little: Corpus) -> None:
    texts = [file.text for file in little.train[:10]]
    first, second = (train_tokenizer(texts, vocabulary_size=400) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) == 400


def test_tokenized_files_end_with_end_of_text(
    tokenizer: PreTrainedTokenizerFast, little: Corpus
) -> None:
    ids = corpus.tokenize(little.held_out, tokenizer)
    assert all(file[-1] == tokenizer.eos_token_id for file in ids)
    assert tokenizer.decode(ids[0][:-1].tolist()) == little.held_out[0].text


# Scoring.


class Uniform(nn.Module):
    """Knows nothing: every token is as likely as any other."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 4096))


@pytest.mark.parametrize(("context", "stride"), [(2048, None), (16, 16), (16, 5), (7, 1)])
def test_bits_per_byte_of_a_uniform_model(
    tokenizer: PreTrainedTokenizerFast, context: int, stride: int | None
) -> None:
    texts = ["import os\n" * 20, "x = 'é'\n"]
    num_tokens = sum(len(tokenizer(text)["input_ids"]) for text in texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    measured = bits_per_byte(Uniform(), tokenizer, texts, context=context, stride=stride)
    assert measured == pytest.approx(12 * num_tokens / num_bytes, rel=1e-5)


def test_bits_per_byte_refuses(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(HastenError, match="no text"):
        bits_per_byte(Uniform(), tokenizer, [""])
    with pytest.raises(HastenError, match="stride"):
        bits_per_byte(Uniform(), tokenizer, ["x"], context=8, stride=9)


# Recipes.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "head dimension"),
        ({"kv_heads": 3}, "does not divide"),
        ({"context": 128}, "longer than"),
    ],
)
def test_recipe_refuses(tiny: recipes.Recipe, change: dict[str, int], message: str) -> None:
    with pytest.raises(HastenError, match=message):
        replace(tiny, **change)  # type: ignore[arg-type]


def test_train_refuses(tmp_path: Path, tiny: recipes.Recipe, little: Corpus) -> None:
    with pytest.raises(HastenError, match="no recipe named 'code-xl'; there are code-lm,"):
        recipes.train("code-xl", tmp_path / "model")
    with pytest.raises(HastenError, match="threads is 0"):
        recipes.train(tiny, tmp_path / "model", threads=0, corpus=little, quiet=True)
    with pytest.raises(HastenError, match="less than one batch"):
        recipes.train(tiny, tmp_path / "model", max_tokens=3, corpus=little, quiet=True)
    precious = tmp_path / "thesis.txt"
    precious.write_text("years of work")
    with pytest.raises(HastenError, match="is no zoo model"):
        recipes.train(tiny, tmp_path, corpus=little, quiet=True)
    assert precious.read_text() == "years of work"


def test_recipes_name_themselves() -> None:
    assert list(recipes.RECIPES) == [*SHIPPED, *CONVERTED]
    for name, recipe in recipes.RECIPES.items():
        assert recipe.name == name
        if isinstance(recipe, recipes.Conversion):
            assert recipe.base in recipes.RECIPES
            continue
        assert recipe.training.stages[-1].length == recipe.context
        assert recipe.training.stages[-1].share >= 0.35


@pytest.mark.slow
def test_training_lowers_the_loss_and_repeats(
    tmp_path: Path, tiny: recipes.Recipe, little: Corpus
) -> None:
    first = recipes.train(tiny, tmp_path / "a", threads=1, corpus=little, quiet=True)
    scores = [entry["held_out_bits_per_byte"] for entry in first.training["evaluations"]]
    assert scores[-1] < 0.95 * scores[0]
    assert first.training["steps"] == 30
    assert json.loads((tmp_path / "a" / "card.json").read_text())["sha256"] == first.sha256
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a"]
    # Again on top of itself: the old model is replaced, and the seed decides the result.
    again = recipes.train(tiny, tmp_path / "a", threads=1, corpus=little, quiet=True)
    assert again.sha256 == first.sha256
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a"]


@pytest.mark.slow
def test_interrupted_training_resumes_to_the_same_model(
    tmp_path: Path, tiny: recipes.Recipe, little: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recipes.train(tiny, tmp_path / "whole", threads=1, corpus=little, quiet=True)
    batch = corpus.PackedTokens.batch

    def interrupting(self: corpus.PackedTokens, index: int, rows: int, length: int) -> Tensor:
        if (length, index) == (128, 10):
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, index, rows, length)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(corpus.PackedTokens, "batch", interrupting)
        recipes.train(tiny, tmp_path / "cut", threads=1, corpus=little, quiet=True)
    assert not (tmp_path / "cut").exists()
    resumed = recipes.train(
        tiny, tmp_path / "cut", threads=1, corpus=little, resume=True, quiet=True
    )
    assert resumed.sha256 == whole.sha256
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cut", "whole"]


_KILLED_WHILE_EXPORTING = """
import os, signal, sys
from dataclasses import asdict, replace
from pathlib import Path
from hasten.training import Stage
from hasten.zoo import corpus, recipes

def die(self, path):
    path.write_text('{"name":')
    os.kill(os.getpid(), signal.SIGKILL)

recipes.Card.save = die
full = recipes.recipe("code-lm-tiny")
stages = (Stage(length=128, share=1.0),)
settings = replace(full.training, batch_tokens=128, stages=stages, tokens=512)
files = [corpus.SourceFile(f"{i}.py", "import os\\nprint(os.name)\\n" * 50) for i in range(9)]
recipes.train(
    replace(full, training=settings),
    Path(sys.argv[1]) / "zoo" / "killed",
    corpus=corpus.Corpus(tuple(files[1:]), tuple(files[:1])),
    quiet=True,
)
"""


@pytest.mark.slow
def test_kill_while_exporting_leaves_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(recipes.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _KILLED_WHILE_EXPORTING, str(tmp_path)],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "zoo" / "killed").exists()
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path))
    assert "killed" not in catalogue.names()  # nor is the folder that was being written one


# The catalogue.


def test_catalogue_lists_shipped_and_own_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path))
    assert catalogue.names() == sorted((*SHIPPED, *CONVERTED, *PICTURES))
    own = catalogue.user_path("mine")
    own.mkdir(parents=True)
    assert not catalogue.is_zoo_name("mine")  # empty: no model yet
    for name in ("config.json", "model.safetensors", "card.json"):
        (own / name).write_text("{}")
    assert catalogue.path("mine") == own == tmp_path / "zoo" / "mine"
    assert catalogue.card("mine") == {}
    (own / "card.json").write_text("{")
    with pytest.raises(HastenError, match="cannot read"):
        catalogue.card("mine")


@pytest.mark.parametrize("name", ["nothing", "", ".", "../weights/code-lm", "code-lm/", "CODE-LM"])
def test_catalogue_refuses_unknown_names(name: str) -> None:
    assert not catalogue.is_zoo_name(name)
    with pytest.raises(HastenError, match="no zoo model named"):
        catalogue.path(name)


def test_held_out_without_the_shipped_files(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = catalogue.held_out_files("code-lm")
    assert shipped == [file.text for file in corpus.shipped_held_out()]
    monkeypatch.setattr(catalogue, "shipped_held_out", tuple)
    assert len(catalogue.held_out_files("code-lm")) > 10  # from this Python's library


# The models that ship.


@pytest.mark.zoo
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_model_is_what_its_card_says(name: str) -> None:
    folder, card = catalogue.path(name), catalogue.card(name)
    assert folder.parent == catalogue.SHIPPED
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert card["sha256"] == digest
    assert card["name"] == name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) == card["num_parameters"]
    assert (model.config.eos_token_id, model.config.pad_token_id) == (0, 1)
    assert model.generation_config.do_sample is False
    assert card["recipe"] == json.loads(json.dumps(asdict(recipes.RECIPES[name])))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("import os\n\ndef", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=4)
    assert ids.shape[1] <= inputs["input_ids"].shape[1] + 4


def test_shipped_models_are_small_and_share_a_tokenizer() -> None:
    # Trained parts of techniques may lie in folders beside; they are not counted here.
    files = [file for name in SHIPPED for file in catalogue.path(name).iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 20_000_000
    vocabularies = [(catalogue.path(name) / "tokenizer.json").read_bytes() for name in SHIPPED]
    assert len(set(vocabularies)) == 1


@pytest.mark.zoo
def test_shipped_models_know_code(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = catalogue.held_out_files("code-lm")
    xz = xz_bits_per_byte(texts)
    scores = []
    for name in SHIPPED:
        model = AutoModelForCausalLM.from_pretrained(catalogue.path(name)).eval()
        scores.append(bits_per_byte(model, tokenizer, texts, context=512, max_bytes=30_000))
    assert scores[0] < scores[1] < scores[2]
    assert scores[0] < xz and scores[1] < xz


@pytest.mark.zoo
def test_shipped_model_uses_more_context_than_a_screenful(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(catalogue.path("code-lm")).eval()
    longest = max(catalogue.held_out_files("code-lm"), key=len)[:12_000]
    scores = [bits_per_byte(model, tokenizer, [longest], context=n) for n in (128, 256, 512)]
    assert scores[2] < scores[1] < scores[0]
    assert scores[2] < 0.98 * scores[0]
