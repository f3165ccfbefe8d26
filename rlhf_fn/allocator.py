"""glibc's malloc, told to keep what this process frees."""

import ctypes
import os
import sys
from typing import Any

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of `mallopt`, from glibc's <malloc.h>


class _Info(ctypes.Structure):
    """What `mallinfo2` returns."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def keep_freed() -> bool:
    """Let malloc give nothing back to the system; whether it will do so.

    By itself it does so with every large tensor that is freed, and the next step's are pages that
    the system zeroes first: up to two thirds of the time of a large step, which
    `kernels/benchmarks/growth.py` shows with and without `--returned`. What tensors held at once is
    then held until the process ends, and some more: for alignment torch asks for a few bytes beyond
    a tensor's, which the hole that one like it left has only when what lies beside it is free too,
    and until then the heap grows. `kept` says how much is free.

    False, and nothing is changed, where malloc is not glibc's, or where the environment has options
    for it (`MALLOC_…`, or `GLIBC_TUNABLES`, of `man mallopt`).
    """
    mallopt = _of_glibc("mallopt")
    told = any(x.startswith("MALLOC_") or x == "GLIBC_TUNABLES" for x in os.environ)
    if mallopt is None or told:
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))


def kept() -> int:
    """Bytes that were freed and are malloc's still; 0 where it does not say."""
    mallinfo = _of_glibc("mallinfo2")
    if mallinfo is None:
        return 0
    mallinfo.restype = _Info
    return mallinfo().fordblks


def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
