"""Weight sets whose tensors are made when they are read, and held by nobody: a proof in float64 takes one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from vfx.program import Weights


class OnRead(Mapping[str, Tensor]):
    """``make(name, tensor)`` of each tensor of a weight set, anew each time that it is read.

    >>> exact = OnRead(weights, lambda name, tensor: tensor.double())
    >>> exact["fc.weight"].dtype
    torch.float64
    """

    def __init__(self, weights: Weights, make: Callable[[str, Tensor], Tensor]):
        self._weights, self._make = weights, make

    def __getitem__(self, name: str) -> Tensor:
        return self._make(name, self._weights[name])

    def __contains__(self, name: object) -> bool:
        return name in self._weights  # without making it

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
