"""Reading a bench result for people: safe look-ups and number formats for tables and report.

A result may lack any piece (no quality, no ceiling, an interrupted run). Whatever is missing, not
finite or of an unexpected type reads as a dash, never as an error and never as zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DASH = "\N{EN DASH}"

MEASURED, MODELLED, CITED = "measured", "modelled", "cited"

VERDICTS = ("faster", "no gain", "inactive", "broken")

# The first of these that a row has stands for its quality where there is room for one only.
QUALITY_ORDER = (
    "perplexity",
    "bits_per_byte",
    "retrieval",
    "parse",
    "psnr",
    "attributes",
    "ssim",
    "perceptual",
    "frechet",
)

# What an output rate is called in a result, and its units in long and short.
RATES = {
    "tokens_per_second": ("tokens per second", "tokens/s"),
    "images_per_second": ("pictures per second", "pictures/s"),
}


def look(value: Any, *path: str | int) -> Any:
    """Follow keys into nested objects; None where the path ends early."""
    for step in path:
        if isinstance(step, int):
            is_list = isinstance(value, Sequence) and not isinstance(value, str)
            value = value[step] if is_list and -len(value) <= step < len(value) else None
        else:
            value = value.get(step) if isinstance(value, Mapping) else None
    return value


def number(value: Any, *path: str | int) -> float | None:
    """A finite number at the end of the path, else None."""
    found = look(value, *path)
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        return None
    return float(found) if math.isfinite(found) else None


def text(value: Any, *path: str | int) -> str:
    """What stands at the end of the path, in words; a dash where nothing does."""
    found = look(value, *path)
    if found is None or found == "":
        return DASH
    if isinstance(found, bool):
        return "yes" if found else "no"
    if isinstance(found, (int, float)):
        return plain_number(float(found))
    return str(found)


def rows(result: Any) -> list[Any]:
    """All measured plans: the rows of the plan in question, then those that ran beside it."""
    return [*objects(result, "rows"), *objects(result, "beside")]


def objects(value: Any, *path: str | int) -> list[Mapping[str, Any]]:
    """The list of objects at the end of the path; anything else in it is dropped."""
    found = look(value, *path)
    if not isinstance(found, Iterable) or isinstance(found, (str, Mapping)):
        return []
    return [item for item in found if isinstance(item, Mapping)]


def plain_number(value: float | None) -> str:
    """Three significant digits, with separators for thousands: 0.0123, 12.3, 12,345."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    if abs(value) < 0.0005:
        return f"{value:.1e}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def times(value: float | None) -> str:
    """A speed ratio: 1.62x."""
    if value is None:
        return DASH
    return f"{value:.2f}x" if value < 100 else f"{value:,.0f}x"


def percent(value: float | None) -> str:
    """A share: 43 %, or 0.4 % for small ones."""
    if value is None:
        return DASH
    digits = 1 if 0 < abs(value) < 0.0995 else 0
    return f"{100 * value:.{digits}f} %".replace("-", "\N{MINUS SIGN}")


def recovery_words(value: float | None) -> str:
    """A recovery with one decimal, as 99.6 % must not read as 100 %."""
    return DASH if value is None else f"{100 * value:.1f} %"


def size(value: float | None) -> str:
    """Bytes in binary units."""
    if value is None:
        return DASH
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{plain_number(value)} {unit}"
        value /= 1024
    return f"{plain_number(value)} TiB"


def rate(value: float | None, unit: str) -> str:
    """A large rate with a decimal prefix: 34.2 GB/s."""
    if value is None:
        return DASH
    for prefix in ("", "k", "M", "G"):
        if abs(value) < 1000:
            return f"{plain_number(value)} {prefix}{unit}"
        value /= 1000
    return f"{plain_number(value)} T{unit}"


def span(low: float | None, high: float | None, *, decimals: int = 2) -> str:
    """An interval from low to high; a dash where either end is unknown."""
    if low is None or high is None:
        return DASH
    return f"{low:.{decimals}f}{DASH}{high:.{decimals}f}"


def ratio_span(row: Any) -> str:
    """The interval of a row's speed ratio."""
    return span(number(row, "ratio", "low"), number(row, "ratio", "high"))


def coverage(rows: Iterable[Any]) -> str:
    """How surely the intervals of these ratios cover: "95 %", or less after few rounds."""
    stated = [number(row, "ratio", "coverage") for row in rows]
    return f"{100 * min([c for c in stated if c is not None], default=0.95):.0f} %"


def plan_name(row: Any) -> str:
    """A row's plan as text."""
    return text(row, "plan")


def is_preliminary(result: Any) -> bool:
    """Some ratio rests on fewer than five rounds, or the run was asked to be quick."""
    rounds = [number(row, "ratio", "rounds") for row in rows(result)]
    return bool(look(result, "quick")) or any(n is not None and n < 5 for n in rounds)


def rate_key(result: Any) -> str:
    """Which output rate a result states."""
    baseline = look(result, "baseline")
    return next((key for key in RATES if look(baseline, key)), "tokens_per_second")


def output_rate(item: Any, *path: str | int) -> float | None:
    """An output rate of a row or a baseline: its median, or what stands at `path`."""
    found = (number(item, key, *(path or ("median",))) for key in RATES)
    return next((value for value in found if value is not None), None)


def rate_limit(result: Any) -> float | None:
    """The machine's limit for the plain model's output rate (modelled): baseline over its share."""
    speed = output_rate(look(result, "baseline"))
    share = number(result, "baseline", "limit_fraction")
    return speed / share if speed is not None and share else None


def limit_fraction(result: Any, row: Any) -> float | None:
    """Share of the limit that a row reached; of plain decoding's limit where it states none."""
    stated = number(row, "limit_fraction")
    if stated is not None:
        return stated
    speed, limit = output_rate(row), rate_limit(result)
    return speed / limit if speed is not None and limit else None


def ceiling_label(row: Any) -> str:
    """How a row's ceiling came about; "modelled" unless it says otherwise."""
    return MEASURED if look(row, "ceiling_detail", "label") == MEASURED else MODELLED


@dataclass(frozen=True)
class Quality:
    """One quality figure of a row."""

    metric: str
    value: float | None
    original: float | None
    recovery: float | None
    low: float | None
    high: float | None
    remarks: str
    unit: str = ""

    @property
    def figure(self) -> float:
        """The share that is kept, or the value where it has a unit of its own."""
        return (self.value if self.recovery is None else self.recovery) or 0.0

    @property
    def words(self) -> str:
        """What is kept of the original, or the value with its unit where that is what is said."""
        if self.recovery is None and self.unit:
            return f"{plain_number(self.value)} {self.unit}"
        return recovery_words(self.recovery)

    @property
    def interval(self) -> str:
        """The interval of what `words` says; empty where there is none."""
        if self.low is None or self.high is None:
            return ""
        if self.recovery is None and self.unit:
            return span(self.low, self.high, decimals=1)
        return span(100 * self.low, 100 * self.high, decimals=1)

    @property
    def name(self) -> str:
        """The metric in words."""
        return self.metric.replace("_", " ")


def qualities(row: Any) -> list[Quality]:
    """All quality figures of a row, the telling ones first."""
    found = look(row, "quality")
    if not isinstance(found, Mapping):
        return []
    order = [name for name in QUALITY_ORDER if name in found]
    order += [name for name in found if name not in QUALITY_ORDER]
    return [_quality(name, found[name]) for name in order]


def main_quality(row: Any) -> Quality | None:
    """The figure that stands for a row's quality: the first with a recovery or a unit of its own."""
    return next((q for q in qualities(row) if q.recovery is not None or q.unit), None)


def _quality(metric: str, found: Any) -> Quality:
    if not isinstance(found, Mapping):
        found = {"value": found}
    value = number(found, "value")
    if value is None:
        value = number(found, "share")
    known = {"value", "share", "original", "recovery", "interval", "num_units", "unit"}
    known |= {"num_identical"}  # worth a remark only where there are some
    remarks = [f"{key.replace('_', ' ')}: {text(found, key)}" for key in found if key not in known]
    units = number(found, "num_units")
    if units is not None:
        remarks.append(f"{units:.0f} units")
    identical = number(found, "num_identical")
    if identical:
        which = "all" if identical == units else f"{identical:.0f} left out of the mean, being"
        remarks.append(f"{which} identical to the original's")
    return Quality(
        metric=metric,
        value=value,
        original=number(found, "original"),
        recovery=number(found, "recovery"),
        low=number(found, "interval", 0),
        high=number(found, "interval", 1),
        remarks=", ".join(remarks),
        unit=str(look(found, "unit") or "") if "recovery" not in found else "",
    )


@dataclass(frozen=True)
class Conditions:
    """Under what a result was measured, as (name, words) pairs."""

    lines: tuple[tuple[str, str], ...]

    def sentence(self) -> str:
        """All in one line, for under a table."""
        return " · ".join(f"{name} {words}" for name, words in self.lines if words != DASH)


def conditions(result: Any) -> Conditions:
    """Machine, versions, threads, seed and command of a result."""
    versions = look(result, "versions")
    pairs = versions.items() if isinstance(versions, Mapping) else ()
    stamped = ", ".join(f"{name} {version}" for name, version in pairs)
    return Conditions(
        (
            ("machine", machine_words(look(result, "machine"))),
            ("threads", text(result, "threads")),
            ("versions", stamped or DASH),
            ("seed", text(result, "seed")),
            ("command", text(result, "command")),
        )
    )


def machine_words(machine: Any) -> str:
    """A machine in one line."""
    if not isinstance(machine, Mapping):
        return DASH
    cores = number(machine, "physical_cores")
    memory = number(machine, "memory_bytes")
    parts = [
        text(machine, "accelerator"),
        text(machine, "cpu"),
        f"{cores:.0f} core{'' if cores == 1 else 's'}" if cores is not None else DASH,
        size(memory),
        text(machine, "os"),
    ]
    return ", ".join(part for part in parts if part != DASH) or DASH


def claim_words(claim: Any) -> str:
    """A paper's claim in one line: what, value and where. Takes a mapping or an object."""
    where = claim_field(claim, "where")
    words = [text(claim_field(claim, "what")), claimed(claim)]
    return " ".join(w for w in words if w != DASH) + (f" ({where})" if where else "")


def claimed(claim: Any) -> str:
    """The value of a claim; that of a speed claim is a ratio."""
    value = claim_field(claim, "value")
    if is_speed_claim(claim) and number(value) is not None:
        return times(number(value))
    return text(value)


def claim_field(claim: Any, name: str) -> Any:
    """One field of a claim, be it a mapping or an object."""
    return look(claim, name) if isinstance(claim, Mapping) else getattr(claim, name, None)


def is_speed_claim(claim: Any) -> bool:
    """Whether a claim is a speed ratio, so that a measured one may stand beside it."""
    what = str(claim_field(claim, "what") or "").lower()
    return any(word in what for word in ("speed-up", "speedup", "speed up", "faster"))
