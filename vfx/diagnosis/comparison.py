"""What ``vfx.compare`` gives: ways to merge or prune side by side, with what each costs and which none beats."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from vfx.diagnosis.point import Point
from vfx.files import csv_text, written
from vfx.terminal import rendered

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Comparison:
    """Points in the order in which they were made; the networks that they were made from come first.

    ``target`` says what accuracy is measured against: "labels", the "ensemble" of the edges, or each of the "edges" for
    its own head; ``not_counted`` which operators the FLOPs leave out; ``note`` why labels were not read.
    """

    points: tuple[Point, ...]
    target: str
    samples: int
    references: int
    not_counted: tuple[str, ...] = ()
    note: str = ""

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    @property
    def made(self) -> tuple[Point, ...]:
        """The points that are not the given networks."""
        return tuple(point for point in self.points[self.references :] if point.accuracy is not None)

    def frontier(self, cost: str = "params") -> list[Point]:
        """The networks that no other beats in accuracy at no more of a cost ("params", "flops", "latency")."""
        points: list[Point] = []
        for point in sorted(self.made, key=lambda p: (getattr(p, cost) or 0.0, -(p.accuracy or 0.0))):
            if not points or (point.accuracy or 0.0) > (points[-1].accuracy or 0.0):
                points.append(point)
        return points

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
        named = {
            "target": self.target,
            "samples": self.samples,
            "not_counted": list(self.not_counted),
            "note": self.note,
        }
        return named | {"points": rows}

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The points as JSON; also written to ``path`` if given. Raises OSError."""
        return written(json.dumps(self.to_dict(), indent=1, default=str) + "\n", path)

    def to_csv(self) -> str:
        """A line for each network; its options as JSON, a cell empty where nothing was measured."""
        rows = self.to_dict()["points"]
        return csv_text([row | {"options": json.dumps(row["options"], default=str)} for row in rows])

    def to_markdown(self) -> str:
        """The table for a page."""
        columns, *rows = self._cells()
        lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
        table = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
        return f"{self._title}{f'; {self.note}' if self.note else ''}.\n\n{table}"

    def figure(self) -> Figure:
        """Accuracy against parameters, with the frontier and the networks that all were made from."""
        from vfx.diagnosis.figures import comparison_figure

        given = self.points[: self.references]
        return comparison_figure(given, self.made, self.frontier(), self.measure)

    @property
    def measure(self) -> str:
        """What the figures are."""
        whose = "the ensemble" if self.target == "ensemble" else "each head's own edge"
        return "accuracy" if self.target == "labels" else f"agreement with {whose}"

    @property
    def _title(self) -> str:
        return f"{self.measure} on {self.samples:,} samples; * no other is better at as many parameters"

    def _cells(self) -> list[list[str]]:
        """Titles of the columns, and the cells of each line."""
        front = {point.name for point in self.frontier()}
        lines = [["network", "%", "loss", "params", "FLOPs", "latency", "seconds"]]
        for point in self.points:
            if point.accuracy is None:
                lines.append([point.name, point.error, "", "", "", "", ""])
                continue
            star = " *" if point.name in front else ""
            latency = "" if point.latency is None else f"{point.latency:.2f}×"
            seconds = "" if point.seconds is None else f"{point.seconds:.1f}"
            loss = "" if point.loss is None else f"{point.loss:.4f}"
            each = f" ({' / '.join(f'{100 * accuracy:.2f}' for accuracy in point.each)})" if point.each else ""
            figures = [f"{100 * point.accuracy:.2f}{each}{star}", loss, f"{point.params:.3f}×", f"{point.flops:.3f}×"]
            lines.append([point.name, *figures, latency, seconds])
        return lines

    def table(self) -> Table:
        """A table of at most 80 columns; what could not be made is named below it with its error."""
        failed = [f"{point.name}: {point.error}" for point in self.points if point.accuracy is None]
        caption = [f"FLOPs without {', '.join(self.not_counted)}"] if self.not_counted else []
        caption += [self.note] if self.note else []
        table = Table(title=self._title, caption="\n".join([*caption, *failed]) or None, caption_justify="left")
        columns, *rows = self._cells()
        for column in columns:
            table.add_column(column, justify="left" if column == "network" else "right", overflow="fold")
        for number, (point, row) in enumerate(zip(self.points, rows)):
            table.add_row(*(row if point.accuracy is not None else [point.name, "–", "", "", "", "", ""]))
            if number == self.references - 1:
                table.add_section()
        return table

    def __str__(self) -> str:
        return rendered(self.table())
