"""Program -> nn.Module: the user's own class where the structure is unchanged, else a plain GraphModule.

BatchNorm and dropout become modules again, so that the result follows ``train()`` and ``eval()``, survives deepcopy and
pickle and can be exported and compiled. State-dict keys are the FQNs of the user's model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from vfx.complex_numbers import restored, together, with_complex_parameters
from vfx.emit.arguments import with_arguments
from vfx.operators import BATCH_NORMS, DROPOUTS, arguments, operator
from vfx.program import Program, Value, casts, copy_graph, moved
from vfx.rewrite import PRESERVED, outputs_error

_NORM_OF_RANK = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_DROPOUTS = {
    "aten.dropout": nn.Dropout,
    "aten.feature_dropout": nn.Dropout2d,
    "aten.alpha_dropout": nn.AlphaDropout,
    "aten.feature_alpha_dropout": nn.FeatureAlphaDropout,
}
FLOAT32 = 1e-4  # for networks that cast to float32 inside and cannot be compared in float64


def emit(program: Program, edge: int = 0) -> tuple[nn.Module, str]:
    """A module in eval mode that computes one weight set, and why it is not the user's class ("" if it is)."""
    if program.structural or program.module is None:
        reason = "the structure changed" if program.module is not None else "the user's class is not at hand"
        return graph_module(program, edge), reason
    try:
        module = own_class(program, edge)
    except (RuntimeError, TypeError) as error:
        return graph_module(program, edge), f"writing back to {type(program.module).__name__} failed: {error}"
    gap = difference(module, program.select(edge))
    if not gap <= PRESERVED:
        return graph_module(program, edge), f"{type(program.module).__name__} differs from the graph by {gap:.1e}"
    return module, ""


def own_class(program: Program, edge: int = 0) -> nn.Module:
    """A deep copy of the user's model that holds this weight set."""
    assert program.module is not None
    weights = program.weights[edge]
    module = copy.deepcopy(program.module).eval()
    state = {
        name: restored(weights.get(program.aliases.get(name, name), tensor), tensor)
        for name, tensor in module.state_dict().items()
    }
    module.load_state_dict(state, strict=True)
    return module.to(next((t.device for t in weights.values()), torch.device("cpu")))


@torch.no_grad()
def difference(module: nn.Module, program: Program) -> float:
    """Relative output error between a module and a Program: in float64, or in float32 scaled to the same threshold."""
    try:
        exact = copy.deepcopy(module)._apply(lambda tensor: moved(tensor, "cpu", torch.float64))
        gap = _difference(exact, program.to("cpu", torch.float64))
        if gap <= PRESERVED or not casts(program.graph):
            return gap
    except RuntimeError:  # the module casts to float32 inside
        pass
    return _difference(copy.deepcopy(module).to("cpu"), program.to("cpu")) * PRESERVED / FLOAT32


def _difference(module: nn.Module, program: Program) -> float:
    call = program.example_call
    return outputs_error(program.returned(module(*call.args, **call.kwargs)), program(*program.example_inputs))


def graph_module(program: Program, edge: int = 0) -> fx.GraphModule:
    """A GraphModule over the Program's graph; parameters and buffers keep their FQNs."""
    weights = program.weights[edge]
    graph, _ = copy_graph(program.graph)
    root = nn.Module()
    _follow_mode(graph, root, program, weights)
    joined = with_complex_parameters(graph)
    for node in graph.nodes:
        if node.op == "get_attr":
            tensor = weights[str(node.target)]
            _register(root, str(node.target), together(tensor) if node.target in joined else tensor, program)
    graph = with_arguments(graph, root, program.signature)
    for node in graph.nodes:
        node.meta = {}
    name = f"Merged{type(program.module).__name__}" if program.module is not None else "Merged"
    return fx.GraphModule(root, graph, class_name=name).eval()


def _follow_mode(graph: fx.Graph, root: nn.Module, program: Program, weights: Mapping[str, Tensor]) -> None:
    """Operators whose flags were frozen by the capture become modules that know their mode."""
    for index, node in enumerate(list(graph.nodes)):
        name = operator(node)
        if name in BATCH_NORMS and isinstance(node.meta.get("val"), Value):
            _batch_norm(graph, root, node, program, weights)
        elif name in DROPOUTS:
            target = f"{name.removeprefix('aten.')}_{index}"
            root.add_module(target, _DROPOUTS[name](arguments(node)["p"]))
            _replace(graph, node, target, (node.args[0],))


def _batch_norm(graph: fx.Graph, root: nn.Module, node: fx.Node, program: Program, weights: Any) -> None:
    a = arguments(node)
    names = {key: a[key].target if isinstance(a[key], fx.Node) else None for key in _BN_TENSORS}
    prefix = str(names["running_mean"]).removesuffix(".running_mean")
    regular = all(name in (None, f"{prefix}.{key}") for key, name in names.items())
    rank = len(node.meta["val"].shape)
    if not regular or rank not in _NORM_OF_RANK or (names["weight"] is None) != (names["bias"] is None):
        root.add_module(f"{node.name}_mode", FunctionalBatchNorm(a["momentum"], a["eps"]))
        _replace(graph, node, f"{node.name}_mode", (a["input"], *(a[key] for key in _BN_TENSORS)))
        return
    momentum = _momentum(program, prefix, a["momentum"])
    features = weights[names["running_mean"]].shape[0]
    norm = _NORM_OF_RANK[rank](features, a["eps"], momentum, affine=names["weight"] is not None)
    for key, name in names.items():
        if name is not None:
            _assign(norm, key, weights[name])
    counter = weights.get(f"{prefix}.num_batches_tracked")
    if counter is not None and norm.num_batches_tracked is not None:
        norm.num_batches_tracked = counter.clone()
    _add_submodule(root, prefix, norm)
    _replace(graph, node, prefix, (a["input"],))


_BN_TENSORS = ("weight", "bias", "running_mean", "running_var")


class FunctionalBatchNorm(nn.Module):
    """F.batch_norm on tensors that are not one BatchNorm module's own."""

    def __init__(self, momentum: float, eps: float):
        super().__init__()
        self.momentum, self.eps = momentum, eps

    def forward(self, x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, weight, bias, self.training, self.momentum, self.eps)


def _momentum(program: Program, prefix: str, captured: float) -> float | None:
    """The module's own momentum: in eval mode a capture sees 0 for the cumulative average (None)."""
    modules = dict(program.module.named_modules()) if program.module is not None else {}
    path = prefix if prefix in modules else prefix.split(".", 2)[-1]  # a branch's norm: branches.0.<path>
    return getattr(modules.get(path), "momentum", captured)


def _replace(graph: fx.Graph, node: fx.Node, target: str, args: tuple[Any, ...]) -> None:
    with graph.inserting_before(node):
        new = graph.create_node("call_module", target, args)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    for unread in [n for n in graph.nodes if n.op == "get_attr" and not n.users]:
        graph.erase_node(unread)


def _register(root: nn.Module, fqn: str, tensor: Tensor, program: Program) -> None:
    path, _, leaf = fqn.rpartition(".")
    owner = _submodule(root, path)
    if leaf in owner._parameters or leaf in owner._buffers:
        return
    if program.is_parameter(fqn):
        owner.register_parameter(leaf, nn.Parameter(tensor.detach().clone()))
    else:
        owner.register_buffer(leaf, tensor.detach().clone())


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor.detach().clone())
    else:
        module._buffers[name] = tensor.detach().clone()


def _submodule(root: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path, made of empty modules where there is none yet."""
    for part in path.split(".") if path else ():
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root


def _add_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    owner = _submodule(root, parent)
    if leaf not in owner._modules:
        owner.add_module(leaf, module)
