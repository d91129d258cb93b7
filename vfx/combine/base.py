"""The common base of edges: a network, a state dict or a checkpoint, under the names of a Program."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vfx.checks import check_finite
from vfx.combine.combiner import combined_names
from vfx.complex_numbers import real_parts
from vfx.emit.checkpoints import renamed
from vfx.emit.files import load
from vfx.errors import ArchitectureError, ArgumentError
from vfx.program import Program, Weights
from vfx.wrappers import plain_model

Base = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]


def base_weights(base: Any, program: Program) -> Weights:
    """The base's tensors for all that is combined in ``program``; heads that each edge keeps need not fit.

    Raises ArgumentError, CheckpointError, ArchitectureError, WeightError.
    """
    tensors, notes = _tensors(base), list[str]()
    wanted = {name: program.weights[0][name] for name in combined_names(program)}
    others = {alias: tensors[alias] for alias in program.aliases if alias in tensors}
    found = renamed(wanted, {**{program.aliases[alias]: x for alias, x in others.items()}, **tensors}, "base", notes)
    for name, tensor in wanted.items():
        if name not in found:
            raise ArchitectureError(f"base= lacks {name!r}, which the edges have; give the network they come from")
        if found[name].shape != tensor.shape:
            raise ArchitectureError(
                f"{name!r} has shape {tuple(tensor.shape)} in the edges and {tuple(found[name].shape)} in base=; keep "
                "the layers that differ for each edge by heads=, or give the network the edges come from"
            )
    own = {name: found[name] for name in wanted}
    check_finite(own, "base")
    return own


def _tensors(base: Any) -> dict[str, Tensor]:
    """What a base holds, by name."""
    if isinstance(base, (str, os.PathLike)):
        base = load(base)
    if isinstance(base, nn.Module):
        model = plain_model(base, "base")
        named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        base = named
    if not isinstance(base, Mapping) or not all(isinstance(x, Tensor) for x in base.values()):
        raise ArgumentError(
            f"base= is a network, a state dict or the path of a checkpoint, not {type(base).__name__}; "
            "load() reads files whose state dict lies inside other entries"
        )
    return {name: real_parts(tensor.detach()) for name, tensor in base.items()}
