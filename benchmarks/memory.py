"""Resident memory of this process, in MiB."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory() -> int:
    """Peak since the start of the process, or since ``reset_peak_memory`` where the system can reset it (Linux)."""
    if STATUS.is_file():
        return _field("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20


def current_memory() -> int:
    """What is resident now; the peak where the system does not tell."""
    return _field("VmRSS") if STATUS.is_file() else peak_memory()


def reset_peak_memory() -> None:
    """Let the peak start from what is resident now; nothing happens where the system cannot."""
    if RESET.is_file():
        RESET.write_text("5")


def _field(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) // 1024
