"""What ``vfx.compare`` gives: ways to merge or prune side by side, with what each costs and which none beats."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from vfx.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """One network: its ``options``, ``accuracy`` (a share), and costs as multiples of one edge (or the dense network).

    ``latency`` is the median time of one batch; ``error`` says why there is no network.
    """

    name: str
    options: Mapping[str, Any]
    accuracy: float | None
    params: float
    flops: float
    latency: float | None = None
    outcome: str = ""
    error: str = ""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Points in the order in which they were made; the networks that they were made from come first.

    ``target`` says what accuracy is measured against: "labels", or the "ensemble" of the edges; ``not_counted`` which
    operators the FLOPs leave out.
    """

    points: tuple[Point, ...]
    target: str
    samples: int
    references: int
    not_counted: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    @property
    def made(self) -> tuple[Point, ...]:
        """The points that are not the given networks."""
        return tuple(point for point in self.points[self.references :] if point.accuracy is not None)

    def frontier(self, cost: str = "params") -> list[Point]:
        """The networks that no other beats in accuracy at no more of a cost ("params", "flops", "latency")."""
        found: list[Point] = []
        for point in sorted(self.made, key=lambda p: (getattr(p, cost) or 0.0, -(p.accuracy or 0.0))):
            if not found or (point.accuracy or 0.0) > (found[-1].accuracy or 0.0):
                found.append(point)
        return found

    def best(self, budget: Mapping[str, float] | None = None) -> Point:
        """The most accurate network whose costs stay within a budget, such as {"params": 1.2}.

        Raises ValueError where none does.
        """
        limits = dict(budget or {})
        fits = [p for p in self.made if all(getattr(p, name) <= limit for name, limit in limits.items())]
        return max(fits, key=lambda p: p.accuracy or 0.0)

    def to_dict(self) -> dict[str, Any]:
        names = {point.name for point in self.frontier()}
        rows = [asdict(point) | {"frontier": point.name in names} for point in self.points]
        named = {"target": self.target, "samples": self.samples, "not_counted": list(self.not_counted)}
        return named | {"points": rows}

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The points as JSON; also written to ``path`` if given. Raises OSError."""
        text = json.dumps(self.to_dict(), indent=1, default=str) + "\n"
        if path is not None:
            write_atomic(path, text)
        return text

    def figure(self) -> Figure:
        """Accuracy against parameters, with the frontier and the networks that all were made from."""
        from vfx.diagnosis.figures import comparison_figure

        return comparison_figure(self)

    def table(self) -> Table:
        what = "accuracy" if self.target == "labels" else "agreement with the ensemble"
        caption = f"FLOPs without {', '.join(self.not_counted)}" if self.not_counted else None
        title = f"{what} on {self.samples:,} samples; * no other is better at as many parameters"
        table = Table(title=title, caption=caption)
        for column in ("network", "%", "params", "FLOPs", "latency"):
            table.add_column(column, justify="left" if column == "network" else "right")
        front = {point.name for point in self.frontier()}
        for number, point in enumerate(self.points):
            star = " *" if point.name in front else ""
            accuracy = point.error or (f"{100 * (point.accuracy or 0):.2f}{star}")
            latency = "" if point.latency is None else f"{point.latency:.2f}×"
            table.add_row(point.name, accuracy, f"{point.params:.3f}×", f"{point.flops:.3f}×", latency)
            if number == self.references - 1:
                table.add_section()
        return table

    def __str__(self) -> str:
        console = Console(width=140, force_terminal=False)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()
