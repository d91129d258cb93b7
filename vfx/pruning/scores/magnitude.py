"""Magnitude: |w| (Han et al. 2015)."""

from __future__ import annotations

from typing import ClassVar

from vfx.on_read import OnRead
from vfx.pruning.scores.score import Score, Subject, Values


class Magnitude(Score):
    """The absolute value of each weight."""

    name: ClassVar[str] = "magnitude"

    def scores(self, subject: Subject) -> Values:
        weights = {target.name: subject.weight(target) for target in subject.targets}
        return OnRead(weights, lambda name, weight: weight.abs())
