"""One call in several processes: each runs the networks on its share of the batches, and sums are added up over all.

Every process makes the same call on the same networks and data. What adds up over batches (moments, Gram and cross
matrices) is reduced, so all hold the same sums; what is decided from them is decided in each alike, and where a
decision could hang on a rounding, process 0's counts. Outside ``across_processes`` all of this does nothing.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vfx.arguments import checked
from vfx.errors import DataError, ProcessError

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

_state: dict[str, bool] = {"on": False}


@checked
@contextmanager
def across_processes(backend: str | None = None) -> Iterator[None]:
    """Calls in this block share their data with the processes that ``torchrun`` started beside this one.

    ``backend``: torch.distributed's, "nccl" where every process has a GPU of its own, else "gloo". A process group that
    is there already is used and left. Raises ProcessError, in all of them, where one ends before the others.

    >>> with vfx.across_processes():
    ...     merged = vfx.merge(models, x, data=loader)
    """
    starting = not dist.is_initialized()
    if starting:
        dist.init_process_group(backend or "gloo")
    _state["on"] = True
    try:
        yield
        wait()
    finally:
        _state["on"] = False
        if starting:
            dist.destroy_process_group()


def count() -> int:
    """How many processes work on this call."""
    return dist.get_world_size() if _state["on"] else 1


def first() -> bool:
    """Whether this is the process that speaks and writes."""
    return not _state["on"] or dist.get_rank() == 0


def wait() -> None:
    """Go on when all processes have come here. Raises ProcessError."""
    if count() > 1:
        _together(lambda: dist.all_reduce(torch.zeros(1)))


def shared(
    batches: Iterable[T], tensors: Callable[[T], Sequence[Tensor]], kind: Callable[[T], Hashable] = lambda _: None
) -> Iterator[T]:
    """This process's share of some batches: every n-th of n processes, of each ``kind`` for itself.

    Each reads all of them, and runs its own. ``tensors`` are those of a batch. Raises DataError unless all processes
    read the same (a loader that shuffles by itself gives each its own order).
    """
    if count() == 1:
        yield from batches
        return
    seen = torch.zeros(3, dtype=torch.float64)
    turns: Counter[Hashable] = Counter()
    for index, batch in enumerate(batches):
        for place, x in enumerate(tensors(batch)):
            total = float(
                (x.real if x.is_complex() else x).double().nan_to_num(0, 1, -1).sum()
            )  # masks have infinities
            seen += seen.new_tensor([1, (index + 1) * (place + 1) * x.numel(), (index + 1) * total])
        turns[kind(batch)] += 1
        if (turns[kind(batch)] - 1) % count() == dist.get_rank():
            yield batch
    if any(not torch.equal(seen, there) for there in _gathered(seen)):
        raise DataError(
            "the processes read different data, so their shares do not make up the whole: give a loader that yields "
            "the same batches in the same order everywhere (no shuffling, or a generator with a fixed seed)"
        )


def added(parts: Mapping[K, Sequence[Tensor]]) -> dict[K, list[Tensor]]:
    """Tensors under names, each the sum over all processes; a process without batches gives none, and gets all.

    Order and names are those of the first process that has them.
    """
    if count() == 1:
        return {name: list(tensors) for name, tensors in parts.items()}
    here = {name: [(tuple(x.shape), x.dtype) for x in tensors] for name, tensors in parts.items()}
    wanted: dict[K, list[tuple[tuple[int, ...], torch.dtype]]] = {}
    for there in _gathered(here):
        wanted = (
            {**there, **wanted} if not wanted else {**wanted, **{k: v for k, v in there.items() if k not in wanted}}
        )
    sums: dict[K, list[Tensor]] = {}
    for name, shapes in wanted.items():
        given_tensors = parts.get(name) or [torch.zeros(shape, dtype=dtype) for shape, dtype in shapes]
        sums[name] = [x.clone().contiguous() for x in given_tensors]
        for x in sums[name]:
            _together(lambda x=x: dist.all_reduce(x))  # type: ignore[misc]
    return sums


def agreed(value: T) -> T:
    """What process 0 has: processors round differently, and all processes must go one way."""
    if count() == 1:
        return value
    box: list[Any] = [value]
    _together(lambda: dist.broadcast_object_list(box, src=0))
    return box[0]


def _gathered(value: T) -> list[T]:
    """The values of all processes, by their numbers."""
    box: list[Any] = [None] * count()
    _together(lambda: dist.all_gather_object(box, value))
    return box


def _together(call: Callable[[], Any]) -> None:
    """Raise ProcessError where another process is no longer there."""
    try:
        call()
    except RuntimeError as error:  # gloo's and nccl's words for a closed connection
        raise ProcessError(lost()) from error


def lost() -> str:
    """What is said where a run cannot go on without one of its processes."""
    return (
        "another process of this run ended, so the sums over all data cannot be made; its own message says why. "
        "Nothing was written: start the run again"
    )


@contextmanager
def ended_by_others() -> Iterator[None]:
    """``torchrun`` ends the processes that are left by SIGTERM: they say so in one line. Raises ProcessError."""

    def stop(*_: object) -> None:
        raise ProcessError(lost())

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
