"""The loader contract: what counts as calibration data and how batches become inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor

from vfx.errors import ArgumentError, DataError
from vfx.program import Program

BATCH_SIZE = 128  # for data given as one tensor

Batch = list[Any]


def reusable(data: Any) -> Any:
    """``data``, or its batches where it can be read only once."""
    return list(data) if isinstance(data, Iterator) else data


class Batches:
    """Calibration batches of a Program, checked against its example inputs, on one device.

    ``data`` is a tensor of samples, or an iterable of tensors, of tuples (inputs first, labels behind them) or of dicts
    (by forward's parameter names). ``max_samples`` cuts it off. An iterator that can be read only once is kept.
    Raises DataError for an empty loader or a batch that does not fit.
    """

    def __init__(self, program: Program, data: Any, max_samples: int | None = None, device: Any = None):
        if max_samples is not None and max_samples < 1:
            raise ArgumentError(f"max_samples must be at least 1, got {max_samples}")
        if isinstance(data, Tensor):
            data = data.split(BATCH_SIZE)
        if not isinstance(data, Iterable):
            raise DataError(f"data must be a tensor or an iterable of batches, got {type(data).__name__}")
        self._data = reusable(data)
        self._names = [str(node.target) for node in program.placeholders]
        self._examples = program.example_inputs
        self._limit = max_samples
        self._device = device

    def __iter__(self) -> Iterator[Batch]:
        seen = 0
        for raw in self._data:
            batch = self._inputs(raw)
            size = batch[0].shape[0]
            if self._limit is not None and seen + size > self._limit:
                batch = [x[: self._limit - seen] if isinstance(x, Tensor) else x for x in batch]
            seen += batch[0].shape[0]
            if batch[0].shape[0]:
                yield [x.to(self._device) if isinstance(x, Tensor) and self._device else x for x in batch]
            if seen == self._limit:
                break
        if not seen:
            raise DataError("the data hold no samples; give at least one batch")

    def __len__(self) -> int:
        """Number of batches where the loader knows it, else 0."""
        count = len(self._data) if isinstance(self._data, Sized) else 0
        first = getattr(self._data, "batch_size", None) or (len(self._data[0]) if isinstance(self._data, tuple) else 0)
        return min(count, -(-self._limit // first)) if count and self._limit and first else count

    def _inputs(self, raw: Any) -> Batch:
        if isinstance(raw, Tensor):
            values: list[Any] = [raw]
        elif isinstance(raw, dict):
            missing = [name for name in self._names if name not in raw]
            if missing:
                raise DataError(f"a batch lacks {', '.join(missing)}; it has {', '.join(map(str, raw))}")
            values = [raw[name] for name in self._names]
        elif isinstance(raw, (tuple, list)):
            values = list(raw[: len(self._names)])
        else:
            raise DataError(f"a batch must be a tensor, a tuple or a dict, got {type(raw).__name__}")
        self._check(values)
        return values

    def _check(self, values: list[Any]) -> None:
        if len(values) < len(self._names):
            raise DataError(f"a batch holds {len(values)} tensors, the network takes {len(self._names)} inputs")
        for name, value, example in zip(self._names, values, self._examples):
            if not isinstance(example, Tensor):
                continue
            if not isinstance(value, Tensor):
                raise DataError(f"input {name!r} of a batch is {type(value).__name__}, not a tensor")
            if value.shape[1:] != example.shape[1:] or value.ndim != example.ndim:
                raise DataError(
                    f"input {name!r} of a batch has shape {tuple(value.shape)}, the network was captured with "
                    f"(batch, {', '.join(map(str, example.shape[1:]))}); resize the data or trace with other inputs"
                )
            if value.dtype != example.dtype:
                raise DataError(f"input {name!r} of a batch is {value.dtype}, the network takes {example.dtype}")
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise DataError(f"input {name!r} of a batch holds NaN or infinite values")
