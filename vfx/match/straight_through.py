"""Straight-through estimator matching (Git Re-Basin, Ainsworth et al. 2022, algorithm 3).

Each edge i ≥ 1 gets a free copy θ̃_i of θ_0. One step, on one batch:

1. π_i ← the permutation that brings θ_i closest to θ̃_i (weight matching from the last π_i on);
2. the loss is taken at the merged network Σ α_i π_i(θ_i), the first edge standing as it is;
3. its gradient by π_i(θ_i) is given to θ̃_i as if the projection were the identity (straight through), and Adam steps.

With two edges and α = ½ this is the paper's algorithm; with more, all are optimised together on one merged network. The
first π_i are weight matching's. The loss is that of ``vfx.match.midpoint``: on labels, else distillation. A step may
raise it, so it is measured over all batches at the start and behind every epoch that moved a channel, and the best
permutations seen are kept. The user's weights are only read.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from vfx.arguments import checked
from vfx.elements import Permutations, identity, permuted, random_permutations
from vfx.errors import ArgumentError
from vfx.match.descent import Descent
from vfx.match.matcher import Matching, Problem
from vfx.match.midpoint import Loss, Midpoint, check_loss
from vfx.program import Weights
from vfx.progress import track
from vfx.statistics.data import Batches


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
        if epochs < 0 or lr <= 0 or restarts < 0 or (steps is not None and steps < 0):
            raise ArgumentError("epochs, steps and restarts must be at least 0, lr above 0")
        self.epochs, self.lr, self.steps, self.restarts = epochs, lr, steps, restarts
        self.loss = check_loss(loss)

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
            return _Run(elements, loss := _loss(task, elements), loss, 0)
        copies = [{n: task.first[n].detach().clone() for n in task.names} for _ in elements]
        adam = torch.optim.Adam([t for copy in copies for t in copy.values()], self.lr)
        best = initial = _loss(task, elements)
        kept, measured, steps = elements, elements, 0
        batches = sum(1 for _ in task.batches) * self.epochs
        total = batches if self.steps is None else min(batches, self.steps)
        epochs = track(range(self.epochs), "straight-through", self.epochs, progress)
        for _ in epochs:
            for inputs, labels in task.batches.labelled():
                if steps == total:
                    break
                elements = [self._project(task, k, copies[k], own, generator) for k, own in enumerate(elements)]
                moved = task.moved([*map(permuted, elements)])
                gradient = task.gradient(moved, task.alphas, inputs, labels)
                for copy, alpha in zip(copies, task.alphas[1:]):
                    for name, tensor in copy.items():
                        tensor.grad = alpha * gradient[name]
                adam.step()
                steps += 1
            elements = [self._project(task, k, copies[k], own, generator) for k, own in enumerate(elements)]
            if _differ(elements, measured):
                measured, loss = elements, _loss(task, elements)
                kept, best = (elements, loss) if loss < best else (kept, best)
        return _Run(kept, best, initial, steps)

    @staticmethod
    def _project(
        task: Midpoint, index: int, copy: Weights, element: Permutations, generator: np.random.Generator
    ) -> Permutations:
        """The group element that brings an edge closest to its free copy."""
        return Descent(task.symmetry, copy, task.others[index]).run(generator, element)[0]


def _loss(task: Midpoint, elements: Sequence[Permutations]) -> float:
    return task.loss_of([*map(permuted, elements)])


class _Run(NamedTuple):
    elements: list[Permutations]
    loss: float
    initial: float
    steps: int


def _differ(one: Sequence[Permutations], other: Sequence[Permutations]) -> bool:
    return any((a[g] != b[g]).any() for a, b in zip(one, other) for g in a)
