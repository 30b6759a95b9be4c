"""What `generate` does with a Diffusers pipeline: make a picture, or a clip, and write it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.cli.shared import check_output, need_extra, note, print_json
from hasten.errors import HastenError

if TYPE_CHECKING:
    from hasten.subject import Subject

FRAMES_PER_SECOND = 8


def paint(
    subject: Subject,
    plans: list[str],
    prompt: str,
    output: Path | None,
    as_json: bool,
    *,
    steps: int,
    guidance: float | None,
    seed: int,
) -> None:
    """Make one picture of a prompt with a plan at work, and write it to a file, whole or not at all."""
    import torch

    import hasten
    from hasten.benchmark.denoise import arguments_of, usual_arguments
    from hasten.denoise.engine import DenoiseModel

    need_extra("PIL", "diffusion")
    if output is not None:
        _check(output)
    arguments = usual_arguments(subject) | arguments_of(subject.pipe, prompt, steps, guidance)
    generator = torch.Generator().manual_seed(seed)
    with hasten.apply(subject, *plans) as fast:
        assert isinstance(fast, DenoiseModel)
        made = fast(**arguments, generator=generator, output_type="pil", return_dict=False)[0][0]
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
