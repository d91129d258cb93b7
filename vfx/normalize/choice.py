"""Held-out calibration data decide between networks: how far is each from the ensemble of the edges?

The ensemble's probabilities are p = Σ αᵢ softmax f_i(x). A network with logits z is scored by the mean of KL(p‖q) over
the held-out samples, which needs no labels; with labels by its cross-entropy. q = softmax(β z), β fitted to the same
samples: where features shrink alike (without normalization, after bias calibration) logits lose their size and keep
their order, and a network is not to be chosen for its confidence. Both are convex in β, and far less noisy than
accuracy on a few hundred samples, which is reported beside them. Outputs with a single column are no logits: they are
scored by the mean squared difference to the mean of the edges, relative to its variance.

Test data never enter. Samples are held out by their position, so the same data give the same choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn.functional import cross_entropy

from vfx.normalization import Direction, removed_biases, without
from vfx.outputs import named_tensors
from vfx.program import Execution, Program, Step, Weights, schedule
from vfx.statistics.data import Prepared

EVERY, LIMIT = 3, 3000  # one sample in three is held out, of the first 3,000
FEW = 256  # held-out samples on which "auto" finds the layers of bias removal, one candidate among others
SEARCH = {"xatol": 1e-3}  # of log β


@dataclass(frozen=True)
class Score:
    """How a network does on held-out data: KL from the ensemble, and with labels cross-entropy and accuracy.

    ``scale`` is the β by which the (first) logits fit best: far above 1 they have lost their size.
    """

    divergence: float
    loss: float | None = None
    accuracy: float | None = None
    scale: float | None = None

    @property
    def value(self) -> float:
        """What is minimised; infinite for a network that gives NaN."""
        value = self.divergence if self.loss is None else self.loss
        return value if math.isfinite(value) else math.inf

    def to_dict(self) -> dict[str, float | None]:
        return asdict(self)


class Judge:
    """Scores networks against the ensemble of ``edges`` on held-out samples."""

    @torch.no_grad()
    def __init__(self, edges: Program, alphas: Sequence[float], held: Prepared):
        self.held = held
        self.expected: list[dict[str, Tensor]] = []
        for batch in held.batches:
            outputs = [_logits(edges(*batch, edge=edge)) for edge in range(edges.edges)]
            self.expected.append({name: _mixture([o[name] for o in outputs], alphas) for name in outputs[0]})

    def part(self, samples: int) -> Judge:
        """A judge that looks at the first batches alone, until they hold ``samples``."""
        sizes = [len(next(iter(expected.values()))) for expected in self.expected]
        count = next((i + 1 for i in range(len(sizes)) if sum(sizes[: i + 1]) >= samples), len(sizes))
        smaller = copy(self)
        smaller.held = Prepared(self.held.batches[:count], self.held.labels[:count])
        smaller.expected = self.expected[:count]
        return smaller

    @torch.no_grad()
    def __call__(self, program: Program) -> Score:
        """The score of a network, run from its inputs on."""
        return self.score([program(*batch) for batch in self.held.batches])

    @torch.no_grad()
    def score(self, outputs: Sequence[Any]) -> Score:
        """The score of a network's outputs on each held-out batch."""
        found = [_logits(output) for output in outputs]
        divergence, scale = 0.0, None
        for name in self.expected[0]:
            target = torch.cat([expected[name] for expected in self.expected])
            logits = torch.cat([output[name] for output in found]).to(target)
            if not logits.isfinite().all():
                return Score(math.nan)
            own, beta = _divergence(logits, target)
            divergence, scale = divergence + own, beta if scale is None else scale
        logits, labels = torch.cat([next(iter(output.values())) for output in found]), self._labels()
        fits = labels is not None and labels.ndim == 1 and logits.ndim == 2 and logits.shape[1] > 1
        fits = fits and labels is not None and 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]
        if not fits:
            return Score(divergence, scale=scale)
        assert labels is not None
        labels = labels.to(logits.device)
        loss, _ = _fitted(lambda beta: float(cross_entropy(beta * logits, labels)))
        return Score(divergence, loss, float((logits.argmax(1) == labels).double().mean()), scale)

    def _labels(self) -> Tensor | None:
        """The labels of all held-out samples, if all have one."""
        known = [labels for labels in self.held.labels if labels is not None]
        return torch.cat(known) if len(known) == len(self.held.labels) else None


def _logits(output: Any) -> dict[str, Tensor]:
    """The floating outputs in float64, their classes on axis 1."""
    found = {name: x.double() for name, x in named_tensors(output).items() if x.is_floating_point() and x.ndim > 1}
    return {name: x.movedim(-1, 1) if x.ndim == 3 else x for name, x in found.items()}


def _mixture(outputs: list[Tensor], alphas: Sequence[float]) -> Tensor:
    """Σ αᵢ softmax fᵢ, or Σ αᵢ fᵢ for a single column."""
    return sum(a * (x.softmax(1) if x.shape[1] > 1 else x) for a, x in zip(alphas, outputs))  # type: ignore[return-value]


def _divergence(logits: Tensor, expected: Tensor) -> tuple[float, float | None]:
    """Mean KL over samples and positions at the β that fits best, and β; or the relative squared difference."""
    if expected.shape[1] == 1:
        return float((logits - expected).square().mean() / expected.var().clamp_min(1e-12)), None
    entropy = torch.special.xlogy(expected, expected).sum(1).mean()
    return _fitted(lambda beta: float(entropy - (expected * (beta * logits).log_softmax(1)).sum(1).mean()))


def _fitted(loss: Callable[[float], float]) -> tuple[float, float]:
    """The smallest loss over the scale β of the logits, and that β; convex in β, so searched in log β."""
    found = minimize_scalar(lambda log: loss(math.exp(log)), bounds=(-12.0, 12.0), method="bounded", options=SEARCH)
    return float(found.fun), math.exp(float(found.x))


# bias removal -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Removal:
    """Bias removal in ``count`` layers from one end, and its score."""

    count: int
    direction: Direction
    score: Score


@torch.no_grad()
def removals(program: Program, judge: Judge, directions: Sequence[Direction], counts: Sequence[int]) -> list[Removal]:
    """Score the removal of the biases of each number of layers, at about half of the price of running each network.

    Networks that differ only behind a layer share what runs before it: one execution advances and leaves a copy at each
    layer. From the end, the copies go on without the biases; from the start, the leading execution has none, and the
    copies go on with theirs.
    """
    plan = [step._replace(in_place=None) for step in schedule(program.graph)]  # copies share their values
    found = []
    for direction in directions:
        sets = {count: removed_biases(program, count, direction) for count in counts}
        everything = removed_biases(program, None, direction)
        start = program.weights[0] if direction == "backward" else without(program.weights[0], everything)
        forks = {
            count: (_parting(program, plan, start, weights), weights)
            for count, names in sets.items()
            for weights in [without(program.weights[0], names)]
        }
        outputs: dict[int, list[Any]] = {count: [] for count in counts}
        for batch in judge.held.batches:
            for count, output in _forked(program, plan, start, forks, batch):
                outputs[count].append(output)
        found += [Removal(count, direction, judge.score(outputs[count])) for count in counts]
    return found


def _parting(program: Program, plan: list[Step], one: Weights, other: Weights) -> int:
    """The first position of the plan at which two weight sets differ (other tensors are other objects, or equal)."""
    different = {name for name in one if one[name] is not other[name] and not torch.equal(one[name], other[name])}
    for position, step in enumerate(plan):
        if any(a.op == "get_attr" and str(a.target) in different for a in step.node.all_input_nodes):
            return position
    return len(plan)


def _forked(
    program: Program, plan: list[Step], start: Weights, forks: Mapping[int, tuple[int, Weights]], batch: list[Tensor]
) -> Iterator[tuple[int, Any]]:
    run = Execution(program.graph, start, batch, plan)
    for count, (position, weights) in sorted(forks.items(), key=lambda item: item[1][0]):
        while run.position < min(position, len(plan)):
            run.step()
        own = Execution(program.graph, weights, batch, plan)
        own.position, own.values, own.result = run.position, dict(run.values), run.result
        own._inputs = iter(batch[sum(step.node.op == "placeholder" for step in plan[: run.position]) :])
        yield count, own.finish()


def best_removal(found: Sequence[Removal]) -> Removal:
    """The best score; of equals the fewest layers."""
    return min(found, key=lambda one: (one.score.value, one.count))


__all__ = ["EVERY", "FEW", "LIMIT", "Judge", "Removal", "Score", "best_removal", "removals"]
