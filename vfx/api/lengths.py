"""Networks without some residual blocks at other lengths than the example's: their graph is captured once more.

A capture leaves the batch open and writes every other size of the example into the graph. The user's own class works
at any length all the same; a network that comes out as a graph, since blocks of it went, would not. So its class is
captured with every size open that its code leaves open, the same blocks go, and the graph that is left gets the
weights, if it is proved to compute what the other one computes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from vfx.capture.capture import capture
from vfx.capture.exporting import DYNAMIC_BATCH, captured_shapes, open_shapes
from vfx.emit.own_class import own_tensors
from vfx.errors import VfxError
from vfx.program import Program
from vfx.proof import PRESERVED, same_function
from vfx.pruning.residual import residual_blocks, without


def with_open_lengths(program: Program, gone: Collection[str]) -> Program:
    """The network without the blocks ``gone``, by name, at any length; as it is where that is not to be had.

    Sizes that the user asked for, by ``dynamic_shapes=`` of the capture, stay.
    """
    model = program.module
    if model is None or not gone or captured_shapes(program, model) != DYNAMIC_BATCH:
        return program
    try:
        shapes = open_shapes(model, program.example_call)
        whole = capture(model, program.example_call, dynamic_shapes=shapes, outputs=program.outputs or None)
        blocks = [block for block in residual_blocks(whole) if block.name in gone]
        if len(blocks) != len(gone):
            return program
        left = without(whole, blocks)
        own, held = own_tensors(model), program.weights[0]
        weights = {name: held[name] if name in own else tensor for name, tensor in left.weights[0].items()}
        opened = replace(program, graph=left.graph, weights=(weights,), buffers=left.buffers, goals={})
        return opened if _varies(opened) and same_function(program, opened) <= PRESERVED else program
    except (VfxError, RuntimeError, KeyError, ValueError, TypeError):  # its code needs the example's sizes
        return program


def _varies(program: Program) -> bool:
    """Whether the batch is left open, as it was, and another size beside it."""
    shapes = [node.meta["val"].shape for node in program.placeholders]
    axes = {(k, d) for k, shape in enumerate(shapes) for d, size in enumerate(shape) if not isinstance(size, int)}
    batch = {(k, d) for k, d in enumerate(program.batch_axes) if d is not None}
    return batch < axes
