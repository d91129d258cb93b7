"""Straight-through estimator matching (Git Re-Basin, Ainsworth et al. 2022, algorithm 3).

Each edge i ≥ 1 gets a free copy θ̃_i of θ_0. One step, on one batch:

1. π_i ← the permutation that brings θ_i closest to θ̃_i (weight matching from the last π_i on);
2. the loss is taken at the merged network Σ α_i π_i(θ_i), the first edge standing as it is;
3. its gradient by π_i(θ_i) is given to θ̃_i as if the projection were the identity (straight through), and Adam steps.

With two edges and α = ½ this is the paper's algorithm; with more, all are optimised together on one merged network. The
first π_i are weight matching's. The loss is the cross-entropy where batches carry integer labels; else distillation:
the Kullback-Leibler divergence of the merged network's softmax from that of the mean of the edges' outputs. A step
may raise the loss, so it is measured over all batches at the start and behind every epoch that
moved a channel, and the best permutations seen are kept. BatchNorm reads the statistics of its batch, as it will after
RESET: the averaged running statistics fit no merged network. The user's weights are only read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from vfx.analyse.symmetry import Symmetry
from vfx.arguments import checked
from vfx.capture.outputs import named_tensors
from vfx.elements import Permutations, act, identity, permuted, random_permutations
from vfx.errors import ArgumentError, DataError
from vfx.match.descent import Descent
from vfx.match.matcher import Matching, Problem
from vfx.match.universe import mean_weights, scored_names
from vfx.operators import arguments, operator_of
from vfx.program import Program, Weights, copy_graph, run
from vfx.progress import track
from vfx.statistics.data import Batches
from vfx.statistics.labels import check_classes

Loss = Callable[[Any, Tensor | None], Tensor]
LOSSES = ("auto", "labels", "distillation")


class StraightThrough:
    """Permutations that lower the merged network's loss on the data.

    ``epochs`` over the batches (``steps`` cuts them off), Adam's ``lr``, ``loss``: "auto", "labels", "distillation", or
    a function of the network's output and the batch's labels (None without). ``restarts`` begin from weight matching of
    random permutations. Raises DataError where the loss does not fit the batches, ArgumentError.
    """

    needs = frozenset({"data"})
    exact = True

    @checked
    def __init__(
        self,
        epochs: int = 5,
        lr: float = 1e-3,
        *,
        steps: int | None = None,
        restarts: int = 0,
        loss: str | Loss = "auto",
    ):
        if isinstance(loss, str) and loss not in LOSSES:
            raise ArgumentError(f"loss={loss!r} is unknown; choose one of {', '.join(LOSSES)} or give a function")
        if epochs < 0 or lr <= 0 or restarts < 0 or (steps is not None and steps < 0):
            raise ArgumentError("epochs, steps and restarts must be at least 0, lr above 0")
        self.epochs, self.lr, self.steps, self.restarts = epochs, lr, steps, restarts
        self.loss = loss

    @torch.no_grad()
    def __call__(self, problem: Problem) -> Matching:
        if problem.data is None:
            raise ArgumentError("straight-through matching runs the networks: give data= (statistics do not do)")
        begin = time.perf_counter()
        program, symmetry, generator = problem.program, problem.symmetry, np.random.default_rng(problem.seed)
        task = Midpoint(program, symmetry, Batches(program, problem.data), self.loss, problem.shares)
        runs = []
        for attempt in range(1 + self.restarts):
            start = [
                Descent(symmetry, program.weights[0], w).run(
                    generator, random_permutations(symmetry.groups, generator) if attempt else None
                )
                for w in program.weights[1:]
            ]
            runs.append(self._run(task, [element for element, _, _ in start], generator, problem.progress))
        best, unread = min(runs, key=lambda run: run.loss), task.batches.unread if self.loss == "auto" else ""
        return Matching(
            elements=(identity(symmetry), *map(permuted, best.elements)),
            objective=(-best.loss,),
            sweeps=(best.steps,),
            seconds=time.perf_counter() - begin,
            details={"loss": best.loss, "initial_loss": best.initial},
            attempts=tuple((-run.loss,) for run in runs),
            notes=(f"labels of the data were not used: {unread}",) if unread else (),
        )

    def _run(
        self, task: Midpoint, elements: list[Permutations], generator: np.random.Generator, progress: bool
    ) -> _Run:
        if not task.names:  # nothing can be permuted
            return _Run(elements, loss := task.loss_of(elements), loss, 0)
        copies = [{n: task.first[n].detach().clone() for n in task.names} for _ in elements]
        adam = torch.optim.Adam([t for copy in copies for t in copy.values()], self.lr)
        best = initial = task.loss_of(elements)
        kept, measured, steps = elements, elements, 0
        batches = sum(1 for _ in task.batches) * self.epochs
        total = batches if self.steps is None else min(batches, self.steps)
        epochs = track(range(self.epochs), "straight-through", self.epochs, progress)
        for _ in epochs:
            for inputs, labels in task.batches.labelled():
                if steps == total:
                    break
                elements = [self._project(task, k, copies[k], own, generator) for k, own in enumerate(elements)]
                for copy, gradient in zip(copies, task.gradients(elements, inputs, labels)):
                    for name, tensor in copy.items():
                        tensor.grad = gradient[name]
                adam.step()
                steps += 1
            elements = [self._project(task, k, copies[k], own, generator) for k, own in enumerate(elements)]
            if _differ(elements, measured):
                measured, loss = elements, task.loss_of(elements)
                kept, best = (elements, loss) if loss < best else (kept, best)
        return _Run(kept, best, initial, steps)

    @staticmethod
    def _project(
        task: Midpoint, index: int, copy: Weights, element: Permutations, generator: np.random.Generator
    ) -> Permutations:
        """The group element that brings an edge closest to its free copy."""
        return Descent(task.symmetry, copy, task.others[index]).run(generator, element)[0]


class _Run(NamedTuple):
    elements: list[Permutations]
    loss: float
    initial: float
    steps: int


def _differ(one: Sequence[Permutations], other: Sequence[Permutations]) -> bool:
    return any((a[g] != b[g]).any() for a, b in zip(one, other) for g in a)


class Midpoint:
    """The merged network of given permutations: its loss on the data, and the gradient by each edge's weights."""

    def __init__(
        self, program: Program, symmetry: Symmetry, batches: Batches, loss: str | Loss, alphas: Sequence[float]
    ):
        self.program, self.symmetry, self.batches, self.alphas = program, symmetry, batches, alphas
        self.graph = batch_statistics(program.graph)
        self.first, *self.others = program.weights
        self.names = scored_names(symmetry)
        self.loss = _Criterion(program, loss)

    def merged(self, elements: Sequence[Permutations]) -> dict[str, Tensor]:
        """Σ α_i π_i(θ_i), fresh tensors."""
        aligned = [self.first, *(act(self.symmetry, permuted(e), w) for w, e in zip(self.others, elements))]
        return mean_weights(aligned, self.alphas)

    def loss_of(self, elements: Sequence[Permutations]) -> float:
        """Mean loss over all samples."""
        weights, total, count = self.merged(elements), 0.0, 0
        for inputs, labels in self.batches.labelled():
            size = self.batches.size(inputs)
            total += size * float(self.loss(run(self.graph, weights, inputs), inputs, labels))
            count += size
        return total / count

    def gradients(
        self, elements: Sequence[Permutations], inputs: list[Tensor], labels: Tensor | None
    ) -> list[dict[str, Tensor]]:
        """Of the loss on one batch, by each permuted edge but the first."""
        weights = self.merged(elements)
        with torch.enable_grad():
            leaves = [weights[name].requires_grad_() for name in self.names]
            loss = self.loss(run(self.graph, weights, inputs), inputs, labels)
            found = torch.autograd.grad(loss, leaves, allow_unused=True)
        gradient = {n: torch.zeros_like(w) if g is None else g for n, w, g in zip(self.names, leaves, found)}
        return [{name: alpha * g for name, g in gradient.items()} for alpha in self.alphas[1:]]


@dataclass(frozen=True)
class _Criterion:
    """The loss of one batch's outputs."""

    program: Program
    kind: str | Loss

    def __call__(self, outputs: Any, inputs: list[Tensor], labels: Tensor | None) -> Tensor:
        if not isinstance(self.kind, str):
            return self.kind(outputs, labels)
        if self.kind == "distillation" or (self.kind == "auto" and labels is None):
            return self._distillation(outputs, inputs)
        if labels is None:
            raise DataError("loss='labels' needs batches with integer class labels behind the inputs")
        return _cross_entropy(outputs, labels)

    @torch.no_grad()
    def _teacher(self, inputs: list[Tensor]) -> dict[str, Tensor]:
        """The mean of the edges' outputs."""
        outputs = [_logits(run(self.program.graph, weights, inputs)) for weights in self.program.weights]
        return {name: torch.stack([own[name] for own in outputs]).mean(0) for name in outputs[0]}

    def _distillation(self, outputs: Any, inputs: list[Tensor]) -> Tensor:
        student, teacher = _logits(outputs), self._teacher(inputs)
        if not student:
            raise DataError("distillation needs an output of shape (samples, classes, …); give loss= as a function")
        return torch.stack([_divergence(student[name], goal) for name, goal in teacher.items()]).sum()


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
