"""Cells of a comparison kept in a file, so that one that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vfx.diagnosis.point import Point
from vfx.errors import ArgumentError
from vfx.files import check_writable, write_atomic


class Cells:
    """Points by their names in a JSON file, which is written anew, whole, behind each of them.

    ``identity`` tells what was compared: a file of other networks, data or options is refused. Raises ArgumentError,
    OutputError.
    """

    def __init__(self, path: str | os.PathLike[str], identity: str):
        check_writable(path)
        self.path, self.identity = Path(path), identity
        self.points: dict[str, Point] = {}
        if not self.path.exists():
            return
        try:
            held = json.loads(self.path.read_text())
            points = [Point(**cell) for cell in held["cells"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ArgumentError(f"{path} holds no cells of a comparison: {error}; name another file") from error
        if held.get("identity") != identity:
            raise ArgumentError(
                f"{path} holds cells of other networks, data, options or of another version; name another file"
            )
        self.points = {point.name: point for point in points}

    def get(self, name: str) -> Point | None:
        """The cell that was finished under this name."""
        return self.points.get(name)

    def keep(self, point: Point) -> None:
        """Add a finished cell to the file."""
        self.points[point.name] = point
        held = {"identity": self.identity, "cells": [asdict(point) for point in self.points.values()]}
        write_atomic(self.path, json.dumps(held, indent=1, default=str) + "\n")


def identity(tensors: Iterable[Tensor], options: Mapping[str, Any], version: str) -> str:
    """A digest of weights, data, options and version."""
    digest = hashlib.sha256(version.encode())
    shown = re.sub(r" at 0x[0-9a-f]+", "", repr(sorted(options.items(), key=lambda item: item[0])))
    digest.update(shown.encode())
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return digest.hexdigest()
