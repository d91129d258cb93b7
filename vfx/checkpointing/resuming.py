"""What a run was started with, as digests, so that a checkpoint of another run is refused.

Weights and calibration data count by their bytes, options by their values, objects of the user by their class and
fields, functions by their name. Data that come in another order in each run (a loader that shuffles) are other data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vfx import __version__
from vfx.checkpointing.journal import journaled
from vfx.options import Rewriting
from vfx.processes import count
from vfx.program import Program, digest

_UNCHANGING = ("checkpoint", "data", "progress", "verify")  # keywords that no weight depends on, and the data


@contextmanager
def resumable(options: Rewriting, networks: Any, example_inputs: Any) -> Iterator[None]:
    """What runs in this block is saved in the folder ``options.checkpoint``, and goes on from it where it was killed.

    Does nothing where no folder is named. Raises CheckpointError for a folder of another run, and OutputError.
    """
    if options.checkpoint is None:
        yield
        return
    with journaled(Path(options.checkpoint), _parts(options, networks, example_inputs)):
        yield


def _parts(options: Rewriting, networks: Any, example_inputs: Any) -> dict[str, str]:
    """The digests of a run, by what a message calls them."""
    given = {option.name: getattr(options, option.name) for option in fields(options)}
    kept = {name: value for name, value in given.items() if name not in _UNCHANGING}
    versions = [__version__, torch.__version__, count()]
    return {
        "call": type(options).__name__,
        "networks": digest_of(networks),
        "example inputs": digest_of(example_inputs),
        "data": digest_of(None if options.data is None else _batches(options.data, options.max_samples)),
        "versions or number of processes": digest_of(versions),
    } | {f"{name}=": digest_of(value) for name, value in kept.items()}


def _batches(data: Any, limit: int | None) -> Iterator[Any]:
    """The batches that a call may read: an endless loader ends at the limit."""
    if isinstance(data, (Tensor, Mapping)) or not isinstance(data, Iterable):
        yield data
        return
    seen = 0
    for batch in data:
        yield batch
        seen += next((len(x) for x in _tensors(batch) if x.ndim), 1)
        if limit is not None and seen >= limit:
            return


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for member in value:
            yield from _tensors(member)


def digest_of(value: Any) -> str:
    """A digest of what a call was given, the same in every process for equal values."""
    hasher = hashlib.sha256()
    for part in _bytes_of(value, ()):
        hasher.update(part)
    return hasher.hexdigest()


def _bytes_of(value: Any, within: tuple[int, ...]) -> Iterator[Any]:
    """The bytes that stand for a value; ``within`` are the objects that hold it."""
    yield f"<{type(value).__module__}.{type(value).__qualname__}>".encode()
    if id(value) in within:
        return
    inner = (*within, id(value))
    if isinstance(value, Tensor):
        yield from _tensor_bytes(value)
    elif isinstance(value, (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Path)):
        yield repr(value).encode()
    elif isinstance(value, np.ndarray):
        yield from (repr((value.shape, value.dtype)).encode(), value.tobytes())
    elif isinstance(value, Program):
        yield digest(value.graph).encode()
        yield from _bytes_of([dict(weights) for weights in value.weights], inner)
    elif isinstance(value, nn.Module):
        modules = [(name, type(module).__qualname__, module.training) for name, module in value.named_modules()]
        yield repr(modules).encode()
        yield from _bytes_of(value.state_dict(), inner)
    elif isinstance(value, Mapping):
        for key in value:
            yield repr(key).encode()
            yield from _bytes_of(value[key], inner)
    elif isinstance(value, (Sequence, set, frozenset, Iterator)):
        for member in sorted(value) if isinstance(value, (set, frozenset)) else value:
            yield from _bytes_of(member, inner)
    elif callable(value) and hasattr(value, "__qualname__"):
        yield f"{value.__module__}.{value.__qualname__}".encode()
    else:
        yield from _bytes_of(getattr(value, "__dict__", {}), inner)


def _tensor_bytes(tensor: Tensor) -> Iterator[Any]:
    yield repr((tuple(tensor.shape), tensor.dtype)).encode()
    plain = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    flat = plain.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        yield flat.view(torch.uint8).numpy().data
