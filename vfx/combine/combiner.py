"""What combines edges of one frame into one weight set, and what it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from vfx.program import Program, Weights


@dataclass(frozen=True, eq=False)
class Combination:
    """Edges that stand in one frame, and what is known of them.

    ``program``: a graph and the weight set of each edge; tensors that each edge keeps for itself are its private ones.
    ``edges``: the same edges, each computing what it did. ``shares``: their weights, which sum to 1. ``base``: the
    weights that all were fine-tuned from. ``data``: calibration batches; ``reading``: how they are read
    (``max_samples``, ``device``, ``progress``).
    """

    program: Program
    edges: Program
    shares: tuple[float, ...]
    base: Weights | None = None
    data: Any = None
    seed: int = 0
    reading: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The parameters that are combined, each once: all that the graph reads but what each edge keeps for itself."""
        return combined_names(self.program)

    def of_base(self, name: str) -> Tensor:
        """A tensor of the base, float64."""
        assert self.base is not None, "a combiner that needs the base is given one"
        return self.base[name].to(self.program.weights[0][name].device).double()

    def change(self, name: str, edge: int) -> Tensor:
        """The task vector of an edge at a name: its weights less the base's, float64."""
        return self.program.weights[edge][name].double() - self.of_base(name)

    def changes(self, name: str) -> list[Tensor]:
        """The task vectors of all edges at a name."""
        return [self.change(name, edge) for edge in range(self.program.edges)]

    def mean(self, name: str) -> Tensor:
        """Σ αᵢ Wᵢ, float64."""
        weights = self.program.weights
        return sum(share * tensors[name].double() for share, tensors in zip(self.shares, weights))  # type: ignore[return-value]

    def summed(self, name: str) -> Tensor:
        """Σ N αᵢ τᵢ: the sum of the task vectors where all count alike."""
        count = len(self.shares)
        return sum(count * share * change for share, change in zip(self.shares, self.changes(name)))  # type: ignore


def combined_names(program: Program) -> tuple[str, ...]:
    """The parameters of a program that are combined, in the order of the graph."""
    kept = program.private | program.masks
    return tuple(name for name in program.names() if name not in kept and program.is_parameter(name))


class Combiner(ABC):
    """Makes one weight set of several; ``needs`` names what it reads: "base", "data".

    What it does not give is averaged, as buffers are; whole numbers come from the first edge.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def __call__(self, combination: Combination) -> dict[str, Tensor]:
        """The combined parameters by name, float64."""

    @property
    def brings_data(self) -> bool:
        """Whether it was given data of its own."""
        return False
