"""The setting of a baseline: the dtype and the runner that it is fastest in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hasten.errors import HastenError
from hasten.measure.clock import Sample, interleave
from hasten.subject import Subject

CHOICE_ROUNDS = 5


@dataclass(frozen=True)
class Setting:
    """A subject in one dtype, and what executes it."""

    subject: Subject
    runner: str

    @property
    def label(self) -> str:
        """As it is shown, such as "bfloat16 compiled"."""
        return f"{str(self.subject.model.dtype).removeprefix('torch.')} {self.runner}"


def settings_of(subject: Subject, stored: Subject | None, runners: Sequence[str]) -> list[Setting]:
    """All that are tried.

    Args:
        stored: the subject in its checkpoint's own dtype, where that may be chosen. Of dtypes only
            float32 and this one are tried: they hold every stored weight.
    """
    subjects = [subject]
    if stored is not None and stored.model.dtype != subject.model.dtype:
        subjects = [stored, subject]
    return [Setting(each, runner) for each in subjects for runner in runners]


def fastest(
    settings: Sequence[Setting],
    call_of: Callable[[Setting], Callable[[], Sample]],
    *,
    seed: int,
    tick: Callable[[int, int, str], None],
) -> Setting:
    """The fastest of the settings; compiling is not counted.

    Args:
        call_of: opens the plain model in a setting and returns one call of it.

    Raises:
        HastenError: where none of them runs here, or the model refuses the call.
    """
    calls: dict[str, Callable[[], Sample]] = {}
    for number, setting in enumerate(settings):
        tick(number, len(settings), f"trying {setting.label}")
        call = call_of(setting)
        try:
            call()  # compiles
        except HastenError:
            raise
        except Exception:  # a model that cannot be compiled here is run as it is
            if setting.runner == "eager":
                raise
            continue
        calls[setting.label] = call
    if not calls:
        names = ", ".join(dict.fromkeys(setting.runner for setting in settings))
        raise HastenError(f"The runner {names!r} does not run here; use --runner auto.")
    best = next(iter(calls))
    if len(calls) > 1:
        timings = interleave(calls, rounds=CHOICE_ROUNDS, warmup=0, seed=seed)
        best = min(calls, key=lambda label: timings.seconds(label).median)
    return next(setting for setting in settings if setting.label == best)
