"""What a merge, a repair or a list of passes did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from vfx.match.matcher import Matching
from vfx.report import Report


@dataclass(frozen=True, eq=False, kw_only=True)
class MergeReport(Report):
    """How good the match is beside what all reports say, ``outcome``: what came of the candidates."""

    GIVEN: ClassVar[str] = "an edge"
    TITLE: ClassVar[str | None] = "merge report"

    matching: Matching | None = None
    verify_error: float | None = None
    outcome: str = ""

    def _figures(self) -> dict[str, Any]:
        matching = self.matching
        return {
            "outcome": self.outcome,
            "params": self.profile.params,
            "flops": self.profile.flops,
            "params_ratio": self.params_ratio,
            "flops_ratio": self.flops_ratio,
            "match_objective": list(matching.objective) if matching else None,
            "match_attempts": [list(values) for values in matching.attempts] if matching else None,
            "match_sweeps": list(matching.sweeps) if matching else None,
            "verify_error": self.verify_error,
        }

    def _rows(self) -> Iterator[tuple[str, str]]:
        if self.outcome:
            yield "outcome", self.outcome
        yield from super()._rows()

    def _proofs(self) -> Iterator[tuple[str, str]]:
        if self.matching is not None:
            yield "matching", ", ".join(f"{x:.4g}" for x in self.matching.objective) + " (objective)"
        if self.matching is not None and self.verify_error is not None:
            yield "proof", f"of the alignment: each edge computes what it did, to {self.verify_error:.1e} (float64)"
