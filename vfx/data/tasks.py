"""Labels of several networks that tell different classes apart: a column for each, so that each is judged on its own.

In: the labelled batches of each network's task. Out: all of them, one behind the other, labels (samples, tasks): those
of the task in its column, -100 (no label) in the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vfx.errors import DataError
from vfx.statistics.labels import NAMES, PADDING


class tasks:
    """Data of several networks with their own classes, in the order of the networks: ``evaluate=`` of ``vfx.compare``.

    ``data``: for each network its batches: tuples whose last entry is labels (N,), or dicts with labels under a usual
    name. Raises DataError for a batch without labels.

    >>> vfx.compare([a, b], x, data=loader, evaluate=vfx.data.tasks(test_of_a, test_of_b), heads=1)
    """

    def __init__(self, *data: Any):
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        for task, batches in enumerate(self.data):
            for batch in batches:
                yield self._labelled(batch, task)

    def _labelled(self, batch: Any, task: int) -> Any:
        name = next((n for n in NAMES if n in batch), None) if isinstance(batch, Mapping) else None
        classes = batch[name] if name else batch[-1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
        if not isinstance(classes, Tensor) or classes.ndim != 1 or classes.is_floating_point():
            raise DataError(
                f"data of task {task}: a batch must be a tuple (inputs, labels (N,) of integers), or a dict"
            )
        labels = torch.full((len(classes), len(self.data)), PADDING)
        labels[:, task] = classes
        return {**batch, name: labels} if name else (*batch[:-1], labels)
