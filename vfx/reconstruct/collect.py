"""The sums of many batches: small batches wait for each other, and are multiplied together.

A product of few rows costs what its result takes to write, to bring into order and to add up in float64. So the rows
of a layer wait until they hold as many numbers as its Gram matrix; memory does not grow with the number of batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vfx.reconstruct.forms import Form
from vfx.reconstruct.sums import Sums


class Collected:
    """Sums in float64 of all batches that were given."""

    def __init__(self) -> None:
        self._total: Sums | None = None
        self._waiting: dict[Form, list[tuple[Tensor, Tensor]]] = {}

    def add(self, sums: Sums) -> None:
        """Add the sums of a batch."""
        if self._total is None:
            self._total = sums.double()
        else:
            self._total += sums

    def wait(self, form: Form, x: Tensor, y: Tensor) -> None:
        """Add a batch of inputs x and wanted outputs y of a form, now or together with later ones.

        Nobody may write into them before ``sums`` was called.
        """
        batch = form.arranged(x, y)
        waiting = self._waiting.setdefault(form, [])
        if waiting and not _joins(form.along, waiting[0], batch):
            self._multiply(form)
        waiting.append(batch)
        if sum(tensor.numel() for pair in waiting for tensor in pair) >= form.entries:
            self._multiply(form)

    def sums(self) -> Sums:
        """The sums of all batches."""
        for form in self._waiting:
            self._multiply(form)
        assert self._total is not None, "a sweep has at least one batch"
        return self._total

    def _multiply(self, form: Form) -> None:
        waiting = self._waiting[form]
        if waiting:
            inputs, goals = (torch.cat(parts, form.along) if len(parts) > 1 else parts[0] for parts in zip(*waiting))
            waiting.clear()
            self.add(form.products(inputs, goals))


def _joins(along: int, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> bool:
    """Whether two batches differ along the axis of their samples at most."""
    return all(
        a.dtype == b.dtype and (*a.shape[:along], *a.shape[along + 1 :]) == (*b.shape[:along], *b.shape[along + 1 :])
        for a, b in zip(first, second)
    )
