"""Networks that edges come from or became: a module, a state dict or a checkpoint, under the names of a Program."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
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


def base_weights(base: Any, program: Program) -> Weights:
    """The base's tensors for all that is combined in ``program``; heads that each edge keeps need not fit.

    Raises ArgumentError, CheckpointError, ArchitectureError, WeightError.
    """
    names = combined_names(program)
    found = tensors_of(base, program, names, "base")
    absent = next((name for name in names if name not in found), None)
    if absent is not None:
        raise ArchitectureError(f"base= lacks {absent!r}, which the edges have; give the network they come from")
    return found


def tensors_of(
    source: Any, program: Program, names: Collection[str], argument: str, others: bool = True
) -> dict[str, Tensor]:
    """Those of the tensors called ``names`` that a module, a state dict or a checkpoint (a path) holds.

    ``argument``: what errors call it; ``others``: whether it may hold tensors of other names.
    Raises ArgumentError, CheckpointError, ArchitectureError, WeightError.
    """
    tensors = _read(source, argument)
    wanted = {name: program.weights[0][name] for name in names}
    tied = {program.aliases[alias]: tensors[alias] for alias in program.aliases if alias in tensors}
    found = renamed(wanted, {**tied, **tensors}, argument, [])
    unknown = next((name for name in found if name not in wanted and name not in program.aliases), None)
    if unknown is not None and not others:
        raise ArchitectureError(f"{argument}= holds {unknown!r}, which is no tensor of the networks")
    found = {name: found[name] for name in wanted if name in found}
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise ArchitectureError(
                f"{name!r} has shape {tuple(wanted[name].shape)} in the networks and {tuple(tensor.shape)} in "
                f"{argument}=; give one of their architecture, or keep the layers that differ for each edge by heads="
            )
    check_finite(found, argument, program.masks)
    return found


def _read(source: Any, argument: str) -> dict[str, Tensor]:
    """What a network holds, by name."""
    if isinstance(source, (str, os.PathLike)):
        source = load(source)
    if isinstance(source, nn.Module):
        model = plain_model(source, argument)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        source = parameters | dict(model.named_buffers(remove_duplicate=False))
    if not isinstance(source, Mapping) or not all(isinstance(x, Tensor) for x in source.values()):
        raise ArgumentError(
            f"{argument}= is a network, a state dict or the path of a checkpoint, not {type(source).__name__}; "
            "vfx.load(path, entry=) reads a state dict inside other entries"
        )
    return {name: real_parts(tensor.detach()) for name, tensor in source.items()}
