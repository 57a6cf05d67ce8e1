"""Memory allocator settings that let a reading process reuse freed memory for its next sample."""

from __future__ import annotations

import ctypes
import functools

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of mallopt, <malloc.h>
KEPT = 64 << 20  # bytes that each arena (of a thread, roughly) may keep at its end
LARGEST = 32 << 20  # bytes of the largest array that is kept; the largest value that mallopt accepts


@functools.cache
def keep_freed() -> None:
    """Let glibc keep freed memory instead of returning it to the system, once per process; no effect elsewhere.

    Samples and batches are arrays of megabytes. By default each is taken from the system page by page and returned when
    it is freed, which takes longer than reading a prepared sample. glibc raises both limits by itself, up to these
    values, but only as far as the largest array freed so far requires.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(TRIM_THRESHOLD, KEPT)
        mallopt(MMAP_THRESHOLD, LARGEST)
