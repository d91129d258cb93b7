"""Program -> nn.Module: the user's own class where it computes the Program, else a GraphModule made of layers.

Both follow ``train()`` and ``eval()``, survive deepcopy and pickle and can be exported and compiled. Keys of the state
dict are the FQNs of the user's model.
"""

from __future__ import annotations

import copy
import math
import traceback
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from vfx.complex_numbers import together, with_complex_parameters
from vfx.emit.arguments import with_arguments
from vfx.emit.calls import by_packets, submodule, with_modules, with_own_names
from vfx.emit.exact import InDouble, sharing
from vfx.emit.kept_sizes import KeptSize, kept_sizes, needed, put
from vfx.emit.own_class import double, own_class, with_exact_scales
from vfx.emit.own_config import config_changes, fit_config, put_config
from vfx.emit.taking import Taking
from vfx.errors import ConfigNote, WeightError, listed
from vfx.program import Program, casts, copy_graph
from vfx.proof import PRESERVED, SINGLE, in_double, outputs_error, samples

FEW = 2  # samples on which resized networks are compared
APART = 0.1  # a relative error in single precision that no rounding explains


def emit(
    program: Program, edge: int = 0, taking: Taking | None = None, verify: bool = True, opened: Program | None = None
) -> tuple[nn.Module, str]:  # fmt: skip
    """A module in eval mode that computes one weight set, and why it is not the user's class ("" if it is).

    Its tensors are copies, or what ``taking`` gives it. Without ``verify`` a class of unchanged structure is not
    compared with the Program. ``opened`` is the same network with more sizes open, for a module that is the graph.
    """
    taking = taking or Taking()
    whole = lambda reason: (graph_module(opened or program, edge, taking.begin()), reason)  # noqa: E731
    if program.module is None:
        return whole("the user's class is not at hand")
    if program.structural and not program.resized:
        return whole("the structure changed")
    if program.resized and program.outputs:
        return whole(f"only outputs {listed([str(name) for name in program.outputs])} are kept")
    try:
        module = own_class(program, edge, taking)
        # queries that were scaled for the class are rounded: the algebra is checked, as for passes
        exact = with_exact_scales(module, program, edge) if _scales(program) else module
    except (RuntimeError, TypeError, WeightError) as error:
        return whole(f"writing back to {type(program.module).__name__} failed: {error}")
    said = not program.resized or fit_config(module, program.module, lambda built: _same(built, module, program))
    put_config(exact, config_changes(program.module, module))
    reason = _unproved(program, edge, exact) if verify or program.resized else ""
    if reason and program.resized:
        sizes = needed(kept_sizes(program, edge), lambda some: not _unproved(program, edge, exact, some))
        module, reason = put(module, sizes), "" if sizes else reason
    if reason:
        return whole(reason)
    if not said:
        warnings.warn(_UNSAID.format(type(module).__name__), ConfigNote, stacklevel=2)
    return module, ""


_UNSAID = (
    "the configuration of {} cannot say what is left of its layers (sizes that differ from one to the next, or heads "
    "that the class would make otherwise), so what its own save_pretrained writes is not read: use vfx.save_pretrained"
)


@torch.no_grad()
def _same(network: nn.Module, module: nn.Module, program: Program) -> bool:
    """Whether two networks give the same outputs on the example inputs."""
    call = program.with_samples(FEW).to("cpu").example_call
    outputs = [program.returned(_on_cpu(net)(*call.args, **call.kwargs)) for net in (network, module)]
    return outputs_error(*outputs) <= SINGLE


def _on_cpu(module: nn.Module) -> nn.Module:
    """A copy on the CPU; it shares the parameters that are there."""
    there = all(tensor.device.type == "cpu" for tensor in (*module.parameters(), *module.buffers()))
    return sharing(module) if there else copy.deepcopy(module).cpu()


def _scales(program: Program) -> bool:
    """Whether attention keeps a scale that is not the default of its width any more."""
    return any("default_scale" in node.meta for node in program.graph.nodes) and not casts(program.graph)


def _unproved(program: Program, edge: int, module: nn.Module, sizes: Sequence[KeptSize] = ()) -> str:
    """Why the user's class, with some of the sizes that its modules keep changed, is not the Program; "" if it is."""
    name = type(module).__name__
    try:
        gap = difference(put(sharing(module), sizes), program.select(edge))
    except Exception as error:  # the user's forward() meets sizes that it was not written for
        if not program.resized:
            raise
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        return f"{name}.forward() does not run at the new sizes: {cause}"
    return "" if gap <= PRESERVED else f"{name} differs from the graph by {gap:.1e}"


@torch.no_grad()
def difference(module: nn.Module, program: Program) -> float:
    """Relative output error between a module and a Program: in float64, or in float32 scaled to the same threshold.

    They are compared on the example inputs; where layers were resized also on random ones at another batch size. Where
    they give the same bits there, in single precision at least, nothing is left to be compared in float64, and nothing
    where they are further apart than rounding can bring them. Tensors are cast one at a time (``vfx.emit.exact``); all
    of the module's at once where that does not run, or does not prove a graph without casts. Casts that differ in
    float64 are compared in the precision that both have, unless that is half.
    """
    program = program.with_samples(FEW) if program.resized else program
    gap = _as_they_are(module, program)
    if (gap == 0 and not program.resized) or APART < gap < math.inf:
        return gap
    try:
        exact = sharing(module)
        with InDouble(exact, program):
            gap = _difference(exact, in_double(program, on_read=True))
    except Exception:  # the user's forward() asks its own tensors for their dtype
        return _difference_at_once(module, program)
    if gap <= PRESERVED or APART < gap < math.inf:
        return gap
    if casts(program.graph):
        return gap if _is_half(program.weights[0].values()) else _scaled_difference(module, program)
    return _difference_at_once(module, program)


def _as_they_are(module: nn.Module, program: Program) -> float:
    """The error in the precision that both have; infinite where that is too coarse, or not one, and tells nothing."""
    tensors = (*module.parameters(), *module.buffers()), program.weights[0].values()
    if _precisions(tensors[0]) != _precisions(tensors[1]) or _is_half(tensors[0]):
        return math.inf
    return _difference(sharing(module), program)


def _is_half(tensors: Iterable[Tensor]) -> bool:
    return any(dtype.itemsize < 4 for dtype in _precisions(tensors))


def _precisions(tensors: Iterable[Tensor]) -> set[torch.dtype]:
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


def _difference_at_once(module: nn.Module, program: Program) -> float:
    try:
        gap = _difference(double(module), in_double(program, on_read=True))
        if gap <= PRESERVED or not casts(program.graph):
            return gap
    except RuntimeError as error:  # the module casts to float32 inside
        traceback.clear_frames(error.__traceback__)  # what they hold is as large as the network
        try:
            return _scaled_difference(module, program)
        except RuntimeError:
            raise error from None
    return _scaled_difference(module, program)


def _scaled_difference(module: nn.Module, program: Program) -> float:
    """The error in the precision that both have, scaled to what is asked of float64."""
    return _difference(_on_cpu(module), program.to("cpu")) * PRESERVED / SINGLE


def _difference(module: nn.Module, program: Program) -> float:
    gaps = []
    for inputs in _trials(program):
        call = program.signature.call(inputs)
        gaps.append(outputs_error(program.returned(module(*call.args, **call.kwargs)), program(*inputs)))
    return max(gaps)


def _trials(program: Program) -> list[Sequence[Any]]:
    """The example inputs; of a resized network also random ones, one sample more where their number may vary."""
    like = program.example_inputs
    if not program.resized:
        return [like]
    varies = any(not isinstance(size, int) for node in program.placeholders for size in node.meta["val"].shape)
    generator = torch.Generator().manual_seed(0)
    return [like, samples(like, program.batch_axes, program.batch_of(like) + varies, generator)]


def graph_module(program: Program, edge: int = 0, taking: Taking | None = None) -> fx.GraphModule:
    """A GraphModule over the Program's graph, made of layers; parameters and buffers keep their FQNs.

    Its tensors are copies, or what ``taking`` gives it.
    """
    taking = taking or Taking()
    graph, _ = copy_graph(program.graph)
    root = nn.Module()
    joined = with_complex_parameters(graph)
    weights = {name: together(t) if name in joined else t for name, t in program.weights[edge].items()}
    with_modules(graph, root, program, weights, taking)
    for node in graph.nodes:
        if node.op == "get_attr":
            _register(root, str(node.target), weights[str(node.target)], program, taking)
    by_packets(graph)
    graph = with_arguments(with_own_names(graph), root, program.signature)
    for node in graph.nodes:
        node.meta = {}
    name = type(program.module).__name__ if program.module is not None else "Network"
    return fx.GraphModule(root, graph, class_name=name).eval()


def _register(root: nn.Module, fqn: str, tensor: Tensor, program: Program, taking: Taking) -> None:
    path, _, leaf = fqn.rpartition(".")
    owner = submodule(root, path)
    if leaf in owner._parameters or leaf in owner._buffers:
        return
    if program.is_parameter(fqn):
        owner.register_parameter(leaf, nn.Parameter(taking(tensor)))
    else:
        owner.register_buffer(leaf, taking(tensor))
