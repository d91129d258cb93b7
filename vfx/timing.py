"""How long a network takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


@torch.no_grad()
def median_seconds(run: Callable[[], Any], device: torch.device | None, runs: int = 5, first: int = 1) -> float:
    """The median time of ``runs`` calls; the ``first`` ones do not count, they take memory that the others find."""
    times = []
    for _ in range(first + runs):
        start = time.perf_counter()
        run()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[first:])
