"""What a compilation did, for people and for machines."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vfx.analyse.cost import Profile
from vfx.match.matcher import Matching
from vfx.progress import stage as say
from vfx.terminal import facts_table, held_out_table, rendered, seconds_text


class Stopwatch:
    """Seconds spent in each named stage, which is said where ``progress`` is shown."""

    def __init__(self, progress: bool = True) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if self._progress and stage not in self.seconds:
            say(stage)
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True, eq=False)
class Report:
    """Passes run, what they refused, how good the match is, and what the result costs against one edge.

    ``scores``: how each candidate that was tried did on held-out calibration data, ``outcome`` what came of it.
    """

    passes: tuple[str, ...]
    notes: tuple[str, ...]
    profile: Profile
    edge_profile: Profile
    own_class: bool
    class_reason: str
    seconds: Mapping[str, float]
    matching: Matching | None = None
    verify_error: float | None = None
    choices: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    outcome: str = ""

    @property
    def params_ratio(self) -> float:
        """Parameters against one edge."""
        return self.profile.params / max(self.edge_profile.params, 1)

    @property
    def flops_ratio(self) -> float:
        """FLOPs against one edge."""
        return self.profile.flops / max(self.edge_profile.flops, 1)

    def to_dict(self) -> dict[str, Any]:
        matching = self.matching
        return {
            **self.choices,
            "outcome": self.outcome,
            "scores": {name: dict(score) for name, score in self.scores.items()},
            "passes": list(self.passes),
            "notes": list(self.notes),
            "params": self.profile.params,
            "flops": self.profile.flops,
            "params_ratio": self.params_ratio,
            "flops_ratio": self.flops_ratio,
            "not_counted": list(self.edge_profile.unknown_ops),
            "match_objective": list(matching.objective) if matching else None,
            "match_attempts": [list(values) for values in matching.attempts] if matching else None,
            "match_sweeps": list(matching.sweeps) if matching else None,
            "verify_error": self.verify_error,
            "own_class": self.own_class,
            "class_reason": self.class_reason,
            "seconds": dict(self.seconds),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        return rendered(
            facts_table(self._rows(), "merge report"), held_out_table(self.scores, self.choices.get("chosen", ""))
        )

    def _rows(self) -> Iterator[tuple[str, str]]:
        if self.outcome:
            yield "outcome", self.outcome
        yield "passes", " → ".join(self.passes)
        yield "parameters", f"{self.profile.params:,} ({self.params_ratio:.3f}× an edge)"
        yield "FLOPs", f"{self.profile.flops:,} ({self.flops_ratio:.3f}× an edge)"
        if self.edge_profile.caveat:
            yield "", self.edge_profile.caveat
        if self.matching is not None:
            yield "matching", ", ".join(f"{x:.4g}" for x in self.matching.objective) + " (objective)"
        if self.matching is not None and self.verify_error is not None:
            yield "proof", f"of the alignment: each edge computes what it did, to {self.verify_error:.1e} (float64)"
        yield "class", "the user's own" if self.own_class else f"GraphModule: {self.class_reason}"
        yield from (("note", note) for note in self.notes)
        yield "seconds", seconds_text(self.seconds)
