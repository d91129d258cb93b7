"""One pass over the data for every measure: merged network and edges advance together from layer to layer.

For each layer of each network: the moments of its output's channels, the moments and zeros of its activation, and the
norms of the feature g(x) = f(x) − f(0) and the offset h = f(0) of what it hands on (*Vanishing Feature* §5.1). f(0) is
run once: floating inputs are 0, and integer inputs (token ids, masks), which have no zero, stay at those of the first
example; or the caller says what stands for 0. Where f(0) is not finite there is no decomposition.

For each activation: how many units (sample, position and channel) are active in an edge and silent in the merged
network. Totals are float64 and the same for any partition into batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from vfx.capture.outputs import named_tensors
from vfx.complex_numbers import real_parts
from vfx.diagnosis.taps import Key, LayerTap
from vfx.program import Execution, Program
from vfx.statistics.moments import Moments, batch_moments


class Observed:
    """What one network's layer did over the data."""

    def __init__(self) -> None:
        self.samples = 0
        self.feature_norms = 0.0
        self.offset_norms = 0.0
        self.output: Moments | None = None
        self.activation: Moments | None = None
        self.zeros = 0

    @property
    def feature(self) -> float:
        """E‖g‖: mean over samples of the Euclidean norm over all positions and channels."""
        return self.feature_norms / max(self.samples, 1)

    @property
    def offset(self) -> float:
        """‖h‖ = ‖f(0)‖ (its mean where the inputs' shapes, and so the reference input, differ)."""
        return self.offset_norms / max(self.samples, 1)

    @property
    def zero_share(self) -> float | None:
        """Share of units of the activation that are exactly 0."""
        return self.zeros / self.activation.count if self.activation is not None and self.activation.count else None

    @property
    def variance(self) -> float | None:
        """Sum over the channels of the output's variance."""
        return None if self.output is None else float((self.output.std**2).sum())


@dataclass
class SilencedUnits:
    """Units active in one edge, and those of them that are silent in the merged network."""

    active: int = 0
    silenced: int = 0

    @property
    def share(self) -> float | None:
        return self.silenced / self.active if self.active else None


class Observer:
    """One network (the weights of one edge of a Program) with its taps, read batch by batch."""

    def __init__(
        self, program: Program, edge: int, taps: Mapping[Key, LayerTap], reference: list[Tensor] | None = None
    ):
        self.graph, self.weights = program.graph, program.weights[edge]
        self.placeholders, self.taps = program.placeholders, taps
        self.plan = program.plan
        self.layers = {key: Observed() for key in taps}
        self.outputs: Moments | None = None
        self._events: dict[fx.Node, list[Key]] = {}
        for key, tap in taps.items():
            for node in {tap.output: None, tap.feature: None}:
                self._events.setdefault(node, []).append(key)
        self._zeros: dict[tuple[torch.Size, ...], dict[Key, Tensor]] = {}
        self._given = reference
        self._axes, self._samples = program.batch_axes, program.batch_of
        self._held = [self._one(x, d) for x, d in zip(program.example_inputs, self._axes)]
        self._run: _Run | None = None

    def start(self, batch: list[Tensor], samples: int) -> None:
        """Begin a forward pass over one batch."""
        reference = self._reference(batch)
        shapes = tuple(x.shape for x in reference)
        if shapes not in self._zeros:
            self._zeros[shapes] = self._at_zero(reference)
        self._run = _Run(Execution(self.graph, self.weights, batch, self.plan), samples, self._zeros[shapes])

    def advance(self) -> dict[Key, Tensor] | None:
        """Run up to the next layer that is read; the activations met there by layer, or None at the end."""
        run = self._run
        assert run is not None
        while run.execution.position < len(self.plan):
            node, value = run.execution.step()
            if node in self._events:
                value = real_parts(value)
                return {key: x for key in self._events[node] if (x := self._read(key, node, value, run)) is not None}
        self._read_logits(run.execution.result, run.samples)
        self._run = None
        return None

    def _reference(self, batch: list[Tensor]) -> list[Tensor]:
        """The input that stands for 0, with one sample where the graph allows any number."""
        if self._given is not None:
            return [x.to(like.device) for x, like in zip(self._given, batch)]
        references = []
        for node, x, axis, held in zip(self.placeholders, batch, self._axes, self._held):
            dynamic = axis is not None and not isinstance(node.meta["val"].shape[axis], int)
            single = self._one(x, axis) if dynamic else x
            if x.is_floating_point():
                references.append(torch.zeros_like(single))
            else:
                fits = isinstance(held, Tensor) and held.shape == single.shape and held.dtype == single.dtype
                references.append(held.to(single.device) if fits else single.clone())
        return references

    @staticmethod
    def _one(x: Tensor, axis: int | None) -> Tensor:
        """The first sample."""
        return x if axis is None else x.narrow(axis, 0, 1)

    def _at_zero(self, reference: list[Tensor]) -> dict[Key, Tensor]:
        execution, values = Execution(self.graph, self.weights, reference, self.plan), {}
        for _ in self.plan:
            node, value = execution.step()
            for key in self._events.get(node, ()):
                if self.taps[key].feature is node and bool(torch.isfinite(value).all()):
                    value = real_parts(value)
                    values[key] = per_sample(node, value, self._samples(reference)).clone()
        return values

    def _read(self, key: Key, node: fx.Node, value: Tensor, run: _Run) -> Tensor | None:
        tap, seen = self.taps[key], self.layers[key]
        if node is tap.output:
            if seen.output is None:
                seen.output = Moments(value.shape[tap.layer.channel], value.device)
            seen.output.update(*batch_moments(value, tap.layer.channel))
        if node is tap.feature and key in run.zeros:
            zero, rows = run.zeros[key], per_sample(node, value, run.samples)
            # a value without a batch axis does not depend on the sample: it counts once for each
            seen.feature_norms += float(_norms(rows - zero).mean()) * run.samples
            seen.offset_norms += float(_norms(zero).mean()) * run.samples
            seen.samples += run.samples
        if node is not tap.activation:
            return None
        if seen.activation is None:
            seen.activation = Moments(1, value.device)
        seen.activation.update(*batch_moments(value.reshape(1, -1), 0))
        active = value != 0
        seen.zeros += active.numel() - int(active.sum())
        return active

    def _read_logits(self, result: Any, samples: int) -> None:
        logits = first_output(result)
        if logits is None or logits.ndim < 2 or logits.shape[0] != samples:
            return
        axis = class_axis(logits)
        if self.outputs is None:
            self.outputs = Moments(logits.shape[axis], logits.device)
        self.outputs.update(*batch_moments(logits, axis))


@dataclass
class _Run:
    """A forward pass that goes on from layer to layer."""

    execution: Execution
    samples: int
    zeros: dict[Key, Tensor]


def observe(
    merged: Observer, edges: list[Observer], batches: Iterable[tuple[list[Tensor], int]]
) -> list[dict[Key, SilencedUnits]]:
    """Feed every batch to all networks; the units silenced of each edge by layer."""
    pairs: list[dict[Key, SilencedUnits]] = [{} for _ in edges]
    for batch, samples in batches:
        observers = [merged, *edges]
        for observer in observers:
            observer.start(batch, samples)
        waiting: dict[Key, dict[int, Tensor]] = {}
        running = dict(enumerate(observers))
        while running:
            for index, observer in list(running.items()):
                active = observer.advance()
                if active is None:
                    del running[index]
                for key, mask in (active or {}).items():
                    if key in merged.taps:
                        waiting.setdefault(key, {})[index] = mask
            for key in [key for key, masks in waiting.items() if len(masks) == len(observers)]:
                _compare(key, waiting.pop(key), pairs)
    return pairs


def _compare(key: Key, masks: dict[int, Tensor], pairs: list[dict[Key, SilencedUnits]]) -> None:
    merged = masks.pop(0)
    for index, active in masks.items():
        if active.shape != merged.shape:
            continue
        pair = pairs[index - 1].setdefault(key, SilencedUnits())
        pair.active += int(active.sum())
        pair.silenced += int((active & ~merged).sum())


def per_sample(node: fx.Node, value: Tensor, samples: int) -> Tensor:
    """A value as a matrix (samples, rest); the batch may stand on any axis, or be the outer part of one (windows)."""
    shape = node.meta["val"].shape
    axis = next((index for index, size in enumerate(shape) if not isinstance(size, int)), 0)
    moved = value.movedim(axis, 0) if value.ndim else value.reshape(1)
    return moved.reshape(samples if moved.shape[0] % samples == 0 else 1, -1)


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)


def first_output(result: Any) -> Tensor | None:
    """The first floating tensor that a network returns."""
    return next((x for x in named_tensors(result).values() if x.is_floating_point()), None)


def class_axis(outputs: Tensor) -> int:
    """Where the classes stand: axis 1 of (N, C) and of maps (N, C, …), the last of sequences (N, T, C)."""
    return outputs.ndim - 1 if outputs.ndim == 3 else 1
