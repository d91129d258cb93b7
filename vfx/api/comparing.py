"""``vfx.compare``: a grid of ways to merge or prune, each measured in accuracy, parameters, FLOPs and time."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vfx.analyse.cost import Profile, cost
from vfx.api.merging import merge
from vfx.api.pruning import prune, prune_structured
from vfx.api.results import Result
from vfx.api.tracing import program_of
from vfx.arguments import check_names, checked
from vfx.diagnosis.comparison import Comparison, Point
from vfx.diagnosis.observe import class_axis, first_output
from vfx.errors import ArgumentError, DataError, PassError, VerificationError
from vfx.program import Program
from vfx.progress import track
from vfx.statistics.data import Batches, reusable
from vfx.statistics.labels import PADDING, check_classes

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
    **options: Any,
) -> Comparison:
    """Merge networks (or prune one) in every way of a grid, and hold what comes out side by side.

    ``models``: edges to merge, or one network to prune. ``grid``: values to try by the options of ``merge``, or of
    ``prune`` (of ``prune_structured`` with ``method``, ``budget`` or ``units`` among them): a value or a list of
    values; the default is a small grid of ``preserve`` and ``solve``, or of ``sparsity``. ``data`` calibrates,
    ``evaluate`` (batches, with labels behind the inputs) measures; without labels the figure is the agreement with the
    ensemble of the edges, or with the dense network. ``options``: given to every call. What cannot be made is listed
    with its error.
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
    for chosen in track(combinations, "compare", len(combinations), progress):
        name = ", ".join(f"{key}={value}" for key, value in chosen.items()) or "default"
        try:
            result = make(edges, example_inputs, **shared | chosen)
        except (ArgumentError, DataError, PassError, VerificationError) as error:
            points.append(Point(name, chosen, None, float("nan"), float("nan"), error=str(error)))
            continue
        points.append(judge.point(name, chosen, result, whole, latency))
    return Comparison(tuple(points), judge.target, judge.samples, given, whole.unknown_ops)


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
            output = _output(self.edges(*batch))
            axis = class_axis(output)
            shape = (*output.shape[:axis], *output.shape[axis + 1 :])
            if labels.shape != shape:
                raise DataError(
                    f"batch {index} has labels of shape {tuple(labels.shape)}; the outputs take one class for each of "
                    f"{shape}"
                )
            check_classes(labels, output.shape[axis])

    def references(self, whole: Profile, single: bool) -> list[Point]:
        """The networks that all is made from, and their ensemble."""
        count = self.edges.edges
        names = ["dense"] if single else [f"edge {edge}" for edge in range(count)]
        points = [Point(n, {}, self.accuracy(self.edges.select(i)), 1.0, 1.0, 1.0) for i, n in enumerate(names)]
        if count > 1:
            right = sum(int((a == b).sum()) for a, b in zip(self._ensemble(), self.wanted))
            points.append(Point("ensemble", {}, right / self._decisions, float(count), float(count), float(count)))
        return points

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
        return Point(name, options, self.accuracy(result.program), params, share, seconds, outcome)

    @torch.no_grad()
    def accuracy(self, program: Program) -> float:
        """The share of right decisions."""
        right = sum(
            int((_decisions(program(*batch)) == wanted.to(batch[0].device)).sum())
            for batch, wanted in zip(self.batches, self.wanted)
        )
        return right / self._decisions

    @property
    def _decisions(self) -> int:
        return max(sum(int((x != PADDING).sum()) for x in self.wanted), 1)

    @torch.no_grad()
    def _ensemble(self) -> list[Tensor]:
        found = []
        for batch in self.batches:
            outputs = [_output(self.edges(*batch, edge=edge)).double() for edge in range(self.edges.edges)]
            axis = class_axis(outputs[0])
            found.append(torch.stack([x.softmax(axis) for x in outputs]).sum(0).argmax(axis))
        return found

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


def _decisions(output: Any) -> Tensor:
    found = _output(output)
    return found.argmax(class_axis(found))


def _output(result: Any) -> Tensor:
    found = first_output(result)
    if found is None or found.ndim < 2:
        raise ArgumentError("compare reads decisions from outputs (N, classes, …); this network gives none")
    return found
