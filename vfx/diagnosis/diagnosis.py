"""The result of ``vfx.diagnose``: rows, verdict, tables, figures and files."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from vfx.diagnosis.logits import Logits
from vfx.diagnosis.rows import LayerRow
from vfx.diagnosis.verdict import Verdict
from vfx.files import csv_text, written
from vfx.pages.diagnosis import page
from vfx.terminal import rendered, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = {
    "feature": "E‖g‖",
    "offset": "‖h‖",
    "feature_ratio": "feature ratio",
    "smoothed_bound": "bound",
    "variance_ratio": "variance ratio",
    "zero_share": "zeros",
    "silenced": "silenced",
    "magnitude_ratio": "|θ| ratio",
}


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Every measure of a merged network beside its edges; ``verdict`` says what to make of them.

    ``diagnosis["variance_ratio"]`` is a column, ``records()`` are rows for ``pandas.DataFrame``.
    """

    rows: tuple[LayerRow, ...]
    samples: int
    edges: int
    logits: Logits
    edge_logits: tuple[Logits, ...]
    verdict: Verdict
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, column: str) -> list[Any]:
        """One column over all layers; edges' columns hold a tuple for each layer."""
        return [getattr(row, column) for row in self.rows]

    def records(self) -> list[dict[str, Any]]:
        """A flat dict for each layer: numbers, strings, None where a measure is not defined."""
        return [row.record() for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "edges": self.edges,
            "verdict": self.verdict.to_dict(),
            "notes": list(self.notes),
            "logits": self.logits.to_dict(),
            "edge_logits": [logits.to_dict() for logits in self.edge_logits],
            "rows": self.records(),
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """JSON text without NaN; also written to ``path``, whole or not at all."""
        return written(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", path)

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """A line for each layer; a cell is empty where a measure is not defined."""
        return written(csv_text(self.records()), path)

    def figures(self) -> dict[str, Figure]:
        """Matplotlib figures by name, after the papers' figures."""
        from vfx.diagnosis.figures import figures

        return figures(self.rows, self.logits, self.edge_logits)

    def to_html(self, path: str | os.PathLike[str] | None = None, title: str = "Diagnosis of a merged network") -> str:
        """One page with verdict, figures and table that needs no other file and no network."""
        from vfx.diagnosis.figures import svg

        drawn = {name: svg(figure) for name, figure in self.figures().items()}
        return written(page(title, self, drawn), path)

    def table(self) -> Table:
        table = Table(title=f"{len(self.rows)} layers, {self.samples} samples, {self.edges} edges")
        for column in ("layer", "", *_SHOWN.values()):
            table.add_column(column, justify="left" if column in ("layer", "") else "right")
        for row in self.rows:
            number = f"({row.number})" if row.shortcut else str(row.number)
            state = "" if row.state == "merged" else row.state
            cells = [shown(getattr(row, name)) if row.measured else "" for name in _SHOWN]
            table.add_row(f"{number} {row.layer}", state, *cells)
        return table

    def __str__(self) -> str:
        return rendered(self.table(), width=140) + str(self.verdict) + "".join(f"\nnote: {note}" for note in self.notes)
