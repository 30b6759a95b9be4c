"""Peak memory of a block of code: resident memory of the process, or the GPU's allocations."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from hasten.measure.clock import synchronise

SAMPLE_SECONDS = 0.005


class Peak:
    """Peak memory over a block, in bytes; complete once the block has ended.

    `start_bytes` is what was in use when it began, so that `growth_bytes` is the block's own.
    `method` says how it was found: "gpu allocator", "kernel high-water mark" (exact), "sampled"
    (may miss spikes of a few milliseconds) or "process maximum" (of the whole life of the process,
    an upper bound).
    """

    def __init__(self, start_bytes: int, method: str) -> None:
        self.start_bytes = start_bytes
        self.bytes = start_bytes
        self.method = method

    @property
    def growth_bytes(self) -> int:
        """Peak less what was in use at the start."""
        return max(0, self.bytes - self.start_bytes)

    def raise_to(self, seen_bytes: int) -> None:
        """Note that so much memory was in use at some moment of the block."""
        self.bytes = max(self.bytes, seen_bytes)

    def __repr__(self) -> str:
        return f"Peak({self.bytes} bytes, {self.method})"


@contextmanager
def peak_memory(device: torch.device | str | None = None) -> Iterator[Peak]:
    """Watch memory while the block runs: `with peak_memory() as peak: ...; peak.bytes`.

    On a CUDA device the allocator's own peak, elsewhere the resident memory of the process. Memory
    that earlier work left behind is given back first, as far as the platform can. Blocks may be
    nested. Take it on a run of its own: the sampling thread disturbs a clock.
    """
    settle()
    if device is not None and torch.device(device).type == "cuda":
        watch = _watch_cuda(torch.device(device))
    elif _reset_high_water():
        watch = _watch_kernel()
    elif resident_bytes() is not None:
        watch = _watch_by_sampling()
    else:
        watch = _watch_maximum()
    with watch as peak:
        _open.append(peak)
        try:
            yield peak
        finally:
            _open.remove(peak)


def resident_bytes() -> int | None:
    """Resident memory of this process now; None where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def settle() -> None:
    """Collect garbage and give freed memory back to the system, so that runs start alike."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # other C libraries have no such call
            ctypes.CDLL(None).malloc_trim(0)


_open: list[Peak] = []


@contextmanager
def _watch_cuda(device: torch.device) -> Iterator[Peak]:
    synchronise(device)
    _note_outside("gpu allocator", torch.cuda.max_memory_allocated(device))
    torch.cuda.reset_peak_memory_stats(device)
    peak = Peak(torch.cuda.memory_allocated(device), "gpu allocator")
    try:
        yield peak
    finally:
        synchronise(device)
        peak.raise_to(torch.cuda.max_memory_allocated(device))
        _note_outside("gpu allocator", peak.bytes)


def _note_outside(method: str, seen_bytes: int) -> None:
    """Tell the blocks around this one what was seen: a reset takes the mark from them too."""
    for outer in _open:
        if outer.method == method:
            outer.raise_to(seen_bytes)


@contextmanager
def _watch_kernel() -> Iterator[Peak]:
    peak = Peak(_high_water() or 0, "kernel high-water mark")
    try:
        yield peak
    finally:
        peak.raise_to(_high_water() or 0)
        _note_outside(peak.method, peak.bytes)


@contextmanager
def _watch_by_sampling() -> Iterator[Peak]:
    peak = Peak(resident_bytes() or 0, "sampled")
    stop = threading.Event()

    def look() -> None:
        peak.raise_to(resident_bytes() or 0)

    def watch() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            look()

    thread = threading.Thread(target=watch, name="hasten-peak-memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        look()


@contextmanager
def _watch_maximum() -> Iterator[Peak]:
    peak = Peak(_process_maximum(), "process maximum")
    try:
        yield peak
    finally:
        peak.raise_to(_process_maximum())


def _process_maximum() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _reset_high_water() -> bool:
    """Set the kernel's peak of this process to its present size; False where not allowed.

    What the mark has seen so far is first noted for the blocks around this one.
    """
    mark = _high_water()
    if mark is None:
        return False
    _note_outside("kernel high-water mark", mark)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    now, resident = _high_water(), resident_bytes()
    # Some sandboxes accept the reset and ignore it. Counters lag by a few pages per thread.
    return now is not None and resident is not None and now <= resident + 16 * 2**20


def _high_water() -> int | None:
    """Largest resident size since the last reset, in bytes, as the kernel saw it."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None
