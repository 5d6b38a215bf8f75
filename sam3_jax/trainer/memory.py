"""What the C library does with freed memory, where the training runs on a CPU."""

from __future__ import annotations

import ctypes

# Names and numbers of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Has glibc keep what is freed; returns whether it does (False: not glibc).

    XLA allocates a step's temporaries anew each time on CPUs. By glibc's defaults every large block
    comes from the kernel and goes back, and clearing its pages took a fifth of the demo's step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER))
    return all(mallopt(*setting) == 1 for setting in settings)
