"""Keep freed memory in the process while it trains on a CPU."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of mallopt(3) and their defaults in glibc.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_DEFAULTS = {_M_TRIM_THRESHOLD: 128 * 1024, _M_TOP_PAD: 128 * 1024, _M_MMAP_MAX: 65536}
_KEEPING = {_M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 256 * 2**20, _M_MMAP_MAX: 0}


def _glibc() -> ctypes.CDLL | None:
    """The C library where it is glibc."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    wanted = ("mallopt", "malloc_trim")
    return library if all(hasattr(library, name) for name in wanted) else None


def give_back() -> None:
    """Return freed memory to the system.

    Where the sizes of activations change from step to step, what is kept falls into pieces that fit
    nothing, and the process grows. Doing this now and then costs little.
    """
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Have glibc reuse large blocks rather than return each to the system at once.

    A step allocates and frees the same large activations as the step before. By default each goes
    back to the system, which then zeroes every page again; that can take a third of the time.
    Does nothing where the C library is not glibc.
    """
    library = _glibc()
    if library is None:
        yield
        return
    for parameter, value in _KEEPING.items():
        library.mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in _DEFAULTS.items():
            library.mallopt(parameter, value)
        library.malloc_trim(0)
