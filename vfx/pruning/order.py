"""The k-th lowest of many scores, counted without sorting or joining them.

Floating numbers are ordered as their bits are, read as integers (of negative ones the bits turned round). The threshold
is found sixteen bits at a time, from the highest: how many scores begin with each, and which of them holds the k-th
(radix selection: Knuth, *The Art of Computer Programming* 3, §5.2.5). Scores are read in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PIECE = 1 << 17  # scores that are read at a time
DIGIT = 16  # bits
_SIGNED = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def kth_lowest(scores: Callable[[], Iterable[Tensor]], count: int) -> tuple[Tensor, int]:
    """The ``count``-th lowest of all values of some tensors of one dtype, none of them NaN, and how many are below it.

    ``scores`` gives the tensors anew each time. ``count`` is at least 1.

    >>> kth_lowest(lambda: [torch.tensor([3.0, 1.0]), torch.tensor([2.0, 1.0])], 3)
    (tensor(2.), 2)
    """
    dtype = next(iter(scores())).dtype
    width = 8 * dtype.itemsize
    prefix, below = 0, 0
    for shift in range(width - DIGIT, -1, -DIGIT):
        counts = np.zeros(1 << DIGIT, np.int64)
        for keys in _keys(scores(), width):
            if shift < width - DIGIT:
                keys = keys[keys >> (shift + DIGIT) == prefix]
            counts += np.bincount(((keys >> shift) & ((1 << DIGIT) - 1)).astype(np.int64), minlength=1 << DIGIT)
        up_to = below + counts.cumsum()
        digit = int(np.searchsorted(up_to, count))
        below = int(up_to[digit] - counts[digit])
        prefix = prefix << DIGIT | digit
    return _value(prefix, width, dtype), below


def _keys(tensors: Iterable[Tensor], width: int) -> Iterator[NDArray[np.int64]]:
    """Integers in the order of the values, none below zero, a piece at a time (of 64 bits the sign's is turned)."""
    lowest = -(1 << (width - 1))
    for tensor in tensors:
        for piece in tensor.reshape(-1).split(PIECE):
            bits = (piece + 0.0).cpu().view(_SIGNED[piece.dtype.itemsize]).numpy().astype(np.int64)  # −0 is 0
            ordered = np.where(bits < 0, lowest - bits - 1, bits)
            yield ordered - lowest if width < 64 else ordered.view(np.uint64) ^ np.uint64(1 << 63)  # type: ignore[misc]


def _value(key: int, width: int, dtype: torch.dtype) -> Tensor:
    """The number that a key stands for."""
    lowest = -(1 << (width - 1))
    ordered = key + lowest
    bits = lowest - ordered - 1 if ordered < 0 else ordered
    return torch.tensor([bits], dtype=_SIGNED[width // 8]).view(dtype)[0]
