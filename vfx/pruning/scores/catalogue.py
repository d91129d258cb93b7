"""The catalogue of scores: one line each."""

from __future__ import annotations

from collections.abc import Callable

from vfx.names import made
from vfx.pruning.scores.alps import ALPS
from vfx.pruning.scores.fisher import DiagonalFisher
from vfx.pruning.scores.gradient import GradientWeight
from vfx.pruning.scores.magnitude import Magnitude
from vfx.pruning.scores.mixed import Mixed
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
    "mixed": Mixed,
    "sparsegpt": SparseGPT,
    "alps": ALPS,
}


def score_named(score: str | Score, **options: object) -> Score:
    """A score by name with its options; a Score is returned as it is. Raises ArgumentError."""
    return score if isinstance(score, Score) else made("score", SCORES, score, "", " or a Score", **options)
