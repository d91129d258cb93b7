"""Calibration inputs from a file of arrays; nothing in it is ever executed."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vfx.archives import check_archive, check_held
from vfx.emit.tensors import READERS as TENSOR_READERS
from vfx.errors import DataError, VfxError
from vfx.reading import require_file
from vfx.statistics.data import BATCH_SIZE
from vfx.statistics.labels import NAMES as LABELS

_NAMES = ("inputs", "x", "images", "data")


def read_inputs(path: Path) -> Tensor:
    """The samples (N, …) in a .npy, .npz, .safetensors, .pt or .pth file.

    Of several arrays the one called inputs, x, images or data is taken. Raises DataError, CheckpointError.
    """
    value = _arrays(path)
    if isinstance(value, Tensor):
        return value
    name = next((name for name in _NAMES if name in value), None)
    if name is None and len(value) == 1:
        name = next(iter(value))
    if name is None:
        raise DataError(f"{path} holds {', '.join(value)}; name the inputs one of {', '.join(_NAMES)}")
    return value[name]


def read_labelled(path: Path) -> Tensor | list[tuple[Tensor, Tensor]]:
    """Batches (inputs, labels) of a file that holds both (labels, label, targets, target or y), else the inputs alone.

    Raises DataError, CheckpointError.
    """
    value, inputs = _arrays(path), read_inputs(path)
    name = None if isinstance(value, Tensor) else next((name for name in LABELS if name in value), None)
    if name is None:
        return inputs
    if len(value[name]) != len(inputs):
        raise DataError(f"{path} holds {len(inputs)} inputs and {len(value[name])} {name}")
    return list(zip(inputs.split(BATCH_SIZE), value[name].split(BATCH_SIZE)))


def read_batches(path: Path, names: list[str]) -> list[dict[str, Tensor]]:
    """Batches of the arrays (N, …) in a file that are called like a network's keyword arguments, with their labels.

    Raises DataError, CheckpointError.
    """
    value = _arrays(path)
    missing = names if isinstance(value, Tensor) else [name for name in names if name not in value]
    if missing:
        held = "one array without a name" if isinstance(value, Tensor) else ", ".join(value)
        raise DataError(f"{path} lacks {', '.join(missing)}; it holds {held}")
    names = [*names, *(name for name in LABELS if name in value and name not in names)]
    counts = {name: len(value[name]) for name in names}
    if len(set(counts.values())) > 1:
        raise DataError(f"the arrays of {path} differ in their number of samples: {counts}")
    parts = [value[name].split(BATCH_SIZE) for name in names]
    return [dict(zip(names, batch)) for batch in zip(*parts)]


def npz_of(batches: Iterable[Any], indices: Tensor) -> bytes:
    """Batches (inputs, or inputs and labels, or dicts) as an .npz file that the readers here take, with ``indices``.

    Raises DataError for tuples of several inputs, whose names nobody knows.
    """
    parts: dict[str, list[Tensor]] = {}
    for batch in batches:
        if isinstance(batch, (tuple, list)) and len(batch) > 2:
            raise DataError(f"a batch holds {len(batch)} tensors without names; give dicts to write several inputs")
        plain = (batch,) if isinstance(batch, Tensor) else batch
        named = batch if isinstance(batch, Mapping) else dict(zip(("inputs", "labels"), plain))
        for name, tensor in named.items():
            parts.setdefault(name, []).append(tensor)
    arrays = {name: torch.cat(tensors).cpu().numpy() for name, tensors in parts.items()}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays | {"indices": indices.numpy()})  # type: ignore[arg-type]
    return buffer.getvalue()


def _arrays(path: Path) -> Any:
    """One array, or arrays by their names; each has an axis of samples."""
    suffix = path.suffix.lower()
    if suffix not in _READERS and path.is_file():
        raise DataError(f"cannot read {path.suffix or 'a file without suffix'} as data; known: {', '.join(_READERS)}")
    require_file(path, DataError)
    try:
        value = _READERS[suffix](path)
    except VfxError:
        raise
    except Exception as error:  # damaged headers and archives raise any class
        raise DataError(f"{path} is damaged, or holds no arrays: {error or type(error).__name__}") from error
    held = value if isinstance(value, Mapping) else {"": value}
    check_held(held, path.stat().st_size, path.name)
    arrays = {key: x for key, x in held.items() if isinstance(x, Tensor) and x.ndim}
    if not arrays:
        raise DataError(f"{path} holds no arrays with an axis of samples")
    return arrays if held is value else value


def _read_npy(path: Path) -> Tensor:
    with path.open("rb") as file:
        return _tensor(np.load(file, allow_pickle=False))


def _read_npz(path: Path) -> dict[str, Tensor]:
    check_archive(path, path.name)
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        members = ((name, archive[name]) for name in archive.files)
        return {name: _tensor(array) for name, array in members if isinstance(array, np.ndarray)}


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


_READERS: dict[str, Callable[[Path], Any]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    **TENSOR_READERS,
}
