"""Statistics of layers recorded while a network is trained: goals for merging without data (*Vanishing Feature*, G.4).

Hooks on the convolution and linear modules read every batch that passes in training mode into exact streaming moments:
per-channel mean and deviation over all samples since ``reset``, variance between batches included. Weights change while
they are recorded, so start over (``reset``) when the last epoch begins, or let older batches fade with ``momentum``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from vfx.analyse.layers import number_layers
from vfx.errors import ArgumentError, DataError
from vfx.program import Program
from vfx.statistics.collect import Statistics, fingerprint
from vfx.statistics.moments import Moments, batch_moments


class Recorder:
    """Records a model's layer statistics in training mode until ``close``; a context manager too.

    ``momentum``: the weight of older batches shrinks by 1 − momentum with each new one, as in BatchNorm; None keeps all
    alike. ``moments`` holds them by module name and call (a module may run several times in one forward pass).
    """

    def __init__(self, model: nn.Module, momentum: float | None = None):
        if momentum is not None and not 0 < momentum < 1:
            raise ArgumentError(f"momentum must lie between 0 and 1, got {momentum}")
        self.model, self.momentum = model, momentum
        self.moments: dict[tuple[str, int], Moments] = {}
        self.samples = 0
        self._calls: dict[str, int] = {}
        self._handles: list[Any] = [model.register_forward_pre_hook(self._begin)]
        for name, module in model.named_modules():
            if isinstance(module, (_ConvNd, nn.Linear)):
                hook = lambda module, _, output, name=name: self._read(name, module, output)  # noqa: E731
                self._handles.append(module.register_forward_hook(hook))
        if len(self._handles) == 1:
            self.close()
            raise ArgumentError(f"{type(model).__name__} has no convolution or linear modules to record")

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the hooks off; what was recorded stays."""
        while self._handles:
            self._handles.pop().remove()

    def reset(self) -> None:
        """Forget everything, for instance when the last epoch begins."""
        self.moments.clear()
        self.samples = 0

    def _begin(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._calls = {}
        if self.model.training:
            self.samples += next((len(x) for x in args if isinstance(x, Tensor) and x.ndim), 0)

    @torch.no_grad()
    def _read(self, name: str, module: nn.Module, output: Tensor) -> None:
        if not self.model.training:
            return
        call = self._calls[name] = self._calls.get(name, -1) + 1
        channel = output.ndim - 1 - (len(module.kernel_size) if isinstance(module, _ConvNd) else 0)
        total = self.moments.get((name, call))
        if total is None:
            total = self.moments[name, call] = Moments(output.shape[channel], output.device)
        if self.momentum is not None:
            total.count *= 1 - self.momentum  # type: ignore[assignment]
            total.m2 *= 1 - self.momentum
        total.update(*batch_moments(output.detach(), channel))


def recorded(program: Program, recorders: Sequence[Recorder]) -> Statistics:
    """Layer statistics of a Program's edges from their recorders, one for each, in the edges' order.

    Layers that no recorded module runs (functional calls) have none and are not normalised. Raises ArgumentError,
    DataError.
    """
    if len(recorders) != program.edges:
        raise ArgumentError(f"{len(recorders)} recorders for {program.edges} edges; give one for each, in their order")
    calls: dict[str, int] = {}
    moments_of: dict[str, list[Moments]] = {}
    for layer in number_layers(program):
        call = calls[layer.fqn] = calls.get(layer.fqn, -1) + 1
        recorded_moments = [recorder.moments.get((layer.fqn, call)) for recorder in recorders]
        kept = [moments for moments in recorded_moments if moments is not None]
        if len(kept) == len(recorded_moments):
            moments_of[layer.node] = kept
    if not moments_of:
        raise DataError("the recorders hold nothing; train the models (in training mode) while they record")
    samples = min(recorder.samples for recorder in recorders)
    return Statistics(samples, (), {}, moments_of, fingerprint(program), frozenset({"layers"}))
