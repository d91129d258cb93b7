"""Learned matching: gradients through the whole symmetry class (Theus et al., *Generalized Linear Mode Connectivity for
Transformers*, NeurIPS 2025, learned matching).

Weight and activation matching compare weights and features; what counts is the merged network's loss. Starting from the
best of them (and of the networks as they are) by that loss, one step on a batch is

1. for each edge i ≥ 1 the element g_i that its charts stand for (``vfx.match.chart``): permutations straight through,
   signs, positive scales, orthogonal maps, invertible dual pairs, turns of planes, each group over its whole class;
2. shares α drawn around those of the merge (two edges at ½: U(0.4, 0.6), as in the paper), so that the whole middle of
   the path is lowered, not one point of it;
3. the loss of Σ α_i g_i(θ_i), the first edge standing as it is, on labels or on the edges' mean outputs
   (``vfx.match.midpoint``), its gradient through the charts, and a step at a rate that falls linearly to zero: of Adam
   for permutations, scales and signs, of one length in every direction for maps (``vfx.match.polar``).

Every fifth batch is held out. The loss there judges the start and what stands behind each epoch, and the best is kept:
the matching is never worse by it than the ones that it started from. Charts and elements are float64 throughout and lie
in their classes whatever the gradients were, so each edge keeps its function. There is no map for the first edge: the
action is linear, and with maps on both edges ½ g₀θ₀ + ½ g₁θ₁ = g₀(½ θ₀ + ½ g₀⁻¹g₁θ₁) has the function of the network
that g₀⁻¹g₁ on the second edge alone gives.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite, isnan
from typing import NamedTuple

import numpy as np
import torch

from vfx.arguments import checked
from vfx.elements import Elements, act, check_classes, compose, identity
from vfx.errors import ArgumentError, DataError
from vfx.match.activation import ActivationMatching
from vfx.match.chart import Charts
from vfx.match.class_descent import in_matrices, settled
from vfx.match.matcher import Matching, Problem
from vfx.match.midpoint import Labelled, Loss, Midpoint, check_loss
from vfx.match.polar import PolarSteps
from vfx.match.weight import WeightMatching
from vfx.progress import track
from vfx.statistics.data import Batches

HELD_OUT = 5  # of so many batches one
TURN = 5.0  # by so many times the rate a step turns maps in every direction
BETAS = 0.9, 0.99  # Adam's: runs are of some hundred steps, so squares are averaged over the last hundred
LOWER = 1e-9, 1e-6  # nats, and a share of the loss, by which it must fall to count as lower

Start = Sequence[Elements]  # of each edge but the first


class LearnedMatching:
    """Elements of the full classes that lower the merged network's loss, learnt by gradients.

    ``epochs`` over the batches (``steps`` cuts them off) at the rate ``lr``; ``spread``: how far an edge's share is
    drawn from its own; ``orders``: the rate of permutations' scores, as a share of ``lr``; ``loss``: "auto" (labels
    where there are any), "labels", "distillation", or a function of the network's output and the batch's labels (None
    without); ``classes``: "full" or "permutation". Raises DataError where the loss does not fit the batches,
    ArgumentError.
    """

    needs = frozenset({"features", "data"})
    exact = True

    @checked
    def __init__(
        self,
        epochs: int = 5,
        lr: float = 0.01,
        *,
        steps: int | None = None,
        spread: float = 0.1,
        orders: float = 1 / 3,
        loss: str | Loss = "auto",
        classes: str = "full",
    ):
        if epochs < 0 or lr <= 0 or orders < 0 or (steps is not None and steps < 0) or not 0 <= spread <= 0.5:
            raise ArgumentError("epochs, steps and orders must be at least 0, lr above 0, spread from 0 to 0.5")
        self.epochs, self.lr, self.steps, self.spread, self.orders = epochs, lr, steps, spread, orders
        self.loss, self.classes = check_loss(loss), check_classes(classes)

    @torch.no_grad()
    def __call__(self, problem: Problem) -> Matching:
        if problem.data is None:
            raise ArgumentError("learned matching runs the networks: give data= (statistics do not do)")
        begin = time.perf_counter()
        batches = _Split(Batches(problem.program, problem.data))
        task = Midpoint(problem.program, problem.symmetry, batches.all, self.loss, problem.shares)
        starts = self._starts(problem)
        losses = {name: task.loss_of(start, batches.held_out()) for name, start in starts.items()}
        name = min(losses, key=lambda start: (isnan(losses[start]), losses[start]))
        if not isfinite(losses[name]):
            raise DataError(
                f"the loss on the held-out batches is {losses[name]}, whatever the matching; give another loss="
            )
        best = self._learnt(problem, task, batches, starts[name])
        return Matching(
            elements=(identity(problem.symmetry), *(settled(problem.symmetry, element) for element in best.elements)),
            objective=(-best.loss,),
            sweeps=(best.steps,),
            seconds=time.perf_counter() - begin,
            details={"loss": best.loss, "initial_loss": losses[name]}
            | {f"loss_from_{start}": loss for start, loss in losses.items()},
            attempts=tuple((-loss,) for loss in best.losses),
            notes=self._notes(name, batches),
        )

    def _notes(self, start: str, batches: _Split) -> tuple[str, ...]:
        notes = [f"learned matching started from {start} matching" if start != "none" else "learned from no matching"]
        if batches.count == 1:
            notes.append("there is one batch: the matching was judged on what it was learnt from")
        if batches.all.unread and self.loss == "auto":
            notes.append(f"labels of the data were not used: {batches.all.unread}")
        return tuple(notes)

    def _starts(self, problem: Problem) -> Mapping[str, Start]:
        """What the methods without gradients find, and the edges as they are."""
        starts: dict[str, Start] = {"weight": WeightMatching(classes=self.classes)(problem).elements[1:]}
        if problem.statistics is not None and "features" in problem.statistics.reads:
            starts["activation"] = ActivationMatching(classes=self.classes)(problem).elements[1:]
        return starts | {"none": [identity(problem.symmetry)] * (problem.program.edges - 1)}

    def _learnt(self, problem: Problem, task: Midpoint, batches: _Split, start: Start) -> _Best:
        """The best by the held-out loss of a start and of what each epoch comes to."""
        symmetry, full = problem.symmetry, self.classes == "full"
        charts = [Charts(symmetry, full) for _ in start]
        begin = [in_matrices(symmetry, element) for element in start] if full else start
        kept = _Best(list(start), task.loss_of(start, batches.held_out()))
        kept = kept._replace(losses=(kept.loss,))
        steps = _steps(self.epochs * batches.learnt_from, self.steps)
        descent = _Descent(charts, self.lr, self.orders, steps)
        if not descent.moves:
            return kept
        generator, edges = np.random.default_rng(problem.seed), task.moved(begin)
        for _ in track(range(self.epochs), "learning", self.epochs, problem.progress):
            for inputs, labels in batches.to_learn():
                if kept.steps == steps:
                    break
                self._gradients(task, charts, edges, generator, (inputs, labels))
                descent.step()
                kept = kept._replace(steps=kept.steps + 1)
            reached = [compose(symmetry, before, chart.elements()) for before, chart in zip(begin, charts)]
            kept = kept.or_lower(reached, task.loss_of(reached, batches.held_out()))
        return kept

    def _gradients(
        self, task: Midpoint, charts: Sequence[Charts], edges: Sequence[Mapping[str, torch.Tensor]],
        generator: np.random.Generator, batch: Labelled,
    ) -> None:  # fmt: skip
        """Those of the loss on one batch at random shares, by the charts of each of the ``edges``."""
        elements = [chart.elements() for chart in charts]
        moved = [act(task.symmetry, element, weights) for element, weights in zip(elements, edges)]
        alphas = _drawn(task.alphas, self.spread, generator)
        gradient = task.gradient(moved, alphas, *batch, names=charts[0].names)
        for chart, element, weights, alpha in zip(charts, elements, moved, alphas[1:]):
            chart.differentiate(element, weights, {name: alpha * by_weight for name, by_weight in gradient.items()})


class _Descent:
    """Adam on entries and polar steps on maps, at rates that fall linearly to zero over so many ``steps``."""

    def __init__(self, charts: Sequence[Charts], lr: float, orders: float, steps: int):
        maps = [tensor for chart in charts for tensor in chart.maps()]
        rates = [
            (orders * lr, [tensor for chart in charts for tensor in chart.orders()]),
            (lr, [tensor for chart in charts for tensor in chart.sizes()]),
        ]
        self._rates = [(rate, entries) for rate, entries in rates if entries]
        self.moves = bool(self._rates or maps)
        groups = [{"params": entries, "lr": rate} for rate, entries in self._rates]
        self._adam = torch.optim.Adam(groups, betas=BETAS) if groups else None
        self._polar, self._left, self._steps = PolarSteps(maps, TURN * lr), steps, steps

    def step(self) -> None:
        share = self._left / self._steps
        self._left -= 1
        self._polar.step(share)
        if self._adam is not None:
            for group, (rate, _) in zip(self._adam.param_groups, self._rates):
                group["lr"] = share * rate
            self._adam.step()


class _Best(NamedTuple):
    elements: Start
    loss: float
    losses: tuple[float, ...] = ()  # of the start and behind each epoch
    steps: int = 0

    def or_lower(self, elements: Start, loss: float) -> _Best:
        lower = self.loss - loss > LOWER[0] + LOWER[1] * abs(self.loss)
        better = self._replace(elements=elements, loss=loss) if lower else self
        return better._replace(losses=(*self.losses, loss))


class _Split:
    """Batches to learn from and batches to judge by: every fifth is held out, of fewer the last; one is for both."""

    def __init__(self, batches: Batches):
        self.all = batches
        self.count = sum(1 for _ in batches)
        self.learnt_from = sum(not self._is_held_out(index) for index in range(self.count))

    def held_out(self) -> Iterator[Labelled]:
        chosen = self._is_held_out if self.count > 1 else lambda _: True
        return (batch for index, batch in enumerate(self.all.labelled()) if chosen(index))

    def to_learn(self) -> Iterator[Labelled]:
        return (batch for index, batch in enumerate(self.all.labelled()) if not self._is_held_out(index))

    def _is_held_out(self, index: int) -> bool:
        if self.count < HELD_OUT:
            return index == self.count - 1 > 0
        return index % HELD_OUT == HELD_OUT - 1


def _steps(all_of_them: int, at_most: int | None) -> int:
    return all_of_them if at_most is None else min(all_of_them, at_most)


def _drawn(shares: Sequence[float], spread: float, generator: np.random.Generator) -> list[float]:
    """Shares that sum to one, those of all edges but the first drawn around their own."""
    width = spread / max(len(shares) - 1, 1)
    others = [float(np.clip(share + generator.uniform(-width, width), 0, 1)) for share in shares[1:]]
    return [1 - sum(others), *others]
