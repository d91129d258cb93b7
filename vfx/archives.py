"""Zip archives, read only after their directory has been checked: what they would unpack to is known beforehand."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vfx.errors import CheckpointError

ALWAYS_READ = 1 << 28  # bytes: what unpacks to less than this is no danger
MAX_RATIO = 100  # unpacked to packed size; arrays of real data stay far below
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def check_unpacked(unpacked: int, packed: int, name: str) -> None:
    """Raise CheckpointError where ``unpacked`` bytes are out of all proportion to the ``packed`` ones of a file."""
    if unpacked > max(ALWAYS_READ, MAX_RATIO * packed):
        raise CheckpointError(
            f"{name} has {packed} bytes and would unpack to {unpacked}: refused as a zip bomb. If it is yours, save it "
            "without compression (np.savez, torch.save)"
        )


def check_held(values: Mapping[str, Any], packed: int, name: str) -> None:
    """Raise CheckpointError for tensors without plain numbers, or with few so often that a copy fills the memory."""
    for key, value in values.items():
        if isinstance(value, Tensor):
            if value.is_meta:
                raise CheckpointError(f"{name}: {key!r} has a shape and no values (device meta): it was never filled")
            if value.layout != torch.strided or value.is_nested or value.is_quantized:
                raise CheckpointError(f"{name}: {key!r} is a nested, quantised or sparse tensor; save a dense one")
            check_unpacked(value.numel() * value.element_size(), packed, f"{name}: {key!r}")


def check_archive(source: Path | bytes, name: str) -> None:
    """Raise CheckpointError if ``source`` is a zip archive that must not be unpacked; other files pass."""
    try:
        packed = zipfile.is_zipfile(BytesIO(source) if isinstance(source, bytes) else source)
    except zipfile.BadZipFile as error:  # of an archive in several files
        raise CheckpointError(f"{name} is no whole zip archive: {error}") from error
    if packed:
        with open_archive(source, name):
            pass


def open_archive(source: Path | bytes, name: str) -> zipfile.ZipFile:
    """A zip archive whose members have plain names, each once, and sane declared sizes. Raises CheckpointError."""
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    try:
        archive = zipfile.ZipFile(BytesIO(source) if isinstance(source, bytes) else source)
    except Exception as error:  # a damaged directory: struct errors, bad encodings, offsets out of range
        raise CheckpointError(f"{name} is no whole zip archive: {error}") from error
    try:
        _check_members(archive.infolist(), size, name)
    except CheckpointError:
        archive.close()
        raise
    return archive


def _check_members(members: Sequence[zipfile.ZipInfo], size: int, name: str) -> None:
    check_unpacked(sum(member.file_size for member in members), size, name)
    taken: set[str] = set()
    for member in members:
        if member.compress_type not in _METHODS or member.flag_bits & 0x1:
            raise CheckpointError(f"{name}: member {member.filename!r} is encrypted or packed in an unknown way")
        if member.filename in taken:
            raise CheckpointError(f"{name}: member {member.filename!r} is there twice")
        taken.add(member.filename)
