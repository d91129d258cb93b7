"""Checks on what the user hands in: edges of one architecture, finite weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from vfx.capture.exporting import structural_copy
from vfx.errors import ArchitectureError, ArgumentError, CaptureError, DataError, WeightError
from vfx.program import Program, frozen_mask
from vfx.proof import SINGLE, is_defined, outputs_error

STATISTICS = ("running_mean", "running_var")  # the names of a norm's buffers


def check_edges(models: Sequence[nn.Module], shapes: bool = True) -> None:
    """Raise unless there are two or more distinct models whose tensors agree in name, shape and dtype.

    ``shapes=False`` lets shapes differ, as those of heads may (``check_heads``).
    """
    if len(models) < 2:
        raise ArgumentError(f"merging needs at least two models, got {len(models)}")
    states = [model.state_dict() for model in models]
    for edge, state in enumerate(states[1:], start=1):
        check_same_tensors(states[0], state, "edge 0", f"edge {edge}", shapes)
    for edge, (model, state) in enumerate(zip(models, states)):
        check_finite(state, f"edge {edge}", masks_of(model))


def differ_in_width(models: Any) -> bool:
    """Whether models have the same tensors but not the same shapes."""
    if not isinstance(models, Sequence) or not all(isinstance(model, nn.Module) for model in models):
        return False
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in models]
    return any(shapes_of.keys() == shapes[0].keys() and shapes_of != shapes[0] for shapes_of in shapes[1:])


def check_same_tensors(
    first: Mapping[str, Tensor], other: Mapping[str, Tensor], name: str, other_name: str, shapes: bool = True
) -> None:
    """Raise ArchitectureError that names the first key on which two state dicts differ."""
    way_out = "edges must share one architecture; build both with the same constructor arguments"
    for key in first:
        if key not in other:
            raise ArchitectureError(f"{other_name} lacks {key!r}, which {name} has; {way_out}")
        if shapes and first[key].shape != other[key].shape:
            raise ArchitectureError(
                f"{key!r} has shape {tuple(first[key].shape)} in {name} and {tuple(other[key].shape)} in "
                f"{other_name}; {way_out}, keep the layers that differ as heads if they are the last ones, or merge "
                "networks of different widths with match='weight', 'activation' or 'ot'"
            )
        if first[key].dtype != other[key].dtype:
            raise ArchitectureError(
                f"{key!r} is {first[key].dtype} in {name} and {other[key].dtype} in {other_name}; cast one of them"
            )
    extra = next((key for key in other if key not in first), None)
    if extra is not None:
        raise ArchitectureError(f"{other_name} has {extra!r}, which {name} lacks; {way_out}")


def check_finite(state: Mapping[str, Tensor], name: str, masks: Collection[str] | None = None) -> None:
    """Raise WeightError that names the first tensor with a value that no network computes with: NaN, or infinities.

    ``masks`` may hold infinities (``masks_of``, ``Program.masks``). Where nobody says
    what is one (None) tensors of −∞ and one other value are, as causal masks. Tensors of a type without arithmetic and
    those without values are refused as well.
    """
    check_storage(state, name)
    for key, tensor in state.items():
        if tensor.is_meta:
            raise WeightError(
                f"{key!r} in {name} is on the meta device and has no values; load them before (to_empty(device=) and "
                "load_state_dict)"
            )
        if _finite(tensor):
            continue
        count = int((~torch.isfinite(tensor)).sum())
        mask = _masks(tensor) if masks is None else key in masks
        if not mask or tensor.isnan().any():
            raise WeightError(f"{count} of {tensor.numel()} values of {key!r} in {name} are NaN or infinite")


def _finite(tensor: Tensor) -> bool:
    """Whether no value of a tensor is NaN or infinite; extremes tell without a tensor of answers."""
    if tensor.is_complex():
        return _finite(torch.view_as_real(tensor.resolve_conj()))
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def check_storage(state: Mapping[str, Tensor], name: str) -> None:
    """Raise WeightError that names the first tensor that is not dense, or of a type that layers cannot compute with."""
    for key, tensor in state.items():
        small = tensor.dtype.is_floating_point and tensor.dtype.itemsize < 2  # float8 and less go with scales
        if small or tensor.is_quantized or tensor.is_nested or tensor.layout != torch.strided:
            kind = tensor.dtype if small or tensor.is_quantized else "nested" if tensor.is_nested else tensor.layout
            raise WeightError(
                f"{key!r} in {name} is {kind}: vfx computes with dense tensors, floating ones of 16 bits and "
                "more; convert it (dequantize() or to_dense()) before"
            )


def masks_of(model: nn.Module) -> set[str]:
    """The buffers of a module that are no running statistics, and frozen parameters that hold −∞."""
    names = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    frozen = {name for name, tensor in model.named_parameters(remove_duplicate=False) if frozen_mask(tensor)}
    return {name for name in names if name.rpartition(".")[2] not in STATISTICS} | frozen


def _masks(tensor: Tensor) -> bool:
    if tensor.is_complex():
        return False
    finite = tensor[tensor.isfinite()]
    return not (tensor == float("inf")).any() and (not len(finite) or bool((finite == finite[0]).all()))


def check_same_masks(program: Program) -> None:
    """Raise ArchitectureError where edges have infinities at different places of a mask: no average means anything."""
    for name in sorted(program.masks):
        first = program.weights[0][name]
        for edge, weights in enumerate(program.weights[1:], start=1):
            infinite = weights[name]
            if (
                infinite is first
                or first.shape != infinite.shape
                or not first.is_floating_point()
                or first.isfinite().all()
            ):
                continue
            if not torch.equal(torch.where(first.isinf(), first, 0), torch.where(infinite.isinf(), infinite, 0)):
                raise ArchitectureError(
                    f"{name!r} is infinite at other places in edge {edge} than in edge 0: masks are not averaged; give "
                    "all edges the same one"
                )


def check_heads(program: Program, heads: Collection[fx.Node]) -> None:
    """Raise ArchitectureError unless the edges' tensors agree in shape wherever the rest of the network reads them."""
    read = {str(n.target) for n in program.graph.nodes if n.op == "get_attr" and set(n.users) - set(heads)}
    for edge, weights in enumerate(program.weights[1:], start=1):
        for name in sorted(read):
            if weights[name].shape != program.weights[0][name].shape:
                raise ArchitectureError(
                    f"{name!r} has shape {tuple(program.weights[0][name].shape)} in edge 0 and "
                    f"{tuple(weights[name].shape)} in edge {edge}, and stands in front of the heads; keep more layers "
                    "as heads"
                )


@torch.no_grad()
def check_same_function(program: Program, models: Sequence[nn.Module]) -> None:
    """Raise ArchitectureError unless every edge computes in its own class what it computes in the shared graph.

    State dicts that agree do not prove one architecture: an activation function, a stride, an eps, or a tensor tied in
    one edge alone shows only in the outputs. Raises DataError where these are NaN and say nothing.
    """
    errors = [_gap(program, edge, model) for edge, model in enumerate(models)]
    if not math.isfinite(errors[0]):
        raise CaptureError(
            f"the graph captured from edge 0 ({type(models[0]).__name__}) does not give what it gives on the example "
            "inputs, so nothing can be compared with it"
        )
    for edge, error in enumerate(errors[1:], start=1):
        if not error <= max(SINGLE, 10 * errors[0]):
            raise ArchitectureError(
                f"edge {edge} ({type(models[edge]).__name__}) has the tensors of edge 0 but is another network: with "
                f"edge 0's graph its outputs differ by {error:.1e} (relative); edges must share one architecture"
            )


def _gap(program: Program, edge: int, model: nn.Module) -> float:
    """Relative output difference between a model and its weight set in the graph; infinite where the model fails."""
    call = program.example_call.map(lambda x: x.clone() if isinstance(x, Tensor) else x)
    try:
        separate = program.returned(structural_copy(model).eval()(*call.args, **call.kwargs))
        shared = program(*program.example_inputs, edge=edge)
    except (RuntimeError, TypeError, ValueError):
        return float("inf")
    if not is_defined(separate):
        raise DataError(
            f"edge {edge} ({type(model).__name__}) gives NaN on the example inputs, so nothing can be compared; give "
            "example_inputs on which every output is a number"
        )
    return outputs_error(separate, shared)
