"""The calls of an emitted graph: modules where they are a layer's, operators elsewhere.

A call becomes its layer's module, under the path of its tensors, where every reader of the module's tensors is the same
plain call (one module called twice stays one) and nothing else is read from under that path: whoever replaces the
module (quantisation, LoRA) then replaces all of it. Other calls stay on loose tensors. BatchNorm and dropout know their
mode wherever they are. Operators are called by their packets (``torch.ops.aten.relu``), which TorchScript knows.
"""

from __future__ import annotations

import operator as python_operator
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from vfx.emit.layers import ModuleCall, layer_of
from vfx.emit.taking import Taking
from vfx.operators import arguments, is_in_place, operator, operator_of
from vfx.program import Program, Value, readers_of

_FEATURE_DROPOUT_OF_RANK = {3: nn.Dropout1d, 5: nn.Dropout3d}
_BN_TENSORS = ("weight", "bias", "running_mean", "running_var")
_COUNTER = "num_batches_tracked"


def with_modules(
    graph: fx.Graph, root: nn.Module, program: Program, weights: Mapping[str, Tensor], taking: Taking
) -> None:
    """Let the graph call modules of ``root`` where its calls are those of layers.

    ``weights`` holds the tensors that the graph reads, and the counters of norms, by FQN; modules get them by
    ``taking``.
    """
    layers = _layer_calls(graph, program, weights)
    for path, calls in layers.items():
        _add_module(root, path, _built(next(iter(calls.values())), path, program, weights, taking))
    paths = {node: path for path, calls in layers.items() for node in calls}
    replaced: dict[fx.Node, fx.Node] = {}
    for node in [node for node in graph.nodes if node in paths]:
        inputs = fx.node.map_arg(layers[paths[node]][node].inputs, lambda x: replaced.get(x, x))
        replaced[node] = _call_module(graph, node, paths[node], inputs)
    for node in list(graph.nodes):
        if operator_of(node).is_batch_norm and isinstance(node.meta.get("val"), Value):
            a = arguments(node)
            root.add_module(f"{node.name}_mode", FunctionalBatchNorm(a["momentum"], a["eps"]))
            _call_module(graph, node, f"{node.name}_mode", (a["input"], *(a[key] for key in _BN_TENSORS)))
    for node, path, dropout in _dropouts(graph, weights, layers):
        _add_module(root, path, dropout)
        _call_module(graph, node, path, (node.args[0],))
    _drop_unread(graph)


def _drop_unread(graph: fx.Graph) -> None:
    """Tensors and zeros (of recurrent layers, which start by themselves) that nothing reads any more."""
    for node in reversed(list(graph.nodes)):
        made = operator(node) == "aten.zeros" or operator_of(node).is_harmless
        if not node.users and (node.op == "get_attr" or made):
            graph.erase_node(node)


class FunctionalBatchNorm(nn.Module):
    """F.batch_norm on tensors that are not one BatchNorm module's own."""

    def __init__(self, momentum: float, eps: float):
        super().__init__()
        self.momentum, self.eps = momentum, eps

    def forward(self, x: Tensor, weight: Any, bias: Any, mean: Any, var: Any) -> Tensor:
        return F.batch_norm(x, mean, var, weight, bias, self.training or mean is None, self.momentum, self.eps)


# layers ---------------------------------------------------------------------------------------------------------------


def _layer_calls(
    graph: fx.Graph, program: Program, weights: Mapping[str, Tensor]
) -> dict[str, dict[fx.Node, ModuleCall]]:
    """The calls of each module, by the path that its tensors stand under."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    calls_of: dict[str, dict[fx.Node, ModuleCall]] = {}
    for node in graph.nodes:
        layer = layer_of(node, shapes)
        if layer is not None and layer.path:
            calls_of.setdefault(layer.path, {})[node] = layer
    foreign = {
        path
        for name, readers in readers_of(graph).items()
        for path in _above(name)
        if path in calls_of and not (_own(calls_of[path], path, name) and calls_of[path].keys() >= {*readers})
    }
    return {
        path: calls
        for path, calls in calls_of.items()
        if path not in foreign and _one_module(list(calls.values()), path, program, weights)
    }


def _above(name: str) -> list[str]:
    """The paths that a tensor's name stands under."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _own(calls: Mapping[fx.Node, ModuleCall], path: str, name: str) -> bool:
    return any(name == f"{path}.{leaf}" for layer in calls.values() for leaf in layer.tensors)


def _one_module(layers: list[ModuleCall], path: str, program: Program, weights: Mapping[str, Tensor]) -> bool:
    """Whether one module makes all of these calls, and holds tensors of these shapes and kinds alone."""
    first = layers[0]
    if any(layer.construction != first.construction for layer in layers):
        return False
    module = _constructed(first)
    own_tensors = {name: tensor for name, tensor in _tensors(module).items() if name != _COUNTER}
    return own_tensors.keys() == first.tensors.keys() and all(
        tensor.shape == weights[f"{path}.{name}"].shape
        and (name in module._parameters) == program.is_parameter(f"{path}.{name}")
        for name, tensor in own_tensors.items()
    )


def _constructed(layer: ModuleCall) -> nn.Module:
    """The module without data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of initial values that a tensor without elements cannot have
        return layer.kind(**layer.options, device="meta")


def _built(layer: ModuleCall, path: str, program: Program, weights: Mapping[str, Tensor], taking: Taking) -> nn.Module:
    """The module with its tensors; a norm follows the momentum of the user's."""
    if "momentum" in layer.options:
        momentum = _momentum(program, path, layer.options["momentum"])
        layer = layer._replace(options={**layer.options, "momentum": momentum})
    module = _constructed(layer)
    for name, old in _tensors(module).items():
        tensor = taking(weights.get(f"{path}.{name}", torch.zeros(old.shape, dtype=old.dtype)))
        setattr(module, name, nn.Parameter(tensor) if name in module._parameters else tensor)
    if isinstance(module, nn.RNNBase):
        module.flatten_parameters()  # one block of memory, as cuDNN wants it
    return module


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers by name."""
    tensors = module._parameters | module._buffers
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _momentum(program: Program, path: str, captured: float) -> float | None:
    """The module's own momentum: in eval mode a capture sees 0 for the cumulative average (None)."""
    modules = dict(program.module.named_modules()) if program.module is not None else {}
    path = path if path in modules else path.split(".", 2)[-1]  # a branch's norm: branches.0.<path>
    return getattr(modules.get(path), "momentum", captured)


def _dropouts(
    graph: fx.Graph, weights: Mapping[str, Tensor], layers: Collection[str]
) -> Iterator[tuple[fx.Node, str, nn.Module]]:
    """Each dropout with its module, under the user's own path where nothing else stands there."""
    taken = {path for name in weights for path in (*_above(name), name)}
    made: dict[str, nn.Module] = {}
    for index, node in enumerate(list(graph.nodes)):
        if not operator_of(node).is_dropout or is_in_place(node):
            continue
        new = _dropout(node)
        path = str(node.meta.get("module") or "")
        named = str(node.meta.get("module_type")).startswith("torch.nn.modules.dropout.") and path not in taken
        if not (path and named) or any(above in layers or above in made for above in _above(path)):
            path = ""
        if not path or repr(made.get(path, new)) != repr(new):
            path = f"{operator(node).removeprefix('aten.')}_{index}"
        yield node, path, made.setdefault(path, new)


def _dropout(node: fx.Node) -> nn.Module:
    kind = getattr(nn, operator_of(node).module)
    if kind is nn.Dropout2d and isinstance(node.meta.get("val"), Value):
        kind = _FEATURE_DROPOUT_OF_RANK.get(len(node.meta["val"].shape), kind)
    dropout: nn.Module = kind(arguments(node)["p"])
    return dropout


def _call_module(graph: fx.Graph, node: fx.Node, path: str, inputs: tuple[Any, ...]) -> fx.Node:
    """Replace a call by that of a module, which nests the states of an LSTM."""
    with graph.inserting_before(node):
        new = graph.create_node("call_module", path, inputs)
        new.name, new.meta = path.replace(".", "_"), node.meta
        if operator_of(node).module == "LSTM":
            states = graph.call_function(python_operator.getitem, (new, 1))
            new.meta, states.meta["val"] = {"val": [node.meta["val"][0], []]}, node.meta["val"][1:]
            for user in [user for user in node.users if user.args[1]]:
                user.args = (states, user.args[1] - 1)  # type: ignore[operator]
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def with_own_names(graph: fx.Graph) -> fx.Graph:
    """A copy whose nodes have a name each: those of calls that became modules may be taken."""
    new, mapping = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        mapping[node] = new.node_copy(node, mapping.__getitem__)
    return new


# tree -----------------------------------------------------------------------------------------------------------------


def submodule(root: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path, made of empty modules where there is none yet."""
    for part in path.split(".") if path else ():
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root


def _add_module(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    submodule(root, parent).add_module(leaf, module)


# operators ------------------------------------------------------------------------------------------------------------


def by_packets(graph: fx.Graph) -> None:
    """Let calls name operators without their overload where torch finds the same overload by the arguments.

    TorchScript reads no other calls, people read these more easily, and they take the same time. Without a tensor
    among the arguments torch looks for the overload too early to trace the call, as unpickling does.
    """
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if not any(isinstance(a.meta.get("val"), Value) for a in node.args if isinstance(a, fx.Node)):
            continue
        try:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), _example)
            overload = torch._C._jit_resolve_packet(node.target._schema.name, *args, **kwargs)
        except (RuntimeError, TypeError, KeyError):  # no example of an argument
            continue
        if (overload or "default") == node.target._overloadname:
            node.target = node.target.overloadpacket


def _example(node: fx.Node) -> Any:
    """A value of the type that a node has."""
    return _value(node.meta["val"])


def _value(value: Any) -> Any:
    if isinstance(value, Value):
        return torch.empty(value.sizes(2), dtype=value.dtype, device="meta")
    if isinstance(value, (list, tuple)):
        return [_value(item) for item in value]
    return value if isinstance(value, (bool, int, float)) else 2  # a size
