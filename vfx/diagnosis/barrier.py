"""``vfx.barrier``: loss and accuracy along the line between two edges, before and after alignment and normalization.

11 points, as in Frankle et al. 2020. Statistics are collected once and the permutations found once; every α and
every normalization uses them. Without labels the target is the edges' ensemble: accuracy is the agreement with its
class, loss the cross-entropy against its softmax. Matchers that find linear maps look again at every α.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor, nn

from vfx.analyse.layer_view import batch_norms
from vfx.api import collect, merge, symmetry, trace
from vfx.arguments import checked
from vfx.diagnosis.curve import Curve
from vfx.diagnosis.observe import class_axis, first_output
from vfx.errors import ArgumentError, DataError
from vfx.files import written
from vfx.match.catalogue import matcher, name_of
from vfx.match.matcher import Known, Matcher, Problem
from vfx.program import Program
from vfx.progress import track
from vfx.statistics.collect import Statistics
from vfx.statistics.data import Batches, reusable
from vfx.statistics.labels import PADDING, check_classes, in_order
from vfx.terminal import rendered

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GOALS = ("repair", "rescale")


@dataclass(frozen=True, eq=False)
class Barrier:
    """Curves between two edges; ``target`` says what they are measured against: "labels" or "ensemble"."""

    curves: tuple[Curve, ...]
    target: str
    samples: int

    def __iter__(self) -> Iterator[Curve]:
        return iter(self.curves)

    def curve(self, match: str | None, normalize: str | None) -> Curve:
        """One curve by how it was made. Raises ArgumentError."""
        for curve in self.curves:
            if (curve.match, curve.normalize) == (match, normalize):
                return curve
        raise ArgumentError(f"no curve {match!r}, {normalize!r}; there are {', '.join(c.name for c in self.curves)}")

    def to_dict(self) -> dict[str, Any]:
        return {"target": self.target, "samples": self.samples, "curves": [curve.to_dict() for curve in self.curves]}

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        return written(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", path)

    def figure(self) -> Figure:
        """Accuracy and loss against α, as in the papers' Figure 1."""
        from vfx.diagnosis.figures import barrier_figure

        return barrier_figure(self.curves, self.target)

    def table(self) -> Table:
        table = Table(title=f"barriers on {self.samples} samples against {_TARGETS[self.target]}")
        for column in ("curve", "accuracy at the middle", "accuracy barrier", "loss barrier"):
            table.add_column(column, justify="left" if column == "curve" else "right")
        for curve in self.curves:
            middle = curve.accuracy[len(curve.accuracy) // 2]
            table.add_row(
                curve.name,
                f"{100 * middle:.2f} %",
                f"{100 * curve.accuracy_barrier:.2f} points",
                f"{curve.loss_barrier:.3f}",
            )
        return table

    def __str__(self) -> str:
        return rendered(self.table())


_TARGETS = {"labels": "the labels", "ensemble": "the edges' ensemble"}


@checked
@torch.no_grad()
def barrier(
    models: Sequence[nn.Module] | Program,
    example_inputs: Any = None,
    *,
    data: Any,
    evaluate: Any = None,
    match: str | Matcher | None = "activation",
    normalize: Sequence[str | None] | None = None,
    points: int = 11,
    before: bool = True,
    preserve: int | str = 0,
    statistics: Statistics | None = None,
    max_samples: int | None = None,
    device: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> Barrier:
    """Measure accuracy and loss of the merged network at ``points`` values of α from one edge to the other.

    ``data`` calibrates, ``evaluate`` (default: ``data``) is measured on; its batches may end in class labels.
    ``match`` aligns the second edge; ``before`` adds the curves without alignment. ``normalize``: names as for
    ``vfx.merge``, default None and RESET with BatchNorm, else None, REPAIR and RESCALE. ``preserve``: layers kept for
    each edge (PFM). At the ends stand the edges themselves.
    Raises ArgumentError, DataError and what ``vfx.merge`` raises.
    """
    program = models if isinstance(models, Program) else trace(models, example_inputs)
    program = program if device is None else program.to(device)
    if program.edges != 2:
        raise ArgumentError(f"a barrier lies between two edges, got {program.edges}; merge pairs of them")
    data = in_order(reusable(data))
    methods = _methods(program) if normalize is None else list(normalize)
    reading: dict[str, Any] = {"max_samples": max_samples, "device": device}
    finder, reader = matcher(match), Batches(program, data, max_samples, device)
    if statistics is None and _reads(finder, methods):
        within = finder is not None and "within" in finder.needs and not batch_norms(program)
        statistics = collect(program, data=data, within=within, **reading, progress=progress)
    problem = Problem(program, symmetry(program), statistics, (0.5, 0.5), reader, seed, progress)
    matches = _matches(problem, finder, before)
    measured = Batches(program, data, max_samples) if evaluate is None else in_order(reusable(evaluate))
    test = Evaluator(program, measured, device)
    alphas = [index / (points - 1) for index in range(points)]
    ends = [test(program.select(edge)) for edge in range(2)]
    todo = [(matched, method, alpha) for matched in matches for method in methods for alpha in alphas[1:-1]]
    make = partial(merge, program, data=data, preserve=preserve, **reading, progress=False)
    values: dict[tuple[str | None, str | None], list[tuple[float, float]]] = {}
    for matched, method, alpha in track(todo, "barrier", len(todo), progress):
        options: dict[str, Any] = {
            "match": matched.matcher,
            "weights": alpha,
            "normalize": method,
            "statistics": matched.statistics,
        }
        merged = make(**options, verify=(matched.name, method) not in values)
        values.setdefault((matched.name, method), []).append(test(merged.program))
    curves = []
    for (name, method), inner in values.items():
        accuracy, loss = zip(*[ends[0], *inner, ends[1]])
        curves.append(Curve(name, method, tuple(alphas), accuracy, loss))
    return Barrier(tuple(curves), test.target, test.samples)


@dataclass(frozen=True)
class _Match:
    """What the curves of one alignment share: a matcher that need not look again, and statistics."""

    name: str | None
    matcher: Matcher | None
    statistics: Statistics | None


def _reads(finder: Matcher | None, methods: Sequence[str | None]) -> bool:
    """Whether statistics of the edges are read."""
    needs = finder.needs if finder is not None else frozenset()
    return bool(needs & {"features", "within"}) or any(name in _GOALS for name in methods)


def _matches(problem: Problem, finder: Matcher | None, before: bool) -> list[_Match]:
    """The alignments to draw curves for.

    Linear maps depend on α and act on networks without BatchNorm, so ``merge`` finds them for every point; statistics
    of a network whose BatchNorm it folds are no use to it.
    """
    statistics = problem.statistics
    direct = [_Match(None, None, statistics)] if before or finder is None else []
    if finder is None:
        return direct
    name = name_of(finder)
    if not finder.exact:
        return [*direct, _Match(name, finder, None if batch_norms(problem.program) else statistics)]
    return [*direct, _Match(name, Known(finder(problem)), statistics)]


def _methods(program: Program) -> list[str | None]:
    return [None, "reset"] if batch_norms(program) else [None, "repair", "rescale"]


class Evaluator:
    """Accuracy and loss of Programs on one set of batches, against their labels or the ensemble of ``edges``.

    Outputs are (N, C), sequences (N, T, C) or maps (N, C, …), labels (N,) or one for each position; negative labels
    (padding) do not count.
    """

    def __init__(self, edges: Program, data: Any, device: Any = None):
        self.edges, self.batches = edges, Batches(edges, data, device=device)
        self.labelled = next(iter(self.batches.labelled()))[1] is not None
        self.target = "labels" if self.labelled else "ensemble"
        self.samples = 0
        self._ensemble: list[Tensor] | None = None

    def __call__(self, program: Program) -> tuple[float, float]:
        """Accuracy (share) and mean loss of a single-edge Program."""
        right, loss, count, samples = 0.0, 0.0, 0, 0
        for index, (batch, labels) in enumerate(self.batches.labelled()):
            logits = _logits(program(*batch))
            target = self._target(index, labels, logits)
            classes = target if self.labelled else target.argmax(1)
            counted = classes >= 0
            right += float(((logits.argmax(1) == classes) & counted).sum())
            target = target.masked_fill(~counted, PADDING) if self.labelled else target
            loss += float(nn.functional.cross_entropy(logits.double(), target, reduction="sum", ignore_index=PADDING))
            count += int(counted.sum())
            samples += self.batches.size(batch)
        self.samples = samples
        return right / max(count, 1), loss / max(count, 1)

    def _target(self, index: int, labels: Tensor | None, logits: Tensor) -> Tensor:
        """Labels (N, …), or the ensemble's probabilities (N, C, …)."""
        if not self.labelled:
            if self._ensemble is None:
                self._ensemble = [self._probabilities(batch) for batch in self.batches]
            return self._ensemble[index].to(logits.device)
        shape = (len(logits), *logits.shape[2:])
        if labels is None or labels.shape != shape:
            given = "no class labels" if labels is None else f"labels of shape {tuple(labels.shape)}"
            raise DataError(f"batch {index} of evaluate has {given}; the outputs take one class for each of {shape}")
        labels = labels.to(logits.device).long()
        check_classes(labels[labels >= 0], logits.shape[1])
        return labels

    def _probabilities(self, batch: list[Tensor]) -> Tensor:
        outputs = (_logits(self.edges(*batch, edge=edge)) for edge in range(self.edges.edges))
        return torch.stack([logits.double().softmax(1) for logits in outputs]).mean(0)


def _logits(result: Any) -> Tensor:
    """A network's first floating output with its classes on axis 1."""
    logits = first_output(result)
    if logits is None or logits.ndim < 2:
        shape = None if logits is None else tuple(logits.shape)
        raise ArgumentError(f"accuracy needs outputs with classes, (N, C) or (N, T, C), this network gives {shape}")
    return logits.movedim(class_axis(logits), 1)
