"""The journal of a call: what each finished layer of its long passes wrote, in a folder, a file a layer.

A call with the same inputs goes the same way, so that the n-th pass of a resumed call is the n-th pass of the killed
one, and what its layers wrote is taken from the files in turn. Each file is written whole or not at all. Tensors come
back with the strides that they had, since products of other layouts round differently.

Outside ``journaled`` nothing is written. In several processes the first one reads and writes for all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from vfx.emit.tensors import read_metadata, read_safetensors
from vfx.errors import CheckpointError
from vfx.files import make_folder, write_atomic
from vfx.processes import agreed, first

KEY = "vfx.checkpoint"  # of a file's metadata
HEAD = "run.json"  # the file that says which run a folder belongs to
_current: dict[str, Journal] = {}


@dataclass(frozen=True)
class Saved:
    """What one layer wrote: tensors by their names, and plain values."""

    tensors: dict[str, Tensor]
    values: Any = None


@dataclass(frozen=True)
class Section:
    """One pass of a call; its ``stages`` are saved under the pass's number and their own."""

    journal: Journal | None = None
    number: int = 0
    key: str = ""

    @property
    def on(self) -> bool:
        """Whether anything is saved."""
        return self.journal is not None

    def entry(self, stage: int, like: Mapping[str, Tensor]) -> Saved | None:
        """What the stage wrote in the run before, on the devices of ``like``; None where it did not come so far.

        Raises CheckpointError for a damaged file, or one of another run.
        """
        if self.journal is None:
            return None
        journal = self.journal
        found = agreed(journal.read(self._file(stage), self.key) if first() else None)
        if found is None:
            return None
        placed = {n: x.to(like[n].device) if n in like else x for n, x in found.tensors.items()}
        return Saved(placed, found.values)

    def write(self, stage: int, tensors: Mapping[str, Tensor], values: Any = None) -> None:
        """Save what a stage wrote. Raises OutputError."""
        if self.journal is not None and first():
            self.journal.write(self._file(stage), self.key, tensors, values)

    def once(self, stage: int, make: Callable[[], dict[str, Tensor]], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that ``make`` gives, from the run before where it came so far."""
        saved = self.entry(stage, like)
        if saved is not None:
            return saved.tensors
        made = make()
        self.write(stage, made)
        return made

    def _file(self, stage: int) -> str:
        return f"{self.number:04d}-{stage:05d}.safetensors"


@dataclass
class Journal:
    """The folder of one run; ``run`` is the digest of all that it was started with."""

    folder: Path
    run: str
    passes: int = field(default=0, init=False)

    def section(self, title: str, stages: Sequence[str]) -> Section:
        """The next pass of the call; ``stages`` are the names of its layers in turn."""
        self.passes += 1
        key = hashlib.sha256(json.dumps([self.run, self.passes, title, list(stages)]).encode()).hexdigest()
        return Section(self, self.passes, key)

    def read(self, name: str, key: str) -> Saved | None:
        """An entry from its file; None if there is none. Raises CheckpointError."""
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            head = json.loads(read_metadata(path)[KEY])
            if head["key"] != key:
                raise CheckpointError(f"{path} was written by another run, or another pass of it; remove the folder")
            tensors = read_safetensors(path)
            strided = {n: _strided(x, head["strides"].get(n)) for n, x in tensors.items()}
            return Saved(strided, head["values"])
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{path} is no part of a checkpoint: {error}") from error

    def write(self, name: str, key: str, tensors: Mapping[str, Tensor], values: Any) -> None:
        """Write an entry, whole or not at all."""
        strides = {
            n: list(x.stride()) for n, x in tensors.items() if not x.is_contiguous() and _fills(x.shape, x.stride())
        }
        head = json.dumps({"key": key, "strides": strides, "values": values})
        alone = {n: x.detach().cpu().contiguous().clone() for n, x in tensors.items()}
        write_atomic(self.folder / name, save(alone, {KEY: head}))


@contextmanager
def journaled(folder: Path, parts: Mapping[str, str]) -> Iterator[None]:
    """What is run in this block is saved in ``folder``, or read from it where a run before came so far.

    ``parts``: digests of what decides the result, by what a message calls it. Raises CheckpointError where the folder
    belongs to a run with others, or to something else; OutputError.
    """
    if first():
        _claim(folder, parts)
    run = hashlib.sha256(json.dumps(dict(parts), sort_keys=True).encode()).hexdigest()
    before = _current.get("journal")
    _current["journal"] = Journal(folder, run)
    try:
        yield
    finally:
        _current.pop("journal")
        if before is not None:
            _current["journal"] = before


def section(title: str, stages: Sequence[str]) -> Section:
    """The next pass of the call that runs, where its layers are saved."""
    journal = _current.get("journal")
    return Section() if journal is None else journal.section(title, stages)


def _claim(folder: Path, parts: Mapping[str, str]) -> None:
    """Make the folder this run's, or see that it is."""
    head = folder / HEAD
    if not head.exists():
        foreign = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
        if foreign or (folder.exists() and not folder.is_dir()):
            raise CheckpointError(
                f"checkpoint={str(folder)!r} holds something else; name a new folder, or an empty one"
            )
        make_folder(folder)
        write_atomic(head, json.dumps({KEY: dict(parts)}, indent=1, sort_keys=True) + "\n")
        return
    try:
        before = json.loads(head.read_text(encoding="utf-8"))[KEY]
        differing = sorted(name for name in {*before, *parts} if before.get(name) != parts.get(name))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{head} is no head of a checkpoint: {error}") from error
    if differing:
        what = "another call" if "call" in differing else f"a run with other {', '.join(differing)}"
        raise CheckpointError(
            f"checkpoint={str(folder)!r} is of {what}; give what that run was given, or name another folder"
        )


def _fills(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether elements with these strides fill their memory, each once, in some order of the axes."""
    expected = 1
    for size, step in sorted(zip(shape, stride), key=lambda axis: axis[1]):
        if size > 1 and step != expected:
            return False
        expected *= size
    return len(shape) == len(stride) and expected > 0


def _strided(tensor: Tensor, stride: Sequence[int] | None) -> Tensor:
    """The tensor in the layout that it was saved from. Raises ValueError for one that is none."""
    if stride is None:
        return tensor
    if not _fills(tensor.shape, stride):
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has strides {stride}")
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
