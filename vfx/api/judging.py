"""What ``vfx.compare`` measures: decisions of networks on batches that are read once.

A network is judged against labels, or without any against the ensemble of the edges. Where each edge keeps its own
heads every head is judged, and the figure is their mean; edges with different numbers of classes have no ensemble, and
without labels of its own (``vfx.data.tasks``) each head is held against the edge whose it is.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from vfx import __version__
from vfx.analyse.cost import Profile, cost
from vfx.api.results import Result
from vfx.diagnosis.cells import identity
from vfx.diagnosis.decisions import check_labels, class_scores, ensemble, log_probabilities
from vfx.diagnosis.point import Point
from vfx.errors import ArgumentError
from vfx.program import Program
from vfx.rewrite.edges import edge_alone
from vfx.statistics.data import Batches
from vfx.statistics.labels import PADDING
from vfx.timing import median_seconds

Heads = list[Tensor]  # log-probabilities of a batch: one network's, or one for each head


class TaskJudge:
    """Measures networks on batches; ``target`` says against what: "labels", the "ensemble" or the "edges".

    Raises ArgumentError without data, DataError for labels that are no classes.
    """

    @torch.no_grad()
    def __init__(self, edges: Program, data: Any, limit: int | None, device: Any):
        if data is None:
            raise ArgumentError("compare measures networks on data; give evaluate= (or data=)")
        self.edges, self.note = edges, ""
        self.batches: list[list[Tensor]] = []
        labels: list[Tensor | None] = []
        for batch, given_labels in Batches(edges, data, limit, device).labelled():
            self.batches.append(batch)
            labels.append(given_labels)
        self.classes = [_scores(self.edges(*self.batches[0], edge=edge)).shape[1] for edge in range(edges.edges)]
        self.alike = len(set(self.classes)) == 1
        wanted = self._labelled(labels)
        self.target = "labels" if wanted is not None else "ensemble" if self.alike else "edges"
        self.wanted = self._decided() if wanted is None else wanted  # of each batch, for each edge
        self.apart = self.target == "edges" or any(label is not batch[0] for batch in self.wanted for label in batch)
        self.samples = sum(len(batch[0]) for batch in self.wanted)
        self.seconds = self._seconds(edges.select(0))

    def _labelled(self, labels: Sequence[Tensor | None]) -> list[Heads] | None:
        """The labels of each batch for each edge; None where there are none that count for all of them."""
        given = [x for x in labels if x is not None]
        if not given or len(given) < len(labels):
            return None
        by_edge: list[Heads] = []
        for index, (batch, classes) in enumerate(zip(self.batches, given)):
            scores = [_scores(self.edges(*batch, edge=edge)) for edge in range(self.edges.edges)]
            columns = len(scores) > 1 and scores[0].ndim == 2 and classes.shape == (len(scores[0]), len(scores))
            if not (columns or self.alike):
                self.note = "labels were not read: which network's classes they are is said by vfx.data.tasks"
                return None
            by_edge.append(list(classes.unbind(1)) if columns else [classes] * len(scores))
            for column, score in zip(by_edge[-1] if columns else by_edge[-1][:1], scores):
                check_labels(column, score, index)
        return by_edge

    def _decided(self) -> list[Heads]:
        """What the edges decide: their ensemble, or each for itself."""
        members = range(self.edges.edges)
        decisions = []
        for batch in self.batches:
            scores = [_scores(self.edges(*batch, edge=edge)) for edge in members]
            each = [ensemble(scores)] * len(scores) if self.alike else scores
            decided = each[0].argmax(1)
            decisions.append([decided if scores is each[0] else scores.argmax(1) for scores in each])
        return decisions

    @torch.no_grad()
    def references(self, whole: Profile, single: bool) -> list[Point]:
        """The networks that all is made from, and all of them together."""
        count = self.edges.edges
        points = []
        for edge, name in enumerate(["dense"] if single else [f"edge {edge}" for edge in range(count)]):
            figures = self._figures([[self._probabilities(batch, edge)] for batch in self.batches], [edge])
            ratio = cost(edge_alone(self.edges, edge)).ratio(whole)
            points.append(Point(name, {}, figures.pop("accuracy"), ratio["params"], ratio["flops"], 1.0, **figures))
        if count > 1:
            params, flops = sum(point.params for point in points), sum(point.flops for point in points)
            name = "ensemble" if self.alike else "all edges"
            together = [[self._probabilities(batch, edge) for edge in range(count)] for batch in self.batches]
            if self.alike:
                together = [[torch.stack(batch).mean(0).log_softmax(1)] for batch in together]
            figures = self._figures(together)
            points.append(Point(name, {}, figures.pop("accuracy"), params, flops, float(count), **figures))
        return points

    def identity(self, data: Any, options: Mapping[str, Any]) -> str:
        """What is compared: the edges, the first calibration batch, all that is measured on, options and version."""
        first = [] if data is None else next(iter(Batches(self.edges, data)))
        weights = [x for edge in self.edges.weights for x in edge.values()]
        measured = [x for batch in (*self.batches, *self.wanted) for x in batch]
        return identity([*weights, *first, *measured], options, __version__)

    @torch.no_grad()
    def point(self, name: str, options: Mapping[str, Any], result: Result, whole: Profile, latency: bool) -> Point:
        """A network that was made with ``options``, measured."""
        ratio = cost(result.program).ratio(whole)
        params = ratio["params"]
        nonzeros = getattr(result.report, "nonzeros", None)
        if nonzeros is not None:  # masks leave the shapes and take the weights
            params = nonzeros / max(whole.params, 1)
        flops = getattr(result.report, "flops_after", None)
        seconds = self._seconds(result.program) / self.seconds if latency else None
        share = ratio["flops"] if flops is None else flops / max(whole.flops, 1)
        outcome = str(getattr(result.report, "outcome", ""))
        figures = self._figures([self._heads(result.program(*batch), options) for batch in self.batches])
        return Point(name, options, figures.pop("accuracy"), params, share, seconds, outcome, **figures)

    def _heads(self, output: Any, options: Mapping[str, Any]) -> Heads:
        """Log-probabilities of each head that ``options`` keep, or of the network that has one."""
        if options.get("heads", 0) == 0 or options.get("head_output") == "mean":
            return [log_probabilities(_scores(output))]
        if options.get("head_output", "list") == "list":
            return [log_probabilities(_scores(scores)) for scores in output]
        return [log_probabilities(scores) for scores in _scores(output).split(self.classes, 1)]

    def _figures(self, outputs: Sequence[Heads], edges: Sequence[int] | None = None) -> dict[str, Any]:
        """Accuracy, loss and, of several heads, the accuracy of each, from the log-probabilities of each batch.

        A network with one output is held against the labels of every edge (or of ``edges``), where these have their
        own.
        """
        heads = len(outputs[0])
        members = edges if edges is not None else range(self.edges.edges if heads > 1 or self.apart else 1)
        each = [self._measured([batch[-1 if heads == 1 else edge] for batch in outputs], edge) for edge in members]
        accuracies, losses = [measured[0] for measured in each], [measured[1] for measured in each]
        loss = statistics.fmean(losses) if self.target == "labels" else None
        apart = tuple(accuracies) if len(each) > 1 else ()
        return {"accuracy": statistics.fmean(accuracies), "loss": loss, "each": apart}

    def _measured(self, outputs: Heads, edge: int) -> tuple[float, float]:
        """The share of right decisions, and the mean cross-entropy of each batch's log-probabilities."""
        right, loss, count = 0, 0.0, 0
        for scores, labels in zip(outputs, self.wanted):
            wanted = labels[edge].to(scores.device)
            right += int((scores.argmax(1) == wanted).sum())
            loss += float(nll_loss(scores, wanted, reduction="sum", ignore_index=PADDING))
            count += int((wanted != PADDING).sum())
        return right / max(count, 1), loss / max(count, 1)

    def _probabilities(self, batch: list[Tensor], edge: int) -> Tensor:
        return log_probabilities(_scores(self.edges(*batch, edge=edge)))

    def _seconds(self, program: Program) -> float:
        """The median time of the first batch."""
        batch = self.batches[0]
        return median_seconds(lambda: program(*batch), batch[0].device)


def _scores(output: Any) -> Tensor:
    return class_scores(output, "compare")
