"""What a classifier decides, and whether labels are classes that it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vfx.diagnosis.observe import class_axis, first_output
from vfx.errors import ArgumentError, DataError
from vfx.statistics.labels import check_classes

_SUM = 1e-3  # how far the sum of probabilities may be from one


def class_scores(result: Any, owner: str) -> Tensor:
    """The first output (N, classes, …) with the classes on axis 1, those of sequences (N, T, classes) moved there.

    Raises ArgumentError, in the name of ``owner``, for a network without decisions among classes.
    """
    scores = first_output(result)
    if scores is None or scores.ndim < 2 or scores.shape[class_axis(scores)] < 2:
        raise ArgumentError(f"{owner} reads decisions from outputs (N, classes, …); this network gives none")
    return scores.movedim(class_axis(scores), 1)


def log_probabilities(scores: Tensor) -> Tensor:
    """In float64, of logits or of probabilities (between 0 and 1, sums of 1), classes on axis 1."""
    scores = scores.double()
    inside = bool(((scores >= 0) & (scores <= 1)).all())
    if inside and bool(((scores.sum(1) - 1).abs() < _SUM).all()):
        return scores.clamp_min(torch.finfo(torch.float32).tiny).log()
    return scores.log_softmax(1)


def ensemble(scores: Sequence[Tensor]) -> Tensor:
    """The log-probabilities of several networks together: of their mean logits, as ``vfx.judge`` has it."""
    return torch.stack([log_probabilities(score) for score in scores]).mean(0).log_softmax(1)


def check_labels(labels: Tensor, scores: Tensor, batch: int) -> None:
    """Raise DataError unless there is one label for each decision, and a class for each label."""
    shape = (scores.shape[0], *scores.shape[2:])
    if labels.shape != shape:
        raise DataError(
            f"batch {batch} has labels of shape {tuple(labels.shape)}; the outputs take one class for each of {shape}"
        )
    check_classes(labels, scores.shape[1])
