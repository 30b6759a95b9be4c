"""The command line: verbs, JSON, progress, interruption. The verbs run in this process."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer.main
from rich.console import Console
from typer.testing import CliRunner, Result

from hasten import __version__, technique
from hasten.cli import app, shared
from hasten.measure import limits as limits_module
from hasten.measure.ledger import Entry, Ledger
from hasten.zoo import corpus, recipes
from tests import models

VERBS = ("list", "show", "bench", "limits", "ledger", "generate", "prepare", "train")
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a data folder and a working folder of its own, and 80 columns."""
    folder = tmp_path / "home"
    monkeypatch.setenv("HASTEN_HOME", str(folder))
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def run(*arguments: str | Path, code: int = 0, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    if (
        result.exit_code != code
        and result.exception
        and not isinstance(result.exception, SystemExit)
    ):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def run_json(*arguments: str | Path) -> dict[str, Any]:
    """The one object on stdout; anything beside it makes `loads` fail."""
    found = json.loads(run(*arguments, "--json").stdout)
    assert isinstance(found, dict)
    return found


# Help.


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples_that_parse(verb: str) -> None:
    result = run(verb, "--help")
    assert "Examples" in result.stdout
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    examples = [line for line in command.epilog.split("\n\n") if "hasten" in line]
    assert examples
    for example in examples:
        line = example.removeprefix("[cyan]").removesuffix("[/cyan]").split(" < ")[0]
        program, name, *arguments = shlex.split(line)
        assert (program, name) == ("hasten", verb)
        command.make_context(name, list(arguments), resilient_parsing=False).close()


def test_help_lists_all_verbs() -> None:
    listed = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert tuple(listed) == VERBS
    assert "Make a model faster, and prove it." in run("--help").stdout


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom hasten.cli import app\n"
        "assert CliRunner().invoke(app, ['bench', '--help']).exit_code == 0\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_module_and_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hasten", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"hasten {__version__}\n"


def test_unknown_option_and_verb_exit_with_2() -> None:
    assert "No such option" in run("list", "--nope", code=2).stderr
    assert "No such command" in run("lits", code=2).stderr


# list and show.


def test_list_shows_every_technique_in_80_columns() -> None:
    shown = run("list").stdout
    assert max(map(len, shown.splitlines())) <= 80
    for name in technique.names():
        assert name in shown


def test_list_json_narrows() -> None:
    everything = run_json("list")
    names = [one["name"] for one in everything["techniques"]]
    assert names == technique.names()
    family = everything["techniques"][0]["family"]
    narrowed = run_json("list", "--family", family, "--engine", "causal")["techniques"]
    assert narrowed and {one["family"] for one in narrowed} == {family}
    assert [one["name"] for one in run_json("list", "prompt_*")["techniques"]] == ["prompt_lookup"]
    assert run_json("list", "zzz*")["techniques"] == []
    assert "No technique matches" in run("list", "zzz*").stdout


def test_a_broken_third_party_technique_is_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modules = {**technique._modules(), "zz_broken": "no.such.module"}
    monkeypatch.setattr(technique, "_modules", lambda: modules)
    result = run("list")
    assert "prompt_lookup" in result.stdout and "zz_broken" not in result.stdout
    assert "zz_broken" in result.stderr
    assert "could not be imported" in run("show", "zz_broken", code=2).stderr


def test_show_technique() -> None:
    shown = run("show", "prompt_lookup").stdout
    for words in ("num_draft", "1 to 64", "drafter", "baseline"):
        assert words in shown
    data = run_json("show", "prompt_lookup")
    knobs = {knob["name"]: knob for knob in data["knobs"]}
    assert knobs["num_draft"]["type"] == "int" and knobs["num_draft"]["low"] == 1
    assert data["slots"] == ["causal.drafter"] and data["baseline"] is True


@pytest.mark.parametrize("name", sorted(technique.BUILT_IN))
def test_show_every_technique(name: str) -> None:
    assert run("show", name).stdout.startswith(name)
    assert run_json("show", name)["name"] == name


def test_show_model(tiny_checkpoint: Path) -> None:
    data = run_json("show", tiny_checkpoint)
    assert data["kind"] == "llama" and data["engine"] == "causal" and data["context"] == 512
    assert "drafter" in data["slots"] and "prompt_lookup" in data["techniques"]
    shown = run("show", tiny_checkpoint).stdout
    assert "llama" in shown and "drafter" in shown


@pytest.mark.zoo
def test_show_zoo_model() -> None:
    data = run_json("show", "code-lm-tiny")
    assert data["zoo"]["quality"]["bits_per_byte"] > 0
    assert "bits per byte" in run("show", "code-lm-tiny").stdout


# limits and ledger.


def test_limits_measures_once_and_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    short = partial(limits_module.measure_limits, seconds=0.2)
    monkeypatch.setattr(limits_module, "measure_limits", short)
    monkeypatch.setattr(limits_module, "WORKING_SETS", (limits_module.MIB,))
    monkeypatch.setattr(limits_module, "_streaming_bytes", lambda device: 8 * limits_module.MIB)
    first = run_json("limits")
    assert first["bandwidth"] > 0 and first["matrix_rate"]["fp32"] > 0
    assert run_json("limits") == first
    assert "read bandwidth" in run("limits").stdout
    assert run_json("limits", "--refresh") != first


def an_entry() -> Entry:
    row = {
        "plan": "prompt_lookup",
        "ratio": {"median": 1.25, "low": 1.1, "high": 1.4},
        "loss_class": "exact",
        "proof": {"passed": True, "detail": ""},
        "verdict": "faster",
    }
    return Entry("prompt_lookup", ("prompt_lookup",), "a-model", "00", "hasten bench", 1, 0, row)


def test_ledger_shows_claims_beside_measurements(tmp_path: Path) -> None:
    assert "nothing measured" in " ".join(run("ledger").stdout.split())
    book = Ledger()
    book.record(an_entry())
    book.record(replace(an_entry(), plan="medusa", techniques=("medusa",), subject="b-model"))
    entries = run_json("ledger")["entries"]
    assert [entry["plan"] for entry in entries] == ["prompt_lookup", "medusa"]
    assert entries[0]["row"]["ratio"]["median"] == 1.25 and entries[0]["stale"] == []
    assert entries[1]["claims"]["medusa"][0]["what"] == "speed-up"
    assert [e["plan"] for e in run_json("ledger", "--technique", "medusa")["entries"]] == ["medusa"]
    assert [e["plan"] for e in run_json("ledger", "--subject", "a-model")["entries"]] == [
        "prompt_lookup"
    ]
    assert (
        run_json("ledger", "--technique", "prompt_lookup", "--subject", "b-model")["entries"] == []
    )
    assert "1.25x" in run("ledger").stdout


def test_ledger_marks_what_no_longer_holds() -> None:
    entry = an_entry()
    Ledger().record(replace(entry, versions={**entry.versions, "torch": "0.1"}))
    (found,) = run_json("ledger")["entries"]
    assert any("torch" in reason for reason in found["stale"])
    assert "dim" in run("ledger").stdout


# generate.


def test_generate_streams_what_json_holds(tiny_checkpoint: Path) -> None:
    arguments = ("generate", tiny_checkpoint, "--prompt", "def f(x):", "--max-new-tokens", "12")
    result = run(*arguments)
    data = run_json(*arguments)
    assert data["text"] and result.stdout.rstrip("\n") == data["text"].rstrip("\n")
    assert "tokens/s" in result.stderr
    assert 1 <= len(data["ids"]) <= 12 and data["tokens_per_second"] > 0
    assert data["activity"]["emitted"] == len(data["ids"])


def test_generate_runs_a_plan_and_a_plan_file(tiny_checkpoint: Path) -> None:
    start = ("generate", tiny_checkpoint, "--prompt", "abcabcabc", "--max-new-tokens", "8")
    plain = run_json(*start)
    drafted = run_json(*start, "--with", "prompt_lookup(num_draft=2)")
    assert drafted["ids"] == plain["ids"] and drafted["activity"]["prompt_lookup.drafted"] > 0
    Path("plan.toml").write_text('[[technique]]\nname = "prompt_lookup"\nnum_draft = 2\n')
    from_file = run_json(*start, "--with", "plan.toml")
    assert from_file["plan"] == drafted["plan"] == "prompt_lookup(num_draft=2)"
    assert from_file["ids"] == plain["ids"]


def test_generate_samples_by_seed(tiny_checkpoint: Path) -> None:
    start = (
        "generate",
        tiny_checkpoint,
        "--prompt",
        "x",
        "--max-new-tokens",
        "16",
        "--temperature",
        "1.5",
    )
    first = run_json(*start, "--seed", "1", "--top-k", "50", "--top-p", "0.99")
    assert (
        run_json(*start, "--seed", "1", "--top-k", "50", "--top-p", "0.99")["ids"] == first["ids"]
    )
    assert (
        run_json(*start, "--seed", "2", "--top-k", "50", "--top-p", "0.99")["ids"] != first["ids"]
    )


def test_generate_reads_standard_input_and_stops(tiny_checkpoint: Path) -> None:
    start = ("generate", tiny_checkpoint, "--prompt", "-", "--max-new-tokens", "20", "--json")
    whole = json.loads(run(*start, stdin="import os\n").stdout)
    assert whole["prompt"] == "import os\n"
    stop = whole["text"][3]
    cut = json.loads(run(*start, "--stop", stop, stdin="import os\n").stdout)
    assert cut["text"] == whole["text"][: whole["text"].index(stop) + 1]


# prepare, and bench, and train.


def test_prepare_saves_parts_where_generate_finds_them(tiny_checkpoint: Path, home: Path) -> None:
    Path("a.py").write_text("\n".join(models.texts()))
    Path("b.py").write_text("\n".join(models.texts(seed=1)))
    arguments = (
        "prepare",
        tiny_checkpoint,
        "--with",
        "medusa(num_heads=1)",
        "--text",
        "*.py",
        "--steps",
        "2",
    )
    data = run_json(*arguments)
    (made,) = data["prepared"]
    assert made["technique"] == "medusa" and made["parameters"] > 0
    assert Path(made["path"]).is_file() and home in Path(made["path"]).parents
    found = run_json(
        "generate",
        tiny_checkpoint,
        "--with",
        "medusa(num_heads=1)",
        "--prompt",
        "def",
        "--max-new-tokens",
        "8",
    )
    assert found["activity"]["medusa.drafted"] > 0
    assert "trained values" in run(*arguments).stdout


def test_bench_hands_its_options_on(monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> None:
    seen: dict[str, Any] = {}

    class Found:
        def to_dict(self) -> dict[str, Any]:
            return {"rows": []}

    def measure(model: str, *plan: str, **options: Any) -> Found:
        print("a library that talks")
        seen.update(options, model=model, plan=plan)
        return Found()

    monkeypatch.setattr("hasten.benchmark.bench", measure)
    monkeypatch.setattr("sys.argv", ["hasten", "bench", "m", "--prompt", "a word"])
    Path("p.jsonl").write_text('"one"\n{"prompt": "two"}\n')
    options = "--runner eager --prompt zero --prompts p.jsonl --max-new-tokens 7 --block-length 1 --rounds 6 --pairs --no-quality"
    more = "--steps 9 --guidance 2.5 --argument height=64 --argument negative_prompt=dim --pictures 4 --no-prepare --no-record --seed 3 --threads 1 --dtype float32 --beside d2o"
    result = run(
        "bench",
        "m",
        "--with",
        "medusa, d2o",
        "--with",
        "x",
        *options.split(),
        *more.split(),
        "--json",
    )
    assert json.loads(result.stdout) == {"rows": []} and "a library" in result.stderr
    tick, command = seen.pop("tick"), seen.pop("command")
    assert callable(tick) and command == "hasten bench m --prompt 'a word'"
    assert seen == {
        "model": "m", "plan": ("medusa, d2o", "x"), "runner": "eager", "prompts": ["zero", "one", "two"],
        "max_new_tokens": 7, "block_length": 1, "steps": 9, "guidance": 2.5, "pictures": 4,
        "arguments": {"height": 64, "negative_prompt": "dim"}, "rounds": 6, "pairs": True, "quality": False, "prepare_missing": False,
        "record": False, "seed": 3, "threads": 1, "dtype": "float32", "beside": ["d2o"],
    }  # fmt: skip


def test_bench_prints_table_and_json_and_writes_report_and_ledger(tiny_checkpoint: Path) -> None:
    arguments = (
        "bench",
        tiny_checkpoint,
        "--with",
        "prompt_lookup(min_ngram=1)",
        "--runner",
        "eager",
    )
    short = ("--no-quality", "--max-new-tokens", "6", "--prompt", "abcabcabcabc", "--threads", "1")
    shown = run(*arguments, *short, "--report", "out/report.html").stdout
    assert "prompt_lookup" in shown and "baseline" in shown
    assert Path("out/report.html").read_text().startswith("<!DOCTYPE html>")
    data = run_json(*arguments, *short)
    assert {"machine", "subject", "baseline", "rows", "pairs"} <= data.keys()
    (row,) = data["rows"]
    assert row["plan"] == "prompt_lookup(min_ngram=1)" and row["proof"]["passed"] is True
    assert {
        "ratio",
        "ceiling",
        "reached",
        "activity",
        "loss_class",
        "verdict",
        "peak_bytes",
    } <= row.keys()
    assert len(run_json("ledger")["entries"]) == 2


def test_train_writes_a_model_that_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = corpus.default_corpus()
    little = corpus.Corpus(whole.train[:12], whole.held_out[:1])
    monkeypatch.setattr(recipes, "default_corpus", lambda: little)
    monkeypatch.setattr(recipes, "_shipped_tokenizer", lambda: None)
    arguments = (
        "train",
        "code-lm-tiny",
        "--output",
        "mine",
        "--max-tokens",
        "8192",
        "--threads",
        "1",
    )
    data = run_json(*arguments)
    assert data["path"] == "mine" and data["card"]["quality"]["bits_per_byte"] > 0
    assert run_json("generate", "mine", "--prompt", "import ", "--max-new-tokens", "4")["ids"]


# Progress and interruption.


def test_progress_shows_time_left_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        shared, "Console", lambda **options: Console(file=screen, force_terminal=True, width=80)
    )
    with shared.progress() as tick:
        for done in range(1, 4):
            tick(done, 3, "first [part]")
        tick(0, 2, "second part")
        tick(1, 2, "second part")
    drawn = screen.getvalue()
    assert "first [part]" in drawn and "second part" in drawn and "3/3" in drawn
    assert "0:00:00" in drawn or "-:--:--" in drawn  # the time left
    screen.truncate(0)
    with shared.progress(quiet=True) as tick:
        tick(1, 2, "nothing to see")
    monkeypatch.setattr(
        shared, "Console", lambda **options: Console(file=screen, force_terminal=False)
    )
    with shared.progress() as tick:
        tick(1, 2, "nothing to see")
    assert "nothing" not in screen.getvalue()


@pytest.fixture
def interrupt_soon() -> Any:
    """Send Ctrl-C to this process after a moment."""
    timer = threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.daemon = True
    yield timer
    timer.cancel()


def test_interrupted_prepare_leaves_nothing(
    tiny_checkpoint: Path, home: Path, interrupt_soon: threading.Timer
) -> None:
    Path("a.py").write_text("\n".join(models.texts(40)))
    interrupt_soon.start()
    result = run(
        "prepare",
        tiny_checkpoint,
        "--with",
        "medusa",
        "--text",
        "a.py",
        "--steps",
        "100000",
        code=130,
    )
    assert (
        result.stderr.splitlines()[-1].startswith("interrupted")
        and "Traceback" not in result.output
    )
    assert not list(home.rglob("*.safetensors")) and not list(home.rglob(".hasten-*"))
    assert [file.name for file in Path().iterdir()] == ["a.py"]


def test_interrupted_process_exits_with_130() -> None:
    """It waits for its prompt on standard input, before anything heavy is imported."""
    command = [sys.executable, "-m", "hasten", "generate", "code-lm", "--prompt", "-"]
    waiting = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with waiting:
        for _ in range(20):  # a signal during start-up would only test Python
            try:
                waiting.wait(0.5)
            except subprocess.TimeoutExpired:
                if Path(f"/proc/{waiting.pid}/wchan").exists() and _is_asleep(waiting.pid):
                    break
        waiting.send_signal(signal.SIGINT)
        out, err = waiting.communicate(timeout=60)
    assert waiting.returncode == 130 and out == ""
    assert err.splitlines()[-1].startswith("interrupted") and "Traceback" not in err


def _is_asleep(pid: int) -> bool:
    """Waiting for input rather than still importing (Linux tells; elsewhere time alone must do)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"
    except OSError:
        return True
