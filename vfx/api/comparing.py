"""``vfx.compare``: a grid of ways to merge or prune, each measured in accuracy, parameters, FLOPs and time."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss

from vfx import __version__
from vfx.analyse.cost import Profile, cost
from vfx.api.merging import merge
from vfx.api.pruning import prune, prune_structured
from vfx.api.results import Result
from vfx.api.sharing import SharedStatistics
from vfx.api.tracing import program_of
from vfx.arguments import check_names, checked
from vfx.diagnosis.cells import Cells, identity
from vfx.diagnosis.comparison import Comparison, Point
from vfx.diagnosis.decisions import check_labels, class_scores, ensemble, log_probabilities
from vfx.errors import ArgumentError, DataError, PassError, VerificationError
from vfx.program import Program
from vfx.progress import stage, track
from vfx.statistics.data import Batches, reusable
from vfx.statistics.labels import PADDING

RUNS = 5  # of a batch, whose median time counts
Values = Any  # one value of an option, or a list of them


@checked
def compare(
    models: nn.Module | Sequence[nn.Module] | Program,
    example_inputs: Any,
    *,
    data: Any = None,
    evaluate: Any = None,
    grid: Mapping[str, Values] | None = None,
    latency: bool = True,
    max_samples: int | None = None,
    device: Any = None,
    progress: bool = True,
    resume: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Comparison:
    """Merge networks (or prune one) in every way of a grid, and hold what comes out side by side.

    ``models``: edges to merge, or one network to prune. ``grid``: values to try by the options of ``merge``, or of
    ``prune`` (of ``prune_structured`` with ``method``, ``budget`` or ``units`` among them): a value or a list of
    values; the default is a small grid of ``preserve`` and ``solve``, or of ``sparsity``. ``data`` calibrates,
    ``evaluate`` (batches, with labels behind the inputs) measures; without labels the figure is the agreement with the
    ensemble of the edges, or with the dense network. ``options``: given to every call. What cannot be made is listed
    with its error. Statistics that several merges read are collected once. ``resume``: a JSON file in which each
    finished network is kept; those that it holds already are not made again.
    Raises ArgumentError, DataError, CaptureError.

    Example: ``vfx.compare([a, b], x, data=loader, evaluate=test, grid={"preserve": [0, 4, 8]})``.
    """
    single, data = isinstance(models, nn.Module), reusable(data)
    make, combinations = _pruning(grid) if single else _merging(grid)
    check_names("grid=", make, (name for one in combinations[:1] for name in one))
    check_names("compare", make, options)
    capturing = {name: options.pop(name) for name in ("dynamic_shapes", "outputs") if name in options}
    edges = program_of(models, example_inputs, **capturing)
    edges = edges if device is None else edges.to(device)
    judge = _Judge(edges, data if evaluate is None else evaluate, max_samples if evaluate is None else None, device)
    whole = cost(edges.select(0))
    points = judge.references(whole, single)
    given = len(points)
    shared = {"data": data, "max_samples": max_samples, "device": device, "progress": False} | options
    cells = None if resume is None else Cells(resume, judge.identity(data, options | {"max_samples": max_samples}))
    names = [", ".join(f"{key}={value}" for key, value in chosen.items()) or "default" for chosen in combinations]
    todo = [chosen for name, chosen in zip(names, combinations) if cells is None or cells.get(name) is None]
    once = None if single else SharedStatistics(edges, [shared | chosen for chosen in todo])
    for name, chosen in track(list(zip(names, combinations)), "compare", len(names), progress):
        if progress:
            stage(name)
        point = None if cells is None else cells.get(name)
        if point is None:
            point = _cell(make, edges, example_inputs, name, chosen, shared, once, judge, whole, latency)
            if cells is not None:
                cells.keep(point)
        points.append(point)
    return Comparison(tuple(points), judge.target, judge.samples, given, whole.unknown_ops)


def _cell(
    make: Callable[..., Result], edges: Program, example_inputs: Any, name: str, chosen: dict[str, Any],
    shared: dict[str, Any], once: SharedStatistics | None, judge: _Judge, whole: Profile, latency: bool,
) -> Point:  # fmt: skip
    """One network made and measured, or why it cannot be made."""
    start = time.perf_counter()
    try:
        given = {} if once is None else once.given(shared | chosen)
        result = make(edges, example_inputs, **shared | chosen | given)
    except (ArgumentError, DataError, PassError, VerificationError) as error:
        return Point(name, chosen, None, float("nan"), float("nan"), error=str(error))
    seconds = time.perf_counter() - start
    return replace(judge.point(name, chosen, result, whole, latency), seconds=seconds)


def _merging(grid: Mapping[str, Values] | None) -> tuple[Callable[..., Result], list[dict[str, Any]]]:
    default = {"solve": ["auto", "least_squares", None]}
    return merge, _combinations(default if grid is None else grid)


def _pruning(grid: Mapping[str, Values] | None) -> tuple[Callable[..., Result], list[dict[str, Any]]]:
    chosen = {"sparsity": [0.5, 0.8, 0.9]} if grid is None else grid
    structured = bool({"method", "budget", "units"} & set(chosen))
    return (prune_structured if structured else prune), _combinations(chosen)


def _combinations(grid: Mapping[str, Values]) -> list[dict[str, Any]]:
    values = [list(v) if isinstance(v, (list, tuple, range)) else [v] for v in grid.values()]
    return [dict(zip(grid, combination)) for combination in itertools.product(*values)]


class _Judge:
    """Measures networks on batches, against labels or the decisions of the edges' ensemble."""

    @torch.no_grad()
    def __init__(self, edges: Program, data: Any, limit: int | None, device: Any):
        if data is None:
            raise ArgumentError("compare measures networks on data; give evaluate= (or data=)")
        self.edges = edges
        self.batches: list[list[Tensor]] = []
        labels: list[Tensor | None] = []
        for batch, own in Batches(edges, data, limit, device).labelled():
            self.batches.append(batch)
            labels.append(own)
        self.target = "labels" if labels and all(x is not None for x in labels) else "ensemble"
        self.wanted = [x for x in labels if x is not None] if self.target == "labels" else self._ensemble()
        self.samples = sum(len(x) for x in self.wanted)
        if self.target == "labels":
            self._check_labels()
        self.seconds = self._seconds(edges.select(0))

    @torch.no_grad()
    def _check_labels(self) -> None:
        for index, (batch, labels) in enumerate(zip(self.batches, self.wanted)):
            check_labels(labels, _scores(self.edges(*batch)), index)

    @torch.no_grad()
    def references(self, whole: Profile, single: bool) -> list[Point]:
        """The networks that all is made from, and their ensemble."""
        count = self.edges.edges
        names = ["dense"] if single else [f"edge {edge}" for edge in range(count)]
        points = []
        for index, name in enumerate(names):
            accuracy, loss = self.measured(self._probabilities([index]))
            points.append(Point(name, {}, accuracy, 1.0, 1.0, 1.0, loss=loss))
        if count > 1:
            accuracy, loss = self.measured(self._probabilities(range(count)))
            points.append(Point("ensemble", {}, accuracy, float(count), float(count), float(count), loss=loss))
        return points

    def identity(self, data: Any, options: Mapping[str, Any]) -> str:
        """What is compared: the edges, the first calibration batch, all that is measured on, options and version."""
        first = [] if data is None else next(iter(Batches(self.edges, data)))
        weights = [x for edge in self.edges.weights for x in edge.values()]
        measured = [x for batch in self.batches for x in batch]
        return identity([*weights, *first, *measured, *self.wanted], options, __version__)

    @torch.no_grad()
    def point(self, name: str, options: Mapping[str, Any], result: Result, whole: Profile, latency: bool) -> Point:
        ratio = cost(result.program).ratio(whole)
        params = ratio["params"]
        nonzeros = getattr(result.report, "nonzeros", None)
        if nonzeros is not None:  # masks leave the shapes and take the weights
            params = nonzeros / max(whole.params, 1)
        flops = getattr(result.report, "flops_after", None)
        seconds = self._seconds(result.program) / self.seconds if latency else None
        share = ratio["flops"] if flops is None else flops / max(whole.flops, 1)
        outcome = str(getattr(result.report, "outcome", ""))
        found = (log_probabilities(_scores(result.program(*batch))) for batch in self.batches)
        accuracy, loss = self.measured(found)
        return Point(name, options, accuracy, params, share, seconds, outcome, loss=loss)

    def measured(self, found: Iterable[Tensor]) -> tuple[float, float | None]:
        """The share of right decisions and, with labels, the mean cross-entropy of each batch's log-probabilities."""
        right, loss = 0, 0.0
        for scores, labels in zip(found, self.wanted):
            wanted = labels.to(scores.device)
            right += int((scores.argmax(1) == wanted).sum())
            loss += float(nll_loss(scores, wanted, reduction="sum", ignore_index=PADDING))
        return right / self._decisions, loss / self._decisions if self.target == "labels" else None

    @property
    def _decisions(self) -> int:
        return max(sum(int((x != PADDING).sum()) for x in self.wanted), 1)

    def _ensemble(self) -> list[Tensor]:
        return [scores.argmax(1) for scores in self._probabilities(range(self.edges.edges))]

    def _probabilities(self, members: Sequence[int]) -> Iterator[Tensor]:
        """The log-probabilities of the ensemble on each batch: of the edges' mean logits, as ``vfx.judge`` has it."""
        for batch in self.batches:
            yield ensemble([_scores(self.edges(*batch, edge=edge)) for edge in members])

    @torch.no_grad()
    def _seconds(self, program: Program) -> float:
        """The median time of the first batch."""
        batch, times = self.batches[0], []
        program(*batch)
        for _ in range(RUNS):
            start = time.perf_counter()
            program(*batch)
            times.append(time.perf_counter() - start)
        return statistics.median(times)


def _scores(output: Any) -> Tensor:
    return class_scores(output, "compare")
