"""MNIST's idx files: a magic number, the sizes of the axes, and bytes; packed by gzip or not.

Two zero bytes, the type (8: unsigned bytes), the number of axes, a big-endian size for each axis, the values.
Source: yann.lecun.com/exdb/mnist, "THE IDX FILE FORMAT".
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vfx.archives import check_unpacked
from vfx.errors import DataError

_BYTES = 8  # the code of unsigned bytes, the one type that MNIST and its kin have


def find_idx(folders: Sequence[Path], name: str) -> Path | None:
    """The first ``name`` or ``name.gz`` in some folders."""
    files = (folder / file for folder in folders for file in (name, f"{name}.gz"))
    return next((file for file in files if file.is_file()), None)


def read_idx(path: Path) -> Tensor:
    """The array of unsigned bytes in an idx file. Raises DataError for a file that is damaged or something else."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            start = file.read(4)
            if len(start) < 4 or start[:3] != bytes((0, 0, _BYTES)):
                raise DataError(f"{path} is no idx file of bytes: it begins with {start!r}")
            shape = struct.unpack(f">{start[3]}I", file.read(4 * start[3]))
            size = math.prod(shape)
            check_unpacked(size, path.stat().st_size, str(path))
            values = file.read(size + 1)
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if len(values) != size:
        raise DataError(f"{path} is damaged: it holds {len(values)} bytes for an array of shape {shape}")
    return torch.from_numpy(np.frombuffer(values, np.uint8).reshape(shape).copy())
