"""The C library's allocator keeps the memory that it has got.

By default glibc gives every large block back to the system when it is freed, so that each step of each method pays for
its activations' pages again: system time, and the noisiest part of a step. A GPU's caching allocator and the ones that
training on CPUs is usually run with (jemalloc, tcmalloc) keep them; so does this, for all methods alike.
"""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD = -1
"""mallopt(3): the top of the heap that may lie free; -1: any amount."""
M_MMAP_MAX = -4
"""mallopt(3): how many blocks may be mappings of their own."""

KEEPS = "glibc, which keeps what is freed"
DEFAULT = "as the system has it"


def keep_freed_memory() -> str:
    """Tells glibc to keep freed memory, for the life of the process; what the table says of it."""
    if platform.libc_ver()[0] != "glibc":
        return DEFAULT
    library = ctypes.CDLL(None)
    done = library.mallopt(M_MMAP_MAX, 0) and library.mallopt(M_TRIM_THRESHOLD, -1)
    return KEEPS if done else DEFAULT
