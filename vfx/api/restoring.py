"""What is done for a pruned network: its layers solved for the dense one's outputs, normalized, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

from torch import Tensor

from vfx.api.results import run_passes
from vfx.choice import Judging, Split, best, contenders, joined, label_notes, trials
from vfx.judge import HeldOutScore
from vfx.normalize.catalogue import Normalization
from vfx.passes.catalogue import normalizing
from vfx.passes.reconstruct import Reconstruct
from vfx.program import Goal, Program
from vfx.reconstruct.references import Carry, Reference, unchanged
from vfx.report import Stopwatch
from vfx.statistics.collect import collect

SOLVED, NOTHING = "least squares", "none"


@dataclass(frozen=True)
class Restored:
    """The network that comes out and what was done: ``solve`` and ``normalize``."""

    program: Program
    solve: str | None
    normalize: str | None


@dataclass(frozen=True)
class Restoring:
    """A pruned network and the ``dense`` one that it was; ``carry`` brings the dense network's values to its channels.

    ``data`` are all calibration data, ``few`` those that the normalization reads. ``normalization`` is what was asked
    for beside the solution, with "auto" resolved to a method; ``named`` says that the user named it.
    ``notes`` is what is to be said of the network, whatever is done for it.
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
    notes: tuple[str, ...] = ()

    def ways(self, solve: str | None) -> tuple[str, ...]:
        """The names of what was asked for; of several the best on held-out samples is meant."""
        method = None if self.normalization is None else self.normalization.method
        if solve is None:
            return (method or NOTHING,)
        if solve == "least_squares":
            return (f"{SOLVED}, then {method}" if method and self.named else SOLVED,)
        return (SOLVED, NOTHING, *((f"{SOLVED}, then {method}", method) if method else ()))

    def folds(self, more: bool = False) -> list[Split]:
        """What ways are tried on; ``more`` are the folds left for a second look."""
        return trials(self.dense, [1.0], self.data, self.judge, self.options, more)

    def scores(self, ways: Sequence[str], folds: Sequence[Split]) -> dict[str, list[HeldOutScore]]:
        """The scores of each way on the held-out samples of each fold."""
        networks: dict[str, list[Program]] = {NOTHING: [self.pruned] * len(folds)}
        if any(way.startswith(SOLVED) for way in ways):
            networks[SOLVED] = [self._solved(f.fit, Stopwatch(False), max_samples=None, progress=False) for f in folds]
        for way in ways:
            if way not in networks:
                start = networks[SOLVED if way.startswith(SOLVED) else NOTHING]
                networks[way] = [
                    self._normalized(n, f.fit, Stopwatch(False), verify=False) for n, f in zip(start, folds)
                ]
        return {way: [f.judge(network) for f, network in zip(folds, networks[way])] for way in ways}

    def __call__(self, way: str, watch: Stopwatch) -> Restored:
        """Do it, on all data."""
        solved, normalized = way.startswith(SOLVED), way not in (SOLVED, NOTHING)
        result = self._solved(self.data, watch) if solved else self.pruned
        if normalized:
            result = self._normalized(result, self.few, watch)
        method = self.normalization.method if normalized and self.normalization else None
        return Restored(result, "least_squares" if solved else None, method)

    def _solved(self, data: Any, watch: Stopwatch, **changes: Any) -> Program:
        options = dict(self.options) | changes
        solve = Reconstruct([Reference(self.dense, 1.0, self.carry)], data, masks=self.masks, **options)
        return run_passes(self.pruned, [solve], watch)

    def _normalized(self, program: Program, data: Any, watch: Stopwatch, verify: bool | None = None) -> Program:
        if self.normalization is None or data is None:
            return program
        keywords = dict(self.options) | {"max_samples": self.samples}
        _, passes = normalizing(self.normalization, [], data, keywords, self.verify if verify is None else verify)
        return run_passes(program, passes, watch)


@dataclass(frozen=True)
class Decision:
    """The candidate and the way that do best on held-out samples, all scores and what is to be said of them."""

    candidate: str
    way: str
    scores: Mapping[str, dict[str, float | None]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    chosen: str = ""  # of ``scores``

    @property
    def choices(self) -> dict[str, str]:
        """What a report says of it beside the settings that came out."""
        return {"chosen": self.chosen} if self.chosen else {}


def decide(candidates: Mapping[str, Restoring], solve: str | None, watch: Stopwatch) -> Decision:
    """Score every way of every candidate, unless there is one only; close ones of several candidates in all folds.

    A candidate gives way to a later one that is better by more than the standard error of the paired difference.
    """
    pairs = {_joined(name, way): (name, way) for name, candidate in candidates.items() for way in candidate.ways(solve)}
    if len(pairs) == 1:
        return Decision(*next(iter(pairs.values())))
    with watch("choice"):
        any_one = next(iter(candidates.values()))
        folds = any_one.folds()
        tried = _scores(candidates, pairs, folds)
        scores = {label: joined(each) for label, each in tried.items()}
        near = contenders(scores, {label: name for label, (name, _) in pairs.items()})
        if near and (more := any_one.folds(more=True)):
            again = _scores(candidates, {label: pairs[label] for label in near}, more)
            scores |= {label: joined(tried[label] + each) for label, each in again.items()}
    ordered = sorted(scores.items(), key=lambda item: item[1].value)
    lines = [[label for label in near or scores if pairs[label][0] == name] for name in candidates]
    firsts = [best({label: scores[label] for label in line}, (), ()) for line in lines if line]
    chosen = reduce(lambda first, later: later if scores[later].better_than(scores[first]) else first, firsts)
    figures = {label: score.to_dict() for label, score in ordered}
    return Decision(*pairs[chosen], figures, label_notes(folds), chosen)


def _scores(
    candidates: Mapping[str, Restoring], pairs: Mapping[str, tuple[str, str]], folds: Sequence[Split]
) -> dict[str, list[HeldOutScore]]:
    """The scores of each fold by the label of candidate and way."""
    scores_of: dict[str, list[HeldOutScore]] = {}
    for name, restoring in candidates.items():
        ways = [way for owner, way in pairs.values() if owner == name]
        scored = restoring.scores(ways, folds) if ways else {}
        scores_of |= {_joined(name, way): each for way, each in scored.items()}
    return scores_of


def _joined(name: str, way: str) -> str:
    return f"{name}: {way}" if name else way


def with_goals(program: Program, normalization: Normalization | None, data: Any, samples: int, options: Any) -> Program:
    """The dense network with the statistics of its layers, where the normalization goes to them."""
    if normalization is None or not normalization.needs_goals or data is None:
        return program
    statistics = collect(program, None, data, features=False, **dict(options) | {"max_samples": samples})
    goals: dict[str, Goal] = statistics.goals()
    return replace(program, goals=goals)
