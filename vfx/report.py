"""What all reports share: figures for machines, tables for people, and the seconds that it took."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from vfx.analyse.cost import Profile
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


@dataclass(frozen=True, eq=False, kw_only=True)
class Report(ABC):
    """Passes run, what they refused, the class of the result, and what it costs against the network that was given.

    ``profile`` is the result's, ``given_profile`` that of what was given (``GIVEN`` says what that is). ``choices`` are
    those made, ``scores`` how each candidate that was tried did on held-out samples. A report adds its own figures,
    rows and tables. Example: ``print(result.report)``, ``result.report.to_json()``.
    """

    GIVEN: ClassVar[str] = "the whole network"
    TITLE: ClassVar[str | None] = None

    passes: tuple[str, ...]
    notes: tuple[str, ...]
    profile: Profile
    given_profile: Profile
    own_class: bool
    class_reason: str
    seconds: Mapping[str, float]
    choices: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)

    @property
    def params_ratio(self) -> float:
        """Parameters against the network that was given."""
        return self.profile.params / max(self.given_profile.params, 1)

    @property
    def flops_ratio(self) -> float:
        """FLOPs against the network that was given."""
        return self.profile.flops / max(self.given_profile.flops, 1)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {
            **self.choices,
            "scores": {name: dict(score) for name, score in self.scores.items()},
            **self._figures(),
            "not_counted": list(self.given_profile.unknown_ops),
            "passes": list(self.passes),
            "notes": list(self.notes),
            "own_class": self.own_class,
            "class_reason": self.class_reason,
            "seconds": dict(self.seconds),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        candidates = held_out_table(self.scores, self.choices.get("chosen", ""))
        return rendered(*self._tables(), facts_table(self._rows(), self.TITLE), candidates)

    @abstractmethod
    def _figures(self) -> dict[str, Any]:
        """What this report alone says, for machines."""

    def _tables(self) -> list[Any]:
        """What stands above the rows."""
        return []

    def _costs(self) -> Iterator[tuple[str, str]]:
        """What the result costs, a row each."""
        yield "parameters", f"{self.profile.params:,} ({self.params_ratio:.3f}× {self.GIVEN})"
        yield "FLOPs", f"{self.profile.flops:,} ({self.flops_ratio:.3f}× {self.GIVEN})"

    def _proofs(self) -> Iterator[tuple[str, str]]:
        """What was proved of the result, a row each."""
        yield from ()

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "passes", " → ".join(self.passes)
        yield from self._costs()
        if self.given_profile.caveat:
            yield "", self.given_profile.caveat
        yield from self._proofs()
        yield "class", "the user's own" if self.own_class else f"GraphModule: {self.class_reason}"
        yield from (("note", note) for note in self.notes)
        yield "seconds", seconds_text(self.seconds)
