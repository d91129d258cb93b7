"""What convolutions read: windows as rows of a matrix, and their products without writing the rows out.

Two offsets i and j of a window meet in Σ_p x[p + i] x[p + j]ᵀ, which depends on j − i alone but at the borders. So the
Gram matrix of all windows that touch the picture takes one product for each of the (2k−1)^r / 2 displacements instead
of k^2r, and the windows that hang over the border further than the convolution's own are taken off again, one line of
the picture with another: by inclusion and exclusion, for those that hang over along several axes. Along one axis alone
the borders follow from offset to offset.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

NARROW, SHORT = 8, 4  # channels, and positions of an output, below which rows are written out
SHARING = 1 / 3  # of the rows written out, above which sharing is not worth putting the products together
BLOCKS = 1 << 17  # products that may be added to a Gram matrix one by one: large kernels have more of them
CROPPING = 1.5  # times fewer rows from where cropping a picture is worth the copies that it takes
OVERLAP = 0.9  # share of what a kernel reads that lies in the picture, up to which it is cropped for the goals
Padding = tuple[tuple[int, int], ...]  # before and behind each spatial axis


@dataclass(frozen=True)
class Window:
    """A convolution's geometry: ``kernel``, ``stride``, ``dilation`` and ``padding`` for each spatial axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Padding

    @property
    def size(self) -> int:
        """Offsets in a window."""
        return len(self.offsets)

    @property
    def offsets(self) -> list[tuple[int, ...]]:
        """The offsets of a window in the order of a kernel's entries."""
        steps = (range(0, d * k, d) for k, d in zip(self.kernel, self.dilation))
        return list(itertools.product(*steps))

    @property
    def reach(self) -> tuple[int, ...]:
        """How far the last offset lies behind the first."""
        return tuple(d * (k - 1) for k, d in zip(self.kernel, self.dilation))

    def outputs(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Positions of the output along each axis."""
        padded = (size + sum(pair) for size, pair in zip(sizes, self.padding))
        return tuple((p - r - 1) // s + 1 for p, r, s in zip(padded, self.reach, self.stride))

    def padded(self, x: Tensor) -> Tensor:
        return F.pad(x, [p for pair in reversed(self.padding) for p in pair])


def patches(window: Window, x: Tensor) -> Tensor:
    """All windows of x (samples, C, …) as rows: (samples, positions…, C · window)."""
    x, rank = window.padded(x), len(window.kernel)
    for dim in range(rank):
        x = x.unfold(2 + dim, window.reach[dim] + 1, window.stride[dim])[..., :: window.dilation[dim]]
    # (samples, C, positions…, window…): a kernel's entries are ordered as (C, window…)
    return x.movedim(1, 1 + rank).flatten(1 + rank)


def window_sums(window: Window, x: Tensor) -> Tensor:
    """The sum of all windows, (C · window,), in float64."""
    total = window.padded(x.sum(0, dtype=torch.float64)[None])[0]
    sizes = window.outputs(x.shape[2:])
    parts = []
    for offset in window.offsets:
        part = total
        for dim, (start, count, stride) in enumerate(zip(offset, sizes, window.stride)):
            part = part.narrow(1 + dim, start, (count - 1) * stride + 1)[
                (slice(None),) * (1 + dim) + (slice(None, None, stride),)
            ]
        parts.append(part.flatten(1).sum(1))
    return torch.stack(parts, 1).reshape(-1)


def shares_products(window: Window, channels: int, sizes: Sequence[int]) -> bool:
    """Whether ``window_gram`` can take these windows and costs less than writing them out."""
    regular = all(s == 1 for s in window.stride) and all(
        0 <= p <= r for pair, r in zip(window.padding, window.reach) for p in pair
    )
    if not regular or window.size == 1 or channels < NARROW:
        return False
    outputs = math.prod(window.outputs(sizes))
    if _line(window) is not None:
        return outputs >= SHORT
    axes = [_axis_meetings(window, sizes, axis) for axis in range(len(sizes))]
    # Sums over all combinations of the axes' meetings; half of them mirror the others.
    blocks = math.prod(sum(len(meeting.pairs) for meeting in meetings) for meetings in axes) // 2
    rows = math.prod(sum(meeting.rows for meeting in meetings) for meetings in axes) // 2
    return blocks <= BLOCKS and min(_spread_rows(window, sizes), rows) < SHARING * window.size**2 * outputs


def window_gram(window: Window, x: Tensor) -> Tensor:
    """Σ rowsᵀ rows of ``patches``, (C · window, C · window), for stride 1."""
    line = _line(window)
    if line is not None:
        return _line_gram(window, x, line)
    channels, size = x.shape[1], window.size
    gram = x.new_zeros(size, size, channels, channels)
    for meetings, product in _products(window, x):
        sign, moved = math.prod(meeting.sign for meeting in meetings), any(meeting.shift for meeting in meetings)
        for first, second in zip(*(_numbers(window, [m.pairs for m in meetings], side) for side in (0, 1))):
            gram[first, second].add_(product, alpha=sign)
            if moved:
                gram[second, first].add_(product.T, alpha=sign)
    return gram.permute(2, 0, 3, 1).reshape(channels * size, -1)


def window_cross(window: Window, x: Tensor, y: Tensor) -> Tensor:
    """Σ rowsᵀ y of ``patches`` and an output y (samples, O, positions…), (C · window, O), for stride 1.

    It is the gradient of a convolution by its weight; what small pictures read is zeros for a good part, so there each
    offset meets what it overlaps with.
    """
    sizes, outputs = x.shape[2:], y.shape[2:]
    axes = [_overlaps(window, axis, size, out) for axis, (size, out) in enumerate(zip(sizes, outputs))]
    read = math.prod(sum(here.stop - here.start for here, _ in overlaps) for overlaps in axes)
    if read > OVERLAP * window.size * math.prod(outputs):
        conv = (conv1d_weight, conv2d_weight, conv3d_weight)[len(sizes) - 1]
        shape = (y.shape[1], x.shape[1], *window.kernel)
        cross = conv(window.padded(x), shape, y.contiguous(), dilation=window.dilation)
        return cross.flatten(1).T  # type: ignore[no-any-return]
    x, y = x.movedim(1, -1).contiguous(), y.movedim(1, -1).contiguous()
    products = []
    for overlaps in itertools.product(*axes):
        here = x[(slice(None), *(inside for inside, _ in overlaps))]
        goal = y[(slice(None), *(position for _, position in overlaps))]
        products.append(here.reshape(-1, x.shape[-1]).T @ goal.reshape(-1, y.shape[-1]))
    return torch.stack(products, 1).flatten(0, 1)


def _overlaps(window: Window, axis: int, size: int, outputs: int) -> list[tuple[slice, slice]]:
    """For each offset along an axis the positions of the picture that it reads, and those of the output that read."""
    result = []
    for offset in range(0, window.reach[axis] + 1, window.dilation[axis]):
        start = offset - window.padding[axis][0]  # output p reads p + start
        first, last = max(0, -start), max(0, -start, min(outputs, size - start))
        result.append((slice(first + start, last + start), slice(first, last)))
    return result


# windows along one axis -----------------------------------------------------------------------------------------------


def _line(window: Window) -> int | None:
    """The one axis along which a window has more than one offset, where nothing is padded along the others."""
    long = [dim for dim, k in enumerate(window.kernel) if k > 1]
    if len(long) != 1 or any(any(pair) for dim, pair in enumerate(window.padding) if dim != long[0]):
        return None
    return long[0]


def _line_gram(window: Window, x: Tensor, axis: int) -> Tensor:
    """The same along one axis of many positions: G[i + 1, j + 1] = G[i, j] + what comes in at the end − what goes out.

    Windows of length n read x[i d], …, x[i d + n − 1] at offset i, so from one offset to the next d positions change.
    """
    k, d, channels = window.kernel[axis], window.dilation[axis], x.shape[1]
    rows = window.padded(x).movedim((2 + axis, 1), (-2, -1)).flatten(0, -3)  # (samples, positions, C)
    n = rows.shape[1] - d * (k - 1)
    first = rows[:, :n].reshape(-1, channels).T
    gram = rows.new_empty(k, k, channels, channels)
    for j in range(k):
        gram[0, j] = first @ rows[:, j * d : j * d + n].reshape(-1, channels)
    change = _ends(rows[:, n:], k, d) - _ends(rows[:, : d * (k - 1)], k, d)
    for i in range(1, k):
        gram[i, i:] = gram[i - 1, i - 1 : k - 1] + change[i - 1, i - 1 :]
    lower = torch.tril_indices(k, k, -1, device=x.device)
    gram[lower[0], lower[1]] = gram[lower[1], lower[0]].mT
    return gram.permute(2, 0, 3, 1).reshape(channels * k, -1)


def _ends(rows: Tensor, k: int, d: int) -> Tensor:
    """Σ_r x[i d + r] x[j d + r]ᵀ, (k − 1, k − 1, C, C), over the d (k − 1) positions of one end."""
    parts = rows.reshape(len(rows), k - 1, d, -1).transpose(1, 2).reshape(len(rows) * d, -1)
    return (parts.T @ parts).reshape(k - 1, rows.shape[2], k - 1, rows.shape[2]).transpose(1, 2)


# windows along several axes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Meeting:
    """Positions ``here`` and ``there`` of one axis that meet as windows' offsets ``pairs``, ``shift`` apart.

    ``sign`` is 1 for all positions of the picture, −1 for single ones, which overhanging windows see.
    """

    here: slice
    there: slice
    pairs: list[tuple[int, int]]
    shift: int
    sign: int

    @property
    def rows(self) -> int:
        return self.here.stop - self.here.start


def _axis_meetings(window: Window, sizes: Sequence[int], axis: int) -> list[_Meeting]:
    """How offsets of a window meet along an axis, in coordinates where window p reads x[p + offset]."""
    size, reach, step = sizes[axis], window.reach[axis], window.dilation[axis]
    before, behind = window.padding[axis]
    offsets = range(0, reach + 1, step)
    apart: dict[int, list[tuple[int, int]]] = {}
    for first, second in itertools.product(offsets, repeat=2):
        if abs(second - first) < size:
            apart.setdefault(second - first, []).append((first, second))
    meetings = [
        _Meeting(slice(max(0, -s), size - max(0, s)), slice(max(0, s), size + min(0, s)), pairs, s, 1)
        for s, pairs in apart.items()
    ]
    lines: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for p in range(-reach, size):
        if not -before <= p <= size - 1 + behind - reach:  # none of the convolution's own windows
            seen = [o for o in offsets if 0 <= p + o < size]
            for first, second in itertools.product(seen, repeat=2):
                lines.setdefault((p + first, p + second), []).append((first, second))
    for (u, v), pairs in lines.items():
        meetings.append(_Meeting(slice(u, u + 1), slice(v, v + 1), pairs, v - u, -1))
    return meetings


def _meetings(window: Window, sizes: Sequence[int]) -> Iterator[tuple[_Meeting, ...]]:
    """One meeting for each axis; of two that mirror each other the one whose first shift is positive."""
    axes = [_axis_meetings(window, sizes, axis) for axis in range(len(sizes))]
    for meetings in itertools.product(*axes):
        if next((meeting.shift for meeting in meetings if meeting.shift), 0) >= 0:
            yield meetings


def _numbers(window: Window, pairs: Sequence[Sequence[tuple[int, int]]], side: int) -> list[int]:
    """The numbers of offsets in a window, for all combinations of the axes' ``pairs``."""
    result = []
    for combination in itertools.product(*pairs):
        number = 0
        for pair, kernel, step in zip(combination, window.kernel, window.dilation):
            number = number * kernel + pair[side] // step
        result.append(number)
    return result


def _spread_rows(window: Window, sizes: Sequence[int]) -> int:
    """Rows of all products of displaced pictures with zeros between them, per sample."""
    displacements = (math.prod(2 * k - 1 for k in window.kernel) + 1) // 2
    return displacements * math.prod(size + reach for size, reach in zip(sizes, window.reach))


def _products(window: Window, x: Tensor) -> Iterator[tuple[tuple[_Meeting, ...], Tensor]]:
    """Σ x[here] x[there]ᵀ for all meetings.

    In large pictures samples and positions stand in one long axis, with as many zeros between them as a window
    reaches, so that a displacement of the whole picture is one offset in it. Small pictures, which would be zeros for
    the most part, are cropped to what overlaps with the displaced one.
    """
    sizes, channels = x.shape[2:], x.shape[1]
    every = list(_meetings(window, sizes))
    whole = [m for m in every if all(meeting.sign == 1 for meeting in m)]
    cropped = sum(math.prod(meeting.rows for meeting in m) for m in whole)
    last = x.movedim(1, -1).contiguous()
    if _spread_rows(window, sizes) <= CROPPING * cropped:
        padding = [p for reach in reversed(window.reach) for p in (0, reach)]
        flat = F.pad(last, [0, 0, *padding])
        strides = [math.prod(flat.shape[axis + 1 : -1]) for axis in range(1, flat.ndim - 1)]
        flat = flat.reshape(-1, channels)
        for meetings in whole:
            offset = sum(meeting.shift * stride for meeting, stride in zip(meetings, strides))
            yield meetings, flat[: len(flat) - offset].T @ flat[offset:]
        del flat
        every = [m for m in every if any(meeting.sign < 0 for meeting in m)]
    for meetings in every:
        here = last[(slice(None), *(meeting.here for meeting in meetings))]
        there = last[(slice(None), *(meeting.there for meeting in meetings))]
        yield meetings, here.reshape(-1, channels).T @ there.reshape(-1, channels)
