"""The most memory this process has held, and holding on to it."""

import ctypes
import platform
import resource
import sys

import jax

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def peak_bytes() -> int:
    """Of the accelerator where its runtime says, else of the process (resident)."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def share_heap() -> None:
    """Makes threads that start from now on take memory from one heap, where the C library is glibc.

    Each would have its own, and keep up to 64 MiB there of what it freed: 0.13 GB in all, where two
    devices read SmolLM2-135M.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def keep_pages() -> None:
    """Makes this process keep the memory that it frees, where its C library is glibc.

    A step of training frees and asks for the same hundreds of megabytes each time. Handed back and
    fetched again they cost a page fault for every 4 KiB: a tenth of a step's CPU time.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_ARENA_MAX, 1)  # the others cannot hold an array of more than 64 MiB
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
