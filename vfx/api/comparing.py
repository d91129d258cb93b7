"""``vfx.compare``: a grid of ways to merge or prune, each measured in accuracy, parameters, FLOPs and time."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from vfx.analyse.cost import cost
from vfx.api.judging import TaskJudge
from vfx.api.merging import merge
from vfx.api.pruning import prune, prune_structured
from vfx.api.results import Result
from vfx.api.sharing import SharedStatistics
from vfx.api.tracing import program_of
from vfx.arguments import check_names, checked
from vfx.diagnosis.cells import Cells
from vfx.diagnosis.comparison import Comparison
from vfx.diagnosis.point import Point
from vfx.errors import ArchitectureError, ArgumentError, DataError, PassError, VerificationError
from vfx.program import Program
from vfx.progress import stage, track
from vfx.statistics.data import reusable

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
    ``prune`` (of ``prune_structured`` with ``method``, ``budget``, ``units`` or ``roles`` among them): a value or a
    list of values; the default is a small grid of ``preserve`` and ``solve``, or of ``sparsity``. ``data`` calibrates,
    ``evaluate`` (batches, with labels behind the inputs) measures; without labels the figure is the agreement with the
    ensemble of the edges, or with the dense network. ``options``: given to every call. What cannot be made is listed
    with its error. Statistics that several merges read are collected once. ``resume``: a JSON file in which each
    finished network is kept; those that it holds already are not made again.
    Edges whose numbers of classes differ are compared with ``heads`` (as for ``merge``, or in the grid): the figure is
    the mean over the heads, each against the labels of its own task (``evaluate=vfx.data.tasks(test_a, test_b)``), else
    against the decisions of the edge whose it is. Raises ArgumentError, ArchitectureError, DataError, CaptureError.

    Example: ``vfx.compare([a, b], x, data=loader, evaluate=test, grid={"preserve": [0, 4, 8]})``.
    """
    single, data = isinstance(models, nn.Module), reusable(data)
    make, combinations = _pruning(grid) if single else _merging(grid)
    check_names("grid=", make, (name for keyword in combinations[:1] for name in keyword))
    check_names("compare", make, options)
    capturing: dict[str, Any] = {name: options.pop(name) for name in ("dynamic_shapes", "outputs") if name in options}
    heads = [combination.get("heads", options.get("heads", 0)) for combination in combinations]
    edges = _captured(models, example_inputs, heads, capturing)
    edges = edges if device is None else edges.to(device)
    judge = TaskJudge(edges, data if evaluate is None else evaluate, max_samples if evaluate is None else None, device)
    whole = cost(edges.select(0))
    points = judge.references(whole, single)
    given = len(points)
    shared = {"data": data, "max_samples": max_samples, "device": device, "progress": False} | options
    cells = None if resume is None else Cells(resume, judge.identity(data, options | {"max_samples": max_samples}))
    names = [", ".join(f"{key}={value}" for key, value in chosen.items()) or "default" for chosen in combinations]
    todo = [chosen for name, chosen in zip(names, combinations) if cells is None or cells.get(name) is None]
    once = None if single else SharedStatistics(edges, [shared | chosen for chosen in todo])
    measure = partial(judge.point, whole=whole, latency=latency)
    making = _Making(partial(make, edges, example_inputs), shared, once, measure)
    for name, chosen in track(list(zip(names, combinations)), "compare", len(names), progress):
        if progress:
            stage(name)
        kept = None if cells is None else cells.get(name)
        points.append(kept or making(name, chosen))
        if cells is not None and kept is None:
            cells.keep(points[-1])
    return Comparison(tuple(points), judge.target, judge.samples, given, whole.unknown_ops, judge.note)


def _captured(models: Any, example_inputs: Any, heads: Sequence[Any], capturing: Mapping[str, Any]) -> Program:
    """The edges, of which tensors may differ behind the earliest cut that the heads of some cell begin with."""
    asked = sorted(dict.fromkeys(heads), key=lambda kept: kept if isinstance(kept, int) else 0, reverse=True)
    for kept in asked[:-1]:
        try:
            return program_of(models, example_inputs, kept, **capturing)
        except (ArchitectureError, ArgumentError):  # too few layers, or more than there are
            continue
    return program_of(models, example_inputs, asked[-1], **capturing)


@dataclass(frozen=True)
class _Making:
    """How the networks of a grid are made, of options ``shared`` and statistics collected ``once``, and measured."""

    make: Callable[..., Result]
    shared: dict[str, Any]
    once: SharedStatistics | None
    measure: Callable[..., Point]

    def __call__(self, name: str, chosen: dict[str, Any]) -> Point:
        """One network made and measured, or why it cannot be made."""
        start, options = time.perf_counter(), self.shared | chosen
        try:
            given = {} if self.once is None else self.once.given(options)
            result = self.make(**options | given)
        except (ArchitectureError, ArgumentError, DataError, PassError, VerificationError) as error:
            return Point(name, chosen, None, float("nan"), float("nan"), error=str(error))
        seconds = time.perf_counter() - start
        return replace(self.measure(name, options, result), options=chosen, seconds=seconds)


def _merging(grid: Mapping[str, Values] | None) -> tuple[Callable[..., Result], list[dict[str, Any]]]:
    default = {"solve": ["auto", "least_squares", None]}
    return merge, _combinations(default if grid is None else grid)


def _pruning(grid: Mapping[str, Values] | None) -> tuple[Callable[..., Result], list[dict[str, Any]]]:
    chosen = {"sparsity": [0.5, 0.8, 0.9]} if grid is None else grid
    structured = bool({"method", "budget", "units", "roles"} & set(chosen))
    return (prune_structured if structured else prune), _combinations(chosen)


def _combinations(grid: Mapping[str, Values]) -> list[dict[str, Any]]:
    values = [list(v) if isinstance(v, (list, tuple, range)) else [v] for v in grid.values()]
    return [dict(zip(grid, combination)) for combination in itertools.product(*values)]
