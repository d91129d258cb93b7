"""The loader contract: what counts as calibration data and how batches become inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vfx.capture.signature import Argument
from vfx.errors import ArgumentError, DataError
from vfx.program import Program
from vfx.statistics.labels import integer_labels, unread

BATCH_SIZE = 128  # for data given as one tensor

Batch = list[Tensor]  # one for each placeholder
Labels = Callable[[Any, int, int], Tensor | None]  # of a raw batch, by its inputs and samples


@dataclass(frozen=True)
class Prepared:
    """Batches that are read already: one tensor for each placeholder, and labels (N,) where the data hold some.

    ``unread`` says why what stands in the place of labels is none.
    """

    batches: tuple[Batch, ...]
    labels: tuple[Tensor | None, ...]
    unread: str = ""

    def __len__(self) -> int:
        return len(self.batches)


class Replay:
    """An iterator that can be read again: batches are taken from it as they are asked for, and kept.

    So a limit on samples ends the reading of an endless one.
    """

    def __init__(self, source: Iterator[Any]):
        self._source = source
        self._kept: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        index = 0
        while True:
            if index == len(self._kept):
                try:
                    self._kept.append(next(self._source))
                except StopIteration:
                    return
            yield self._kept[index]
            index += 1


def reusable(data: Any) -> Any:
    """``data``, or a replay of it where it can be read only once."""
    return Replay(data) if isinstance(data, Iterator) else data


class Batches:
    """Calibration batches of a Program, checked against its example inputs, on one device.

    ``data`` is a tensor of samples, or an iterable of tensors, of tuples (forward's arguments in order, labels behind
    them) or of dicts (by forward's parameter names; other keys are labels), or ``Prepared``. Arguments that were
    captured nested are nested alike. A batch becomes one tensor for each placeholder. ``max_samples`` cuts the data
    off. An iterator that can be read only once is kept. Raises DataError for an empty loader or a batch that does not
    fit.
    """

    def __init__(self, program: Program, data: Any, max_samples: int | None = None, device: Any = None):
        if max_samples is not None and max_samples < 1:
            raise ArgumentError(f"max_samples must be at least 1, got {max_samples}")
        if isinstance(data, Batches):  # those of another Program that takes the same inputs
            data, max_samples, device = data._given_as(max_samples, device)
        shapes = [node.meta["val"].shape for node in program.placeholders]
        sizes = [shape[axis] for shape, axis in zip(shapes, program.batch_axes) if axis is not None]
        fixed = [size for size in sizes if isinstance(size, int)]
        self._fixed = fixed[0] if fixed else None  # a batch size that is part of the network
        if isinstance(data, Tensor):
            data = data.split(self._fixed or BATCH_SIZE, program.batch_axes[0] or 0)
        if not isinstance(data, (Iterable, Prepared)) or isinstance(data, Mapping):
            raise DataError(f"data must be a tensor or an iterable of batches, got {type(data).__name__}")
        self._data = reusable(data)
        self._arguments = program.signature.inputs
        self._checks = [
            _Check(str(node.target), example, shape, axis)
            for node, example, shape, axis in zip(
                program.placeholders, program.example_inputs, shapes, program.batch_axes
            )
        ]
        self._samples = program.batch_of
        self._limit = max_samples
        self._device = device
        self.unread = data.unread if isinstance(data, Prepared) else ""  # of labels, as far as the data were read

    def _given_as(self, max_samples: int | None, device: Any) -> tuple[Any, int | None, Any]:
        limit, device_set = self._limit, self._device
        return self._data, limit if max_samples is None else max_samples, device_set if device is None else device

    def __iter__(self) -> Iterator[Batch]:
        return (batch for _, _, batch in self._read())

    def labelled(self, kind: Labels = integer_labels) -> Iterator[tuple[Batch, Tensor | None]]:
        """Batches with their labels (samples, …) where the data hold some (``vfx.statistics.labels``)."""
        for index, (raw, samples, batch) in enumerate(self._read()):
            prepared = isinstance(self._data, Prepared)
            labels = self._data.labels[index] if prepared else kind(raw, len(self._arguments), samples)
            if labels is None and not prepared:
                self.unread = self.unread or unread(raw, len(self._arguments), samples)
            if labels is not None:
                labels = labels[: self.size(batch)].to(self._device)
            yield batch, labels

    def held(self) -> list[Any]:
        """The raw batches up to the limit, to be read again in the same order (a loader may shuffle)."""
        return [raw for raw, _, _ in self._read()]

    def _read(self) -> Iterator[tuple[Any, int, Batch]]:
        """Each raw batch with its samples and its inputs, which are cut off at the limit."""
        seen = 0
        for raw in self._data.batches if isinstance(self._data, Prepared) else self._data:
            batch = list(raw) if isinstance(self._data, Prepared) else self._inputs(raw)
            samples = size = self.size(batch)
            if self._limit is not None and seen + size > self._limit:
                if self._fixed and seen:
                    break
                size = self._whole(self._limit - seen)
                batch = self._rows(batch, torch.arange(size))
            seen += size
            if size:
                yield raw, samples, [x.to(self._device) if self._device else x for x in batch]
            if seen == self._limit:
                break
        if not seen:
            raise DataError("the data hold no samples; give at least one batch")

    def split(self, every: int, limit: int, fold: int = 0) -> tuple[Prepared, Prepared]:
        """The first ``limit`` samples without every ``every``-th of them, and those; the same for the same data.

        Of the ``every`` ways to choose them ``fold`` is one. Every batch of the first part keeps its place, so it may
        be smaller; empty ones are left out. Where the batch size is part of the network whole batches are held out.
        """
        parts: tuple[list[Any], list[Any]] = ([], [])
        seen = 0
        for batch, labels in self.labelled():
            size = self._whole(min(self.size(batch), limit - seen))
            held = self._held(seen, size, every, fold)
            for part, chosen in zip(parts, (~held, held)):
                rows = chosen.nonzero()[:, 0]
                if len(rows):
                    rows_held = self._rows(batch, rows)
                    part.append((rows_held, labels[rows.to(labels.device)] if labels is not None else None))
            seen += size
            if seen >= limit:
                break
        first, second = (
            Prepared(tuple(batch for batch, _ in part), tuple(label for _, label in part), self.unread)
            for part in parts
        )
        return first, second

    def parts(self, every: int) -> Iterator[tuple[Batch, bool]]:
        """Batches that are not held out and such that are (True): every ``every``-th, or where there are few batches,
        or nobody knows how many, the ``every``-th samples of each."""
        if len(self) >= 2 * every or (self._fixed and len(self) >= every):
            yield from ((batch, (index + 1) % every == 0) for index, batch in enumerate(self))
            return
        seen = 0
        for batch in self:
            size = self.size(batch)
            held = self._held(seen, size, every)
            seen += size
            for chosen, flag in ((~held, False), (held, True)):
                rows = chosen.nonzero()[:, 0]
                if len(rows):
                    yield self._rows(batch, rows), flag

    def _whole(self, samples: int) -> int:
        """As many samples as can be run: all of a batch where its size is part of the network."""
        return samples if self._fixed is None else max(samples - samples % self._fixed, self._fixed)

    def _held(self, seen: int, size: int, every: int, fold: int = 0) -> Tensor:
        """Which of the samples behind the first ``seen`` are held out: every ``every``-th, or batch by batch."""
        place = torch.arange(seen, seen + size)
        return ((place if self._fixed is None else place // self._fixed) + 1 + fold) % every == 0

    def __len__(self) -> int:
        """Number of batches where the loader knows it, else 0."""
        count = len(self._data) if isinstance(self._data, Sized) else 0
        if isinstance(self._data, Prepared):
            return count
        first = getattr(self._data, "batch_size", None) or (len(self._data[0]) if isinstance(self._data, tuple) else 0)
        return min(count, -(-self._limit // first)) if count and self._limit and first else count

    def size(self, batch: Batch) -> int:
        """Number of samples in a batch."""
        return self._samples(batch)

    def _rows(self, batch: Batch, rows: Tensor) -> Batch:
        """Some samples of a batch."""
        axes = ((check.axis, x) for check, x in zip(self._checks, batch))
        return [x if axis is None else x.index_select(axis, rows.to(x.device)) for axis, x in axes]

    def _inputs(self, raw: Any) -> Batch:
        values = [x for argument, value in self._given(raw) for x in argument.read(value, DataError)]
        for check, value in zip(self._checks, values):
            check(value)
        checked = zip(self._checks, values)
        sizes = {check.name: int(x.shape[check.axis]) for check, x in checked if check.axis is not None}
        if len(set(sizes.values())) > 1:
            raise DataError(f"the inputs of a batch differ in their number of samples: {sizes}")
        return values

    def _given(self, raw: Any) -> list[tuple[Argument, Any]]:
        """Each argument of forward with its value in this batch."""
        names = [argument.name for argument in self._arguments]
        if isinstance(raw, Mapping):
            missing = [name for name in names if name not in raw]
            if missing:
                raise DataError(f"a batch lacks {', '.join(missing)}; it has {', '.join(map(str, raw))}")
            return [(argument, raw[argument.name]) for argument in self._arguments]
        if not isinstance(raw, (Tensor, tuple, list)):
            raise DataError(f"a batch must be a tensor, a tuple or a dict, got {type(raw).__name__}")
        values = [raw] if isinstance(raw, Tensor) else raw
        if len(values) < len(names):
            raise DataError(
                f"a batch holds {len(values)} tensors, the network takes {len(names)} inputs ({', '.join(names)})"
            )
        return list(zip(self._arguments, values))


@dataclass(frozen=True)
class _Check:
    """What a placeholder takes; raises DataError for anything else."""

    name: str
    example: Tensor
    shape: tuple[Any, ...]
    axis: int | None  # of the samples

    def __call__(self, value: Tensor) -> None:
        fixed = [(i, size) for i, size in enumerate(self.shape) if isinstance(size, int)]
        if value.ndim != len(self.shape) or any(value.shape[i] != size for i, size in fixed):
            free = self.axis if self.axis is not None and not isinstance(self.shape[self.axis], int) else None
            sizes = ["batch" if i == free else str(size) for i, size in enumerate(self.shape)]
            raise DataError(
                f"input {self.name!r} of a batch has shape {tuple(value.shape)}, the network was captured with "
                f"({', '.join(sizes)}); resize the data or trace with other inputs"
            )
        if value.dtype != self.example.dtype:
            raise DataError(f"input {self.name!r} of a batch is {value.dtype}, the network takes {self.example.dtype}")
        if not (value.is_floating_point() or value.is_complex()) or torch.isfinite(value).all():
            return
        if value.isnan().any() or torch.isfinite(self.example).all():  # a mask has infinities in the example, too
            raise DataError(f"input {self.name!r} of a batch holds NaN or infinite values")
