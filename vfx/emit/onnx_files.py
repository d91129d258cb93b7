"""An ONNX network on the disk: one file, or above protobuf's limit a graph and the file of its weights beside it.

The two of a large network are never half new: the weights get a name of their own, made of their content, so that those
of the earlier network stay until the graph is replaced, in one step. Then what no graph refers to is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vfx.errors import OutputError
from vfx.extras import needed_for
from vfx.files import move_into_place, one_writer, write_atomic

with needed_for("ONNX"):
    import onnx
    from google.protobuf.message import Message


def place_file(model: bytes, path: Path) -> None:
    """Write a network that is one file. Raises OutputError."""
    write_atomic(path, model)
    with one_writer(path.parent):
        _remove_unread(path)


def check_no_link(path: Path) -> None:
    """Raise OutputError where a runtime would look for the weights in another folder."""
    if path.is_symlink():
        raise OutputError(
            f"{path} is a link, and the weights of so large a network lie beside its graph: give the path of the file "
            f"itself, {path.resolve()}"
        )


def name_weights(graph: Path, weights: Path, path: Path) -> Path:
    """Rename the file of weights that ``graph`` refers to as ``path`` needs it; gives the file, beside ``graph``."""
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    named = weights.with_name(f"{path.name}.{digest[:16]}.data")
    model = onnx.load(str(graph), load_external_data=False)
    for entry in _locations(model):
        entry.value = named.name
    onnx.save(model, str(graph))
    weights.rename(named)
    return named


def place_pair(graph: Path, weights: Path, path: Path) -> None:
    """Let a graph and its weights, whole files on the same disk, take the place of what was at ``path``."""
    with one_writer(path.parent):
        try:
            move_into_place(weights, path.with_name(weights.name), like=path)
            move_into_place(graph, path)
        finally:
            _remove_unread(path)


def _remove_unread(path: Path) -> None:
    """Remove the weights of networks that were at ``path`` before."""
    pattern = re.compile(re.escape(path.name) + r"\.[0-9a-f]{16}\.data")
    files = [file for file in path.parent.iterdir() if pattern.fullmatch(file.name)]
    if not files:
        return
    try:
        read = {entry.value for entry in _locations(onnx.load(str(path), load_external_data=False))}
    except Exception:  # no network stands there, and its weights may be wanted
        return
    for file in files:
        if file.name not in read:
            with contextlib.suppress(OSError):
                file.unlink()


def read_weights(model: onnx.ModelProto, folder: Path) -> None:
    """Read weights that lie in files in ``folder`` into a model. Raises ValueError unless they fill their shapes."""
    tensors = list(_external(model))
    onnx.load_external_data_for_model(model, str(folder))
    for tensor in tensors:
        try:
            whole = min(tensor.dims, default=0) >= 0 and onnx.numpy_helper.to_array(tensor) is not None
        except ValueError:
            whole = False
        if not whole:
            raise ValueError(
                f"the file of weights holds {len(tensor.raw_data)} bytes for {tensor.name!r}, which do not fill its "
                f"shape {tuple(tensor.dims)}"
            )


def _locations(model: onnx.ModelProto) -> Iterator[Any]:
    """Every entry of a model that names a file of weights."""
    for tensor in _external(model):
        yield from (entry for entry in tensor.external_data if entry.key == "location")


def _external(message: Any) -> Iterator[onnx.TensorProto]:
    """The tensors of a model that lie in files beside it."""
    if isinstance(message, onnx.TensorProto):
        if message.data_location == onnx.TensorProto.EXTERNAL:
            yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                yield from _external(part)
