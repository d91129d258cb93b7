"""Calibration inputs from a file of arrays; nothing in it is ever executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vfx.errors import DataError, VfxError

_NAMES = ("inputs", "x", "images", "data")


def read_inputs(path: Path) -> Tensor:
    """The samples (N, …) in a .npy, .npz, .safetensors, .pt or .pth file.

    Of several arrays the one called inputs, x, images or data is taken. Raises DataError, CheckpointError.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    value = _arrays(path)
    if isinstance(value, Tensor):
        return value
    name = next((name for name in _NAMES if name in value), None)
    if name is None and len(value) == 1:
        name = next(iter(value))
    if name is None:
        raise DataError(f"{path} holds {', '.join(value)}; name the inputs one of {', '.join(_NAMES)}")
    return value[name]


def _arrays(path: Path) -> Any:
    from vfx.emit.files import load

    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return {name: torch.from_numpy(archive[name]) for name in archive.files}
        return load(path)
    except VfxError:
        raise
    except (ValueError, OSError, TypeError) as error:
        raise DataError(f"{path} cannot be read as arrays: {error}") from error
