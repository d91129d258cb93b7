"""What is done for a pruned network: its layers solved for the dense one's outputs, normalized, or both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from passes.catalogue import normalizing
from passes.reconstruct import Reconstruct
from vfx.api.results import run_passes
from vfx.choice import Judging, best, joined, label_notes, trials
from vfx.judge import Score
from vfx.normalize.catalogue import Normalization
from vfx.program import Goal, Program
from vfx.reconstruct.references import Carry, Reference, unchanged
from vfx.report import Stopwatch
from vfx.statistics.collect import collect

SOLVED = "least squares"


@dataclass(frozen=True)
class Restored:
    """The network that comes out, what was done (``solve``, ``normalize``), and the scores of all that was tried."""

    program: Program
    solve: str | None
    normalize: str | None
    scores: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Restoring:
    """A pruned network and the ``dense`` one that it was; ``carry`` brings the dense network's values to its channels.

    ``data`` are all calibration data, ``few`` those that the normalization reads. ``normalization`` is what was asked
    for beside the solution, with "auto" resolved to a method; ``named`` says that the user named it.
    """

    dense: Program
    pruned: Program
    data: Any
    few: Any
    normalization: Normalization | None
    named: bool
    samples: int
    options: Mapping[str, Any]
    carry: Carry = unchanged
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    judge: Judging = "auto"
    verify: bool = True

    def __call__(self, solve: str | None, watch: Stopwatch) -> Restored:
        """Do what was asked for, or what wins on held-out samples ("auto")."""
        method = None if self.normalization is None else self.normalization.method
        if solve is None:
            return Restored(self._normalized(self.pruned, self.few, watch), None, method)
        if solve == "least_squares":
            result = self._solved(self.data, watch)
            method = method if self.named else None
            return Restored(self._normalized(result, self.few, watch) if method else result, "least_squares", method)
        with watch("choice"):
            scores, notes = self._scores()
        name = best(scores, (), ())
        result = self._solved(self.data, watch) if name.startswith(SOLVED) else self.pruned
        behind = not name.endswith(SOLVED) and name != "none"
        result = self._normalized(result, self.few, watch) if behind else result
        result = replace(result, notes=(*result.notes, *notes))
        figures = {name: score.to_dict() for name, score in sorted(scores.items(), key=lambda item: item[1].value)}
        solved = "least_squares" if name.startswith(SOLVED) else None
        return Restored(result, solved, method if behind else None, figures)

    def _scores(self) -> tuple[dict[str, Score], tuple[str, ...]]:
        """The score of all that is tried, and what is wrong with the labels."""
        folds = trials(self.dense, [1.0], self.data, self.judge, self.options)
        scores: dict[str, Score] = {}
        solved = [self._solved(fold.fit, Stopwatch(), max_samples=None, progress=False) for fold in folds]
        ready = {SOLVED: solved, "none": [self.pruned] * len(folds)}
        if self.normalization is not None:
            method = self.normalization.method
            for name, networks in ((f"{SOLVED}, then {method}", solved), (method, ready["none"])):
                ready[name] = [self._normalized(n, f.fit, Stopwatch(), verify=False) for n, f in zip(networks, folds)]
        for name, networks in ready.items():
            scores[name] = joined([fold.judge(network) for fold, network in zip(folds, networks)])
        return scores, label_notes(folds)

    def _solved(self, data: Any, watch: Stopwatch, **own: Any) -> Program:
        options = dict(self.options) | own
        solve = Reconstruct([Reference(self.dense, 1.0, self.carry)], data, masks=self.masks, **options)
        return run_passes(self.pruned, [solve], watch)

    def _normalized(self, program: Program, data: Any, watch: Stopwatch, verify: bool | None = None) -> Program:
        if self.normalization is None or data is None:
            return program
        own = dict(self.options) | {"max_samples": self.samples}
        _, passes = normalizing(self.normalization, [], data, own, self.verify if verify is None else verify)
        return run_passes(program, passes, watch)


def with_goals(program: Program, normalization: Normalization | None, data: Any, samples: int, options: Any) -> Program:
    """The dense network with the statistics of its layers, where the normalization goes to them."""
    if normalization is None or not normalization.needs_goals or data is None:
        return program
    found = collect(program, None, data, features=False, **dict(options) | {"max_samples": samples})
    goals: dict[str, Goal] = found.goals()
    return replace(program, goals=goals)
