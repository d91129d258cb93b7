"""Weights in several files, as Hugging Face writes them: an index names the file, a shard, of each tensor.

Nothing here reads tensors, so that a command can say at once what is missing.
"""

from __future__ import annotations

import json
from pathlib import Path

from vfx.errors import CheckpointError, listed
from vfx.reading import require_file

INDEX = ".index.json"  # how the name of an index ends
_WHOLE = ("model.safetensors", "pytorch_model.bin")  # the file of weights in a directory, by preference


def weights_in(path: Path) -> Path:
    """The file, or the index, of the weights in a directory; another path as it is. Raises CheckpointError."""
    try:
        if not path.is_dir():
            return path
    except (OSError, ValueError):  # a name that no file can have: who opens it says so
        return path
    names = (*_WHOLE, *(name + INDEX for name in _WHOLE))
    indices = [path / name for name in names if (path / name).is_file()] or sorted(path.glob(f"*{INDEX}"))
    if not indices:
        raise CheckpointError(f"{path} is a folder, not a file; name a file in it: it has no {' or '.join(_WHOLE)}")
    return indices[0]


def files_of(path: Path) -> list[Path]:
    """The files that hold the weights at ``path``: those that an index names, else itself. Raises CheckpointError."""
    path = weights_in(path)
    if not path.name.endswith(INDEX):
        return [path]
    return [path.with_name(name) for name in dict.fromkeys(read_index(path).values())]


def require_weights(path: Path) -> None:
    """Raise CheckpointError, which says what stands there, unless all files of the weights can be opened."""
    for file in files_of(path):
        require_file(file, CheckpointError)


def read_index(path: Path) -> dict[str, str]:
    """The name of the file of each tensor, in the index's order. Raises CheckpointError for a damaged index."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no index of weights: {error}") from error
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(f"{path} is no index of weights: it has no weight_map from tensors to files")
    outside = [file for file in dict.fromkeys(files.values()) if Path(file).name != file or file in (".", "..")]
    if outside:
        raise CheckpointError(f"{path} names {listed(outside)}, which is no file beside it")
    return files


def index_of(files: dict[str, str], size: int) -> str:
    """The text of an index of tensors of ``size`` bytes together."""
    return json.dumps({"metadata": {"total_size": size}, "weight_map": files}, indent=1, sort_keys=True) + "\n"
