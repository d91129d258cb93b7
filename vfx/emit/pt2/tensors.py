"""The tensors of an exported program: raw bytes beside a JSON table of their shapes; pickles are refused."""

from __future__ import annotations

import math
import pickle
import re
import warnings
from collections.abc import Callable
from io import BytesIO
from typing import Any

import torch
from torch import Tensor, nn
from torch._export.serde import schema
from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE as DTYPES

from vfx.archives import check_archive, check_unpacked
from vfx.emit.pt2.records import read_record
from vfx.emit.pt2.rules import RULES, checked_name, checked_path
from vfx.errors import CheckpointError

_FILE = re.compile(r"(weight|tensor)_[0-9]{1,9}", re.ASCII)
_CONSTANTS = (type(None), bool, int, float, str)


def read_tensors(table: bytes, read: Callable[[str], bytes]) -> dict[str, Tensor]:
    """Tensors by their names, from a table and the bytes that ``read`` gives for each file that it names.

    Tensors of one file share its storage. Raises CheckpointError.
    """
    config = read_record(schema.PayloadConfig, table, RULES).config
    files: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, entry in config.items():
        checked_path(name)
        if entry.use_pickle or entry.tensor_meta is None or not _FILE.fullmatch(entry.path_name):
            raise CheckpointError(
                f"{name!r} is stored in {entry.path_name[:80]!r} as a pickled object, which may run code: only plain "
                "tensors are read"
            )
        if entry.path_name not in files:
            content = bytearray(read(entry.path_name))
            files[entry.path_name] = torch.frombuffer(content, dtype=torch.uint8) if content else _empty()
        tensor = _view(name, files[entry.path_name], entry.tensor_meta)
        if entry.is_param:
            tensors[name] = nn.Parameter(tensor, requires_grad=entry.tensor_meta.requires_grad)
        else:
            tensors[name] = tensor
    return tensors


def read_pickled_tensors(content: bytes, name: str) -> dict[str, Tensor]:
    """Tensors by their names in the form of torch 2.8 and older, read without running code. Raises CheckpointError."""
    value = load_plain(content, name)
    if not isinstance(value, dict) or not all(isinstance(item, Tensor) for item in value.values()):
        raise CheckpointError(f"{name} holds no dict of tensors")
    for key, tensor in value.items():
        _check_plain(tensor, checked_path(str(key)), len(content))
    return value


def read_samples(content: bytes, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of ``forward`` that the program was exported with. Raises CheckpointError."""
    value = load_plain(content, name)
    if not (isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[1], dict)):
        raise CheckpointError(f"{name} holds no arguments and keyword arguments")
    args, kwargs = _plain(value[0], len(content)), _plain(value[1], len(content))
    for key in kwargs:
        checked_name(key)
    if not isinstance(args, tuple):
        raise CheckpointError(f"{name} holds no tuple of arguments")
    return args, kwargs


def load_plain(content: bytes, name: str) -> Any:
    """What ``torch.save`` wrote, as long as it is tensors, numbers and containers. Raises CheckpointError."""
    check_archive(content, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{name} needs code to be unpickled and is refused") from error
    except Exception as error:  # damaged archives raise many unrelated classes
        raise CheckpointError(f"{name} is damaged: {type(error).__name__}: {error}") from error


def _empty() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)


def _view(name: str, content: Tensor, meta: schema.TensorMeta) -> Tensor:
    if meta.dtype not in DTYPES:
        raise CheckpointError(f"{name!r} has the unknown type {meta.dtype.name}")
    dtype = DTYPES[meta.dtype]
    sizes, strides = _integers(name, meta.sizes), _integers(name, meta.strides)
    (offset,) = _integers(name, [meta.storage_offset])
    if len(sizes) != len(strides):
        raise CheckpointError(f"{name!r} has {len(sizes)} sizes and {len(strides)} strides")
    count = math.prod(sizes)
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides)) + 1 if count else 0
    if last * dtype.itemsize > content.numel():
        raise CheckpointError(f"{name!r} of shape {sizes} needs {last * dtype.itemsize} bytes, has {content.numel()}")
    check_unpacked(count * dtype.itemsize, content.numel(), repr(name))
    if not count:
        return torch.empty(sizes, dtype=dtype)
    whole = content[: content.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
    return whole.as_strided(sizes, strides, offset)


def _integers(name: str, values: list[schema.SymInt]) -> list[int]:
    if any(value.type != "as_int" or value.as_int < 0 for value in values):
        raise CheckpointError(f"{name!r} has a shape that is not of fixed sizes")
    return [value.as_int for value in values]


def _plain(value: Any, size: int) -> Any:
    if isinstance(value, Tensor):
        _check_plain(value, "a sample", size)
        return value
    if type(value) in (tuple, list):
        return type(value)(_plain(item, size) for item in value)
    if isinstance(value, dict):
        if not all(type(key) in (str, int) for key in value):
            raise CheckpointError("a sample input has keys that are no text")
        return {key: _plain(item, size) for key, item in value.items()}
    if type(value) in _CONSTANTS:
        return value
    raise CheckpointError(f"a sample input is {type(value).__name__}, neither a tensor nor a constant")


def _check_plain(tensor: Tensor, name: str, size: int) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise CheckpointError(f"{name} is no plain tensor in memory ({tensor.layout}, {tensor.device})")
    check_unpacked(tensor.numel() * tensor.element_size(), size, name)
