"""Batches that are read anew in every pass: what the readers of ``vfx.data`` return where all would not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from vfx.statistics.data import BATCH_SIZE


class Mapped:
    """Batches with a function applied to each as it is read."""

    def __init__(self, batches: Any, change: Callable[[Any], Any]):
        self._batches, self._change = batches, change

    def __iter__(self) -> Iterator[Any]:
        return (self._change(batch) for batch in self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def batch_size(self) -> int | None:
        return getattr(self._batches, "batch_size", None)


def in_batches(tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Tensors of as many samples (N, …) each as a list of tuples of at most ``BATCH_SIZE`` samples."""
    return list(zip(*(tensor.split(BATCH_SIZE) for tensor in tensors)))
