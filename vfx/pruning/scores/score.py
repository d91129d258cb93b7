"""What a score is: higher means that the network needs the weight more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from vfx.garbage import give_back
from vfx.program import Program
from vfx.pruning.selection import Selection
from vfx.pruning.targets import Target
from vfx.statistics.data import Batches

Values = Mapping[str, Tensor]
Select = Callable[[Values], dict[str, Tensor]]  # scores -> True where a weight stays


@dataclass(frozen=True)
class Subject:
    """What is pruned: one network, its prunable weights, what earlier steps left of them, the data and the scopes."""

    program: Program
    targets: tuple[Target, ...]
    data: Any = None
    max_samples: int | None = None
    seed: int = 0
    device: Any = None
    progress: bool = True
    kept: Values = field(default_factory=dict)
    selection: Selection | None = None

    def weight(self, target: Target) -> Tensor:
        return self.program.weights[0][target.name]

    def batches(self, max_samples: int | None = None) -> Batches:
        """The calibration data, up to ``max_samples`` where the user set no bound."""
        return Batches(self.program, self.data, self.max_samples or max_samples, self.device)


@dataclass(frozen=True)
class Pruned:
    """The masks (True: stays) and the weights behind them, by FQN."""

    masks: dict[str, Tensor]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Scored:
    """Scores by FQN, and what makes the weights that any masks leave of them."""

    values: Values
    masked: Callable[[dict[str, Tensor]], Pruned]


class Score(ABC):
    """``scores`` gives every target a tensor of its weight's shape; ``prepare`` may also update what stays."""

    name: ClassVar[str]
    needs_data: ClassVar[bool] = False
    scope: ClassVar[str] = "global"  # where the user names none
    protect: ClassVar[tuple[str, ...]] = ()
    layer_by_layer: bool = False  # whether a layer's scores depend on what was pruned before it
    moves_weights: bool = False  # whether those that stay are updated

    @abstractmethod
    def scores(self, subject: Subject) -> Values:
        """A score for each weight, by FQN."""

    def check(self, selection: Selection) -> None:
        """Raise ArgumentError where the score cannot be compared in this scope; by default, it can in any."""
        return

    def prepare(self, subject: Subject) -> Scored:
        """The scores, and the weights with zeros where a mask is False."""
        tensors = subject.program.weights[0]
        zeroed = lambda masks: {name: tensors[name].masked_fill(~mask, 0) for name, mask in masks.items()}  # noqa: E731
        return Scored(self.scores(subject), lambda masks: Pruned(masks, zeroed(masks)))

    def prune(self, subject: Subject, select: Select) -> Pruned:
        """Select by the scores."""
        scored = self.prepare(subject)
        masks = select(scored.values)
        give_back(sum(mask.numel() for mask in masks.values()))  # before the new weights are made
        return scored.masked(masks)
