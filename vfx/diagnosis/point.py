"""One network of a comparison: how it was made, how good it is and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Point:
    """One network: its ``options``, ``accuracy`` (a share), and costs as multiples of one edge (or the dense network).

    ``latency`` is the median time of one batch, ``seconds`` the time it took to make the network, ``loss``
    the cross-entropy against labels; ``each`` the accuracy of every edge's head, where a network has several or each
    edge its own labels; ``error`` says why there is no network.
    """

    name: str
    options: Mapping[str, Any]
    accuracy: float | None
    params: float
    flops: float
    latency: float | None = None
    outcome: str = ""
    error: str = ""
    seconds: float | None = None
    loss: float | None = None
    each: Sequence[float] = ()
