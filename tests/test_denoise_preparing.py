"""Trained parts for pipelines: what a benchmark trains before it measures, and `hasten prepare`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import hasten
from hasten import technique as registry
from hasten.benchmark.calls import plain_prompts, training_prompts
from hasten.cli import app
from hasten.denoise.call_settings import KINDS, settings_of
from hasten.denoise.network import networks
from hasten.denoise.step_counts import for_steps
from hasten.errors import HastenError, PlanError
from hasten.parts import default_path, find
from hasten.parts import save as save_part
from hasten.plan import Plan
from hasten.subject import open_subject
from tests import pipelines

STEPS = 4
SEARCH = "auto_diffusion(steps=2, population=2, generations=0, samples=2, batch=2)"
OPTIONS: dict[str, Any] = {
    "steps": STEPS,
    "guidance": 2.5,
    "pictures": 1,
    "rounds": 5,
    "runner": "eager",
    "quality": False,
    "record": False,
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder of the test's own, so that no part is there yet."""
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@contextmanager
def watched(pipe: Any) -> Iterator[list[int]]:
    """The rows of each call of a pipeline's network."""
    calls: list[int] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(len(args[0] if args else kwargs["hidden_states"]))

    handle = networks(pipe)[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


# ---------------------------------------------------------------------------- in a benchmark
def test_a_benchmark_trains_what_is_missing_for_its_own_calls(home: Path) -> None:
    pipe, said = pipelines.tiny("dit"), list[str]()
    plan = ["harmonica", "fewer_steps"]
    options = OPTIONS | {"tick": lambda done, total, message: said.append(message)}
    result = hasten.bench(pipe, plan[0], beside=["mag_cache", SEARCH], **options).to_dict()
    # What the plan does not say of its steps follows the benchmark's.
    assert [row["plan"] for row in result["rows"]] == [f"harmonica(steps={STEPS})"]
    assert [row["plan"] for row in result["beside"]] == ["mag_cache", SEARCH]
    assert all(row["verdict"] != "broken" for row in result["rows"])
    subject = open_subject(pipe)
    found = {t.name: find(t, subject.hash) for t in Plan.parse(f"harmonica(steps={STEPS})")}
    assert found["harmonica"] is not None and len(found["harmonica"]["logits"]) == STEPS
    ratios = find(*Plan.parse("mag_cache"), subject.hash)
    assert ratios is not None and len(ratios["ratios"]) == STEPS
    assert find(*Plan.parse(SEARCH), subject.hash) is not None
    trained = [words for words in said if words.startswith("training ")]
    for number, name in enumerate((f"harmonica(steps={STEPS})", "mag_cache", SEARCH), start=1):
        assert any(words.startswith(f"training {name} ({number} of 3)") for words in trained), name
    # What is measured is something else than what was trained on, and nothing is trained twice.
    assert not set(training_prompts(subject)) & set(plain_prompts(pipe))
    said.clear()
    hasten.bench(pipe, "harmonica", **options)
    assert not [words for words in said if words.startswith("training")]


def test_a_missing_part_is_one_error_before_anything_runs(home: Path) -> None:
    pipe = pipelines.tiny("sd3")
    with watched(pipe) as calls, pytest.raises(PlanError) as raised:
        hasten.bench(
            pipe, "harmonica", beside=["mag_cache", "easy_cache"], prepare_missing=False, **OPTIONS
        )
    words = str(raised.value)
    assert not calls and "\n" not in words and "easy_cache" not in words
    assert f"harmonica(steps={STEPS}), mag_cache" in words
    assert (
        f'hasten prepare StableDiffusion3Pipeline --with "harmonica(steps={STEPS})" --with "mag_cache"'
        in words
    )
    assert not list(home.rglob("*.safetensors"))


def test_nothing_is_trained_for_a_call_that_the_pipeline_refuses(home: Path) -> None:
    with pytest.raises(HastenError, match="refuses this call: height and width"):
        hasten.bench(pipelines.tiny("sd3"), "harmonica", **OPTIONS, arguments={"height": 17})
    assert not list(home.rglob("*.safetensors"))


def test_the_guidance_that_is_measured_is_trained_with(home: Path) -> None:
    """Without guidance a pipeline computes one row, in training too."""
    rows = {}
    for guidance in (1.0, 3.0):
        pipe = pipelines.tiny("dit")
        with watched(pipe) as calls:
            hasten.bench(pipe, "mag_cache", **OPTIONS | {"guidance": guidance})
        rows[guidance] = set(calls)
    assert rows == {1.0: {1}, 3.0: {2}}
    assert len(list(home.rglob("mag_cache*"))) == 2


# ----------------------------------------------------------------- settings of the call
RATIOS: dict[str, Any] = {"prompts": ["a", "b"], "steps": 1}


def usual(**more: Any) -> dict[str, Any]:
    """Settings of a cheap call, with others in their place."""
    return {"height": 16, "width": 16, "num_inference_steps": 3, "guidance_scale": 3.0} | more


def differing(of: str, **more: Any) -> bool:
    """Whether a setting of such a call is another one."""
    pipe = pipelines.tiny("sd3")
    return settings_of(pipe, usual())[of] != settings_of(pipe, usual(**more))[of]


def test_settings_of_a_call() -> None:
    assert differing("steps", num_inference_steps=4) and not differing("size", guidance_scale=4.0)
    assert differing("size", height=32) and not differing("guidance", height=32, prompt="b")
    assert differing("guidance", guidance_scale=4.0) and not differing("guidance", guidance_scale=3)
    assert differing("scheduler", sigmas=[1.0, 0.5])
    assert differing("scheduler", sigmas="few")  # which the pipeline refuses, not this
    # What is left out counts as its default.
    assert not differing("steps", num_inference_steps=3) and not differing("size")
    pipe = pipelines.tiny("sd3")
    assert (
        settings_of(pipe, {})["guidance"] == settings_of(pipe, {"guidance_scale": 7.0})["guidance"]
    )
    other = pipelines.tiny("sd3", scheduler="FlowMatchHeunDiscreteScheduler")
    shifted = pipelines.tiny("sd3")
    shifted.scheduler.register_to_config(shift=2.0)
    known = [settings_of(one, usual())["scheduler"] for one in (pipe, other, shifted)]
    assert known[0] not in known[1:] and known[1] != known[2]
    assert json.loads(json.dumps(settings_of(pipe, usual()))) == settings_of(pipe, usual())
    for slug in registry.names(engine="denoise"):
        assert set(registry.get(slug).part_settings) <= set(KINDS), slug


def test_a_negative_prompt_turns_some_guidance_on() -> None:
    pipe = pipelines.tiny("flux")
    assert (
        settings_of(pipe, {"negative_prompt": "b"})["guidance"] != settings_of(pipe, {})["guidance"]
    )


def test_a_call_gets_the_parts_that_were_made_for_it() -> None:
    pipe, made = pipelines.tiny("sd3"), {}
    for guidance in (2.0, 8.0):
        arguments = usual(guidance_scale=guidance)
        made[guidance] = hasten.prepare(pipe, "mag_cache", arguments=arguments, **RATIOS)
    ratios = {scale: found["mag_cache"]["ratios"] for scale, found in made.items()}
    assert not torch.equal(*ratios.values())
    with hasten.apply(pipe, "mag_cache(threshold=9.0)") as fast:
        for guidance in (2.0, 8.0, 2.0):
            more = {"num_inference_steps": 3, "guidance_scale": guidance, "negative_prompt": None}
            fast(**pipelines.call("sd3", **more))
            assert torch.equal(fast.parts["mag_cache"]["ratios"], ratios[guidance])
            ((_, bound),) = fast.bound
            assert torch.equal(bound["ratios"], ratios[guidance])


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"guidance_scale": 4.0}, "is for guidance_scale=3.0, and this call has guidance_scale=4.0"),
    ({"height": 32}, "is for height=16, and this call has height=32"),
    ({"num_inference_steps": 5}, "is for num_inference_steps=3, and"),
]


@pytest.mark.parametrize(("more", "words"), OTHERS)
def test_a_call_that_no_parts_were_made_for_is_refused(
    more: dict[str, Any], words: str, tmp_path: Path
) -> None:
    pipe = pipelines.tiny("sd3")
    made = hasten.prepare(pipe, "mag_cache", arguments=usual(), **RATIOS)
    with hasten.apply(pipe, "mag_cache") as fast:
        fast(**pipelines.call("sd3", **usual()))
        hasten.save(fast, tmp_path / "saved")
        with watched(pipe) as calls, pytest.raises(PlanError) as caught:
            fast(**pipelines.call("sd3", **usual(**more)))
        assert words in str(caught.value) and "\n" not in str(caught.value) and not calls
        fast(**pipelines.call("sd3", **usual()))  # nothing came of it
    with hasten.load(tmp_path / "saved", pipe) as fast, pytest.raises(PlanError, match=words):
        fast(**pipelines.call("sd3", **usual(**more)))
    # Parts that are handed over are the caller's own affair.
    with hasten.apply(pipe, "mag_cache", parts=made) as fast:
        fast(**pipelines.call("sd3", **usual(**more)))


def test_parts_for_another_scheduler_are_refused() -> None:
    hasten.prepare(pipelines.tiny("sd3"), "mag_cache", arguments=usual(), **RATIOS)
    other = pipelines.tiny("sd3", scheduler="FlowMatchHeunDiscreteScheduler")
    with (
        hasten.apply(other, "mag_cache") as fast,
        pytest.raises(
            PlanError, match=r"is for scheduler=FlowMatchEuler.*call has .*FlowMatchHeun"
        ),
    ):
        fast(**pipelines.call("sd3", **usual()))


def test_a_search_for_another_guidance_is_made_anew() -> None:
    """Also where the plan names the same knobs; and a router may be used at any guidance."""
    pipe, said = pipelines.tiny("dit"), list[str]()
    options = OPTIONS | {"tick": lambda done, total, message: said.append(message)}
    searched = []
    for guidance in (2.0, 4.0, 2.0):
        said.clear()
        hasten.bench(pipe, SEARCH, beside=["harmonica"], **options | {"guidance": guidance})
        trained = [words for words in said if words.startswith("training ")]
        searched.append({words.removeprefix("training ").split("(")[0] for words in trained})
    assert searched == [{"auto_diffusion", "harmonica"}, {"auto_diffusion"}, set()]


def test_without_training_parts_for_other_calls_are_no_parts() -> None:
    pipe = pipelines.tiny("sd3")
    hasten.prepare(pipe, "mag_cache", arguments=usual(), **RATIOS)
    with pytest.raises(PlanError, match="No trained part for mag_cache"):
        hasten.bench(pipe, "mag_cache", prepare_missing=False, **OPTIONS)


def test_files_that_do_not_say_what_they_are_for_are_passed_over() -> None:
    """As they were written before settings stood in them."""
    pipe = pipelines.tiny("sd3")
    subject, (technique,) = open_subject(pipe), Plan.parse("mag_cache")
    parts = {"ratios": torch.ones(3)}
    save_part(default_path(technique, subject.hash), technique, parts, subject.hash)
    with pytest.raises(PlanError, match="has no trained part"):
        hasten.apply(pipe, "mag_cache")


# ------------------------------------------------------------------------- numbers of steps
@pytest.mark.parametrize(
    ("plan", "steps", "made"),
    [
        ("harmonica", 20, "harmonica(steps=20)"),
        ("harmonica(beta=2.0)", 20, "harmonica(beta=2.0, steps=20)"),
        ("harmonica", 50, "harmonica"),
        ("harmonica(steps=20)", 20, "harmonica(steps=20)"),
        ("adaptive_guidance(linear=True)", 12, "adaptive_guidance(linear=True, steps=12)"),
        ("adaptive_guidance", 12, "adaptive_guidance"),
        ("auto_diffusion, easy_cache", 12, "auto_diffusion, easy_cache"),
        # How many steps are made then, the schedule says.
        ("fewer_steps", 12, "fewer_steps"),
    ],
)
def test_a_plan_follows_the_sampler(plan: str, steps: int, made: str) -> None:
    assert str(for_steps(Plan.parse(plan), steps)) == made


def test_a_plan_for_another_number_of_steps_is_refused() -> None:
    with pytest.raises(PlanError, match=r"harmonica\(steps=20\) is for 20 steps, and .* makes 12"):
        for_steps(Plan.parse("harmonica(steps=20)"), 12)


# ------------------------------------------------------------------------- the command line
def run(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def folder() -> str:
    return str(pipelines.folder("sd3"))


def test_prepare_and_generate_on_the_command_line(folder: str, home: Path) -> None:
    Path("prompts.txt").write_text("a red circle\n\na blue square\n")
    size = ["--argument", "height=16", "--argument", "width=16"]
    options = ["--text", "prompts.txt", "--sampler-steps", "4", "--guidance", "3", "--steps", "3"]
    result = run("prepare", folder, "--with", "harmonica", *options, *size, "--json")
    data = json.loads(result.stdout)
    assert data["plan"] == "harmonica(steps=4)"
    (made,) = data["prepared"]
    settings = settings_of(pipelines.tiny("sd3"), {"height": 16, "width": 16})
    path = default_path(*Plan.parse("harmonica(steps=4)"), data["subject"]["hash"], settings)
    assert made["technique"] == "harmonica" and Path(made["path"]) == path and path.is_file()
    assert made["parameters"] > 0
    paint = ["generate", folder, "--with", "harmonica", "--prompt", "circle", *size]
    painted = run(*paint, "--steps", "4", "--output", "a.png")
    assert "calls 4" in painted.stderr
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    refused = run(*paint, "--steps", "5", code=2)
    assert "no trained part" in refused.stderr and "harmonica(steps=5)" in refused.stderr


def test_lines_of_the_text_are_prompts(folder: str) -> None:
    """All lines of all files, without empty ones; two of them, so two trajectories at the most."""
    Path("a.txt").write_text("one\n\n")
    Path("b.txt").write_text("two\n   \n")
    arguments = ["--text", "*.txt", "--sampler-steps", "2", "--argument", "height=16"]
    data = json.loads(
        run(
            "prepare", folder, "--with", "mag_cache", *arguments, "--argument", "width=16", "--json"
        ).stdout
    )
    assert data["prompts"] == 2


def test_classes_are_prompts_of_a_pipeline_that_takes_those() -> None:
    dit = str(pipelines.folder("dit"))
    Path("classes.txt").write_text("5\n12\n")
    arguments = ["prepare", dit, "--with", "mag_cache", "--sampler-steps", "2"]
    assert "mag_cache: 2 trained values" in run(*arguments, "--text", "classes.txt").stdout
    Path("words.txt").write_text("a red circle\n")
    said = run(*arguments, "--text", "words.txt", code=2).stderr
    assert said.startswith("error: 'a red circle' is no class of this DiTPipeline; give a number")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "needs prompts"),
        ("--text none.txt", "Cannot read none.txt"),
        ("--text empty.txt", "nothing to learn from"),
        ("--text one.txt --sampler-steps 0", "--sampler-steps is 0"),
        ("--text one.txt --sampler-steps 100000", "num_inference_steps=100000 is out of range"),
        ("--text one.txt --argument heigth=16", "Did you mean height?"),
        ("--text one.txt --argument height=17", "refuses this call: height and width"),
        ("--text one.txt --argument height", "--argument height is not NAME=VALUE"),
        ("--text one.txt --argument prompt=x", "sets the argument 'prompt' itself"),
        ("--text one.txt --guidance nan", "guidance=nan"),
        ("--text one.txt --steps 0", "--steps is 0"),
    ],
)
def test_prepare_says_what_is_wrong(folder: str, home: Path, arguments: str, words: str) -> None:
    Path("empty.txt").write_text("\n \n")
    Path("one.txt").write_text("a red circle\n")
    result = run("prepare", folder, "--with", "mag_cache", *arguments.split(), code=2)
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and words in line and result.stdout == ""
    assert not list(home.rglob("*.safetensors"))


def test_options_of_pipelines_are_refused_for_language_models(tiny_checkpoint: Path) -> None:
    for option in (["--sampler-steps", "4"], ["--guidance", "2"], ["--argument", "height=1"]):
        said = run("prepare", str(tiny_checkpoint), "--with", "medusa", *option, code=2).stderr
        assert f"{option[0]} is for Diffusers pipelines" in said


def test_help_says_what_text_means_for_a_pipeline() -> None:
    page = " ".join(run("prepare", "--help").output.split())
    assert "hasten prepare" in page and "harmonica" in page and "prompts.txt" in page


def test_training_leaves_the_pipeline_as_it_was(home: Path) -> None:
    pipe = pipelines.tiny("sd3")
    before = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    config = dict(getattr(pipe, "_progress_bar_config", {}))
    arguments = {"num_inference_steps": 3, "height": 16, "width": 16}
    made = hasten.prepare(pipe, "harmonica", prompts=["a", "b"], arguments=arguments, steps=2)
    assert len(made["harmonica"]["logits"]) == 3
    assert all(torch.equal(before[k], v) for k, v in pipe.transformer.state_dict().items())
    assert dict(pipe._progress_bar_config) == config
    assert not hasattr(pipe.transformer, "_diffusers_hook")
