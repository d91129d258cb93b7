"""Capturing and reading networks: trace, symmetry, layers, profile, statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vfx.analyse.cost import Profile, cost
from vfx.analyse.layers import Layers, number_layers
from vfx.analyse.symmetry import Symmetry
from vfx.analyse.symmetry import symmetry as infer_symmetry
from vfx.api.results import Result
from vfx.arguments import checked
from vfx.capture.capture import capture
from vfx.capture.exporting import DYNAMIC_BATCH
from vfx.checks import check_edges, check_finite, check_heads, check_same_function, masks_of
from vfx.complex_numbers import real_parts
from vfx.errors import ArgumentError
from vfx.program import Program
from vfx.statistics.collect import Statistics
from vfx.statistics.collect import collect as collect_statistics
from vfx.statistics.record import Recorder
from vfx.statistics.record import recorded as recorded_statistics
from vfx.ties import with_common_ties
from vfx.wrappers import plain_models


@checked
def trace(
    models: nn.Module | Sequence[nn.Module],
    example_inputs: Any,
    *,
    heads: int | str = 0,
    dynamic_shapes: Any = DYNAMIC_BATCH,
    outputs: Sequence[int | str] | None = None,
) -> Program:
    """Capture one model, or several of one architecture, as a Program with a weight set for each.

    ``example_inputs``: a tensor, a tuple of forward's arguments, or a dict of its keyword arguments; arguments may nest
    tensors in tuples, lists and dicts, beside constants, which are baked in. All functions here take them so.
    DataParallel and ``torch.compile`` are taken off; a tie that not all models have is loosened, with a note.
    ``heads``: the last layers, in which the models' tensors may differ in shape (other numbers of classes).
    ``dynamic_shapes``: which sizes vary, as ``torch.export`` takes it; by default the batch, with None nothing.
    ``outputs``: those that count, by key (``["logits"]``), index or path (``states[2]``); by default all. The graph
    returns these alone, in the nesting that they have, and channels that leave the network in others are free. The
    user's own class, where it comes back, still returns all its outputs: nothing is proved of the others.
    Raises ArgumentError, CaptureError, ArchitectureError, WeightError.
    """
    models = plain_models(models)
    if isinstance(models, nn.Module):
        state = models.state_dict()
        if not all(tensor.is_meta for tensor in state.values()):  # shapes are enough for symmetry, layers and profile
            check_finite(state, "the model", masks_of(models))
        return capture(models, example_inputs, dynamic_shapes=dynamic_shapes, outputs=outputs)
    check_edges(models, shapes=not heads)
    first, notes = with_common_ties(models)
    program = capture(first, example_inputs, dynamic_shapes=dynamic_shapes, outputs=outputs)
    program = program.with_weights([program.weights[0], *(weights_of(program, model) for model in models[1:])])
    program = program.with_notes(notes)
    if heads:
        check_heads(program, number_layers(program).heads(heads).branch)
    check_same_function(program, models)
    return program


def weights_of(program: Program, model: nn.Module) -> dict[str, torch.Tensor]:
    """Another edge's tensors under the names of the graph; constants of the capture are shared."""
    tensors = {name: real_parts(tensor.detach()) for name, tensor in model.named_parameters(remove_duplicate=False)}
    tensors |= {name: tensor.detach() for name, tensor in model.named_buffers(remove_duplicate=False)}
    return {name: tensors.get(name, tensor) for name, tensor in program.weights[0].items()}


@checked
def symmetry(
    model: nn.Module | Program, example_inputs: Any = None, *, outputs: Sequence[int | str] | None = None
) -> Symmetry:
    """Symmetries of a network: ``.groups`` and their classes, ``.pinned``; prints as a table.

    ``outputs``: those that count, as for ``vfx.trace``.
    """
    return infer_symmetry(program_of(model, example_inputs, outputs=outputs))


@checked
def layers(model: nn.Module | Program, example_inputs: Any = None) -> Layers:
    """Numbered conv and linear layers, shortcuts among them, and the joins of each cut."""
    return number_layers(program_of(model, example_inputs))


@checked
def profile(model: nn.Module | Program | Result, example_inputs: Any = None) -> Profile:
    """Parameters, MACs, FLOPs and memory of each layer, counted from the graph (torchstat's conventions, batch 1)."""
    return cost(program_of(model.program if isinstance(model, Result) else model, example_inputs))


@checked
def collect(
    models: Sequence[nn.Module] | Program,
    example_inputs: Any = None,
    *,
    data: Any,
    activations: bool = False,
    max_samples: int | None = None,
    within: bool = False,
    device: Any = None,
    progress: bool = True,
) -> Statistics:
    """One pass over ``data`` for all edges; pass the result as ``statistics=`` to any number of merges of them.

    ``within`` adds the second moments inside each network, which ZipIt!, CCA and optimal transport read; these methods
    act on networks whose BatchNorm is folded (``vfx.FoldNormalization(batch_norm=True)``). ``activations`` reads the
    layers behind their activation functions too (normalization with ``site="activation"``).
    """
    program = program_of(models, example_inputs)
    options: dict[str, Any] = {"max_samples": max_samples, "device": device, "progress": progress}
    options |= {"within": within, "activations": activations}
    return collect_statistics(program, symmetry(program), data, **options)


@checked
def record(model: nn.Module, *, momentum: float | None = None) -> Recorder:
    """Record a model's layer statistics while it is trained, for merging without data (*Vanishing Feature*, App. G.4).

    Use it around the training loop (``with vfx.record(model) as recorder``), and ``reset()`` when the last epoch
    begins; ``momentum`` lets older batches fade instead. Raises ArgumentError.
    """
    return Recorder(plain_models(model), momentum)


@checked
def recorded(
    models: Sequence[nn.Module] | Program, recorders: Sequence[Recorder], example_inputs: Any = None
) -> Statistics:
    """What ``vfx.record`` saw of each edge, to be given to ``merge`` as ``statistics=``. Raises DataError."""
    return recorded_statistics(program_of(models, example_inputs), recorders)


def program_of(
    models: Any, example_inputs: Any, heads: int | str = 0, dynamic_shapes: Any = DYNAMIC_BATCH,
    outputs: Sequence[int | str] | None = None,
) -> Program:  # fmt: skip
    """``models`` captured, or as they are where they were before."""
    if isinstance(models, Program):
        late = "dynamic_shapes" if dynamic_shapes != DYNAMIC_BATCH else "outputs" if outputs is not None else ""
        if late:
            raise ArgumentError(f"{late}= belongs to the capture of a network, and a Program is captured")
        return models
    if example_inputs is None:
        raise ArgumentError("example_inputs are needed to capture a model")
    heads = 0 if isinstance(models, nn.Module) else heads
    return trace(models, example_inputs, heads=heads, dynamic_shapes=dynamic_shapes, outputs=outputs)
