"""What this machine can do at best: read bandwidth, matrix rate, cost of one small call.

All figures are measured here, best of many repeats, in about five seconds, and kept in the user's
data folder under a name made from machine, versions and threads. A limit that was measured while
other work ran is too low; `Limits.other_load` tells.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hasten.home import atomic_write, ensure_folder, home
from hasten.measure.clock import Tick, synchronise
from hasten.measure.machine import machine, versions

SCHEMA = 1
MIB = 2**20
WORKING_SETS = (4 * MIB, 16 * MIB, 32 * MIB, 64 * MIB)
MATRIX_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}

Call = Callable[[], object]


@dataclass(frozen=True)
class Limits:
    """Measured bests of one device. Rates are per second; a multiply-add counts as two.

    `cached_bandwidth` maps a working set in bytes to the rate at which it is read over and over:
    small models fit in the last-level cache and beat the memory. `matrix_rate` maps "fp32", "bf16"
    and "int8" to operations per second, None where unsupported, with the reason in `unsupported`.
    `other_load` counts the cores that other processes kept busy meanwhile (None where the system
    does not say).
    """

    device: str
    threads: int
    bandwidth: float
    streamed_bytes: int
    cached_bandwidth: Mapping[int, float]
    matrix_rate: Mapping[str, float | None]
    unsupported: Mapping[str, str]
    dispatch_seconds: float
    other_load: float | None
    fingerprint: str
    versions: Mapping[str, str]
    measured_at: str

    @property
    def is_disturbed(self) -> bool:
        """Other work took a good part of the cores, so that the true limits are higher."""
        return self.other_load is not None and self.other_load > 0.15 * self.threads

    def bandwidth_for(self, working_set_bytes: float) -> float:
        """Bytes per second at which a working set of this size can be read again and again.

        Interpolated between measured sizes on a logarithmic scale; a smaller set is never slower
        than a larger one, since a limit is the best that was seen.
        """
        points = {**self.cached_bandwidth, self.streamed_bytes: self.bandwidth}
        sizes = sorted(points)
        rates = np.maximum.accumulate([points[size] for size in reversed(sizes)])[::-1]
        wanted = math.log(max(working_set_bytes, 1.0))
        return float(np.exp(np.interp(wanted, np.log(sizes), np.log(rates))))

    def fraction_of_limit(
        self,
        *,
        bytes_per_second: float | None = None,
        flops_per_second: float | None = None,
        working_set_bytes: float | None = None,
        dtype: str = "fp32",
    ) -> float | None:
        """Share of the limit that was reached: of bandwidth or of arithmetic, whichever is nearer.

        Give the bytes read and the operations done per second; `working_set_bytes` picks the
        bandwidth of a set of that size instead of the streaming one. Not cut off at 1: a larger
        figure means that the limit was measured on a busy machine or the bytes are overcounted.
        None where nothing was given that has a limit.
        """
        fractions = []
        if bytes_per_second is not None:
            size = self.streamed_bytes if working_set_bytes is None else working_set_bytes
            fractions.append(bytes_per_second / self.bandwidth_for(size))
        rate = self.matrix_rate.get(dtype)
        if flops_per_second is not None and rate:
            fractions.append(flops_per_second / rate)
        return max(fractions) if fractions else None

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON, with the label that every figure here carries."""
        sizes = {str(size): rate for size, rate in self.cached_bandwidth.items()}
        return {"label": "measured", "schema": SCHEMA, **asdict(self), "cached_bandwidth": sizes}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Limits:
        """Inverse of `to_dict`. Raises KeyError, TypeError or ValueError for anything else."""
        if data["schema"] != SCHEMA:
            raise ValueError(f"limits of schema {data['schema']}, not {SCHEMA}")
        fields = {name: data[name] for name in cls.__dataclass_fields__}
        sizes = fields["cached_bandwidth"].items()
        fields["cached_bandwidth"] = {int(size): float(rate) for size, rate in sizes}
        found = cls(**fields)
        if not found.bandwidth > 0 or not found.dispatch_seconds > 0:
            raise ValueError("limits must be positive")
        return found


def limits(
    refresh: bool = False,
    on_tick: Tick | None = None,
    *,
    device: torch.device | str | None = None,
) -> Limits:
    """The limits of this machine: from the user's data folder, or measured now (about 5 s).

    `refresh` measures anew. The device defaults to the GPU where there is one. Raises HastenError,
    before measuring, where the result could not be kept.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    path = cache_path(chosen)
    if not refresh:
        with contextlib.suppress(OSError, KeyError, TypeError, ValueError):
            return Limits.from_dict(json.loads(path.read_text(encoding="utf-8")))
    ensure_folder(path.parent)
    found = measure_limits(chosen, on_tick=on_tick)
    atomic_write(path, json.dumps(found.to_dict(), indent=1))
    return found


def cache_path(device: torch.device) -> Path:
    """File that holds the limits of this device under the present versions and threads."""
    key = (machine().fingerprint, versions(), torch.get_num_threads(), str(device))
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return home() / "limits" / f"{name}.json"


@torch.inference_mode()
def measure_limits(
    device: torch.device, *, seconds: float = 4.0, on_tick: Tick | None = None
) -> Limits:
    """Measure now, spending about `seconds` on the clock; nothing is read or written."""
    tick = on_tick or (lambda done, total, label: None)
    total = len(WORKING_SETS) + len(MATRIX_TYPES) + 2
    share = seconds / total
    busy_before, own_before, start = _busy_seconds(), time.process_time(), time.perf_counter()
    done = 0

    streamed = _streaming_bytes(device)
    tick(done, total, "read bandwidth")
    bandwidth = _read_rate(streamed, device, 2 * share)
    done += 1

    cached = {}
    for size in WORKING_SETS:
        tick(done, total, f"read bandwidth, {size // MIB} MiB again and again")
        cached[size] = _read_rate(size, device, share)
        done += 1

    rates: dict[str, float | None] = {}
    unsupported: dict[str, str] = {}
    for name, dtype in MATRIX_TYPES.items():
        tick(done, total, f"{name} matrix rate")
        try:
            rates[name] = _matrix_rate(dtype, device, share)
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            rates[name] = None
            unsupported[name] = f"unsupported: {str(error).splitlines()[0][:120]}"
        done += 1

    tick(done, total, "cost of a small call")
    dispatch = _dispatch_seconds(device, share)
    tick(total, total, "")
    other_load = None
    busy_after = _busy_seconds()
    if busy_before is not None and busy_after is not None:
        others = busy_after - busy_before - (time.process_time() - own_before)
        other_load = round(max(0.0, others) / (time.perf_counter() - start), 2)
    return Limits(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        threads=torch.get_num_threads(),
        bandwidth=bandwidth,
        streamed_bytes=streamed,
        cached_bandwidth=cached,
        matrix_rate=rates,
        unsupported=unsupported,
        dispatch_seconds=dispatch,
        other_load=other_load,
        fingerprint=machine().fingerprint,
        versions=versions(),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _read_rate(size: int, device: torch.device, seconds: float) -> float:
    """Bytes per second over a buffer of `size` bytes: the best of several ways to read it.

    A plain sum runs on all threads; a matrix-vector product is what decoding does. Which of the two
    is faster depends on the library and on who else uses the cores.
    """
    buffer = torch.ones(size // 4, device=device)
    matrix = buffer.view(-1, 1024)
    vector = torch.ones(1024, device=device)
    readers: tuple[Call, ...] = (
        lambda: buffer.sum(),
        lambda: torch.mv(matrix, vector),
        lambda: torch.dot(buffer, buffer),
    )
    budget = seconds / len(readers)
    return size / min(_best_seconds(reader, device, budget) for reader in readers)


def _matrix_rate(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """Operations per second of a square matrix product, the best over growing sizes."""
    largest = 8192 if device.type == "cuda" else 4096
    size, rate = 256, 0.0
    deadline = time.perf_counter() + seconds
    while True:
        call = _product(size, dtype, device)
        took = _best_seconds(call, device, seconds / 10)
        rate = max(rate, 2 * size**3 / took)
        # The next size takes eight times as long and is called several times. Small sizes say
        # little, so 1024 may cost up to twice the time.
        allowed = deadline + (seconds if size < 1024 else 0.0)
        if size >= largest or time.perf_counter() + 8 * 6 * took > allowed:
            break
        size *= 2
    took = _best_seconds(call, device, max(deadline - time.perf_counter(), 0.0))
    return max(rate, 2 * size**3 / took)


def _product(size: int, dtype: torch.dtype, device: torch.device) -> Call:
    left = torch.ones(size, size, device=device).to(dtype)
    right = torch.ones(size, size, device=device).to(dtype)
    if dtype == torch.int8:
        right = right.t().contiguous().t()  # by columns, which is what int8 units of GPUs take
        return lambda: torch._int_mm(left, right)
    return lambda: torch.mm(left, right)


def _dispatch_seconds(device: torch.device, seconds: float) -> float:
    """Seconds that one call of a tiny operation costs, however little it computes."""
    number = torch.ones(1, device=device)
    calls = 1000

    def burst() -> None:
        for _ in range(calls):
            number.add(number)

    return _best_seconds(burst, device, seconds) / calls


def _best_seconds(call: Call, device: torch.device, seconds: float) -> float:
    """Least time of one call, over repeats that fill about `seconds`.

    On a CPU one thread alone is tried too: beside other work the threads of a parallel call wait
    for one another, and one by itself can be many times faster than all.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return _best_of(call, device, seconds)
    together = _best_of(call, device, 0.7 * seconds)
    torch.set_num_threads(1)
    try:
        return min(together, _best_of(call, device, 0.3 * seconds))
    finally:
        torch.set_num_threads(threads)


def _best_of(call: Call, device: torch.device, seconds: float) -> float:
    """Least time of one call, by the present number of threads.

    Short calls are timed in groups of about half a millisecond, so that the clock and the
    synchronisation weigh nothing. The first call only warms up.
    """
    best, group = math.inf, 1
    deadline = time.perf_counter() + seconds
    for repeat in range(1_000_000):
        start = time.perf_counter()
        for _ in range(group):
            call()
        synchronise(device)
        took = (time.perf_counter() - start) / group
        if repeat > 0:
            best = min(best, took)
        if repeat == 1:
            group = max(1, min(1000, round(5e-4 / max(took, 1e-9))))
        if repeat > 1 and time.perf_counter() > deadline:
            break
    return best


def _busy_seconds() -> float | None:
    """Seconds that all cores together have worked since the start, stolen time included."""
    try:
        first = Path("/proc/stat").read_text().splitlines()[0].split()
        ticks = [int(value) for value in first[1:9]]
        return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


def _streaming_bytes(device: torch.device) -> int:
    """Size of a buffer that no cache holds: eight times the last level, 256 MiB to 1 GiB."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return _whole_rows(min(2**30, free // 4))
    size = max(256 * MIB, min(2**30, 8 * _last_level_cache()))
    return _whole_rows(min(size, max(64 * MIB, machine().memory_bytes // 8)))


def _whole_rows(size: int) -> int:
    return size // 4096 * 4096


def _last_level_cache() -> int:
    """Bytes of the largest cache of the first core, 0 where the system does not say."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            text = file.read_text().strip()
            scale = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
            sizes.append(int(text.rstrip("KMG")) * scale)
    return max(sizes)
