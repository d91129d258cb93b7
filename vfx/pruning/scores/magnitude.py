"""Magnitude: |w| (Han et al. 2015)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vfx.pruning.scores.score import Score, Subject


class Magnitude(Score):
    """The absolute value of each weight."""

    name: ClassVar[str] = "magnitude"

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        return {target.name: subject.weight(target).abs() for target in subject.targets}
