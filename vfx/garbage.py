"""Garbage: its collection put off where that costs as much as the work, freed memory given back where that is much."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

LARGE = 1 << 26  # bytes of tensors in work from which on freed memory is worth giving back


@contextmanager
def collection_paused() -> Iterator[None]:
    """No automatic collection inside, for work that makes many small objects and hardly any cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def give_back(size: int) -> bool:
    """Let the system have what was freed but is still resident, after work on ``size`` bytes; whether it was asked to.

    Tensors of some megabytes that come and go between small objects leave holes, which glibc keeps. Nothing is done for
    less than ``LARGE`` bytes, or with another C library.
    """
    trim = _trim() if size >= LARGE else None
    if trim is None:
        return False
    trim(0)
    return True


@cache
def _trim() -> Any:
    """glibc's ``malloc_trim``; None where there is none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
