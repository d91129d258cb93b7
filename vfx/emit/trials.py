"""Calls on which what was written is compared with the module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vfx.capture.exporting import DYNAMIC_BATCH
from vfx.capture.signature import Call, has_batch
from vfx.proof import is_defined, samples

BATCHES = (1, 7)
Axes = Sequence[int | None] | None  # on which samples stand, one for each tensor; None where nobody says


def trials(module: nn.Module, call: Call, dynamic_shapes: Any, axes: Axes) -> Iterator[tuple[str, Call]]:
    """Calls at batch 1 and 7 with their names; the example call alone where nobody says which axes are samples."""
    if axes is None and dynamic_shapes == DYNAMIC_BATCH:
        axes = [0 if batched else None for batched in has_batch(call.tensors())]
    if axes is None or dynamic_shapes is None:
        yield "the example inputs", call
        return
    generator = torch.Generator().manual_seed(0)
    for batch in BATCHES:
        yield f"batch {batch}", _fresh(module, call, axes, batch, generator)


def _fresh(module: nn.Module, call: Call, axes: Sequence[int | None], batch: int, generator: torch.Generator) -> Call:
    """Random samples in place of the call's, unless they lead to NaN; then its own, as often as need be."""
    drawn = iter(samples(call.tensors(), axes, batch, generator))
    fresh = call.map(lambda x: next(drawn) if isinstance(x, Tensor) else x)
    if is_defined(module(*fresh.args, **fresh.kwargs)):
        return fresh
    axes_left = iter(axes)
    return call.map(lambda x: _repeated(x, next(axes_left), batch) if isinstance(x, Tensor) else x)


def _repeated(x: Tensor, axis: int | None, count: int) -> Tensor:
    return x if axis is None else x.index_select(axis, torch.arange(count) % x.shape[axis])
