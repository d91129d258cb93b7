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
from vfx.emit.exact import copied
from vfx.emit.layers import ModuleCall, layer_of
from vfx.emit.scales import with_default_scales
from vfx.emit.taking import Taking
from vfx.errors import WeightError, listed
from vfx.operators import arguments
from vfx.program import Program, moved

_FEATURES = ("in_features", "out_features", "in1_features", "in2_features", "num_features", "normalized_shape")
_CHANNELS = ("in_channels", "out_channels", "groups", "num_groups", "num_channels", "num_parameters")
_WIDTHS = ("num_embeddings", "embedding_dim", "input_size", "hidden_size", "proj_size")
_SIZES = frozenset(_FEATURES + _CHANNELS + _WIDTHS)  # constructor arguments of torch's layers, and their attributes


def own_class(program: Program, edge: int = 0, taking: Taking | None = None) -> nn.Module:
    """A deep copy of the user's model, in eval mode, that holds this weight set (copied, or as ``taking`` gives it).

    Raises WeightError if the graph reads a parameter that the model has not.
    """
    assert program.module is not None
    held = with_default_scales(program, edge) if program.resized else program.weights[edge]
    weights = {**held, **_resized_buffers(program, edge)}
    tensors = own_tensors(program.module)
    names = {program.aliases.get(name, name) for name in tensors}
    if program.resized and (added := [name for name in program.names() if name not in names | program.buffers]):
        raise WeightError(f"{type(program.module).__name__} has no {listed(added)}")
    taking, new = taking or Taking(), dict[int, tuple[Tensor, Tensor]]()
    for name, tensor in tensors.items():
        given = weights.get(program.aliases.get(name, name))
        if given is not None and id(tensor) not in new:
            new[id(tensor)] = tensor, taking(restored(given, tensor), tensor.dtype)
    module = copied(program.module, {key: _like(tensor, data) for key, (tensor, data) in new.items()}).eval()
    module = module.to(next((tensor.device for tensor in weights.values()), torch.device("cpu")))
    if program.resized:
        _resize(module, program, edge)
    return module


def with_exact_scales(module: nn.Module, program: Program, edge: int = 0) -> nn.Module:
    """A copy of ``own_class``'s module in which queries scaled for the class are not rounded; the rest is shared."""
    scaled = with_default_scales(program, edge, exact=True)
    new = {}
    for name, tensor in own_tensors(module).items():
        key = program.aliases.get(name, name)
        changed = key in scaled and scaled[key] is not program.weights[edge][key]
        new[id(tensor)] = nn.Parameter(scaled[key], tensor.requires_grad) if changed else tensor
    return copied(module, new)


def double(module: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU, made without one in the module's own precision."""
    cast = {}
    for tensor in {id(tensor): tensor for tensor in own_tensors(module).values()}.values():
        data = moved(tensor.detach(), "cpu", torch.float64)
        shares = data.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        cast[id(tensor)] = _like(tensor, data.clone() if shares else data)
    return copied(module, cast)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of a model, shared ones under each of their names."""
    parameters, buffers = module.named_parameters, module.named_buffers
    return {**dict(parameters(remove_duplicate=False)), **dict(buffers(remove_duplicate=False))}


def _like(tensor: Tensor, data: Tensor) -> Tensor:
    """A parameter, or a buffer, of the kind of another one, that holds ``data``."""
    if type(tensor) is nn.Parameter:
        return nn.Parameter(data, tensor.requires_grad)
    twin = copy.deepcopy(tensor.detach())
    if isinstance(tensor, nn.Parameter):
        twin = type(tensor)(twin, tensor.requires_grad)
    else:
        twin.__dict__.update(copy.deepcopy(tensor.__dict__))
    twin.data = data
    return twin


def _resized_buffers(program: Program, edge: int) -> dict[str, Tensor]:
    """Buffers of the user's model at their new sizes, where all who read one agree on them."""
    buffers_of: dict[str, list[Tensor]] = {}
    for node in program.graph.nodes:
        if "buffer" in node.meta:
            buffers_of.setdefault(node.meta["buffer"], []).append(program.weights[edge][str(node.target)])
    return {name: sets[0] for name, sets in buffers_of.items() if all(torch.equal(sets[0], buffer) for buffer in sets)}


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
