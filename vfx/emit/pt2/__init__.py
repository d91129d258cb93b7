"""Exported programs (.pt2) as plain data: the archive is taken apart, checked and handed to torch piece by piece.

``torch.export.load`` runs what a file tells it to: it unpickles sample inputs, weights, constants and objects,
evaluates size expressions as Python, imports what structures name, calls any function of torch that a node names and
loads compiled libraries. Here torch never sees the file. The graph is rebuilt from its JSON by torch's schema
(``records``) under rules for names, operators and structures (``rules``), sizes by a grammar (``expressions``), tensors
from raw bytes (``tensors``); every other member is refused, text for the user (``extra/``) ignored.
"""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch._export.serde import schema
from torch._export.serde.serialize import ExportedProgramDeserializer
from torch.export import ExportedProgram
from torch.export.pt2_archive import constants as layout

from vfx.archives import open_archive
from vfx.capture.exporting import EXPORTING, kept_back
from vfx.emit.pt2.records import read_record
from vfx.emit.pt2.rules import RULES
from vfx.emit.pt2.tensors import read_pickled_tensors, read_samples, read_tensors
from vfx.errors import ArgumentError, CheckpointError, VfxError

_KNOWN = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id|\w+)|models/\w+\.json|extra/.*"
    r"|data/weights/(weight_[0-9]+|\w+_weights_config\.json|\w+\.pt)"
    r"|data/constants/(tensor_[0-9]+|\w+_constants_config\.json|\w+\.pt)|data/sample_inputs/\w+\.pt",
    re.DOTALL,
)
_OLDER = "serialized_exported_program.json"


def write_program(program: ExportedProgram) -> bytes:
    """The archive of an exported program. Raises ArgumentError for one that ``read_program`` would refuse."""
    buffer = io.BytesIO()
    with EXPORTING:
        torch.export.save(program, buffer)
    content = buffer.getvalue()
    try:
        read_program(content, "the archive")
    except CheckpointError as error:
        raise ArgumentError(
            f"this network cannot go to .pt2, as it could not be read again safely: {error.__cause__}; export to .onnx"
        ) from error
    return content


def read_program(source: Path | bytes, name: str) -> ExportedProgram:
    """The exported program in an archive, read without running code from it. Raises CheckpointError."""
    try:
        with open_archive(source, name) as archive:
            return _program(archive, name)
    except VfxError as error:
        raise CheckpointError(f"{name} cannot be read as an exported program: {error}") from error
    except Exception as error:  # zip, JSON and torch raise many unrelated classes
        cause = next(iter(str(error).splitlines()), "")
        raise CheckpointError(f"{name} is not an exported program: {type(error).__name__}: {cause[:300]}") from error


def _program(archive: zipfile.ZipFile, name: str) -> ExportedProgram:
    members = _members(archive)
    record = read_record(schema.ExportedProgram, members.read("models/model.json"), RULES)
    state = members.tensors(layout.WEIGHTS_DIR, "model_weights_config.json")
    constants = members.tensors(layout.CONSTANTS_DIR, "model_constants_config.json")
    samples = read_samples(members.read("data/sample_inputs/model.pt"), "the member of sample inputs")
    # torch's deserializer keeps its state in a global, too, and logs whole graphs before it raises
    with EXPORTING, kept_back(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sympy's, of sizes that it then refuses
        return ExportedProgramDeserializer().deserialize(record, state, constants, samples)


def _members(archive: zipfile.ZipFile) -> _Members:
    names = archive.namelist()
    root = names[0].split("/")[0] + "/" if names else ""
    if _OLDER in names:
        raise CheckpointError(
            "it was written by torch 2.7 or older, whose archives hold pickles; write it anew with torch.export.save"
        )
    members = _Members(archive, root)
    for name in names:
        inner = name.removeprefix(root)
        if not name.startswith(root) or not _KNOWN.fullmatch(inner):
            raise CheckpointError(f"member {name[:80]!r} is no plain data of an exported program: {_why(inner)}")
    expected = {"archive_format": layout.ARCHIVE_FORMAT_VALUE, "archive_version": layout.ARCHIVE_VERSION_VALUE}
    for member, value in expected.items():
        if members.read(member) != value.encode():
            raise CheckpointError(f"its {member} is not {value}")
    if members.has("byteorder") and members.read("byteorder") != b"little":
        raise CheckpointError("its byte order is not little")
    return members


def _why(inner: str) -> str:
    if inner.startswith(layout.AOTINDUCTOR_DIR):
        return "it is a compiled library, which runs when it is loaded; export the network without AOTInductor"
    return "it may carry code, or belongs to another format"


class _Members:
    """The members of an archive by their names below its root folder."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        self.archive, self.root = archive, root
        self.names = set(archive.namelist())

    def has(self, name: str) -> bool:
        return self.root + name in self.names

    def read(self, name: str) -> bytes:
        if not self.has(name):
            raise CheckpointError(f"it lacks the member {name}")
        return self.archive.read(self.root + name)

    def tensors(self, folder: str, table: str) -> dict[str, Any]:
        older = f"{folder}model.pt"
        if self.has(older):
            return read_pickled_tensors(self.read(older), older)
        return read_tensors(self.read(folder + table), lambda name: self.read(folder + name))
