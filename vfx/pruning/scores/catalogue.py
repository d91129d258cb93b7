"""The catalogue of scores: one line each."""

from __future__ import annotations

from collections.abc import Callable

from vfx.errors import ArgumentError
from vfx.pruning.scores.alps import ALPS
from vfx.pruning.scores.fisher import DiagonalFisher
from vfx.pruning.scores.gradient import GradientWeight
from vfx.pruning.scores.magnitude import Magnitude
from vfx.pruning.scores.random import Random
from vfx.pruning.scores.score import Score
from vfx.pruning.scores.sparsegpt import SparseGPT
from vfx.pruning.scores.wanda import Wanda
from vfx.pruning.scores.woodfisher import WoodFisher

SCORES: dict[str, Callable[..., Score]] = {
    "magnitude": Magnitude,
    "random": Random,
    "fisher": DiagonalFisher,
    "woodfisher": WoodFisher,
    "wanda": Wanda,
    "gradient": GradientWeight,
    "sparsegpt": SparseGPT,
    "alps": ALPS,
}


def score_named(score: str | Score, **options: object) -> Score:
    """A score by name with its options; a Score is returned as it is. Raises ArgumentError."""
    if isinstance(score, Score):
        return score
    if not isinstance(score, str) or score not in SCORES:
        raise ArgumentError(f"score={score!r} is unknown; choose one of {', '.join(SCORES)} or a Score")
    try:
        return SCORES[score](**options)
    except TypeError as error:
        raise ArgumentError(f"score={score!r} takes no such options: {error}") from error
