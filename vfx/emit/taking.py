"""The tensors that a module gets: copies, or a Program's own where nobody else holds them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vfx.program import Program, Weights


class Taking:
    """Gives a module its tensors; what is in one of the ``held`` weight sets is copied, all is where that is None.

    A tensor is taken as it is once at most, and only where it is all of its storage.
    """

    def __init__(self, held: Iterable[Weights] | None = None):
        self._copies = held is None
        self._held = {_storage(tensor) for weights in held or () for tensor in weights.values()}
        self.begin()

    def begin(self) -> Taking:
        """Start anew, for another module in place of the one that had the tensors."""
        self._taken: set[int] = set()
        self._given: dict[int, tuple[Tensor, Tensor]] = {}  # what was copied, and the copy, by the former's id
        return self

    def __call__(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor in a dtype, to be a module's own."""
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes > 0
        free = not self._copies and _storage(tensor) not in self._held | self._taken
        if free and whole and dtype in (None, tensor.dtype):
            self._taken.add(_storage(tensor))
            return tensor.detach()
        given = tensor.detach().to(dtype or tensor.dtype, copy=True)
        if given.dtype == tensor.dtype:
            self._given[id(tensor)] = tensor, given
        return given

    def shared(self, program: Program) -> Program:
        """The Program with the copies that a module got in place of what they were copied from."""
        shared_tensor = lambda tensor: self._given.get(id(tensor), (tensor, tensor))[1]  # noqa: E731
        return program.with_weights(
            [{name: shared_tensor(tensor) for name, tensor in w.items()} for w in program.weights]
        )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
