"""Values of many stopped executions, in memory up to a limit and behind it in a temporary file.

What is kept are storages, each once: values that are views of one another stay so, and their strides too, so a run goes
on bit for bit as if nothing had happened. The file has no name (it is unlinked when it is made) and is gone when it is
closed, or when the process ends in whatever way. It is written sequentially, so that a full disk is an error and not a
bus error, and read through a memory map. Two files take turns: one is read while the next stage writes the other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vfx.errors import DataError
from vfx.program import Execution

MEMORY_LIMIT = 4 << 30  # bytes of activations that are kept in memory


@dataclass(frozen=True)
class _Parked:
    """A tensor whose storage lies in the file."""

    storage: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _Piece:
    """A storage in the file."""

    start: int
    bytes: int
    device: torch.device


@dataclass(frozen=True)
class _Away:
    """All values of one execution: what stays, what is parked, and where."""

    nodes: tuple[Any, ...]
    leaves: tuple[Any, ...]
    spec: Any
    pieces: tuple[_Piece, ...]


class Spill:
    """Takes the values of stopped executions and gives them back; at most ``limit`` bytes of them stay in memory.

    Tensors that share their storage with ``shared`` ones (weights) stay where they are and do not count. ``spilled``
    counts the bytes written. Raises DataError if the disk is full.
    """

    def __init__(self, limit: int = MEMORY_LIMIT, shared: Iterable[Tensor] = ()):
        self.limit, self.held, self.spilled = limit, 0, 0
        self._shared = {_address(tensor) for tensor in shared}
        self._kept: dict[int, int] = {}
        self._away: dict[int, _Away] = {}
        self._files: list[BinaryIO | None] = [None, None]

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            if file is not None:
                file.close()

    def next_stage(self) -> None:
        """From here on values are written to the other file; what it held has been read."""
        self._files.reverse()
        if self._files[1] is not None:
            self._files[1].seek(0)
            self._files[1].truncate()

    def keep(self, run: Execution) -> None:
        """Put a run's values away until ``fetch``."""
        self._leave_inputs(run)
        leaves, spec = pytree.tree_flatten(list(run.values.values()))
        leaves = [x.resolve_conj().resolve_neg() if isinstance(x, Tensor) else x for x in leaves]
        storages = {_address(x): x.untyped_storage() for x in leaves if self._is_own(x)}
        size = sum(storage.nbytes() for storage in storages.values())
        if self.held + size <= self.limit:
            self._kept[id(run)] = size
            self.held += size
            return
        number = {address: index for index, address in enumerate(storages)}
        parked = (_parked(x, number[_address(x)]) if self._is_own(x) else x for x in leaves)
        pieces = tuple(self._append(storage) for storage in storages.values())
        self._away[id(run)] = _Away(tuple(run.values), tuple(parked), spec, pieces)
        run.values = {}

    def fetch(self, run: Execution) -> None:
        """Bring a run's values back."""
        self.held -= self._kept.pop(id(run), 0)
        away = self._away.pop(id(run), None)
        if away is not None:
            run.values = self._read(away)

    def _leave_inputs(self, run: Execution) -> None:
        """An input that is a view of a larger tensor is the user's: writing it to disk would free nothing."""
        for node, value in run.values.items():
            if node.op == "placeholder" and isinstance(value, Tensor) and _is_part(value):
                self._shared.add(_address(value))

    def _is_own(self, value: Any) -> bool:
        return isinstance(value, Tensor) and _address(value) not in self._shared

    def _append(self, storage: torch.UntypedStorage) -> _Piece:
        if self._files[1] is None:
            self._files[1] = tempfile.TemporaryFile(prefix="vfx-", buffering=0)  # type: ignore[assignment]  # noqa: SIM115
        file = self._files[1]
        assert file is not None
        start = file.tell()
        try:
            remaining = memoryview(_bytes(storage).cpu().numpy().data)
            while remaining:
                remaining = remaining[file.write(remaining) :]
        except OSError as error:
            raise DataError(
                f"activations of the calibration data do not fit on the disk at {tempfile.gettempdir()} ({error}); "
                "raise memory_limit, lower max_samples, or set TMPDIR to a larger disk"
            ) from error
        self.spilled += storage.nbytes()
        return _Piece(start, storage.nbytes(), storage.device)

    def _read(self, away: _Away) -> dict[Any, Any]:
        storages = [self._storage(piece) for piece in away.pieces]
        leaves = [
            torch.empty(0, dtype=x.dtype, device=storages[x.storage].device).set_(
                storages[x.storage], x.offset, x.size, x.stride
            )
            if isinstance(x, _Parked)
            else x
            for x in away.leaves
        ]
        return dict(zip(away.nodes, pytree.tree_unflatten(leaves, away.spec)))

    def _storage(self, piece: _Piece) -> torch.UntypedStorage:
        """A copy in memory: the file is written again while the run goes on."""
        if not piece.bytes:
            return torch.UntypedStorage(0, device=piece.device)
        file = self._files[0]
        assert file is not None
        mapped = np.memmap(file, np.uint8, "r", piece.start, (piece.bytes,))
        copy = torch.empty(piece.bytes, dtype=torch.uint8)
        copy.numpy()[:] = mapped
        return copy.to(piece.device).untyped_storage()


def _parked(tensor: Tensor, storage: int) -> _Parked:
    return _Parked(storage, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def _is_part(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() > tensor.nbytes


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """A storage as a flat tensor of bytes."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]
