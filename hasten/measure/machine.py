"""What machine this is, as far as it matters to a measurement. No host names, no paths."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

OF_PIPELINES = ("diffusers",)
"""Packages on which measurements of pipelines depend, beside those on which all do."""


@dataclass(frozen=True)
class Machine:
    """The machine as this process may use it (affinity and container limits respected)."""

    cpu: str
    instruction_set: str  # widest vector instructions that torch uses, such as "AVX512"
    physical_cores: int
    logical_cores: int
    torch_threads: int
    memory_bytes: int
    accelerator: str | None
    os: str
    python: str

    @property
    def fingerprint(self) -> str:
        """12 hex digits that change when the hardware does.

        Threads and Python are conditions of one run, not of the machine, and stay out. Memory
        counts in whole GiB, since a kernel update moves the exact figure.
        """
        parts = (
            self.cpu,
            self.instruction_set,
            self.physical_cores,
            self.logical_cores,
            round(self.memory_bytes / 2**30),
            self.accelerator,
            self.os,
        )
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """The fields and the fingerprint, ready for JSON."""
        return {**asdict(self), "fingerprint": self.fingerprint}


def machine() -> Machine:
    """Look at this machine now. Takes a few milliseconds."""
    logical, physical = _cores()
    return Machine(
        cpu=_cpu_name(),
        instruction_set=torch.backends.cpu.get_cpu_capability(),
        physical_cores=physical,
        logical_cores=logical,
        torch_threads=torch.get_num_threads(),
        memory_bytes=_memory_bytes(),
        accelerator=_accelerator(),
        os=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
    )


def versions(*further: str) -> dict[str, str]:
    """Versions of everything that a measurement depends on: name -> version.

    Args:
        further: packages on which only some measurements depend, such as `OF_PIPELINES`.
    """
    found = {"hasten": _hasten_version(), "torch": torch.__version__}
    for package in ("transformers", "numpy"):
        found[package] = _installed(package)
    found["python"] = platform.python_version()
    return found | {package: _installed(package) for package in further}


def _hasten_version() -> str:
    # The source tree knows best: an editable install keeps the metadata of the day it was made.
    stated = getattr(sys.modules.get("hasten"), "__version__", None)
    return str(stated) if stated else _installed("hasten")


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _accelerator() -> str | None:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return "Apple GPU"
    return None


@functools.cache
def _cpu_name() -> str:
    """The name on the box, with family and model where the kernel gives them.

    Cloud machines often say no more than "AMD EPYC", which covers five generations.
    """
    fields: dict[str, str] = {}
    for line in _read("/proc/cpuinfo").splitlines():
        key, separator, value = line.partition(":")
        if separator:
            fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or fields.get("Processor") or platform.processor()
    name = " ".join(name.split()) or platform.machine() or "unknown"
    if "cpu family" in fields and "model" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    elif "CPU implementer" in fields and "CPU part" in fields:
        name += f" ({fields['CPU implementer']}, part {fields['CPU part']})"
    return name


def _cores() -> tuple[int, int]:
    """(logical, physical) cores that this process may keep busy at once."""
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
    else:
        allowed = set(range(os.cpu_count() or 1))
    physical = set()
    for cpu in allowed:
        topology = f"/sys/devices/system/cpu/cpu{cpu}/topology"
        core = _read(f"{topology}/core_id")
        # Without a topology every logical core counts as one of its own.
        physical.add((_read(f"{topology}/physical_package_id"), core) if core else cpu)
    # A quota of 1.5 cores lets two threads run some of the time, hence the ceiling.
    quota = _cpu_quota()
    logical = len(allowed) if quota is None else max(1, min(len(allowed), math.ceil(quota)))
    return logical, min(len(physical), logical)


def _cpu_quota() -> float | None:
    """Cores that the container may use (the tightest of its groups), None where unlimited."""
    quotas = []
    for group in _groups("cpu"):
        quota, _, period = _read(group / "cpu.max").partition(" ")
        if not quota:  # version 1 of control groups
            quota = _read(group / "cpu.cfs_quota_us")
            period = _read(group / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _memory_bytes() -> int:
    """Memory that this process may fill, in bytes: the machine's, or its container's if less."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        total = 0
    for group in _groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            value = _read(group / name)
            if value.isdigit():
                total = min(total, int(value)) if total else int(value)
    return total


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the control groups that this process belongs to, innermost first."""
    root = Path("/sys/fs/cgroup")
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controller if controllers else root
        folder = base / path.lstrip("/")
        # Inside a container the path may name a group of the host, which is not visible here.
        while folder != base:
            yield folder
            folder = folder.parent
        yield base


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
