"""Random: the baseline that every score must beat."""

from __future__ import annotations

import hashlib
from typing import ClassVar

import torch
from torch import Tensor

from vfx.pruning.scores.score import Score, Subject


class Random(Score):
    """Uniform numbers from the seed and the weight's name: the same whatever else the network holds."""

    name: ClassVar[str] = "random"

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        return {
            target.name: _uniform(f"{subject.seed}/{target.name}", target.shape).to(subject.weight(target).device)
            for target in subject.targets
        }


def _uniform(key: str, shape: tuple[int, ...]) -> Tensor:
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
