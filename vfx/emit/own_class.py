"""The user's own class with a Program's weights, its layers resized in place where channels were removed or added.

A deep copy of the user's model gets the new tensors, and each layer the sizes that its call in the graph has now
(``in_features``, ``groups``, ``normalized_shape`` …). Whether its ``forward`` then computes the Program is not known
before it was run: see ``vfx.emit.module``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from vfx.complex_numbers import restored
from vfx.emit.layers import ModuleCall, layer_of
from vfx.emit.scales import with_default_scales
from vfx.errors import WeightError, listed
from vfx.operators import arguments
from vfx.program import Program

_FEATURES = ("in_features", "out_features", "in1_features", "in2_features", "num_features", "normalized_shape")
_CHANNELS = ("in_channels", "out_channels", "groups", "num_groups", "num_channels", "num_parameters")
_WIDTHS = ("num_embeddings", "embedding_dim", "input_size", "hidden_size", "proj_size")
_SIZES = frozenset(_FEATURES + _CHANNELS + _WIDTHS)  # constructor arguments of torch's layers, and their attributes


def own_class(program: Program, edge: int = 0) -> nn.Module:
    """A deep copy of the user's model, in eval mode, that holds this weight set.

    Raises WeightError if the graph reads a parameter that the model has not.
    """
    assert program.module is not None
    held = with_default_scales(program, edge) if program.resized else program.weights[edge]
    weights = {**held, **_resized_buffers(program, edge)}
    module = copied(program.module).eval()
    module = module.to(next((tensor.device for tensor in weights.values()), torch.device("cpu")))
    own = own_tensors(module)
    names = {program.aliases.get(name, name) for name in own}
    if program.resized and (added := [name for name in program.names() if name not in names | program.buffers]):
        raise WeightError(f"{type(program.module).__name__} has no {listed(added)}")
    for name, tensor in own.items():
        given = weights.get(program.aliases.get(name, name))
        if given is not None:
            tensor.data = restored(given, tensor).detach().to(tensor.dtype, copy=True)
    if program.resized:
        _resize(module, program, edge)
    return module


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of a model, shared ones under each of their names."""
    parameters, buffers = module.named_parameters, module.named_buffers
    return {**dict(parameters(remove_duplicate=False)), **dict(buffers(remove_duplicate=False))}


def copied(module: nn.Module) -> nn.Module:
    """A deep copy; tensors that ``forward`` computes anew and keeps (an older weight norm's) are copied by value."""
    plain = [value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    computed = {id(tensor): tensor.detach().clone() for tensor in plain if not tensor.is_leaf}
    return copy.deepcopy(module, computed)


def _resized_buffers(program: Program, edge: int) -> dict[str, Tensor]:
    """Buffers of the user's model at their new sizes, where all who read one agree on them."""
    found: dict[str, list[Tensor]] = {}
    for node in program.graph.nodes:
        if "buffer" in node.meta:
            found.setdefault(node.meta["buffer"], []).append(program.weights[edge][str(node.target)])
    return {name: one[0] for name, one in found.items() if all(torch.equal(one[0], other) for other in one)}


def _resize(module: nn.Module, program: Program, edge: int) -> None:
    """Bring the sizes that layers keep beside their tensors up to date with their calls in the graph."""
    shapes = {name: tuple(tensor.shape) for name, tensor in program.weights[edge].items()}
    layers = dict(module.named_modules())
    for node in program.graph.nodes:
        layer = layer_of(node, shapes)
        owner = layers.get(layer.path if layer is not None else str(node.meta.get("module") or ""))
        for name, size in _sizes(node, layer).items() if owner not in (None, module) else ():
            if isinstance(getattr(owner, name, None), (int, tuple)):
                setattr(owner, name, size)
    for part in module.modules():
        if isinstance(part, nn.RNNBase):
            part.flatten_parameters()


def _sizes(node: fx.Node, layer: ModuleCall | None) -> dict[str, Any]:
    """The sizes that a call names; of one whose weights are computed or absent those among its arguments."""
    given = layer.options if layer is not None else arguments(node) if node.op == "call_function" else {}
    sizes = {
        name: tuple(given[name]) if isinstance(given[name], list) else given[name] for name in _SIZES & given.keys()
    }
    return {name: size for name, size in sizes.items() if not isinstance(size, fx.Node)}
