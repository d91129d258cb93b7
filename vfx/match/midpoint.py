"""The merged network of given elements: its loss on the data, and the loss's gradient by each edge's weights.

The loss is the cross-entropy where batches carry integer labels; else distillation: the Kullback-Leibler divergence of
the merged network's softmax from that of the mean of the edges' outputs. BatchNorm reads the statistics of its batch,
as it will after RESET: the averaged running statistics fit no merged network. Where outputs are compared it does so in
the edges as well, so that copies of one network agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from vfx.analyse.symmetry import Symmetry
from vfx.capture.outputs import named_tensors
from vfx.elements import Elements, act
from vfx.errors import ArgumentError, DataError
from vfx.match.universe import check_one_shape, mean_weights, scored_names
from vfx.operators import arguments, operator_of
from vfx.program import Program, Weights, copy_graph, run
from vfx.statistics.data import Batches
from vfx.statistics.labels import PADDING, check_classes

Loss = Callable[[Any, Tensor | None], Tensor]
Labelled = tuple[list[Tensor], Tensor | None]  # a batch's inputs, and its labels where it has some
LOSSES = ("auto", "labels", "distillation")


def check_loss(loss: str | Loss) -> str | Loss:
    """The loss itself; raises ArgumentError for a name that is unknown."""
    if isinstance(loss, str) and loss not in LOSSES:
        raise ArgumentError(f"loss={loss!r} is unknown; choose one of {', '.join(LOSSES)} or give a function")
    return loss


class Midpoint:
    """The merged network of the edges, the first one standing as it is and each other behind its element.

    ``alphas`` are the edges' shares, ``loss`` a name of ``LOSSES`` or a function of the network's output and labels.
    """

    def __init__(
        self, program: Program, symmetry: Symmetry, batches: Batches, loss: str | Loss, alphas: Sequence[float]
    ):
        check_one_shape(program.weights)
        self.program, self.symmetry, self.batches, self.alphas = program, symmetry, batches, alphas
        self.graph = batch_statistics(program.graph)
        self.first, *self.others = program.weights
        self.names = scored_names(symmetry)
        self.loss = _Criterion(self.graph, program.weights, loss)

    def moved(self, elements: Sequence[Elements]) -> list[Weights]:
        """Every edge but the first behind its element."""
        return [act(self.symmetry, element, weights) for element, weights in zip(elements, self.others)]

    def loss_of(self, elements: Sequence[Elements], batches: Iterable[Labelled] | None = None) -> float:
        """Mean loss over all samples (of some ``batches``)."""
        weights, total, count = mean_weights([self.first, *self.moved(elements)], self.alphas), 0.0, 0
        for inputs, labels in self.batches.labelled() if batches is None else batches:
            size = self.batches.size(inputs)
            total += size * float(self.loss(run(self.graph, weights, inputs), inputs, labels))
            count += size
        return total / count

    def gradient(
        self, moved: Sequence[Weights], alphas: Sequence[float], inputs: list[Tensor], labels: Tensor | None,
        names: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Of the loss on one batch, by weights (all that groups move) of the network that merges the ``moved`` edges.

        The first edge, which stands as it is, is one of them.
        """
        names = self.names if names is None else names
        weights = mean_weights([self.first, *moved], alphas)
        with torch.enable_grad():
            leaves = [weights[name].requires_grad_() for name in names]
            loss = self.loss(run(self.graph, weights, inputs), inputs, labels)
            if not loss.isfinite():
                raise DataError(f"the loss on a batch is {float(loss)}; take a smaller lr=, or a loss= that is finite")
            if not loss.requires_grad:
                raise ArgumentError("loss= does not depend on the network's output, which it is given first")
            found = torch.autograd.grad(loss, leaves, allow_unused=True)
        return {n: torch.zeros_like(w) if g is None else g for n, w, g in zip(names, leaves, found)}


@dataclass(frozen=True)
class _Criterion:
    """The loss of one batch's outputs; the ``edges`` teach by the ``graph``."""

    graph: fx.Graph
    edges: Sequence[Weights]
    kind: str | Loss

    def __call__(self, outputs: Any, inputs: list[Tensor], labels: Tensor | None) -> Tensor:
        if not isinstance(self.kind, str):
            return _scalar(self.kind(outputs, labels))
        if labels is not None and (labels == PADDING).all():
            labels = None
        if self.kind == "distillation" or (self.kind == "auto" and labels is None):
            return self._distillation(outputs, inputs)
        if labels is None:
            raise DataError("loss='labels' needs batches with integer class labels behind the inputs")
        return _cross_entropy(outputs, labels)

    @torch.no_grad()
    def _teacher(self, inputs: list[Tensor]) -> dict[str, Tensor]:
        """The mean of the edges' outputs."""
        outputs = [_logits(run(self.graph, weights, inputs)) for weights in self.edges]
        return {name: torch.stack([own[name] for own in outputs]).mean(0) for name in outputs[0]}

    def _distillation(self, outputs: Any, inputs: list[Tensor]) -> Tensor:
        student, teacher = _logits(outputs), self._teacher(inputs)
        if not student:
            raise DataError("distillation needs an output of shape (samples, classes, …); give loss= as a function")
        return torch.stack([_divergence(student[name], goal) for name, goal in teacher.items()]).sum()


def _scalar(loss: Any) -> Tensor:
    """What a function of the user's gave. Raises ArgumentError unless it is one number."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ArgumentError(f"loss= must give one number as a tensor, such as a mean over the batch, not {given}")
    return loss.reshape(())


def _logits(outputs: Any) -> dict[str, Tensor]:
    """Outputs that hold several classes for each sample."""
    return {n: t for n, t in named_tensors(outputs).items() if t.is_floating_point() and t.ndim > 1 and t.shape[-1] > 1}


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence from teacher to student, mean over all but the classes: axis 1 of images, the last of the rest."""
    axis = 1 if student.ndim >= 4 else -1
    log, goal = (x.movedim(axis, -1).flatten(0, -2).log_softmax(-1) for x in (student, teacher))
    return F.kl_div(log, goal, reduction="batchmean", log_target=True)


def _cross_entropy(outputs: Any, labels: Tensor) -> Tensor:
    """On the first output whose shape fits the labels, its classes along axis 1 or the last one."""
    for logits in _logits(outputs).values():
        target = labels.to(logits.device).long()
        if (logits.shape[0], *logits.shape[2:]) == target.shape:
            check_classes(target, logits.shape[1])
            return F.cross_entropy(logits, target)
        if logits.shape[:-1] == target.shape:
            check_classes(target, logits.shape[-1])
            return F.cross_entropy(logits.flatten(0, -2), target.flatten())
    shapes = ", ".join(str(tuple(t.shape)) for t in named_tensors(outputs).values())
    raise DataError(
        f"labels of shape {tuple(labels.shape)} fit none of the outputs ({shapes}); give loss= as a function"
    )


def batch_statistics(graph: fx.Graph) -> fx.Graph:
    """The graph with BatchNorms that normalise by the statistics of their batch and leave the running ones alone."""
    changed, _ = copy_graph(graph)
    for node in changed.nodes:
        if operator_of(node).name == "aten.batch_norm":
            a = arguments(node) | {"running_mean": None, "running_var": None, "training": True}
            node.args, node.kwargs = tuple(a.values()), {}
    return changed
