"""nn.Module -> Program, through one ``torch.export`` capture.

The undecomposed graph is kept (conv, linear, batch_norm, layer_norm and attention stay whole). Parameters, buffers and
lifted constants become ``get_attr`` nodes addressed by FQN; shared storage is read under one name; in-place operators
become functional ones where no alias is read later; parameter-free subgraphs become constants; the batch size is a
symbol. The user's model is never touched: the capture works on a structural copy that shares its tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from vfx.capture.builder import Builder
from vfx.capture.constants import fold_constants
from vfx.capture.exporting import DYNAMIC_BATCH, exported
from vfx.capture.in_place import functionalise, is_mutable, own_written, without_idle_writes, without_unread_writes
from vfx.capture.signature import Call, Signature, as_call, batched_call, in_order, positional_names, signature_of
from vfx.operators import operator_of
from vfx.precision import name_dtypes
from vfx.program import Program, digest, is_empty


def capture(
    model: nn.Module | ExportedProgram, example_inputs: Any, *, dynamic_shapes: Any = DYNAMIC_BATCH,
    outputs: Sequence[int | str] | None = None,
) -> Program:  # fmt: skip
    """Capture ``model`` as a Program with one weight set.

    ``example_inputs`` is a tensor, a tuple of forward's positional arguments or a dict of its keyword arguments. They
    may nest tensors in tuples, lists and dicts; None, bool, int, float and str are constants that the capture bakes in.
    The first axis of the first tensor is the batch, and so is that of every tensor that has the same size there (a
    batch of one is doubled so that it is not taken for a constant). ``dynamic_shapes`` goes to ``torch.export``; by
    default the batch axis alone is dynamic, with a minimum of 1, and with None every size is the examples'. Outputs
    that are no tensors (caches) are dropped, with a note, and so are those that ``outputs`` does not name
    (``vfx.capture.outputs.selected``), with all that only they need. Raises CaptureError if the model cannot be
    captured, ArgumentError if the inputs do not fit its ``forward`` or an output has no such name.
    """
    if isinstance(model, ExportedProgram):
        call = as_call(example_inputs)
        return _program(model, call, signature_of(call, _exported_names(model, call)), None, [], outputs)
    call = in_order(model.forward, as_call(example_inputs), type(model).__name__)
    call = batched_call(call) if dynamic_shapes == DYNAMIC_BATCH else call
    signature = signature_of(call, positional_names(model.forward, call))
    program, notes = exported(model, call, dynamic_shapes)
    return _program(program, call, signature, model, notes, outputs)


def _exported_names(exported: ExportedProgram, call: Call) -> list[str] | None:
    """Names of the positional arguments, where the exported program knows them."""
    signature = exported.module_call_graph[0].signature if exported.module_call_graph else None
    names = getattr(signature, "forward_arg_names", None) or []
    return list(names[: len(call.args)]) if len(names) >= len(call.args) else None


def _program(
    exported: ExportedProgram, call: Call, signature: Signature, model: nn.Module | None, notes: list[str],
    outputs: Sequence[int | str] | None,
) -> Program:  # fmt: skip
    builder = Builder(exported, signature, outputs)
    graph = builder.build()
    graph = without_unread_writes(functionalise(own_written(without_idle_writes(graph))))
    graph, weights = fold_constants(graph, builder.weights, builder.constants)
    graph = name_dtypes(_without_empty_parts(graph))
    read = {node.target for node in graph.nodes if node.op == "get_attr"}
    weights = {name: tensor for name, tensor in weights.items() if name in read or name in exported.state_dict}
    graph.lint()
    return Program(
        graph=graph,
        weights=(weights,),
        example_inputs=tuple(call.tensors()),
        signature=signature,
        module=model,
        buffers=frozenset(set(weights) - builder.parameters),
        aliases=builder.aliases,
        notes=(*notes, *builder.notes),
        origin=digest(graph),
        outputs=tuple(outputs or ()),
    )


def _without_empty_parts(graph: fx.Graph) -> fx.Graph:
    """Concatenations read no empty tensors (a new cache, no channels left to pass by); of one part they are that part.

    A concatenation that is empty itself stays.
    """
    if any(is_mutable(node) for node in graph.nodes):  # a part must not be written to in place of its copy
        return graph
    for node in [n for n in graph.nodes if operator_of(n).ties == "concatenate"]:
        if any(part.meta["val"].dtype != node.meta["val"].dtype for part in node.args[0]):
            continue
        parts = [part for part in node.args[0] if not is_empty(part)]
        if len(parts) == 1:
            node.replace_all_uses_with(parts[0])
        elif parts:
            node.args = (parts, *node.args[1:])
    graph.eliminate_dead_code()
    return graph
