"""Gradients of each sample's loss by ``torch.func``: ``vmap`` over the gradient of the functional Program.

Samples go through in chunks, so that memory holds one chunk of gradients. With a batch of n samples a chunk is a tensor
(n, *weight) for each weight; ``minibatch`` m averages the loss of m samples behind one gradient (the public WoodFisher
code does so).

The loss is cross-entropy with the labels of the data. Without labels they come from the network itself: drawn from its
softmax ("sampled": the true Fisher information) or its best class ("argmax"). A loss of one's own takes (output,
labels) of a batch, labels None where the data have none, and returns its mean.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from vfx.capture.outputs import named_tensors
from vfx.errors import ArgumentError, DataError, PassError
from vfx.program import run
from vfx.progress import track
from vfx.pruning.scores.score import Subject
from vfx.statistics.data import Batches
from vfx.statistics.labels import PADDING, check_classes, tensor_labels

Labels = Literal["sampled", "argmax"]
Loss = Callable[[Any, Any], Tensor]
CHUNK_BYTES, CHUNK = 1 << 28, 64  # gradients of at most this much memory and this many samples at once


class SampleGradients:
    """Per-sample gradients of one network's loss with respect to chosen weights."""

    def __init__(self, subject: Subject, loss: Loss | None = None, labels: Labels = "sampled", minibatch: int = 1):
        if labels not in ("sampled", "argmax"):
            raise ArgumentError(f"labels={labels!r} is unknown; choose 'sampled' or 'argmax'")
        self.program = subject.program
        self.graph, self.weights = subject.program.graph, dict(subject.program.weights[0])
        self.axes = subject.program.batch_axes
        self.loss, self.kind, self.minibatch = loss, labels, minibatch
        self.seed, self.progress = subject.seed, subject.progress

    @cached_property
    @torch.no_grad()
    def classes(self) -> int:
        """How many classes the network's scores have."""
        return by_class(logits(self.program(*self.program.example_inputs))).shape[-1]

    def chunks(self, names: Sequence[str], batches: Batches) -> Iterator[dict[str, Tensor]]:
        """Gradients (n, *weight) of each weight in ``names``, chunk by chunk."""
        chosen = {name: self.weights[name] for name in names}
        size = sum(tensor.numel() * tensor.element_size() for tensor in chosen.values())
        limit = max(1, min(CHUNK, CHUNK_BYTES // max(size, 1)))
        for batch, labels in self._whole_minibatches(batches):
            for part, part_labels in self._cut(batch, labels, limit * self.minibatch):
                yield self._gradients(chosen, part, part_labels)

    def mean(self, names: Sequence[str], batches: Batches) -> dict[str, Tensor]:
        """The mean of all samples' gradients, in float64."""
        chosen = {name: self.weights[name] for name in names}
        totals = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in chosen.items()}
        count = 0
        for batch, labels in self._labelled(batches):
            size = batches.size(batch)

            def total(weights: dict[str, Tensor], batch: Any = batch, labels: Any = labels, size: int = size) -> Tensor:
                return self._loss(self._forward(weights, batch), labels) * size

            for name, gradient in _guarded(grad(total), chosen).items():
                totals[name] += gradient
            count += size
        return {name: gradient / count for name, gradient in totals.items()}

    def _gradients(self, chosen: dict[str, Tensor], batch: list[Tensor], labels: Tensor | None) -> dict[str, Tensor]:
        def loss(weights: dict[str, Tensor], batch: list[Tensor], labels: Tensor | None) -> Tensor:
            return self._loss(self._forward(weights, batch), labels)

        each = vmap(grad(loss), in_dims=(None, list(self.axes), None if labels is None else 0))
        return _guarded(each, chosen, batch, labels)

    def _forward(self, weights: dict[str, Tensor], batch: list[Tensor]) -> Any:
        return run(self.graph, {**self.weights, **weights}, batch)

    def _loss(self, output: Any, labels: Tensor | None) -> Tensor:
        value = self.loss(output, labels) if self.loss else cross_entropy(output, labels)
        if value.ndim:
            raise ArgumentError(f"the loss must return one number, the mean over its batch; got {tuple(value.shape)}")
        return value

    def _labelled(self, batches: Batches) -> Iterator[tuple[list[Tensor], Tensor | None]]:
        generator = torch.Generator().manual_seed(self.seed)
        for batch, labels in track(batches.labelled(tensor_labels), "gradients", len(batches), self.progress):
            if labels is None and self.loss is None:
                labels = self._pseudo_labels(batch, generator)
            elif labels is not None and self.loss is None and not labels.is_floating_point():
                check_classes(labels, self.classes)
            yield batch, labels

    def _whole_minibatches(self, batches: Batches) -> Iterator[tuple[list[Tensor], Tensor | None]]:
        """Batches of whole minibatches: what is over of one goes in front of the next; what is over at last is left."""
        rest: tuple[list[Tensor], Tensor | None] | None = None
        seen, any_whole = 0, False
        for batch, labels in self._labelled(batches):
            seen += batches.size(batch)
            batch, labels = (batch, labels) if rest is None else self._joined(rest, (batch, labels))
            count = batches.size(batch)
            whole = count - count % self.minibatch
            if whole:
                any_whole = True
                yield self._rows(batch, labels, slice(0, whole))
            rest = self._rows(batch, labels, slice(whole, count)) if whole < count else None
        if not any_whole:
            raise DataError(f"{seen} samples hold no minibatch of {self.minibatch} alike; give more of them")

    def _rows(self, batch: list[Tensor], labels: Tensor | None, rows: slice) -> tuple[list[Tensor], Tensor | None]:
        axes = ((d, x) for d, x in zip(self.axes, batch))
        kept = [x if d is None else x[(slice(None),) * d + (rows,)] for d, x in axes]
        return kept, None if labels is None else labels[rows]

    def _joined(
        self, first: tuple[list[Tensor], Tensor | None], second: tuple[list[Tensor], Tensor | None]
    ) -> tuple[list[Tensor], Tensor | None]:
        """Two batches as one; only the second where they do not fit together (sequences of another length)."""
        pairs = [(a, b, d) for a, b, d in zip(first[0], second[0], self.axes) if d is not None]
        pairs += [(first[1], second[1], 0)] if first[1] is not None and second[1] is not None else []
        alike = (first[1] is None) == (second[1] is None) and all(
            a.select(d, 0).shape == b.select(d, 0).shape for a, b, d in pairs
        )
        if not alike:
            return second
        joined = [b if d is None else torch.cat([a, b], d) for a, b, d in zip(first[0], second[0], self.axes)]
        return joined, None if first[1] is None or second[1] is None else torch.cat([first[1], second[1]])

    @torch.no_grad()
    def _pseudo_labels(self, batch: list[Tensor], generator: torch.Generator) -> Tensor:
        """Labels that the network gives its own inputs."""
        rows = by_class(logits(self._forward({}, batch)))
        if self.kind == "argmax":
            return rows.argmax(-1)
        flat = rows.reshape(-1, rows.shape[-1]).softmax(-1).cpu()
        return torch.multinomial(flat, 1, generator=generator).reshape(rows.shape[:-1]).to(rows.device)

    def _cut(self, batch: list[Tensor], labels: Tensor | None, size: int) -> Iterator[tuple[list[Tensor], Any]]:
        """Chunks (n, m, …) of a batch of whole minibatches: n gradients, m samples behind each."""
        m = self.minibatch
        count = self.program.batch_of(batch)
        for start in range(0, count, size):
            chunk, chunk_labels = self._rows(batch, labels, slice(start, start + size))
            part = [x if d is None else x.unflatten(d, (-1, m)) for d, x in zip(self.axes, chunk)]
            yield part, None if chunk_labels is None else chunk_labels.unflatten(0, (-1, m))


def _guarded(function: Callable[..., Any], *args: Any) -> Any:
    """A torch.func transform; what it cannot differentiate is refused with the way out."""
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.filterwarnings("ignore", message="There is a performance drop")  # slow, but right
            return function(*args)
    except (RuntimeError, NotImplementedError) as error:
        raise PassError(
            f"torch.func could not take gradients of single samples through this network: {error}. Way out: a score "
            "without gradients ('magnitude', 'wanda'), a fitting loss=, or a capture with a dynamic batch"
        ) from error


def logits(output: Any) -> Tensor:
    """The class scores of an output: the tensor itself, an entry called logits, or the first tensor."""
    tensors = named_tensors(output)
    if not tensors:
        raise ArgumentError("the network returns no tensor to take a loss of; give the score a loss= of your own")
    return next((x for name, x in tensors.items() if name == "['logits']"), next(iter(tensors.values())))


def by_class(scores: Tensor) -> Tensor:
    """Class scores with the classes last: images keep them on axis 1, tokens and vectors on the last."""
    if scores.ndim < 2:
        raise ArgumentError(f"cross-entropy needs class scores (samples, classes), got {tuple(scores.shape)}")
    return scores.movedim(1, -1) if scores.ndim > 3 else scores


def cross_entropy(output: Any, labels: Tensor | None) -> Tensor:
    """Mean cross-entropy of class scores (N, C), (N, L, C) or (N, C, H, W) with integer labels without the C."""
    rows = by_class(logits(output))
    if labels is None or labels.is_floating_point() or labels.shape != rows.shape[:-1]:
        given = "no labels" if labels is None else f"{labels.dtype} labels of shape {tuple(labels.shape)}"
        raise ArgumentError(
            f"cross-entropy of class scores {tuple(rows.shape)} needs integer labels {tuple(rows.shape[:-1])}, got "
            f"{given}; give the score a loss= of your own"
        )
    total = F.cross_entropy(rows.reshape(-1, rows.shape[-1]), labels.reshape(-1).long(), reduction="sum")
    return total / (labels != PADDING).sum().clamp_min(1)
