"""Memory of large activations, kept between layers rather than given back to the system.

glibc's malloc takes a block above a threshold, which moves up to 32 MiB by itself, from the system, and gives it back
when it is freed. The activations of one layer of a ViT-B/32 at batch 64 are 39 MB: each time, the system has to find
and clear ten thousand pages. See docs/benchmarks.md, Scoring.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# The parameters of mallopt(3), as malloc.h numbers them.
_TRIM_THRESHOLD, _MMAP_MAX, _MMAP_THRESHOLD = -1, -4, -3
_LARGEST_INT = 2**31 - 1
# What glibc starts with.
_MMAP_MAX_DEFAULT = 65536
# As high as glibc's own rule goes: see `memory_kept`.
_HIGHEST_MMAP_THRESHOLD = 32 << 20


@contextmanager
def memory_kept(device: str) -> Iterator[None]:
    """Let malloc keep what is freed, for a pass on the CPU; nothing elsewhere, or where there is no glibc.

    Changes the speed and nothing else. What has been freed goes back to the system when the block ends.
    """
    library = _glibc() if device == "cpu" else None
    if library is None:
        yield
        return
    # No block from the system by itself, rather than from a higher threshold: older versions refuse one above 32 MiB.
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, _LARGEST_INT)
    try:
        yield
    finally:
        # From the first mallopt on, the thresholds do not move by themselves any more. Where they start, 128 KiB, every
        # activation of a later training would be given back; so they stay where they would have moved to by then: in
        # a process that has freed a block of 32 MiB, the mmap threshold is that, and the trim threshold twice that.
        library.mallopt(_MMAP_MAX, _MMAP_MAX_DEFAULT)
        library.mallopt(_MMAP_THRESHOLD, _HIGHEST_MMAP_THRESHOLD)
        library.mallopt(_TRIM_THRESHOLD, 2 * _HIGHEST_MMAP_THRESHOLD)
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, if it is glibc."""
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
