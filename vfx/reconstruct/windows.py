"""What convolutions read: windows as rows of a matrix, and their Gram matrix without writing the rows out.

Two offsets i and j of a window meet in Σ_p x[p + i] x[p + j]ᵀ, which depends on j − i alone but at the borders. So the
Gram matrix of all windows that touch the picture takes one product for each of the (2k−1)^r / 2 displacements instead
of k^2r, and the windows that hang over the border further than the convolution's own are taken off again: strips of one
row or column, which see a part of the kernel only. Along one axis alone the borders follow from offset to offset.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NARROW, SHORT = 8, 4  # channels, and positions of an output, below which rows are written out
SHARING = 1 / 3  # of the rows written out, above which sharing is not worth putting the products together
CROPPING = 1.5  # times fewer rows from where cropping a picture is worth the copies that it takes
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
    if not regular or window.size == 1 or channels < NARROW or len(window.kernel) > 2:
        return False
    outputs = window.outputs(sizes)
    if _line(window) is not None:
        return math.prod(outputs) >= SHORT
    spread, cropped = _displaced_rows(window, sizes)
    return min(spread, cropped) + _overhanging_rows(window, sizes) < SHARING * window.size**2 * math.prod(outputs)


def window_gram(window: Window, x: Tensor) -> Tensor:
    """Σ rowsᵀ rows of ``patches``, (C · window, C · window), for stride 1 and one or two spatial axes."""
    line = _line(window)
    if line is not None:
        return _line_gram(window, x, line)
    channels, offsets = x.shape[1], window.offsets
    number = {offset: index for index, offset in enumerate(offsets)}
    gram = x.new_zeros(len(offsets), len(offsets), channels, channels)
    for shift, product in _displaced(window, x):
        for first, i in number.items():
            j = number.get((first[0] + shift[0], first[1] + shift[1]))
            if j is not None:
                gram[i, j] = product
                gram[j, i] = product.T
    for chosen, rows in _overhanging(window, x):
        strip = (rows.T @ rows).reshape(channels, len(chosen), channels, len(chosen)).permute(1, 3, 0, 2)
        index = torch.tensor(chosen, device=x.device)
        gram[index[:, None], index[None, :]] -= strip
    return gram.permute(2, 0, 3, 1).reshape(channels * len(offsets), -1)


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


# windows along two axes -----------------------------------------------------------------------------------------------


def _displacements(window: Window) -> list[tuple[int, int]]:
    """Half of all displacements between two offsets of a window; the others are their negatives."""
    down, right = ([*range(0, reach + 1, step)] for reach, step in zip(window.reach, window.dilation))
    left = [-columns for columns in right[:0:-1]]
    return [(rows, columns) for rows in down for columns in (right if rows == 0 else left + right)]


def _displaced_rows(window: Window, sizes: Sequence[int]) -> tuple[int, int]:
    """Rows of all products with zeros between the pictures, and of those of cropped pictures, per sample."""
    spread = math.prod(size + reach for size, reach in zip(sizes, window.reach))
    shifts = _displacements(window)
    cropped = sum(max(0, sizes[0] - rows) * max(0, sizes[1] - abs(columns)) for rows, columns in shifts)
    return len(shifts) * spread, cropped


def _displaced(window: Window, x: Tensor) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Σ_q x[q] x[q + shift]ᵀ over the whole picture, for half of all displacements.

    In large pictures samples, rows and columns stand in one long axis, with as many zeros between them as a window
    reaches, so that a displacement is one offset in it. Small pictures, which would be zeros for the most part, are
    cropped to what overlaps with the displaced one.
    """
    spread, cropped = _displaced_rows(window, x.shape[2:])
    if spread > CROPPING * cropped:
        yield from _displaced_crops(window, x)
        return
    height, width = window.reach
    flat = F.pad(x, (0, width, 0, height)).permute(0, 2, 3, 1).contiguous()
    columns = flat.shape[2]
    flat = flat.reshape(-1, x.shape[1])
    for shift in _displacements(window):
        offset = shift[0] * columns + shift[1]
        yield shift, flat[: len(flat) - offset].T @ flat[offset:]


def _displaced_crops(window: Window, x: Tensor) -> Iterator[tuple[tuple[int, int], Tensor]]:
    height, width, channels = x.shape[2], x.shape[3], x.shape[1]
    x = x.permute(0, 2, 3, 1).contiguous()
    for rows, columns in _displacements(window):
        if rows < height and abs(columns) < width:
            here = x[:, : height - rows, max(0, -columns) : width - max(0, columns)]
            there = x[:, rows:, max(0, columns) : width + min(0, columns)]
            yield (rows, columns), here.reshape(-1, channels).T @ there.reshape(-1, channels)


def _overhanging_rows(window: Window, sizes: Sequence[int]) -> int:
    """What the strips cost, in rows of one product of all channels with themselves, per sample."""
    total = 0
    for axis, other in ((0, 1), (1, 0)):
        along = sizes[1] + window.reach[1] if axis == 0 else window.outputs(sizes)[0]
        total += along * sum((len(seen) * window.kernel[other]) ** 2 for _, seen in _hanging_over(window, sizes, axis))
    return total


def _hanging_over(window: Window, sizes: Sequence[int], axis: int) -> Iterator[tuple[int, list[int]]]:
    """Positions along an axis whose windows touch the picture but are none of the convolution's; offsets that they see.

    In coordinates where window p reads x[p + offset], p runs from −reach to size − 1; the convolution's own from
    −padding to size − 1 + padding − reach.
    """
    size, reach, (before, behind) = sizes[axis], window.reach[axis], window.padding[axis]
    for p in range(-reach, size):
        if not -before <= p <= size - 1 + behind - reach:
            seen = [o for o in range(0, reach + 1, window.dilation[axis]) if 0 <= p + o < size]
            if seen:
                yield p, seen


def _overhanging(window: Window, x: Tensor) -> Iterator[tuple[list[int], Tensor]]:
    """Windows that touch the picture, but are none of the convolution's: rows of those offsets that they see.

    Strips above and below take all columns, those left and right the rows between.
    """
    reach = window.reach
    for p, seen in _hanging_over(window, x.shape[2:], 0):
        picture = F.pad(x[:, :, [p + o for o in seen]], (reach[1], reach[1]))
        yield _strip(window, picture, seen, None)
    for p, seen in _hanging_over(window, x.shape[2:], 1):
        picture = F.pad(x[..., [p + o for o in seen]], (0, 0, window.padding[0][0], window.padding[0][1]))
        yield _strip(window, picture, None, seen)


def _strip(
    window: Window, picture: Tensor, rows: list[int] | None, columns: list[int] | None
) -> tuple[list[int], Tensor]:
    """The windows of one strip: the offsets that they see, by number, and (windows, C · offsets)."""
    along = 3 if rows is not None else 2
    reach, step = window.reach[along - 2], window.dilation[along - 2]
    steps = list(range(0, reach + 1, step))
    parts = picture.unfold(along, reach + 1, 1)[..., ::step]
    if rows is not None:  # (samples, C, seen rows, positions, columns)
        chosen = [(r, c) for r in rows for c in steps]
        parts = parts.permute(0, 3, 1, 2, 4)
    else:  # (samples, C, positions, seen columns, rows)
        assert columns is not None
        chosen = [(r, c) for r in steps for c in columns]
        parts = parts.permute(0, 2, 1, 4, 3)
    number = {offset: index for index, offset in enumerate(window.offsets)}
    return [number[offset] for offset in chosen], parts.reshape(-1, picture.shape[1] * len(chosen))
