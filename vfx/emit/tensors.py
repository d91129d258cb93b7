"""Files of tensors, safetensors and those of ``torch.save``, read without running code from them.

torch's restricted unpickler refuses every class that it does not know. Settings and counters beside the weights
(``argparse.Namespace``, paths, NumPy numbers, configurations) are common and not needed: inert objects stand in for
them, so their classes are neither imported nor called.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load as load_tensors
from torch import Tensor

from vfx.archives import check_archive
from vfx.errors import CheckpointError, listed
from vfx.reading import require_file
from vfx.shards import files_of, read_index

_PICKLE, _ZIP = b"\x80", b"PK"  # how torch's files begin, old and new


class Placeholder:
    """Stands for an object that is no weight; it holds nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def _default_dict(*factory: Any) -> dict[Any, Any]:
    return {}


_NUMPY = ("multiarray.scalar", "multiarray._reconstruct")
_SETTINGS = (
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "frozenset", "int", "list", "range", "slice", "str")),
    *("argparse.Namespace", "types.SimpleNamespace", "enum.Enum", "uuid.UUID", "decimal.Decimal"),
    *(f"{m}.{n}" for m in ("pathlib", "pathlib._local") for n in ("Path", "PosixPath", "PurePosixPath", "WindowsPath")),
    *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
    *(f"numpy.{part}.{name}" for part in ("core", "_core") for name in _NUMPY),
    *("numpy.dtype", "numpy.ndarray", "numpy.bool_", "numpy.float64", "numpy.float32", "numpy.int64", "numpy.int32"),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Bool", "Float16", "Float32", "Float64", "Int32", "Int64", "Str")),
    *("omegaconf.listconfig.ListConfig", "omegaconf.dictconfig.DictConfig", "typing.Any"),
    *(f"omegaconf.base.{name}" for name in ("Metadata", "ContainerMetadata")),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Enum", "Float", "Integer", "Path", "String")),
)
_SETTING_DICTS = (
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "easydict.EasyDict",
    "addict.addict.Dict",
    "yacs.config.CfgNode",
    "mmengine.config.config.ConfigDict",
    "ml_collections.config_dict.config_dict.ConfigDict",
)
_STANDINS: list[Any] = [
    *((Placeholder, name) for name in _SETTINGS),
    *((OrderedDict, name) for name in _SETTING_DICTS),
    (_default_dict, "collections.defaultdict"),
]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors by their names. Raises CheckpointError for a file that is missing, damaged or something else."""
    require_file(path, CheckpointError)
    try:
        return load_tensors(path.read_bytes())
    except Exception as error:  # damaged headers raise more than SafetensorError
        raise CheckpointError(f"{path} is damaged, or no safetensors file: {error}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a safetensors file. Raises CheckpointError for a file that is missing or damaged."""
    require_file(path, CheckpointError)
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except Exception as error:  # damaged headers raise more than SafetensorError
        raise CheckpointError(f"{path} is damaged, or no safetensors file: {error}") from error


def read_pickle(path: Path) -> Any:
    """What ``torch.save`` wrote to ``path``, settings beside the tensors replaced by inert objects.

    Raises CheckpointError for a file that is missing, damaged or something else, or needs code.
    """
    require_file(path, CheckpointError)
    check_archive(path, path.name)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_STANDINS):
            warnings.simplefilter("ignore")  # foreign pickle protocols; what cannot be read raises
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise any class
        raise CheckpointError(_explain(path, error)) from error


def read_shards(path: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index names.

    Raises CheckpointError for a damaged index, a file that is missing or damaged, and one that lacks what it should
    hold.
    """
    held: dict[str, Tensor] = {}
    for file in files_of(path):
        reader = READERS.get(file.suffix.lower())
        if reader is None:
            raise CheckpointError(f"{path.name} names {file.name}: cannot read that; known: {', '.join(READERS)}")
        tensors = reader(file)
        if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise CheckpointError(f"{file} holds more than tensors, so that it is no part of a state dict")
        if twice := sorted(tensors.keys() & held.keys()):
            raise CheckpointError(f"{file.name} and a file before it, of {path.name}, both hold {listed(twice)}")
        held |= tensors
    if missing := [f"{name} ({file})" for name, file in read_index(path).items() if name not in held]:
        raise CheckpointError(f"the files of {path.name} lack {listed(missing)}")
    return held


def _explain(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(8)
    text = str(error)
    if "TorchScript" in text:
        return (
            f"{path} is a TorchScript archive, which is code. Save the network's state dict instead: "
            "torch.save(torch.jit.load(path).state_dict(), path)"
        )
    if not start.startswith((_PICKLE, _ZIP)):
        return f"{path} is not a torch checkpoint: it begins with {start!r}"
    cause = text.partition("WeightsUnpickler error:")[2].strip() or text or type(error).__name__
    foreign = start[:1] == _PICKLE and start[1:2] > b"\x02"  # torch.save writes protocol 2
    if foreign or (isinstance(error, pickle.UnpicklingError) and re.search(r"GLOBAL|reduce|Can only", cause)):
        name = re.search(r"GLOBAL (\S+)", cause)
        what = f" ({name[1]})" if name else " (plain pickle, not torch.save)" if foreign else ""
        return (
            f"{path} needs code to be unpickled and is refused. Save a state dict instead: "
            f"torch.save(model.state_dict(), path), or use safetensors{what}"
        )
    return f"{path} is damaged, or no torch checkpoint: {cause.splitlines()[0]}"


READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": read_safetensors,
    **dict.fromkeys((".pt", ".pth", ".ckpt", ".bin", ".tar"), read_pickle),  # .tar: checkpoints called .pth.tar
}
