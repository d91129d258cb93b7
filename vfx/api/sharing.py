"""Statistics that several merges of the same edges read, collected in one pass over the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vfx.api.aligning import asks_of
from vfx.api.normalizing import reads_for
from vfx.api.tracing import symmetry
from vfx.errors import VfxError
from vfx.match.catalogue import matcher
from vfx.normalize.catalogue import normalization
from vfx.program import Program
from vfx.statistics.collect import Statistics, collect

_MATCHES = ("auto", "activation")  # read what a pass over the edges as they are gives
_OWN = ("prepare", "heads", "statistics", "references")  # change the edges, or what is read of them


class SharedStatistics:
    """Collects once, when the first merge asks, what all of some merges read; those that need their own get none."""

    def __init__(self, edges: Program, merges: Sequence[Mapping[str, Any]]):
        self.edges = edges
        self.sharing = [merge for merge in merges if self._shares(merge)]
        self.found: Statistics | None = None

    def given(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What to pass to ``merge`` beside ``options``."""
        if len(self.sharing) < 2 or not self._shares(options):
            return {}
        if self.found is None:
            asks: dict[str, bool] = {}
            for merge in self.sharing:
                asks |= {name: asks.get(name, False) or wanted for name, wanted in self._asks(merge).items()}
            reading: dict[str, Any] = {name: options.get(name) for name in ("max_samples", "device")}
            self.found = collect(self.edges, symmetry(self.edges), options["data"], **asks, **reading, progress=False)
        return {"statistics": self.found}

    def _shares(self, options: Mapping[str, Any]) -> bool:
        alike = options.get("match", "auto") in _MATCHES and not any(options.get(name) for name in _OWN)
        try:
            return alike and options.get("data") is not None and any(self._asks(options).values())
        except VfxError:  # the merge itself says what is wrong
            return False

    def _asks(self, options: Mapping[str, Any]) -> dict[str, bool]:
        asked = normalization(options.get("normalize", "auto"), True)
        finder = matcher("activation", options.get("restarts", 0), options.get("classes", "full"))
        return asks_of(reads_for(asked, finder, self.edges), finder, symmetry(self.edges))
