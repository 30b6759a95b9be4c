"""What `generate` and `prepare` do with a Diffusers pipeline: make a picture, or train for its calls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.cli.shared import check_output, need_extra, note, print_json
from hasten.errors import HastenError

if TYPE_CHECKING:
    from hasten.plan import Plan
    from hasten.subject import Subject

FRAMES_PER_SECOND = 8


def paint(
    subject: Subject,
    plans: list[str],
    prompt: str,
    output: Path | None,
    as_json: bool,
    *,
    runner: str,
    steps: int,
    guidance: float | None,
    arguments: dict[str, Any],
    seed: int,
) -> None:
    """Make one picture of a prompt with a plan at work, and write it to a file, whole or not at all."""
    import torch

    import hasten
    from hasten.benchmark.calls import pictures_of
    from hasten.denoise.engine import DenoiseModel
    from hasten.denoise.inputs import refusals
    from hasten.denoise.step_counts import for_steps
    from hasten.plan import Plan

    need_extra("PIL", "diffusion")
    if output is not None:
        _check(output)
    sampler: dict[str, Any] = {"steps": steps, "guidance": guidance, "seed": seed}
    (picture,) = pictures_of(subject, [prompt], 1, arguments=arguments, **sampler)
    subject.pipe.set_progress_bar_config(leave=False, disable=True if as_json else None)
    generator = torch.Generator().manual_seed(seed)
    parsed = for_steps(Plan.parse(*plans), steps)
    with hasten.apply(subject, parsed, runner=runner) as fast, refusals(subject.pipe):
        assert isinstance(fast, DenoiseModel)
        given = picture.arguments | {"generator": generator, "output_type": "pil"}
        made = fast(**given, return_dict=False)[0][0]
        seconds, activity, plan = fast.seconds, fast.activity, str(fast.plan)
    frames = made if isinstance(made, list) else [made]
    target = output or Path(
        f"{Path(subject.name).name}-{seed}{'.gif' if len(frames) > 1 else '.png'}"
    )
    _write(frames, target)
    if as_json:
        print_json(
            {
                "subject": subject.name,
                "plan": plan,
                "prompt": prompt,
                "output": target,
                "seconds": seconds,
                "activity": activity,
            }
        )
    else:
        counters = ", ".join(f"{name} {value:g}" for name, value in activity.items())
        note(f"{target}: {seconds:.2f} s ({counters})")


def for_pipeline(
    subject: Subject,
    plan: Plan,
    arguments: dict[str, Any],
    steps: int | None,
    guidance: float | None,
) -> tuple[Plan, dict[str, Any]]:
    """The plan and the arguments with which parts are trained, for a sampler of so many steps."""
    from hasten.benchmark.calls import check_given, guided, usual_arguments
    from hasten.denoise.inputs import COUNT, check_steps
    from hasten.denoise.step_counts import for_steps

    check_given(subject.pipe, arguments)
    found = usual_arguments(subject) | arguments | guided(subject.pipe, guidance)
    if steps is not None:
        check_steps(subject.pipe, steps)
        plan, found = for_steps(plan, steps), found | {COUNT: steps}
    return plan, found


def _write(frames: list[Any], target: Path) -> None:
    from io import BytesIO

    from hasten.home import atomic_write

    kind = target.suffix.lower()
    held, options = BytesIO(), dict[str, Any]()
    if kind == ".gif":
        options = {
            "save_all": True,
            "append_images": frames[1:],
            "duration": 1000 // FRAMES_PER_SECOND,
            "loop": 0,
        }
    frames[0].save(held, format=kind[1:].upper(), **options)
    atomic_write(target, held.getvalue())


def _check(target: Path) -> None:
    if target.suffix.lower() not in (".png", ".gif"):
        raise HastenError(f"--output is {target}; give a name that ends in .png or .gif.")
    check_output(target)
