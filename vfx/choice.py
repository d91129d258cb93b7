"""What a default call decides: candidates made from a part of the calibration data, judged on the samples held out.

A candidate makes a network from calibration data. Each is made from the samples that are not held out and scored on
those that are (``vfx.judge``), in several folds where samples are few or channels differ and scores are close; the
best is then made anew from all data. An edge as it is stands among the candidates of a merge, so nothing that merging
gives up is given up in silence.

A network has to beat the edges, and one that does not fit into the user's own class those that do, by more than the
standard error of the paired difference, the latter by ``MARGIN`` of the score besides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vfx.emit.module import emit
from vfx.errors import ArgumentError
from vfx.judge import EVERY, LIMIT, HeldOutScore, Judge, Kind
from vfx.processes import agreed
from vfx.program import Program
from vfx.statistics.data import Batches, Prepared

FEW, FOLDS = 256, 3  # with fewer samples than this, so many folds
MARGIN = 0.02  # of the score, by which a candidate outside the user's own class has to win
CLOSE = 0.1  # of the best score, within which networks of different channels are looked at in all folds
Judging = Kind | Callable[[nn.Module], float]


@dataclass(frozen=True)
class Candidate:
    """A way to make a network from calibration data; ``edge`` where it is that edge as it is."""

    name: str
    make: Callable[[Any], Program]
    edge: int | None = None


@dataclass(frozen=True)
class Split:
    """Samples to make a candidate from, and the judge that holds the others."""

    fit: Prepared
    judge: Any  # Judge or UserJudge

    @property
    def notes(self) -> tuple[str, ...]:
        """What is wrong with the labels of the data."""
        if not isinstance(self.judge, Judge) or self.judge.notes or self.judge.labels is None:
            return getattr(self.judge, "notes", ())
        wrong = self.judge.misfit(self.fit.labels)
        return (f"some labels of the data cannot judge, those held out to choose could: {wrong}",) if wrong else ()


class UserJudge:
    """The user's own figure of a module, the larger the better."""

    def __init__(self, figure: Callable[[nn.Module], float]):
        self.figure = figure

    @torch.no_grad()
    def __call__(self, program: Program) -> HeldOutScore:
        return agreed(HeldOutScore(-float(self.figure(emit(program)[0]))))


def trials(
    edges: Program, alphas: Sequence[float], data: Any, judge: Judging, options: Mapping[str, Any], more: bool = False
) -> list[Split]:
    """The folds in which candidates are tried; ``more`` are those that are left for a second look.

    Raises ArgumentError for fewer samples than one fold needs.
    """
    batches = Batches(edges, data, options["max_samples"], options["device"])
    count = sum(batches.size(batch) for batch in batches)
    first = FOLDS if count < FEW else 1
    splits = []
    for fold in range(first, FOLDS) if more else range(first):
        fit, held = batches.split(EVERY, LIMIT, fold)
        if not (fit.batches and held.batches):
            raise ArgumentError(
                f"'auto' holds samples out to choose; give at least {EVERY}, or name what to do (solve=, normalize=, "
                "and score= and allocation= where channels go)"
            )
        splits.append(Split(fit, UserJudge(judge) if callable(judge) else Judge(edges, alphas, held, judge)))
    return splits


def label_notes(trials: Sequence[Split]) -> tuple[str, ...]:
    """What is wrong with the labels, once: the first fold's note."""
    return next((trial.notes for trial in trials if trial.notes), ())


def scored(candidate: Candidate, trials: Sequence[Split]) -> HeldOutScore:
    """A candidate's score over all folds."""
    return joined([trial.judge(candidate.make(trial.fit)) for trial in trials])


def joined(scores: Sequence[HeldOutScore]) -> HeldOutScore:
    """The mean of several folds' scores."""
    if len(scores) == 1:
        return scores[0]

    def mean(name: str) -> Any:
        values = [getattr(score, name) for score in scores]
        return None if None in values else sum(values) / len(values)

    samples = [score.samples for score in scores if score.samples is not None]
    figures = {name: mean(name) for name in ("divergence", "loss", "accuracy", "scale", "agreement")}
    return HeldOutScore(**figures, samples=torch.cat(samples) if len(samples) == len(scores) else None)


def best(scores: Mapping[str, HeldOutScore], edges: Sequence[str], foreign: Sequence[str]) -> str:
    """The name of the score to go with; ``foreign`` candidates do not fit the user's own class."""
    order = sorted(scores, key=lambda name: scores[name].value)
    merged = [name for name in order if name not in foreign and name not in edges]
    others = [name for name in order if name in foreign and name not in edges]
    winner = merged[0] if merged else None
    if others and (winner is None or _clearly(scores[others[0]], scores[winner])):
        winner = others[0]
    rival = next((name for name in order if name in edges), None)
    if winner is None or (rival is not None and not scores[winner].better_than(scores[rival])):
        winner = rival
    assert winner is not None, "there is at least one candidate"
    return winner


def contenders(scores: Mapping[str, HeldOutScore], fits: Mapping[str, str]) -> list[str]:
    """The names within ``CLOSE`` of the best, where they come from several ``fits``; else none.

    The paired error over held-out samples knows nothing of what another choice of the samples to fit would have given,
    which for different channels is more than the difference of close scores.
    """
    least = min(score.value for score in scores.values())
    near = [name for name, score in scores.items() if score.value - least <= CLOSE * abs(least)]
    return near if len({fits[name] for name in near}) > 1 else []


def _clearly(score: HeldOutScore, rival: HeldOutScore) -> bool:
    return score.better_than(rival) and rival.value - score.value > MARGIN * abs(rival.value)
