"""A state dict on the disk: one .safetensors file, or an index and the files, shards, of its tensors beside it.

An index is never half new: shards are named after their content, so that those of the earlier network stay until the
index is replaced, in one step. Then what no index names is removed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from vfx.emit.files import safetensors_of
from vfx.emit.tensors import read_safetensors, read_shards
from vfx.files import one_writer, write_atomic
from vfx.shards import INDEX, index_of, read_index


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in the file ``path``, or in those of the index that stands in its place. Raises CheckpointError."""
    index = _index(path)
    return read_shards(index) if index.is_file() else read_safetensors(path)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], shard_size: int | None
) -> None:
    """Write tensors to the file ``path``, or, where they take more than ``shard_size`` bytes, to several and an index.

    What stood there before, file or index, goes. Raises ArgumentError for a dtype that no file can hold, OutputError.
    """
    size = sum(tensor.nbytes for tensor in tensors.values())
    if shard_size is None or size <= shard_size:
        write_atomic(path, safetensors_of(tensors, metadata))
        _index(path).unlink(missing_ok=True)
    else:
        files: dict[str, str] = {}
        for shard in _shards(tensors, shard_size):
            data = safetensors_of(shard, metadata)
            name = f"{path.stem}-{hashlib.sha256(data).hexdigest()[:16]}{path.suffix}"
            write_atomic(path.with_name(name), data)
            files |= dict.fromkeys(shard, name)
        write_atomic(_index(path), index_of(files, size))
        path.unlink(missing_ok=True)
    with one_writer(path.parent):
        _remove_unnamed(path)


def _index(path: Path) -> Path:
    return path.with_name(path.name + INDEX)


def _shards(tensors: Mapping[str, Tensor], most: int) -> Iterator[dict[str, Tensor]]:
    """Tensors in their order, as many together as ``most`` bytes hold, at least one."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > most:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _remove_unnamed(path: Path) -> None:
    """Remove the shards of networks that were at ``path`` before."""
    named = set(read_index(_index(path)).values()) if _index(path).is_file() else set()
    pattern = re.compile(re.escape(path.stem) + r"-[0-9a-f]{16}" + re.escape(path.suffix))
    for file in path.parent.iterdir():
        if pattern.fullmatch(file.name) and file.name not in named:
            file.unlink(missing_ok=True)
