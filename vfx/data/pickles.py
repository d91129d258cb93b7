"""CIFAR's python files, which are pickles, read without running code from them.

A pickle is a program that may name any function. Here it may name only those with which NumPy writes an array of bytes
(``_reconstruct``, ``ndarray``, ``dtype``, ``_codecs.encode``), and inert stand-ins of this file take their places:
NumPy itself is not called until plain bytes and a shape are at hand.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from vfx.errors import DataError
from vfx.reading import require_file


class _Array:
    """What a pickled ndarray says of itself."""

    def __init__(self, *arguments: Any):
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """The array, if it is one of unsigned bytes in C or Fortran order. Raises ValueError."""
        _, shape, dtype, fortran, data = self.state
        if not (isinstance(dtype, _Dtype) and dtype.name in ("u1", "|u1") and isinstance(data, bytes)):
            raise ValueError("an array of other values than unsigned bytes")
        if not all(isinstance(size, int) and size >= 0 for size in shape) or math.prod(shape) != len(data):
            raise ValueError(f"an array of {len(data)} bytes and shape {shape}")
        return np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")


class _Dtype:
    def __init__(self, name: Any = "", *flags: Any):
        self.name = name.decode() if isinstance(name, bytes) else name

    def __setstate__(self, state: Any) -> None:
        pass


class _Encoded(bytes):
    """How protocol 2 writes bytes under Python 3. A class, since a pickle could change the attributes of a function."""

    def __new__(cls, text: str, encoding: str = "latin1") -> _Encoded:
        return super().__new__(cls, text.encode("latin1"))

    def __setstate__(self, state: Any) -> None:
        pass


_STANDINS: dict[tuple[str, str], Any] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Encoded,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STANDINS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no file of images needs")
        return _STANDINS[module, name]


def read_arrays(path: Path) -> dict[str, Any]:
    """The dict in a pickle: arrays of unsigned bytes as NumPy's, texts, numbers and lists as they are.

    Raises DataError for a file that is missing, damaged, something else, or names any other code.
    """
    require_file(path, DataError)
    try:
        with path.open("rb") as file:
            value = _Reader(file, encoding="bytes").load()
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__} instead of a dict")
        named = {key.decode() if isinstance(key, bytes) else str(key): item for key, item in value.items()}
        return {key: item.array() if isinstance(item, _Array) else item for key, item in named.items()}
    except Exception as error:  # a damaged pickle raises any class
        raise DataError(f"{path} is refused or damaged: {error or type(error).__name__}") from error
